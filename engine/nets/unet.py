"""EDM's U-Nets (2206.00364): DDPM++ and NCSN++ of Song et al. (2011.13456), and ADM of Dhariwal and Nichol (2105.05233).

Each embeds the noise level, encodes and decodes, is called F(x, c_noise, labels, augment_labels), and can stop after its
encoder (`levels`), which is where GAN heads listen. Keyword arguments and state_dict keys are EDM's.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.engine.nets import ops
from potstill.engine.nets.layers import (
    BlockStyle,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    ResidualBlock,
    UNetBlock,
)
from potstill.engine.nets.modulation import Modulation, modulation


def resolutions_of(img_resolution: int, levels: int) -> list[int]:
    """The side of the images at each level of a U-Net. ValueError where a level cannot be half of the one before: the decoder
    doubles, so 7 halved to 4 would come back as 8."""
    if not levels:
        raise ValueError("channel_mult wants at least one level, got none")
    if img_resolution % 2 ** (levels - 1):
        fitting = -(-img_resolution // 2 ** (levels - 1)) * 2 ** (levels - 1)
        fewer = next(n for n in range(levels, 0, -1) if img_resolution % 2 ** (n - 1) == 0)
        raise ValueError(
            f"{img_resolution}x{img_resolution} images cannot be halved {levels - 1} times, as {levels} levels (channel_mult) want: use images of "
            f"{fitting}x{fitting} (potstill convert images --resolution {fitting}), or {fewer} level{'s' * (fewer > 1)}"
        )
    return [img_resolution >> level for level in range(levels)]


def channels_of(layer: nn.Module) -> int:
    """Channels of what a layer of an encoder returns."""
    channels = layer.out_channels
    assert isinstance(channels, int)
    return channels


def last_of_each(maps: Sequence[Tensor]) -> list[Tensor]:
    """Of the encoder's outputs [N, C, H, W] the last of every resolution."""
    return list({one.shape[-1]: one for one in maps}.values())


