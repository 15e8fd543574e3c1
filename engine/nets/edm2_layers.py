"""The layers of EDM2's U-Nets (2312.02696, Appendix B): each keeps the expected magnitude of what passes through it.

A weight's length says nothing: a layer uses w / (1e-4 + |w| / √n)·gain / √n per output channel, n numbers each. There are no
biases and no learnt norms. State_dict keys and keyword arguments are EDM2's, the code is ours.

Statistics and the embedding are computed in float32; a net runs in bfloat16 by being fed bfloat16.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from potstill import kernels
from potstill.engine.nets import ops
from potstill.engine.nets.attention import ordered
from potstill.engine.nets.layers import ResidualBlock
from potstill.engine.nets.shadow import UnitShadow
from potstill.kernels import reference


def mp() -> Any:
    """The operations of kernels/mp.py, each a pass; within `ops.definitions()` their definitions."""
    return reference if ops.by_definition() else kernels


def unit_vectors(x: Tensor) -> Tensor:
    """x over its root mean square along the last dimension, which 1e-4 is added to; statistics in float32."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (1e-4 + size / math.sqrt(x.shape[-1])).to(x.dtype)


class MPConv(nn.Module):
    """A convolution, or with kernel () a linear map, by weights of unit length: [N, in, H, W] -> [N, out, H, W] or [N, in] -> [N, out].

    gained: is it called with a gain, which goes into the weight before it is rounded?
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, ...], *, gained: bool = False):
        super().__init__()
        self.shadow_kind = None if gained else UnitShadow
        self.in_channels, self.out_channels = in_channels, out_channels
        planned = torch.empty(out_channels, in_channels, *kernel)
        self.weight = nn.Parameter(laid_out(planned if planned.is_meta else torch.randn(planned.shape)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """gain: a number, or a parameter [1]."""
        w = self.computed(x.dtype, gain)
        if w.ndim == 2:
            return F.linear(x, w)
        return ops.convolution(x, w, None, frozen=not w.requires_grad, padding=w.shape[-1] // 2)

    def computed(self, dtype: torch.dtype, gain: Tensor | float = 1.0) -> Tensor:
        """The weight as the layer computes with it: each output channel of length `gain`."""
        shadow = None if self.shadow_kind is None or ops.by_definition() else getattr(self.weight, "_shadow", None)
        if shadow is not None and shadow.dtype is dtype:
            return shadow.of(self.weight)
        return mp().normalized_weight(self.weight, gain.reshape(()) if isinstance(gain, Tensor) else gain, dtype)

    def _apply(self, *args: Any, **kwargs: Any) -> "MPConv":
        """Where it moves to, the weight lies as images do, so that no convolution lays it out anew."""
        super()._apply(*args, **kwargs)
        self.weight.data = laid_out(self.weight.data)
        return self


def laid_out(weight: Tensor) -> Tensor:
    """As `ops.in_memory_format`, where it is a convolution's."""
    return ops.in_memory_format(weight) if weight.ndim == 4 else weight


def force_norms(weights: Sequence[Tensor]) -> None:
    """Forced weight normalisation (Sec. 2.3): weights [out, …] in place, each output channel to root mean square 1 (1 - 1e-4).

    No version of a tensor is counted up: for weights that are normalised already this changes nothing but last bits, and a forward
    between two others must not spoil their backward.
    """
    kernels.force_weight_norm_([weight.data for weight in weights])


class MPFourier(nn.Module):
    """√2 cos(f x + φ) at random frequencies and phases, fixed at initialisation: [N] -> [N, channels]."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int):
        super().__init__()
        planned = torch.empty(channels)
        self.register_buffer("freqs", planned if planned.is_meta else 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", planned.clone() if planned.is_meta else 2 * math.pi * torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (x.outer(self.freqs.to(x.dtype)) + self.phases.to(x.dtype)).cos() * math.sqrt(2)


class Gained(nn.Module):
    """A module with one learnt number, `gain_name`, which is [1] here, as shards want it, and () in EDM2's files."""

    gain_name: str

    def __init__(self, gain_name: str):
        super().__init__()
        self.gain_name = gain_name
        self.register_parameter(gain_name, nn.Parameter(torch.zeros(1)))
        self.register_state_dict_post_hook(_gain_as_stored)
        self.register_load_state_dict_pre_hook(_gain_as_here)

    @property
    def gain(self) -> Tensor:
        return getattr(self, self.gain_name)


