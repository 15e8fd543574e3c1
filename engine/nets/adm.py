"""ADM of Dhariwal and Nichol (2105.05233) as re-implemented by EDM (2206.00364): DhariwalUNet."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.engine.nets.layers import BlockStyle, Conv2d, GroupNorm, Init, Linear, PositionalEmbedding, UNetBlock
from potstill.engine.nets.unet import UNet, channels_of, resolutions_of


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

        resolutions = resolutions_of(img_resolution, len(channel_mult))
        self.enc = nn.ModuleDict()
        cout = in_channels
        for level, (res, mult) in enumerate(zip(resolutions, channel_mult, strict=True)):
            key = f"{res}x{res}"
            if level == 0:
                cin, cout = cout, model_channels * mult
                self.enc[f"{key}_conv"] = Conv2d(cin, cout, 3, init=init)
            else:
                self.enc[f"{key}_down"] = UNetBlock(cout, cout, style, down=True)
            for index in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.enc[f"{key}_block{index}"] = UNetBlock(cin, cout, style, attention=res in attn_resolutions)
        skips = [channels_of(layer) for layer in self.enc.values()]

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
                self.dec[f"{key}_block{index}"] = UNetBlock(cin, cout, style, attention=res in attn_resolutions)
        self.out_norm = GroupNorm(cout)
        self.out_conv = Conv2d(cout, out_channels, 3, init=init_zero)

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(c_noise)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self.kept_labels(labels))
        return F.silu(emb)

    def decode(self, skips: list[Tensor], emb: Tensor) -> Tensor:
        skips = list(skips)
        x = skips[-1]
        for block in self.dec.values():
            if x.shape[1] != block.in_channels:
                x = torch.cat([x, skips.pop()], 1)
            x = block(x, emb)
        return self.out_conv(self.out_norm(x, silu=True))
