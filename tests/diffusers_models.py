"""Tiny random models of every family that potstill knows, by diffusers' own classes, with a scheduler's config and conditions for each.

Use it behind `pytest.importorskip("diffusers")`. All have 8×8 latents, few parameters (`model`: the same for the same seed) and
no zero weight; `folder` writes one as a pipeline's folder without text encoders and VAE.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from potstill.engine.nets.conditions import Text

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD |= {"steps_offset": 1}
LINEAR = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
STATIC = {"num_train_timesteps": 1000, "shift": 3.0}
DYNAMIC = {"num_train_timesteps": 1000, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


class Tiny(NamedTuple):
    """How one is made."""

    name: str  # of the class
    config: dict[str, Any]
    pipeline: str  # the class that model_index.json names
    scheduler: tuple[str, dict[str, Any]]  # class, config
    shape: tuple[int, ...] = (4, 8, 8)
    classes: int = 0
    text: tuple[int, int] | None = None  # tokens, width
    masked: bool = False
    pooled: int = 0  # width
    time_ids: bool = False


UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
PIXELS = UNET | {"in_channels": 3, "out_channels": 3, "down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
PIXELS |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
CROSS = UNET | {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 12, "attention_head_dim": 2}
CROSS |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
XL = CROSS | {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 34}
XL |= {"use_linear_projection": True, "transformer_layers_per_block": 2}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}

TINY = {
    "unet": Tiny("UNet2DModel", PIXELS, "DDPMPipeline", ("DDPMScheduler", LINEAR), (3, 8, 8)),
    "unet_classes": Tiny("UNet2DModel", PIXELS | {"num_class_embeds": 4}, "DDPMPipeline", ("DDPMScheduler", LINEAR), (3, 8, 8), 4),
    "sd15": Tiny(
        "UNet2DConditionModel",
        CROSS,
        "StableDiffusionPipeline",
        ("PNDMScheduler", SD | {"skip_prk_steps": True, "set_alpha_to_one": False}),
        text=(7, 12),
    ),
    "sd21": Tiny(
        "UNet2DConditionModel",
        CROSS | {"use_linear_projection": True},
        "StableDiffusionPipeline",
        ("DDIMScheduler", SD | {"prediction_type": "v_prediction", "clip_sample": False}),
        text=(7, 12),
    ),
    "sdxl": Tiny(
        "UNet2DConditionModel",
        XL,
        "StableDiffusionXLPipeline",
        ("EulerDiscreteScheduler", SD),
        text=(7, 12),
        pooled=10,
        time_ids=True,
    ),
    "dit": Tiny(
        "DiTTransformer2DModel",
        HEADS | {"in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 4},
        "DiTPipeline",
        ("DDIMScheduler", LINEAR | {"clip_sample": False}),
        classes=4,
    ),
    "pixart": Tiny(
        "PixArtTransformer2DModel",
        HEADS | {"num_layers": 2, "cross_attention_dim": 16, "sample_size": 8, "caption_channels": 12, "use_additional_conditions": False},
        "PixArtAlphaPipeline",
        ("DPMSolverMultistepScheduler", LINEAR),
        text=(7, 12),
        masked=True,
    ),
    "pixart_1024": Tiny(
        "PixArtTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": 24, "sample_size": 8}
        | {"caption_channels": 12, "use_additional_conditions": True},
        "PixArtAlphaPipeline",
        ("DPMSolverMultistepScheduler", LINEAR),
        text=(7, 12),
        masked=True,
    ),
    "sd3": Tiny(
        "SD3Transformer2DModel",
        HEADS
        | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 12, "caption_projection_dim": 16}
        | {"pooled_projection_dim": 10, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        "StableDiffusion3Pipeline",
        ("FlowMatchEulerDiscreteScheduler", STATIC),
        text=(7, 12),
        pooled=10,
    ),
    "flux": Tiny(
        "FluxTransformer2DModel",
        HEADS
        | {"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10}
        | {"guidance_embeds": True, "axes_dims_rope": (2, 2, 4)},
        "FluxPipeline",
        ("FlowMatchEulerDiscreteScheduler", DYNAMIC | {"shift": 3.0}),
        text=(7, 12),
        pooled=10,
    ),
    "sana": Tiny(
        "SanaTransformer2DModel",
        HEADS
        | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
        | {"cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8, "timestep_scale": 0.5},
        "SanaPipeline",
        ("FlowMatchEulerDiscreteScheduler", STATIC),
        text=(7, 12),
        masked=True,
    ),
    "qwen": Tiny(
        "QwenImageTransformer2DModel",
        HEADS | {"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4)},
        "QwenImagePipeline",
        ("FlowMatchEulerDiscreteScheduler", DYNAMIC | {"max_shift": 0.9, "shift_terminal": 0.02, "max_image_seq_len": 8192}),
        text=(7, 12),
        masked=True,
    ),
    "flux2": Tiny(
        "Flux2Transformer2DModel",
        HEADS
        | {"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 12, "timestep_guidance_channels": 16}
        | {"axes_dims_rope": (2, 2, 2, 2)},
        "Flux2Pipeline",
        ("FlowMatchEulerDiscreteScheduler", DYNAMIC),
        (16, 8, 8),
        text=(7, 12),
    ),
    "zimage": Tiny(
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 12}
        | {"axes_dims": [4, 2, 2], "axes_lens": [128, 16, 16]},
        "ZImagePipeline",
        ("FlowMatchEulerDiscreteScheduler", STATIC),
        text=(7, 12),
        masked=True,
    ),
    "lumina2": Tiny(
        "Lumina2Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2}
        | {"num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (4, 4, 4), "axes_lens": (64, 16, 16), "cap_feat_dim": 12},
        "Lumina2Pipeline",
        ("FlowMatchEulerDiscreteScheduler", STATIC | {"shift": 6.0}),
        text=(7, 12),
        masked=True,
    ),
    "wan": Tiny(
        "WanTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 16}
        | {"ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32},
        "WanPipeline",
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
        (4, 2, 8, 8),
        text=(7, 12),
    ),
}
TEXTS = [name for name, tiny in TINY.items() if tiny.text]


def model(name: str, seed: int = 0) -> nn.Module:
    """The diffusers model, in eval mode; weights that start as zeros are drawn, too."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = getattr(diffusers, TINY[name].name)(**TINY[name].config)
        for p in net.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.02)
    return net.eval()


