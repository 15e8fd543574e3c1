"""The layers of EDM's U-Nets (2206.00364, Appendix F.2): state_dict keys are EDM's, the code is ours.

Weights stay float32; a layer casts them to the dtype of its input, so a net runs in bfloat16 by being fed bfloat16.
Statistics, softmax and the embedding are computed in float32. What lies below a layer is chosen in engine/nets/ops.py.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from potstill.engine.nets import ops
from potstill.engine.nets.attention import ordered, self_attention
from potstill.engine.nets.block import residual_block
from potstill.engine.nets.modulation import Modulation
from potstill.engine.nets.shadow import in_dtype


@dataclass(frozen=True)
class Init:
    """How a layer's weight and bias are drawn: a named law, scaled."""

    law: Literal["kaiming_normal", "kaiming_uniform", "xavier_uniform"] = "kaiming_normal"
    weight: float = 1.0
    bias: float = 0.0

    def draw(self, shape: tuple[int, ...], fan_in: int, fan_out: int, scale: float) -> Tensor:
        if (planned := torch.empty(shape)).is_meta:  # arithmetic with nothing takes torch longer there than with numbers elsewhere
            return planned
        uniform, normal = torch.rand(shape) * 2 - 1, torch.randn(shape)
        if self.law == "kaiming_normal":
            return math.sqrt(1 / fan_in) * normal * scale
        return math.sqrt(6 / (fan_in + fan_out) if self.law == "xavier_uniform" else 3 / fan_in) * uniform * scale


class Linear(nn.Module):
    """y = x Wᵀ + b: [N, in] -> [N, out]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, init: Init = Init()):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        draw = lambda scale, *shape: init.draw(shape, in_features, out_features, scale)  # noqa: E731
        self.weight = nn.Parameter(draw(init.weight, out_features, in_features))
        self.bias = nn.Parameter(draw(init.bias, out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, in_dtype(self.weight, x.dtype), in_dtype(self.bias, x.dtype) if self.bias is not None else None)


class Conv2d(nn.Module):
    """A convolution (kernel 3 or 1, or 0 for none) after an optional factor-2 resampling with `resample_filter`.

    [N, in, H, W] -> [N, out, H', W']. `fused_resample` swaps the order for down-sampling: convolve, then resample.
    """

    weight: nn.Parameter | None  # with kernel 0 there is neither
    bias: nn.Parameter | None
    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        resample_filter: tuple[int, ...] = (1, 1),
        fused_resample: bool = False,
        init: Init = Init(),
    ):
        assert not (up and (down or fused_resample))
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.fused_resample = up, down, fused_resample
        self.box = tuple(resample_filter) == (1, 1)  # two taps: nearest neighbour up, mean of four down, no padding
        fan_in, fan_out = in_channels * kernel**2, out_channels * kernel**2
        self.padding = kernel // 2
        self.weight = self.bias = None
        if kernel:
            shape = (out_channels, in_channels, kernel, kernel)
            self.weight = nn.Parameter(ops.in_memory_format(init.draw(shape, fan_in, fan_out, init.weight)))
            self.bias = nn.Parameter(init.draw((out_channels,), fan_in, fan_out, init.bias))
        f = torch.tensor(resample_filter, dtype=torch.float32, device="cpu")  # arithmetic on "meta" would import a compiler
        taps = (f.outer(f)[None, None] / f.sum() ** 2).to(torch.get_default_device()) if up or down else None
        self.register_buffer("resample_filter", taps)

    def forward(self, x: Tensor) -> Tensor:
        taps = self.resample_filter
        if taps is None:
            return self._convolve(x, self.padding)
        f_pad = (taps.shape[-1] - 1) // 2
        if self.fused_resample and self.bias is not None:
            x = self._convolve(x, self.padding + f_pad, bias=False)
            return self._downsample(x, padding=0) + in_dtype(self.bias, x.dtype)[:, None, None]
        x = self._upsample(x, f_pad) if self.up else self._downsample(x, f_pad)
        return x if self.weight is None else self._convolve(x, self.padding)

    def _apply(self, *args: Any, **kwargs: Any) -> "Conv2d":
        """Where it moves to, the weight lies as images do, so that no convolution lays it out anew."""
        super()._apply(*args, **kwargs)
        if self.weight is not None:
            self.weight.data = ops.in_memory_format(self.weight.data)
        return self

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias as the layer computes with them."""
        assert self.weight is not None and self.bias is not None
        return in_dtype(self.weight, dtype), in_dtype(self.bias, dtype)

    def _convolve(self, x: Tensor, padding: int, bias: bool = True) -> Tensor:
        assert self.weight is not None and self.bias is not None
        frozen = not (self.weight.requires_grad or self.bias.requires_grad)
        given = in_dtype(self.bias, x.dtype) if bias else None
        return ops.convolution(x, in_dtype(self.weight, x.dtype), given, frozen=frozen, padding=padding)

    def filters(self, x: Tensor) -> Tensor:
        """The resampling filter for every channel of x."""
        assert self.resample_filter is not None
        taps = self.resample_filter * 4 if self.up else self.resample_filter
        return taps.to(x.dtype).expand(x.shape[1], 1, -1, -1)

    def _upsample(self, x: Tensor, padding: int) -> Tensor:
        if self.box:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return ops.upsample(x, self.filters(x), padding)

    def _downsample(self, x: Tensor, padding: int) -> Tensor:
        if self.box:
            return ops.average_pool(x)
        return ops.convolution(x, self.filters(x), None, frozen=True, stride=2, padding=padding)


