"""The pipeline of a teacher of text to image that is trained here: a folder as diffusers' save_pretrained writes it, from the first moment.

model_index.json, scheduler/
tokenizer/, text_encoder/                   copied from a folder, or of words alone (`WORDS`)
vae/                                        which hands pictures on as they are: stock pipelines want one
transformer/config.json                     its weights when it is trained: then the folder is a pipeline like any other
"""

# diffusers, transformers and tokenizers are optional, and untyped.
# pyright: reportMissingImports=false

import difflib
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.common.reading import read_json
from potstill.engine.common.writing import save_tensors, whole
from potstill.engine.data.embeddings import check_longest, own_length, places_of
from potstill.engine.data.pipelines import tokenizer, transformer
from potstill.engine.formats.pipeline import write_json
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.nets.parts import LOADED, stored_in, stumbling
from potstill.engine.nets.pipelines import AGAIN, SIDES, diffusers, part_of, quietly

INDEX = "model_index.json"
PART = "transformer"
PIPELINES = {"PixArtTransformer2DModel": "PixArtAlphaPipeline"}  # the classes that can be trained here, and what runs them
#: DDPM's and PixArt's table.
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "rescale_betas_zero_snr": False}
PREDICTIONS = ("v_prediction", "epsilon", "flow")
FOLLOWING = {
    "in_channels",
    "out_channels",
    "sample_size",
    "caption_channels",
    "cross_attention_dim",
    "norm_num_groups",
}  # from what is given
WORDS = "words"  # the encoder without weights to be had: a vector a word
WIDTH, LONGEST = 32, 128  # of these vectors; tokens of a prompt
SPECIAL = ("<pad>", "<unk>", "<s>")


def fresh_net(name: str, config: dict[str, Any] | None, prediction: str, shape: tuple[int, ...], width: int) -> DiffusersDenoiser:
    """A denoiser of random weights for samples [C, H, W] and text of so many numbers a token. prediction: one of PREDICTIONS.

    UserError for a class that is none of PIPELINES, or settings that it does not take.
    """
    if name not in PIPELINES:
        raise UserError(f"net.model_type={name} cannot be trained from nothing here: wanted one of {', '.join(PIPELINES)}")
    given = dict(config or {})
    check_config(name, given, "net.config")
    own = {"in_channels": shape[0], "out_channels": shape[0], "sample_size": max(shape[1:]), "caption_channels": width}
    own |= {"cross_attention_dim": inner_width(given), "norm_num_groups": 1}
    table = {"prediction": prediction, "steps": 1000, "betas": LINEAR}
    scheme = {"prediction": "flow", "steps": 1000, "shift": 1.0} if prediction == "flow" else table
    described = {"class": name, "config": own | given, "scheme": scheme, "size": shape[1:], "fixed": {}}
    return DiffusersDenoiser.from_description(described)


def another_net(teacher: DiffusersDenoiser, config: Mapping[str, Any]) -> DiffusersDenoiser:
    """A net of random weights of the teacher's class, with these settings in place of its own."""
    check_config(teacher.name, config, "students.net.config")
    own = teacher.description()
    settings = own["config"] | dict(config)
    if teacher.name in PIPELINES:
        settings["cross_attention_dim"] = inner_width(settings)
    return DiffusersDenoiser.from_description(own | {"config": settings})


def inner_width(config: Mapping[str, Any]) -> Any:
    """Of a transformer's tokens, also of those that say what its prompts do."""
    return config.get("num_attention_heads", 16) * config.get("attention_head_dim", 72)


def check_config(name: str, given: Mapping[str, Any], setting: str) -> None:
    """UserError for a key that follows from what is given, or that this class does not know: diffusers itself would leave it out."""
    if taken := sorted(given.keys() & FOLLOWING if name in PIPELINES else ()):
        raise UserError(f"{setting}.{taken[0]} follows from the data and the text encoder: leave it out")
    known = list(signature(getattr(diffusers(), name).__init__).parameters)[1:]
    if unknown := next((key for key in given if key not in known), None):
        near = difflib.get_close_matches(unknown, known, 1, 0.3)
        raise UserError(f"{setting}.{unknown} is no setting of {name}" + (f"; did you mean {setting}.{near[0]}?" if near else ""))
    for one in ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size"):
        if one in given and not (isinstance(given[one], int) and given[one] >= 1):
            raise UserError(f"{setting}.{one} wants a whole number from 1, got {given[one]!r:.40}")