class UNet(nn.Module):
    """What all have in common: `enc` and `dec`, dictionaries of layers keyed "{H}x{W}_{name}"."""

    enc: nn.ModuleDict
    dec: nn.ModuleDict
    map_noise: PositionalEmbedding | FourierEmbedding
    map_augment: Linear | None
    map_layer0: Linear

    def __init__(self, label_dim: int, label_dropout: float):
        super().__init__()
        self.label_dim, self.label_dropout = label_dim, label_dropout
        self.map_steps: nn.Module | None = None  # engine.nets.steps
        self.out_norm: GroupNorm | None = None  # of ADM
        self.out_conv: Conv2d | None = None

    def build_levels(
        self, style: BlockStyle, img_resolution: int, in_channels: int, out_channels: int, model_channels: int,
        channel_mult: Sequence[int], num_blocks: int, attn_resolutions: Sequence[int],
        encoder_type: str = "standard", decoder_type: str | None = None,
    ) -> None:  # fmt: skip
        """Fill `enc` and `dec`. decoder_type: None for ADM, which attends in more blocks and whose output layers follow the decoder."""
        resolutions = resolutions_of(img_resolution, len(channel_mult))
        widths = [model_channels * mult for mult in channel_mult]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        cout, caux = widths[0] if decoder_type is None else model_channels, in_channels
        for level, (res, width) in enumerate(zip(resolutions, widths, strict=True)):
            key = f"{res}x{res}"
            if level == 0:
                self.enc[f"{key}_conv"] = Conv2d(in_channels, cout, 3, init=style.init)
            else:
                self.enc[f"{key}_down"] = UNetBlock(cout, cout, style, down=True)
                if encoder_type == "skip":
                    self.enc[f"{key}_aux_down"] = Conv2d(caux, caux, 0, down=True, resample_filter=style.resample_filter)
                    self.enc[f"{key}_aux_skip"] = Conv2d(caux, cout, 1, init=style.init)
                if encoder_type == "residual":
                    self.enc[f"{key}_aux_residual"] = Conv2d(
                        caux, cout, 3, down=True, resample_filter=style.resample_filter, fused_resample=True, init=style.init
                    )
                    caux = cout
            for index in range(num_blocks):
                cin, cout = cout, width
                self.enc[f"{key}_block{index}"] = UNetBlock(cin, cout, style, attention=res in attn_resolutions)
        skips = [channels_of(layer) for name, layer in self.enc.items() if "aux" not in name]

        for level, (res, width) in reversed(list(enumerate(zip(resolutions, widths, strict=True)))):
            key = f"{res}x{res}"
            if coarsest := level == len(widths) - 1:
                self.dec[f"{key}_in0"] = UNetBlock(cout, cout, style, attention=True)
                self.dec[f"{key}_in1"] = UNetBlock(cout, cout, style)
            else:
                self.dec[f"{key}_up"] = UNetBlock(cout, cout, style, up=True)
            for index in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), width
                attention = res in attn_resolutions and (decoder_type is None or index == num_blocks)
                self.dec[f"{key}_block{index}"] = UNetBlock(cin, cout, style, attention=attention)
            if decoder_type == "skip" or (decoder_type == "standard" and level == 0):
                if decoder_type == "skip" and not coarsest:
                    self.dec[f"{key}_aux_up"] = Conv2d(out_channels, out_channels, 0, up=True, resample_filter=style.resample_filter)
                self.dec[f"{key}_aux_norm"] = GroupNorm(cout, eps=style.eps)
                self.dec[f"{key}_aux_conv"] = Conv2d(cout, out_channels, 3, init=style.init_zero)
        parts: dict[str, nn.ModuleDict] = {"enc": self.enc, "dec": self.dec}
        self.blocks = {
            part: [b for b in layers.values() if isinstance(b, ResidualBlock)] for part, layers in parts.items()
        }  # wrapped or not
        if decoder_type is None:
            self.out_norm = GroupNorm(cout, eps=style.eps)
            self.out_conv = Conv2d(cout, out_channels, 3, init=style.init_zero)

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """The conditioning vector [N, emb] of noise level, class and augmentation, in float32."""
        raise NotImplementedError(type(self).__name__)

    def encode(self, x: Tensor, emb: Tensor | Modulation) -> list[Tensor]:
        """The encoder's outputs that the decoder reads, first to last."""
        skips, aux = [], x
        for name, block in self.enc.items():
            if "aux_down" in name:
                aux = block(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + block(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + block(aux)) / math.sqrt(2)
            else:
                x = block(x, emb) if isinstance(block, ResidualBlock) else ops.in_memory_format(block(x))
                skips.append(x)
        return skips

    def decode(self, skips: list[Tensor], emb: Tensor | Modulation) -> Tensor:
        """The image-shaped output from what `encode` returned."""
        skips = list(skips)
        x, aux, normed = skips[-1], None, None
        for name, block in self.dec.items():
            if "aux_up" in name:
                aux = block(aux)
            elif "aux_norm" in name:
                normed = block(x, silu=True)
            elif "aux_conv" in name:
                out = block(normed)
                aux = out if aux is None else out + aux
            else:
                if x.shape[1] == block.in_channels:
                    x = block(x, emb)
                elif ops.fuses(x) and block.joins:
                    x = block(x, emb, skips.pop())
                else:
                    x = block(torch.cat([x, skips.pop()], 1), emb)
        if self.out_norm is not None and self.out_conv is not None:
            return self.out_conv(self.out_norm(x, silu=True))
        assert aux is not None  # the finest level has an aux_conv
        return aux

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        steps: int | None = None,
        deepest: bool = False,
    ) -> Any:
        """The image-shaped output; with `deepest` a pair of it and what the last encoder block returned."""
        x, emb = ops.in_memory_format(x), self.conditioned(self.embed(c_noise, labels, augment_labels), steps)
        if ops.fuses(x):
            emb = modulation(emb, [*self.blocks["enc"], *self.blocks["dec"]])
        skips = self.encode(x, emb)
        return (self.decode(skips, emb), skips[-1]) if deepest else self.decode(skips, emb)

    def conditioned(self, emb: Tensor, steps: int | None) -> Tensor:
        """`emb` and, in a net with a step condition, the number of levels beside it: what blocks are called with."""
        if (self.map_steps is None) != (steps is None):
            knows = "does not know" if self.map_steps is None else "wants to know"
            raise ValueError(f"this net {knows} in how many steps it is sampled, got steps={steps}")
        return emb if self.map_steps is None else torch.cat([emb, self.map_steps(steps).expand_as(emb)], 1)

    def levels(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """The last encoder output of every resolution, finest first; the decoder does not run."""
        x, emb = ops.in_memory_format(x), self.conditioned(self.embed(c_noise, labels, None), None)
        skips = self.encode(x, modulation(emb, self.blocks["enc"]) if ops.fuses(x) else emb)
        return last_of_each(skips)

    def drop_labels(self, labels: Tensor | None) -> Tensor:
        """Labels with whole rows zeroed at random during training (label dropout), for guidance."""
        assert labels is not None  # a net with classes is called with labels: a denoiser's are zeros for none
        if not (self.training and self.label_dropout):
            return labels
        return labels * (torch.rand(len(labels), 1, device=labels.device) >= self.label_dropout).to(labels.dtype)


class SongUNet(UNet):
    """DDPM++ by default; NCSN++ with embedding_type="fourier", encoder_type="residual", channel_mult_noise=2,
    resample_filter=[1, 3, 3, 1]. Keyword arguments and state_dict keys are EDM's.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: tuple[int, ...] = (1, 1),
    ):
        _check_choice("embedding_type", embedding_type, ("positional", "fourier"))
        _check_choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _check_choice("decoder_type", decoder_type, ("standard", "skip"))
        super().__init__(label_dim, label_dropout)
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        init = Init("xavier_uniform")
        init_zero = Init("xavier_uniform", weight=1e-5)
        style = BlockStyle(
            emb_channels, dropout, heads=1, skip_scale=math.sqrt(0.5), eps=1e-6, resample_filter=tuple(resample_filter),
            resample_proj=True, adaptive_scale=False, init=init, init_zero=init_zero,
            init_attn=Init("xavier_uniform", weight=math.sqrt(0.2)),
        )  # fmt: skip

        positional = embedding_type == "positional"
        self.map_noise = PositionalEmbedding(noise_channels, endpoint=True) if positional else FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, init=init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)

        self.build_levels(
            style, img_resolution, in_channels, out_channels, model_channels, channel_mult, num_blocks, attn_resolutions,
            encoder_type, decoder_type,
        )  # fmt: skip

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(c_noise)
        cos, sin = emb.chunk(2, dim=1)
        emb = torch.cat([sin, cos], 1)  # EDM swaps them to match the older checkpoints
        if self.map_label is not None:
            emb = emb + self.map_label(self.drop_labels(labels) * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} wants one of {', '.join(choices)}, got {value!r}")


class DhariwalUNet(UNet):
    """Adaptive group norm (scale and shift from the embedding), 64 channels per head. Keywords and keys are EDM's."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: tuple[int, ...] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ):
        super().__init__(label_dim, label_dropout)
        emb_channels = model_channels * channel_mult_emb
        init = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
        init_zero = Init("kaiming_uniform", weight=0, bias=0)
        style = BlockStyle(
            emb_channels, dropout, heads=None, skip_scale=1.0, eps=1e-5, resample_filter=(1, 1),
            resample_proj=False, adaptive_scale=True, init=init, init_zero=init_zero, init_attn=init,
        )  # fmt: skip

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, init=init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        label_init = Init("kaiming_normal", weight=math.sqrt(label_dim))
        self.map_label = Linear(label_dim, emb_channels, bias=False, init=label_init) if label_dim else None

        self.build_levels(style, img_resolution, in_channels, out_channels, model_channels, channel_mult, num_blocks, attn_resolutions)

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(c_noise)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self.drop_labels(labels))
        return F.silu(emb)