class GroupNorm(nn.Module):
    """Group normalisation with at most 32 groups of at least 4 channels each, and what stands around it in a block:

        GroupNorm(x + add)·(1 + scale) + shift, then SiLU        x [N, C, H, W]; add, scale, shift [N, C] or None

    Its weights are read in float32, whatever x is.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5):
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        if not self.groups or channels % self.groups:
            raise ValueError(f"GroupNorm wants channels that divide into min(32, channels // 4) groups, got {channels}")
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, *, silu: bool = False, **given: Any) -> Tensor:
        return ops.norm_silu(x, self.weight, self.bias, self.groups, self.eps, silu=silu, **given)


class PositionalEmbedding(nn.Module):
    """cos and sin of σ's label at geometric frequencies: [N] -> [N, channels]. stored: the frequencies lie beside the weights."""

    freqs: Tensor | None
    max_positions = 10000

    def __init__(self, channels: int, *, endpoint: bool = False, stored: bool = False):
        super().__init__()
        check_even(channels)
        self.channels, self.endpoint = channels, endpoint
        known = frequencies(channels, endpoint, torch.device("cpu")).to(torch.get_default_device()) if stored else None
        self.register_buffer("freqs", known)

    def forward(self, x: Tensor) -> Tensor:
        angles = x.outer(frequencies(self.channels, self.endpoint, x.device) if self.freqs is None else self.freqs)
        return torch.cat([angles.cos(), angles.sin()], 1)


def check_even(channels: int) -> None:
    if channels % 2:
        raise ValueError(f"an embedding of cosines and sines wants an even number of channels (model_channels), got {channels}")