def _gain_as_stored(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    if (name := prefix + module.gain_name) in state:
        state[name] = state[name].reshape(())


def _gain_as_here(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if (name := prefix + module.gain_name) in state and state[name].ndim == 0:
        state[name] = state[name].reshape(1)


@dataclass(frozen=True)
class MPStyle:
    """What all blocks of one U-Net share."""

    emb_channels: int
    concat_balance: float
    resample_filter: tuple[int, ...]
    channels_per_head: int
    dropout: float
    res_balance: float
    attn_balance: float
    clip_act: float | None


class MPBlock(ResidualBlock, Gained):
    """Residual block with optional resampling and self-attention: [N, in, H, W], [N, emb] -> [N, out, H', W'].

    An encoder's block normalises every pixel; a decoder's does not, and changes the number of channels after its branch has left.
    """

    @property
    def joins(self) -> bool:
        return True

    def __init__(
        self, in_channels: int, out_channels: int, style: MPStyle, *, decoder: bool = False, up: bool = False, down: bool = False,
        attention: bool = False,
    ):  # fmt: skip
        Gained.__init__(self, "emb_gain")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.decoder, self.up, self.down, self.style, self.dropout = decoder, up, down, style, style.dropout
        self.heads = out_channels // style.channels_per_head if attention else 0
        if self.heads and out_channels % self.heads:
            raise ValueError(f"attention wants channels that divide into {self.heads} heads, got {out_channels}")
        self.checkpoint = False
        self.conv_res0 = MPConv(in_channels if decoder else out_channels, out_channels, (3, 3))
        self.emb_linear = MPConv(style.emb_channels, out_channels, ())
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, out_channels * 3, (1, 1)) if self.heads else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if self.heads else None

    def forward(self, x: Tensor, emb: Tensor, beside: Tensor | None = None) -> Tensor:
        """`beside`: channels that follow those of x, weighed against them, which nobody has put into one tensor yet."""
        if self.checkpoint and torch.is_grad_enabled() and not ops.by_definition():
            return checkpoint(self._forward, x, emb, beside, use_reentrant=False)
        return self._forward(x, emb, beside)

    def _forward(self, x: Tensor, emb: Tensor, beside: Tensor | None) -> Tensor:
        style, x = self.style, self._resampled(ops.in_memory_format(x))
        if beside is not None:
            x, h = mp().mp_cat_silu(x, ops.in_memory_format(beside), style.concat_balance)
        elif self.decoder:
            h = mp().mp_silu(x)
        else:
            x, h = mp().pixel_norm_silu(x if self.conv_skip is None else self.conv_skip(x))
        y, key = self.conv_res0(h), self._key(x.device)
        y = mp().mp_silu(y, self.emb_linear(emb, self.gain) + 1, 0.0 if key is None else self.dropout, key)
        y = self.conv_res1(y)
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp().mp_sum(x, y, style.res_balance, None if self.heads else style.clip_act)
        return mp().mp_sum(x, self._attention(x), style.attn_balance, style.clip_act) if self.heads else x

    def shortcut(self, x: Tensor) -> Tensor:
        x = self._resampled(x)
        x = x if self.conv_skip is None else self.conv_skip(x)
        return x if self.decoder else mp().pixel_norm(x)

    def _key(self, device: torch.device) -> Tensor | None:
        """What fixes the mask of this call's dropout, if there is one: from PyTorch's own generator, so that its seed does."""
        if not (self.training and self.dropout):
            return None
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)

    @property
    def plain_scale(self) -> float:
        balances = [self.style.res_balance, self.style.attn_balance][: 1 + bool(self.heads)]
        return math.prod((1 - t) / math.sqrt((1 - t) ** 2 + t**2) for t in balances)

    def _attention(self, x: Tensor) -> Tensor:
        """Self-attention over pixels with q, k and v of unit magnitude, projected."""
        assert self.attn_qkv is not None and self.attn_proj is not None
        n, c, height, width = x.shape
        weight = ordered(self.attn_qkv.computed(x.dtype).flatten(1), self.heads)
        qkv = F.linear(x.permute(0, 2, 3, 1).flatten(1, 2), weight).view(n, height * width, 3, self.heads, c // self.heads)
        q, k, v = unit_vectors(qkv).permute(2, 0, 3, 1, 4).unbind()
        a = ops.attention(q, k, v).transpose(1, 2).reshape(n, height * width, c)
        a = F.linear(a, self.attn_proj.computed(x.dtype).flatten(1))
        return ops.in_memory_format(a.unflatten(1, (height, width)).permute(0, 3, 1, 2))

    def _resampled(self, x: Tensor) -> Tensor:
        if not (self.up or self.down):
            return x
        if self.style.resample_filter == (1, 1):
            return F.interpolate(x, scale_factor=2, mode="nearest") if self.up else ops.average_pool(x)
        taps = _taps(self.style.resample_filter, x.dtype, x.device)
        padding, filters = (len(taps) - 1) // 2, (taps * 4 if self.up else taps).expand(x.shape[1], 1, -1, -1)
        return ops.upsample(x, filters, padding) if self.up else ops.convolution(x, filters, None, frozen=True, stride=2, padding=padding)


@cache
def _taps(resample_filter: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A filter [k, k] of sum 1, copied to a device once."""
    f = torch.tensor(resample_filter, dtype=torch.float32, device="cpu")
    return (f.outer(f) / f.sum() ** 2).to(device, dtype)
