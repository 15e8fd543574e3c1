"""A U-Net whose residual blocks can be left out, for some samples or all: what probing and skipping are both built on.

A block is y = skip_scale · (F(x) + s) with s its skip path (and once more with attention). Left out, y becomes a_c · s + b_c,
per channel c, with a_c the block's own scale and b_c = 0 unless something better was fitted. A skip path that changes
shape (1x1 convolution, resampling) always runs, so every block can be left out.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from potstill.engine.common.errors import UserError
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.edm_denoiser import EDMDenoiser
from potstill.engine.nets.layers import ResidualBlock
from potstill.engine.nets.unet import UNet


class Skippable(ResidualBlock):
    """A block that runs on the first `rows` samples (None: on all), while the others take its skip path.

    `rows` is a Python number, so a compiled or captured net has static shapes. scale and shift are [n, C, 1, 1] for the n
    samples left out, or [1, C, 1, 1] for all alike. `watch(self, s, y)` sees skip path and output, and may replace y.
    """

    def __init__(self, block: ResidualBlock):
        nn.Module.__init__(self)
        self.block = block
        self.in_channels, self.out_channels = block.in_channels, block.out_channels
        self.rows: int | None = None
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        self.watch: Callable[[Skippable, Tensor, Tensor], Tensor] | None = None

    @property
    def plain_scale(self) -> float:
        """What the block itself multiplies its skip path with."""
        return self.block.plain_scale

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.watch is not None:
            return self.watch(self, self.shortcut(x), self.block(x, emb))
        if self.rows is None or self.rows >= len(x):
            return self.block(x, emb)
        passed = self.calibrated(self.shortcut(x[self.rows :]))
        return torch.cat([self.block(x[: self.rows], emb[: self.rows]), passed]) if self.rows else passed

    def shortcut(self, x: Tensor) -> Tensor:
        """s: the skip path without the block's scale."""
        return self.block.shortcut(x)

    def calibrated(self, s: Tensor) -> Tensor:
        """What stands for the block's output where it is left out."""
        if self.scale is None or self.shift is None:
            return s * self.plain_scale
        return torch.addcmul(self.shift.to(s.dtype), s, self.scale.to(s.dtype))


class SkippableDenoiser(EDMDenoiser):
    """A view of a denoiser that shares its weights and whose residual blocks are `Skippable`; the net itself stays as it is."""

    parts: dict[str, Skippable]

    def __init__(self, net: EDMDenoiser):
        model = copy.deepcopy(net.model, {id(t): t for t in [*net.model.parameters(), *net.model.buffers()]})
        for layers in (model.enc, model.dec):
            for name, block in layers.items():
                if isinstance(block, ResidualBlock):
                    layers[name] = Skippable(block)
        super().__init__(model, net.precond, net.scheme, net.kwargs)
        if self.precond == "iDDPMPrecond":
            self.u = net.u  # a file's levels are not to the bit those that we compute
        self.train(net.training)
        self.to(next(net.parameters()).device)
        self.compute_dtype, self.guide, self.parts = net.compute_dtype, net.guide, blocks_of(model)

    def blocks(self) -> list[nn.Module]:
        """What is left out or not: the wrappers stay."""
        return [part.block for part in self.parts.values()]


def with_unet(net: Denoiser) -> EDMDenoiser:
    """The net, if it is one whose layers can be left out. UserError for others."""
    if not isinstance(net, EDMDenoiser):
        raise UserError(f"skipping leaves out blocks of EDM's U-Nets, got {type(net.model).__name__}: do without a plan and skipping.cache")
    return net


def blocks_of(model: UNet) -> dict[str, Any]:
    """The residual blocks of a U-Net in the order they run, named like "enc.16x16_block0"; of a skippable one, `Skippable`s."""
    parts = (("enc", model.enc), ("dec", model.dec))
    return {f"{part}.{name}": b for part, blocks in parts for name, b in blocks.items() if isinstance(b, ResidualBlock)}