def scheduler(name: str) -> Any:
    """The diffusers scheduler."""
    import diffusers

    kind, config = TINY[name].scheduler
    return getattr(diffusers, kind)(**config)


def condition(name: str, n: int, seed: int = 0) -> Text | Tensor | None:
    """n random prompts or one-hot classes, as `DiffusersDenoiser` takes them; None for a net of neither."""
    tiny, draws = TINY[name], torch.Generator().manual_seed(seed)
    if tiny.classes:
        return torch.nn.functional.one_hot(torch.randint(tiny.classes, (n,), generator=draws), tiny.classes).float()
    return text(name, n, draws) if tiny.text else None


def text(name: str, n: int, draws: torch.Generator) -> Text:
    tiny = TINY[name]
    assert tiny.text is not None
    tokens, width = tiny.text
    embeds = torch.randn(n, tokens, width, generator=draws)
    lengths = torch.randint(2, tokens + 1, (n, 1), generator=draws)
    mask = torch.arange(tokens) < lengths if tiny.masked else None
    pooled = torch.randn(n, tiny.pooled, generator=draws) if tiny.pooled else None
    ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(n, 1)
    return Text(embeds, mask, pooled, {"time_ids": ids} if tiny.time_ids else {})


def null(name: str, seed: int = 99) -> Text | None:
    """The null prompt: one random row, or zeros as SDXL's; None for nets without prompts."""
    if not TINY[name].text:
        return None
    row = text(name, 1, torch.Generator().manual_seed(seed))
    return Text(row.embeds * 0, None, row.pooled * 0, row.extra) if row.pooled is not None and TINY[name].time_ids else row


def folder(name: str, path: Path, seed: int = 0, **changes: Any) -> Path:
    """A pipeline's folder with the model and its scheduler only. changes: of the scheduler's config."""
    tiny, net = TINY[name], model(name, seed)
    part = "unet" if tiny.name.startswith("UNet") else "transformer"
    net.save_pretrained(path / part)  # pyright: ignore[reportCallIssue]
    made = scheduler(name)
    made.register_to_config(**changes)
    made.save_pretrained(path / "scheduler")
    parts = {part: ["diffusers", tiny.name], "scheduler": ["diffusers", tiny.scheduler[0]]}
    (path / "model_index.json").write_text(json.dumps({"_class_name": tiny.pipeline, "_diffusers_version": "0.42.1"} | parts))
    return path
