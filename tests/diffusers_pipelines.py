"""Whole tiny pipelines of diffusers, made without a download: tokenizers of single letters, random encoders and VAEs, and the
denoisers of `diffusers_models`, which fit them.

Use it behind `pytest.importorskip("diffusers")`. `folder(kind, path)` writes one as `DiffusionPipeline.from_pretrained` reads it.
A picture's sides are 8 times those of its latents, as VAEs have it (Sana's 4 times, FLUX.2's 2 times). The kinds are those of
`diffusers_models`, but for UNet2DModel with classes, for which DDPMPipeline has no argument. The fixtures `folders` and `pipelines`
(conftest.py) make them when they are asked for; `write_recipe` is what runs on them are begun with.
"""

import json
from pathlib import Path
from typing import Any

import diffusers_models
import torch
from torch import nn

PIPELINES = tuple(kind for kind in diffusers_models.TINY if kind != "unet_classes")
TOKENS = 16  # of CLIP's prompts
WORDS = ["a cat", "a dog", "seven birds on a wire", "rain", "an old stone bridge", "snow", "a red bicycle"]
WIDTH, POOLED = 12, 10  # of what the denoisers read
# Of the denoisers' configs: PixArtAlphaPipeline tells the resolution to nets of this sample_size only, and Lumina2Pipeline's prompts
# have 256 tokens.
CHANGES = {"pixart_1024": {"sample_size": 128}, "lumina2": {"axes_lens": (300, 16, 16)}}


def folder(kind: str, path: Path, seed: int = 0, **changes: Any) -> Path:
    """A pipeline's folder. changes: of its scheduler's config."""
    pipeline(kind, seed, **changes).save_pretrained(path, safe_serialization=True)
    return path


def scaled(path: Path, factor: float) -> Path:
    """The folder with another scaling of its latents: what a random VAE makes varies as a trained one's does."""
    config = path / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": factor}))
    return path


def write_recipe(folder: Path, method: str = "steps: [999], fake_per_student: 2", train: str = "kimg: 0.008") -> Path:
    """A recipe of a few iterations with two samples each, by DMD on latents of 8 x 8, and prompts, more than a batch."""
    (folder / "prompts.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tiny.yaml").write_text(
        "defaults: [schema, {method: dmd}, _self_]\ndata: {path: null}\nteacher: {size: [8, 8], loss: {sampling_steps: 2}}\n"
        f"method: {{{method}}}\ntrain: {{batch: 2, {train}}}\n"
    )
    return folder / "tiny.yaml"


def pipeline(kind: str, seed: int = 0, **changes: Any) -> Any:
    """The pipeline. kind: one of PIPELINES."""
    import diffusers

    tiny = diffusers_models.TINY[kind]
    net, scheduler = diffusers_models.model(kind, seed), diffusers_models.scheduler(kind)
    scheduler = type(scheduler).from_config(scheduler.config, **changes)
    if kind in CHANGES:
        weights, net = net.state_dict(), type(net).from_config(net.config | CHANGES[kind]).eval()
        net.load_state_dict(weights)
    part = "unet" if tiny.name.startswith("UNet") else "transformer"
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        others = PARTS[tiny.pipeline](kind)
    for module in others.values():
        if isinstance(module, nn.Module):
            module.eval()
    return getattr(diffusers, tiny.pipeline)(**{part: net, "scheduler": scheduler} | others)


# Tokenizers: every byte is a word


def letters() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def numbered(*words: str) -> dict[str, int]:
    return {word: i for i, word in enumerate(words)}


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    vocab = numbered(*letters(), *(letter + "</w>" for letter in letters()), "<|startoftext|>", "<|endoftext|>")
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    words = ["▁", *(chr(i) for i in range(33, 127))]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=special + [(word, -2.0) for word in words], extra_ids=0, model_max_length=TOKENS)