def check_text_encoder(encoder: str, max_length: int | None) -> None:
    """UserError, Damaged where a text encoder or its tokenizer is not whole, or takes no prompts of so many tokens (None: the pipeline's own
    number). No weight is read.
    """
    length = max_length or max(map(own_length, PIPELINES.values()))
    if encoder == WORDS:
        return check_longest(f"text.encoder={WORDS}", LONGEST, length)
    place, words = _parts_of(encoder)
    _loaded(place, words, device_map="meta")
    check_longest(f"text.encoder={encoder}", places_of(place, words), length)


def width_of(encoder: str) -> int:
    """Numbers that a text encoder makes of a token. UserError, Damaged where there is none at this place."""
    if encoder == WORDS:
        return WIDTH
    place, words = _parts_of(encoder)
    config = read_json(place / "config.json", dict, AGAIN)
    stored_in(place, "transformers")
    if not (words / "tokenizer_config.json").is_file():
        raise UserError(f"{words} has no tokenizer_config.json: wanted the folder of a text encoder with its tokenizer; {AGAIN}")
    config = config.get("text_config") or config
    width = next((config[name] for name in ("hidden_size", "d_model", "n_embd", "dim") if isinstance(config.get(name), int)), 0)
    if width < 1:
        raise UserError(f"{place} does not say how wide its text encoder is (hidden_size): wanted a text encoder of transformers")
    return width


def _parts_of(encoder: str) -> tuple[Path, Path]:
    """The folders of a text encoder and its tokenizer: those of a pipeline, or one folder of both. UserError where they are not there."""
    folder = Path(encoder).expanduser()
    if (folder / INDEX).is_file():
        return part_of(folder, "text_encoder"), part_of(folder, "tokenizer")
    if not (folder / "config.json").is_file():
        raise UserError(f"text.encoder={encoder} has no config.json: wanted {WORDS}, or the folder of a text encoder or pipeline")
    return folder, folder


def write_newborn(folder: Path, net: DiffusersDenoiser, encoder: str, captions: Sequence[str]) -> None:
    """All but the denoiser's weights, model_index.json last. encoder: WORDS, made of the words of the captions; or a folder."""
    if folder.exists():  # what was begun, and is not whole
        shutil.rmtree(folder)
    words, text_encoder = _of_words(captions) if encoder == WORDS else _loaded(*_parts_of(encoder))
    library, prediction = diffusers(), net.scheme["prediction"]
    flow = library.FlowMatchEulerDiscreteScheduler
    scheduler = flow(shift=1.0) if net.flow else library.DPMSolverMultistepScheduler(**LINEAR, prediction_type=prediction)
    model, vae = cast(Any, net.model), passing(net.shape[0])
    with quietly():
        for name, one in (("tokenizer", words), ("text_encoder", text_encoder), ("scheduler", scheduler), ("vae", vae)):
            one.save_pretrained(folder / name)
        model.save_config(folder / PART)
    config = read_json(folder / PART / "config.json", dict, AGAIN) | {SIDES: list(net.shape[1:])}
    write_json(folder / PART / "config.json", config)
    index: dict[str, Any] = {"_class_name": PIPELINES[net.name], "_diffusers_version": library.__version__}
    index |= {"tokenizer": ["transformers", type(words).__name__], "text_encoder": ["transformers", type(text_encoder).__name__]}
    index |= {name: ["diffusers", type(one).__name__] for name, one in (("scheduler", scheduler), ("vae", vae), (PART, net.model))}
    with whole(folder / INDEX) as part:
        write_json(part, index)


