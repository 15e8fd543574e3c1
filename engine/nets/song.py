"""DDPM++ and NCSN++ of Song et al. (2011.13456) as re-implemented by EDM (2206.00364): SongUNet."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.engine.nets.layers import (
    BlockStyle,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    UNetBlock,
)
from potstill.engine.nets.ops import laid
from potstill.engine.nets.unet import UNet, channels_of, resolutions_of


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
        resample_filter = tuple(resample_filter)
        style = BlockStyle(
            emb_channels, dropout, heads=1, skip_scale=math.sqrt(0.5), eps=1e-6, resample_filter=resample_filter,
            resample_proj=True, adaptive_scale=False, init=init, init_zero=init_zero,
            init_attn=Init("xavier_uniform", weight=math.sqrt(0.2)),
        )  # fmt: skip

        positional = embedding_type == "positional"
        self.map_noise = PositionalEmbedding(noise_channels, endpoint=True) if positional else FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, init=init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)

        resolutions = resolutions_of(img_resolution, len(channel_mult))
        self.enc = nn.ModuleDict()
        cout = caux = in_channels
        for level, (res, mult) in enumerate(zip(resolutions, channel_mult, strict=True)):
            key = f"{res}x{res}"
            if level == 0:
                cin, cout = cout, model_channels
                self.enc[f"{key}_conv"] = Conv2d(cin, cout, 3, init=init)
            else:
                self.enc[f"{key}_down"] = UNetBlock(cout, cout, style, down=True)
                resample = {"down": True, "resample_filter": resample_filter}
                if encoder_type == "skip":
                    self.enc[f"{key}_aux_down"] = Conv2d(caux, caux, 0, **resample)
                    self.enc[f"{key}_aux_skip"] = Conv2d(caux, cout, 1, init=init)
                if encoder_type == "residual":
                    self.enc[f"{key}_aux_residual"] = Conv2d(caux, cout, 3, fused_resample=True, init=init, **resample)
                    caux = cout
            for index in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.enc[f"{key}_block{index}"] = UNetBlock(cin, cout, style, attention=res in attn_resolutions)
        skips = [channels_of(layer) for name, layer in self.enc.items() if "aux" not in name]

        self.dec = nn.ModuleDict()
        last = len(channel_mult) - 1
        for level in reversed(range(len(channel_mult))):
            res, mult = resolutions[level], channel_mult[level]
            key = f"{res}x{res}"
            if level == last:
                self.dec[f"{key}_in0"] = UNetBlock(cout, cout, style, attention=True)
                self.dec[f"{key}_in1"] = UNetBlock(cout, cout, style)
            else:
                self.dec[f"{key}_up"] = UNetBlock(cout, cout, style, up=True)
            for index in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                attention = index == num_blocks and res in attn_resolutions
                self.dec[f"{key}_block{index}"] = UNetBlock(cin, cout, style, attention=attention)
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < last:
                    up = {"up": True, "resample_filter": resample_filter}
                    self.dec[f"{key}_aux_up"] = Conv2d(out_channels, out_channels, 0, **up)
                self.dec[f"{key}_aux_norm"] = GroupNorm(cout, eps=1e-6)
                self.dec[f"{key}_aux_conv"] = Conv2d(cout, out_channels, 3, init=init_zero)

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(c_noise)
        cos, sin = emb.chunk(2, dim=1)
        emb = torch.cat([sin, cos], 1)  # EDM swaps them to match the older checkpoints
        if self.map_label is not None:
            emb = emb + self.map_label(self.kept_labels(labels) * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        skips, aux = [], x
        for name, block in self.enc.items():
            if "aux_down" in name:
                aux = block(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + block(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + block(aux)) / math.sqrt(2)
            else:
                x = block(x, emb) if isinstance(block, UNetBlock) else laid(block(x))
                skips.append(x)
        return skips

    def decode(self, skips: list[Tensor], emb: Tensor) -> Tensor:
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
                if x.shape[1] != block.in_channels:
                    x = torch.cat([x, skips.pop()], 1)
                x = block(x, emb)
        assert aux is not None  # the finest level has an aux_conv
        return aux


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} wants one of {', '.join(choices)}, got {value!r}")
