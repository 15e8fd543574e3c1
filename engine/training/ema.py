"""Exponential moving average of a net's weights, with its half-life in images (EDM's convention)."""

import copy

import torch
from torch import Tensor, nn


class EMA:
    """A copy of `net` that follows it; buffers are copied as they are."""

    def __init__(self, net: nn.Module):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self._targets: list[Tensor] = list(self.net.parameters())
        self._sources = [p.detach() for p in net.parameters()]
        self._buffers = list(zip(self.net.buffers(), net.buffers(), strict=True))

    @torch.no_grad()
    def update(self, decay: float, *, weights: bool = True) -> None:
        """average ← decay · average + (1 - decay) · weights. weights=False: the optimiser has done that; buffers only."""
        if weights:
            torch._foreach_lerp_(self._targets, self._sources, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for target, source in self._buffers:
            target.copy_(source)


def ema_decay(batch: int, images: int, half_life: float, ramp_up: float) -> float:
    """Per-step decay 0.5^(batch / H) with H = min(half_life, ramp_up · images); 0 at the very first step.

    images: how many had been seen before this step's batch, as EDM, SiD and GDD count.
    """
    half_life = min(half_life, images * ramp_up)
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0
