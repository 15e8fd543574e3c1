"""Families of diffusers' denoisers, the only table of their class names: what each takes, how it is called and how it is built up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.tables import flux2_mu
from potstill.engine.nets import calls, encoders
from potstill.engine.nets.conditions import Text


@dataclass(frozen=True)
class Family:
    """One class of diffusers."""

    call: calls.Call
    blocks: tuple[str, ...]  # classes of the modules that repeat
    stacks: Mapping[str, bool] = field(default_factory=dict)  # lists of blocks in order: do they return (text, image)? Of a U-Net none
    entered: int = 0  # first blocks whose parts the model itself calls: they are not wrapped
    widths: Mapping[str, str] = field(default_factory=dict)  # a text's tensor -> the setting that says its last size; {}: no prompts
    embed: encoders.Embed | None = None  # by the pipeline's own encode_prompt
    classes: str = ""  # the setting that says their number
    null_class: bool = False  # is there one more class, for none?
    patch: int | str = "patch_size"  # of latents to a token, or the setting that says so
    packed: int = 1  # latents to a token of the model's own, which are packed outside of it
    size: tuple[int, ...] | None = None  # of latents, where no setting says it: as of its pipeline
    fixed: Mapping[str, float] = field(default_factory=dict)  # its pipeline's defaults of what is fixed
    rounds_time: Literal["never", "16 bit", "16-bit weights"] = "never"  # when does it round t to the precision of its activations?
    images: Literal["last", "first", "after text"] = "last"  # where a block's tokens of the image are
    mu: Callable[[int, int], float] | None = None  # of a dynamic shift, at (tokens, steps), where its pipeline has a rule of its own
    refused: tuple[str, ...] = ()  # settings that ask for inputs which nothing here gives
    waits: str = ""  # why a call of it waits for the device, so that no CUDA graph can hold it

    @property
    def text(self) -> bool:
        """Is it told prompts?"""
        return bool(self.widths)

    def encode(self, pipe: Any, prompts: list[str]) -> Text:
        """The prompts as the pipeline `pipe` embeds them, on its device."""
        assert self.embed is not None
        return self.embed(pipe, list(prompts), False)[0]

    def encode_null(self, pipe: Any) -> Text | None:
        """The one row that guidance leads away from, as the pipeline makes it; None: the net has none, such as Flux's."""
        assert self.embed is not None
        return self.embed(pipe, [""], True)[1]

    def patches(self, config: calls.Config) -> tuple[int, ...]:
        """Latents to a token, along each side."""
        patch = config[self.patch] if isinstance(self.patch, str) else self.patch
        return tuple(patch) if isinstance(patch, list | tuple) else (patch, patch)

    def channels(self, config: calls.Config) -> int:
        """Of a transformer's tokens."""
        wide = config.get("hidden_size") or config.get("dim")
        return wide or config["num_attention_heads"] * config["attention_head_dim"]

    def shape(self, name: str, config: calls.Config, size: tuple[int, ...] | None) -> tuple[int, ...]:
        """Of one sample of a net with these settings. UserError for a net of other inputs than a noisy sample, or a size that cannot be."""
        channels, out = config["in_channels"], config.get("out_channels") or config["in_channels"]
        if self.packed > 1:
            out *= config["patch_size"] ** 2
        asked = [setting for setting in self.refused if config.get(setting)]
        asked += ["addition_embed_type"] if config.get("addition_embed_type") not in (None, "text_time") else []
        if asked or out not in (channels, 2 * channels):
            why = f"its settings {', '.join(asked)}" if asked else f"{channels} channels in and {out} out"
            raise UserError(f"this {name} wants more than a noisy sample and its condition ({why}): wanted one of text to image")
        sides: Any = size or self.size or config.get("sample_size")
        if sides is None:
            raise UserError(f"the settings of this {name} do not say the size of its samples: give one")
        sides, patches = tuple(sides) if isinstance(sides, list | tuple) else (sides, sides), self.patches(config)
        if len(sides) != len(patches) or any(side < 1 or side % patch for side, patch in zip(sides, patches, strict=True)):
            raise UserError(
                f"{name} takes samples whose {len(patches)} sides are multiples of {list(patches)}, got {list(sides)}: choose other sizes "
                "(teacher.size, or the data's)"
            )
        return channels // self.packed, *sides

    def check(self, name: str, config: calls.Config, text: Text) -> None:
        """UserError for prompts of another encoder."""
        for part, setting in self.widths.items():
            wanted, given = config[setting], getattr(text, part)
            if setting == "projection_class_embeddings_input_dim":  # SDXL: beside the embeddings of six numbers
                wanted = (wanted or 0) - 6 * (config["addition_time_embed_dim"] or 0)
            if isinstance(wanted, int) and wanted and (given is None or given.shape[-1] != wanted):
                got = "none" if given is None else given.shape[-1]
                raise UserError(f"{name} takes {part} of {wanted} numbers of a prompt, got {got}: encode the prompts with its own pipeline")