def passing(channels: int) -> Any:
    """A VAE whose latents are the pictures themselves, [N, C, H, W] in [-1, 1], up to rounding: `data.pipelines.decodes` knows it.

    An AutoencoderTiny of two convolutions with a ReLU between, which x and -x pass. Its decoder begins with 3 tanh(x / 3), which is x where
    x is small: hence the scale.
    """
    wide, scale = 2 * channels, 256.0
    vae = diffusers().AutoencoderTiny(
        in_channels=channels, out_channels=channels, latent_channels=channels, encoder_block_out_channels=(wide,), scaling_factor=scale,
        decoder_block_out_channels=(wide,), num_encoder_blocks=(0,), num_decoder_blocks=(0,),
    )  # fmt: skip
    convolutions = [m for half in (vae.encoder, vae.decoder) for m in half.modules() if isinstance(m, torch.nn.Conv2d)]
    eye = torch.eye(channels)
    ways = torch.cat([eye, -eye])  # [2C, C]
    matrices = (torch.cat([eye, 0 * eye]), torch.cat([2 * eye, 0 * eye], 1) / scale, ways, scale / 2 * ways.T)
    offsets = (0.0, -1 / scale, 0.0, 0.5)  # the encoder is shown (x + 1) / 2, and the decoder's answer is 2 x - 1
    with torch.no_grad():
        for conv, matrix, offset in zip(convolutions, matrices, offsets, strict=True):
            conv.weight.zero_()[:, :, 1, 1] = matrix
            if conv.bias is not None:
                conv.bias.fill_(offset)
    return vae


def write_trained(folder: Path, net: DiffusersDenoiser, *, again: bool = True) -> None:
    """The weights of its denoiser, which are trained by now; again: also where there are some."""
    file = folder / PART / min(LOADED["diffusers"], key=len)
    if file.exists() and not again:
        return
    model: Any = net.model
    tensors: dict[str, Tensor] = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    with whole(file) as part:
        save_tensors(tensors, part, {"format": "pt"})


def _loaded(encoder: Path, words: Path, **how: Any) -> tuple[Any, Any]:
    """Tokenizer and text encoder, of a class of transformers' own. UserError, Damaged where one is not whole."""
    import transformers

    with quietly(), stumbling(encoder, "a text encoder"):
        config = transformers.AutoConfig.from_pretrained(encoder, local_files_only=True)
        kind = type(transformers.AutoTokenizer.from_pretrained(words, local_files_only=True)).__name__
    kinds = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel"}
    name = kinds.get(config.model_type.removesuffix("_text_model"), "AutoModel")
    found = tokenizer(words, kind)
    if found.pad_token is None:
        raise UserError(
            f"the tokenizer in {words} has no token for padding: set its pad_token and save it again, or take another text encoder"
        )
    return found, transformer(encoder, name, unread="pooler.", dtype=torch.float32, **how)


def _of_words(captions: Sequence[str]) -> tuple[Any, Any]:
    """A tokenizer of these words alone, and a CLIPTextModel without a layer: LayerNorm(vector of the word + vector of its place).

    A vector is standard normals seeded by its name, the same in every set of words. Nothing is trained or downloaded.
    """
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    found = sorted({word for text in set(captions) for word in re.findall(r"\w+|[^\w\s]+", text.lower())})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(word for word in found if word not in SPECIAL)])}
    pad, unknown, begin = SPECIAL
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, unk_token=unknown, bos_token=begin, model_max_length=LONGEST
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=0, num_attention_heads=1,
        max_position_embeddings=LONGEST, bos_token_id=vocabulary[begin], eos_token_id=vocabulary[unknown], pad_token_id=vocabulary[pad],
    )  # fmt: skip
    net = transformers.CLIPTextModel(config)
    vectors = {"token_embedding": list(vocabulary), "position_embedding": [f"place {i}" for i in range(LONGEST)]}
    with torch.no_grad():
        for end, names in vectors.items():
            weight = next(p for name, p in net.named_parameters() if name.endswith(f"{end}.weight"))
            weight.copy_(torch.from_numpy(np.stack([_vector(name) for name in names])))
    return tokenizer, net.eval()


def _vector(name: str) -> np.ndarray:
    return np.random.Generator(np.random.Philox(zlib.crc32(name.encode()))).standard_normal(WIDTH, np.float32)