def gemma_tokenizer() -> Any:
    from transformers import GemmaTokenizer

    vocab = numbered("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(chr(i) for i in range(33, 127)))
    return GemmaTokenizer(vocab=vocab, merges=[])


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    made = Qwen2Tokenizer(vocab=numbered(*letters(), "<|endoftext|>"), merges=[])
    made.chat_template = "{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}{% endfor %}"
    return made


# Text encoders


def clip(width: int, projected: int = 0) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=TOKENS, projection_dim=projected or width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5(kind: str = "T5") -> Any:
    import transformers

    sizes = {"vocab_size": 98, "d_model": WIDTH, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return getattr(transformers, kind + "EncoderModel")(getattr(transformers, kind + "Config")(**sizes))


def decoder(kind: str, tokenizer: Any, width: int = WIDTH, layers: int = 2) -> Any:
    """A language model that is read as an encoder."""
    import transformers

    config = getattr(transformers, kind + "Config")(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return getattr(transformers, kind + "Model")(config)


def qwen_vl(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
    text |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": WIDTH, "fullatt_block_indexes": [0]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


# VAEs


def vae(**more: Any) -> Any:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": (4,) * 4}
    return AutoencoderKL(norm_num_groups=2, latent_channels=4, layers_per_block=1, **blocks, **more)


def sana_vae() -> Any:
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()), scaling_factor=0.41407,
    )  # fmt: skip


def video_vae(name: str) -> Any:
    import diffusers

    more = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 2.0, 0.5, 1.0]}
    return getattr(diffusers, name)(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True], **more
    )


# Everything but denoiser and scheduler, by the pipeline's class


def stable_diffusion(kind: str) -> dict[str, Any]:
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {"tokenizer": clip_tokenizer(), "text_encoder": clip(WIDTH), "vae": vae(scaling_factor=0.18215)} | none


def stable_diffusion_xl(kind: str) -> dict[str, Any]:
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer()}
    return tokenizers | {"text_encoder": clip(5), "text_encoder_2": clip(7, POOLED), "vae": vae(scaling_factor=0.13025)}


def stable_diffusion_3(kind: str) -> dict[str, Any]:
    first = {"tokenizer": clip_tokenizer(), "text_encoder": clip(5, 4)}
    second = {"tokenizer_2": clip_tokenizer(), "text_encoder_2": clip(6, POOLED - 4)}
    third = {"tokenizer_3": t5_tokenizer(), "text_encoder_3": t5()}
    return first | second | third | {"vae": vae(scaling_factor=1.5305, shift_factor=0.0609)}


def flux(kind: str) -> dict[str, Any]:
    first, second = {"tokenizer": clip_tokenizer(), "text_encoder": clip(POOLED)}, {"tokenizer_2": t5_tokenizer(), "text_encoder_2": t5()}
    return first | second | {"vae": vae(scaling_factor=0.3611, shift_factor=0.1159)}


def pixart(kind: str) -> dict[str, Any]:
    return {"tokenizer": t5_tokenizer(), "text_encoder": t5(), "vae": vae(scaling_factor=0.18215)}


def sana(kind: str) -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": decoder("Gemma2", tokenizer), "vae": sana_vae()}


def lumina2(kind: str) -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": decoder("Gemma2", tokenizer), "vae": vae(scaling_factor=0.3611, shift_factor=0.1159)}


def z_image(kind: str) -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": decoder("Qwen3", tokenizer), "vae": vae(scaling_factor=0.3611, shift_factor=0.1159)}


def qwen_image(kind: str) -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": qwen_vl(tokenizer), "vae": video_vae("AutoencoderKLQwenImage")}


def flux2(kind: str) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2

    tokenizer = qwen_tokenizer()
    encoder = decoder("Qwen3", tokenizer, width=WIDTH // 3, layers=30)  # the pipeline reads the 10th, 20th and 30th
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",), "block_out_channels": (8,)}
    made = AutoencoderKLFlux2(norm_num_groups=4, latent_channels=4, layers_per_block=1, **blocks)
    return {"tokenizer": tokenizer, "text_encoder": encoder, "vae": made}


def wan(kind: str) -> dict[str, Any]:
    return {"tokenizer": t5_tokenizer(), "text_encoder": t5("UMT5"), "vae": video_vae("AutoencoderKLWan")}


PARTS = {
    "DDPMPipeline": lambda kind: {}, "DiTPipeline": lambda kind: {"vae": vae(scaling_factor=0.18215)},
    "StableDiffusionPipeline": stable_diffusion, "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3, "FluxPipeline": flux, "PixArtAlphaPipeline": pixart, "SanaPipeline": sana,
    "Lumina2Pipeline": lumina2, "ZImagePipeline": z_image, "QwenImagePipeline": qwen_image, "WanPipeline": wan,
    "Flux2Pipeline": flux2,
}  # fmt: skip