def family_of(name: str) -> Family:
    """The family of a class. UserError for an unknown one."""
    if name not in FAMILIES:
        raise UserError(f"{name} is no denoiser that potstill knows how to call: wanted one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


UNET_INPUTS = ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "num_class_embeds")
TRANSFORMER = {"transformer_blocks": False}
PAIRS = {"transformer_blocks": True}
FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family(calls.unet, ("ResnetBlock2D", "Attention"), classes="num_class_embeds", patch=1, refused=("class_embed_type",)),
    "UNet2DConditionModel": Family(
        calls.unet_condition,
        ("BasicTransformerBlock", "ResnetBlock2D"),
        widths={"embeds": "cross_attention_dim", "pooled": "projection_class_embeddings_input_dim"},
        embed=encoders.stable_diffusion,
        patch=1,
        refused=UNET_INPUTS,
    ),
    "DiTTransformer2DModel": Family(
        calls.dit, ("BasicTransformerBlock",), TRANSFORMER, entered=1, classes="num_embeds_ada_norm", null_class=True
    ),
    "PixArtTransformer2DModel": Family(
        calls.pixart, ("BasicTransformerBlock",), TRANSFORMER, widths={"embeds": "caption_channels"}, embed=encoders.masked
    ),
    "SD3Transformer2DModel": Family(
        calls.sd3,
        ("JointTransformerBlock",),
        PAIRS,
        widths={"embeds": "joint_attention_dim", "pooled": "pooled_projection_dim"},
        embed=encoders.stable_diffusion_3,
    ),
    "FluxTransformer2DModel": Family(
        calls.flux,
        ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        {"transformer_blocks": True, "single_transformer_blocks": True},
        widths={"embeds": "joint_attention_dim", "pooled": "pooled_projection_dim"},
        embed=encoders.flux,
        patch=2,
        packed=4,
        size=(128, 128),
        fixed={"guidance": 3.5},
        rounds_time="16 bit",
    ),
    "SanaTransformer2DModel": Family(
        calls.sana,
        ("SanaTransformerBlock",),
        TRANSFORMER,
        widths={"embeds": "caption_channels"},
        embed=encoders.masked,
        refused=("guidance_embeds",),
    ),
    "QwenImageTransformer2DModel": Family(
        calls.qwen,
        ("QwenImageTransformerBlock",),
        PAIRS,
        widths={"embeds": "joint_attention_dim"},
        embed=encoders.qwen_image,
        patch=2,
        packed=4,
        size=(128, 128),
        rounds_time="16 bit",
        waits="its forward copies the prompts' number of tokens to the device",
        refused=("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"),
    ),
    "Flux2Transformer2DModel": Family(
        calls.flux2,
        ("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
        {"transformer_blocks": True, "single_transformer_blocks": False},
        widths={"embeds": "joint_attention_dim"},
        embed=encoders.flux2,
        patch=1,
        size=(64, 64),
        fixed={"guidance": 4.0},
        rounds_time="16-bit weights",
        mu=flux2_mu,
    ),
    "ZImageTransformer2DModel": Family(
        calls.z_image,
        ("ZImageTransformerBlock",),
        {"layers": False},
        widths={"embeds": "cap_feat_dim"},
        embed=encoders.z_image,
        patch=2,
        size=(128, 128),
        images="first",
        refused=("siglip_feat_dim",),
        waits="it takes prompts without padding, whose lengths are read from the device",
    ),
    "Lumina2Transformer2DModel": Family(
        calls.lumina2,
        ("Lumina2TransformerBlock",),
        {"layers": False},
        widths={"embeds": "cap_feat_dim"},
        embed=encoders.masked,
        images="after text",
        waits="its forward reads the prompts' lengths from the device",
    ),
    "WanTransformer3DModel": Family(
        calls.wan,
        ("WanTransformerBlock",),
        {"blocks": False},
        widths={"embeds": "text_dim"},
        embed=encoders.wan,
        size=(21, 60, 104),
        refused=("image_dim", "added_kv_proj_dim"),
    ),
}