def frequencies(channels: int, endpoint: bool, device: torch.device | None = None) -> Tensor:
    """EDM's frequencies [channels / 2] from 1 to 1/10000; the last is reached only with `endpoint`."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=device) / (half - int(endpoint))
    return (1 / PositionalEmbedding.max_positions) ** exponents


class FourierEmbedding(nn.Module):
    """cos and sin of σ's label at random frequencies, fixed at initialisation: [N] -> [N, channels]."""

    freqs: Tensor

    def __init__(self, channels: int, *, scale: float = 16.0):
        super().__init__()
        check_even(channels)
        planned = torch.empty(channels // 2)
        self.register_buffer("freqs", planned if planned.is_meta else torch.randn(channels // 2) * scale)

    def forward(self, x: Tensor) -> Tensor:
        angles = x.outer(2 * math.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], 1)


@dataclass(frozen=True)
class BlockStyle:
    """What all blocks of one U-Net share; DDPM++/NCSN++ and ADM differ in every line."""

    emb_channels: int
    dropout: float
    heads: int | None  # None: one head per 64 channels
    skip_scale: float
    eps: float
    resample_filter: tuple[int, ...]
    resample_proj: bool
    adaptive_scale: bool
    init: Init
    init_zero: Init
    init_attn: Init


class ResidualBlock(nn.Module):
    """A block of a U-Net that adds something to a skip path: what may be left out, sharded, compiled, recomputed by itself.

    checkpoint: keep only what enters for backward, and compute the block again (same numbers, same dropout).
    """

    in_channels: int
    out_channels: int
    dropout: float
    checkpoint: bool
    heads: int

    @property
    def joins(self) -> bool:
        """Does it take `beside`?"""
        return False

    @property
    def maps_plainly(self) -> bool:
        """May engine.nets.modulation take the map of the embedding out of it?"""
        return False

    def shortcut(self, x: Tensor) -> Tensor:
        """The skip path without the block's scale."""
        raise NotImplementedError(f"{type(self).__name__}.shortcut")

    @property
    def plain_scale(self) -> float:
        """What the block itself multiplies its skip path with."""
        raise NotImplementedError(f"{type(self).__name__}.plain_scale")


class UNetBlock(ResidualBlock):
    """Residual block with optional resampling and self-attention: [N, in, H, W], [N, emb] -> [N, out, H', W']."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dropout, self.skip_scale, self.adaptive_scale = style.dropout, style.skip_scale, style.adaptive_scale
        self.heads = 0 if not attention else style.heads or out_channels // 64
        if self.heads and out_channels % self.heads:
            raise ValueError(f"attention wants channels that divide into heads of 64, got {out_channels}")
        self.checkpoint = False
        resample = {"up": up, "down": down, "resample_filter": style.resample_filter}
        self.norm0 = GroupNorm(in_channels, eps=style.eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, init=style.init, **resample)
        self.affine: nn.Module = Linear(style.emb_channels, out_channels * (2 if style.adaptive_scale else 1), init=style.init)
        self.norm1 = GroupNorm(out_channels, eps=style.eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init=style.init_zero)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if style.resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, init=style.init, **resample)
        if self.heads:
            self.norm2 = GroupNorm(out_channels, eps=style.eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, init=style.init_attn)
            self.proj = Conv2d(out_channels, out_channels, 1, init=style.init_zero)

    def forward(self, x: Tensor, emb: Tensor | Modulation, beside: Tensor | None = None) -> Tensor:
        """`beside`: channels that follow those of x, which nobody has put into one tensor yet."""
        if self.checkpoint and torch.is_grad_enabled() and not ops.by_definition():
            return checkpoint(self._forward, x, emb, beside, use_reentrant=False)
        return self._forward(x, emb, beside)

    def _forward(self, x: Tensor, emb: Tensor | Modulation, beside: Tensor | None) -> Tensor:
        x, key = ops.in_memory_format(x), self._key(x.device)
        if not ops.fuses(x):
            assert isinstance(emb, Tensor) and beside is None
            x = self._by_layers(x, emb, key)
            return self._scaled(x + self._attention(self.norm2(x))) if self.heads else x
        if isinstance(emb, Modulation):
            params = emb.of(self)
        else:
            params = self.affine(emb) if self.adaptive_scale else self.affine(emb) + self.conv0.bias
        x = residual_block(self, x, beside, params, key)
        return self_attention(self, x) if self.heads else x

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.skip is None else self.skip(x)

    @property
    def plain_scale(self) -> float:
        return self.skip_scale ** (2 if self.heads else 1)

    @property
    def maps_plainly(self) -> bool:
        """Not where FSDP gathers its weights."""
        return self.joins and type(self.affine) is Linear

    @property
    def joins(self) -> bool:
        """A block that is compiled, sharded or within another takes one tensor."""
        return type(self) is UNetBlock and self._compiled_call_impl is None

    def _by_layers(self, x: Tensor, emb: Tensor, key: Tensor | None) -> Tensor:
        """The definition of `residual_block`."""
        h = self.conv0(self.norm0(x, silu=True))
        params, dropout = self.affine(emb).to(h.dtype), 0.0 if key is None else self.dropout
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = self.norm1(h, scale=scale, shift=shift, silu=True, dropout=dropout, key=key)
        else:
            h = self.norm1(h, add=params, silu=True, dropout=dropout, key=key)
        return self._scaled(self.conv1(h) + (x if self.skip is None else self.skip(x)))

    def _key(self, device: torch.device) -> Tensor | None:
        """What fixes the mask of this call's dropout, if there is one: from PyTorch's own generator, so that its seed does."""
        if not (self.training and self.dropout):
            return None
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)

    def _scaled(self, x: Tensor) -> Tensor:
        """x·skip_scale, in x's own memory: a sum needs nothing kept of itself."""
        return x if self.skip_scale == 1 else x.mul_(self.skip_scale)

    def _attention(self, x: Tensor) -> Tensor:
        """Self-attention over pixels, projected: an image like x, of any memory format."""
        n, c, height, width = x.shape
        weight, bias = self.qkv.cast(x.dtype)
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        qkv = F.linear(tokens, ordered(weight.flatten(1), self.heads), ordered(bias, self.heads).flatten())
        q, k, v = qkv.view(n, height * width, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind()
        a = ops.attention(q, k, v).transpose(1, 2).reshape(n, height * width, c)
        weight, bias = self.proj.cast(x.dtype)
        return F.linear(a, weight.flatten(1), bias).unflatten(1, (height, width)).permute(0, 3, 1, 2)
