"""What the layers compute with, chosen in one place: how images lie in memory, and what autograd keeps of them.

A convolution's gradient to its input needs the weight alone, but PyTorch keeps the input too, whether or not the weight
wants a gradient (2.13). A teacher, a fake net in the student's turn and GDD-I's frozen layers want the first without the
second, so a convolution whose weight does not require a gradient is `_FixedConv` here, and keeps no image. No
`requires_grad` is ever toggled: it is read off the parameter.

Gradients of gradients go through `_FixedConv` and `_AveragePool`, not through the fused GroupNorm; forward mode goes through none of
them. Who wants either says so, with `definitions()`: under it every layer is PyTorch's own differentiable operations.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from potstill import kernels
from potstill.kernels import conv, native
from potstill.kernels.norm_silu import in_one_op, plain
from potstill.kernels.residual import residual

_by_definition = False  # a plain global: the compiler guards on it, and knows no ContextVar


@contextmanager
def definitions() -> Iterator[None]:
    """Within it nets run on PyTorch's own operations: any number of derivatives, in reverse and forward mode."""
    global _by_definition
    before, _by_definition = _by_definition, True
    try:
        yield
    finally:
        _by_definition = before


def by_definition() -> bool:
    """Are we within `definitions()`?"""
    return _by_definition


def memory_format(device: torch.device) -> torch.memory_format:
    """How a U-Net's images lie in memory on a device.

    NHWC, which tensor cores want, and oneDNN by 3 to 10 %; the norms are ours, so nothing transposes. On a CPU whose norm
    was not compiled NCHW: there PyTorch's GroupNorm loses in NHWC twice what convolutions gain.
    """
    return torch.channels_last if device.type == "cuda" or native.used() else torch.contiguous_format


def in_memory_format(x: Tensor) -> Tensor:
    """x [N, C, H, W] in its device's memory format; copies only what lies differently."""
    return x.contiguous(memory_format=memory_format(x.device))


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, **given: Any) -> Tensor:
    """kernels.norm_silu, or its definition within `definitions()`."""
    return (plain if by_definition() else kernels.norm_silu)(x, weight, bias, groups, eps, **given)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *, frozen: bool, stride: int = 1, padding: int = 0) -> Tensor:
    """A convolution of [N, C, H, W]; a weight with one input channel is applied to each channel of x.

    `frozen`: weight and bias want no gradient; then nothing but the weight is kept for backward.
    """
    groups = x.shape[1] // weight.shape[1]
    if _keeps_nothing(x, frozen):
        return _FixedConv.apply(x, weight, bias, stride, padding, groups, False)
    return F.conv2d(x, weight, bias, stride, padding, groups=groups)


def upsample(x: Tensor, filters: Tensor, padding: int) -> Tensor:
    """Each channel of x [N, C, H, W] up by 2 with fixed filters [C, 1, k, k]."""
    if _keeps_nothing(x, True):
        return _FixedConv.apply(x, filters, None, 2, padding, x.shape[1], True)
    return F.conv_transpose2d(x, filters, groups=x.shape[1], stride=2, padding=padding)


def average_pool(x: Tensor) -> Tensor:
    """Means of 2x2 pixels: [N, C, H, W] -> [N, C, H/2, W/2]; keeps nothing."""
    return _AveragePool.apply(x) if _keeps_nothing(x, True) else F.avg_pool2d(x, 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v for [N, heads, S, d].

    GPU: SDPA. CPU: two matrix products; there SDPA's fused backward takes 2 to 5 times as long in bfloat16, and its
    other way does bfloat16 in float32.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


# --- Without autograd, for engine/nets/block.py -----------------------------------------------------------------------------


def fuses(x: Tensor) -> bool:
    """Does a residual block of x run as one node of autograd? Compilers and those who ask for `definitions()` see its layers."""
    if by_definition() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return memory_format(x.device) is torch.channels_last and in_one_op(x)


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, C, H, W] * weight [O, C, 3, 3], padded by 1."""
    return conv.forward(x, weight) if conv.takes(x, weight) else in_memory_format(F.conv2d(x, weight, None, 1, 1))


def convolved_residual(x: Tensor, weight: Tensor, skip: Tensor, bias: Tensor, skip_bias: Tensor | None, scale: float) -> Tensor:
    """(x * weight + bias + skip + skip_bias)·scale."""
    if conv.takes(x, weight):
        return conv.forward(x, weight, bias if skip_bias is None else bias + skip_bias, skip, scale)
    return residual(convolved(x, weight), skip, bias, skip_bias, scale)


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """Of `convolved`."""
    return conv.input_grad(dy, weight) if conv.takes(dy, weight) else in_memory_format(F.conv_transpose2d(dy, weight, None, 1, 1))


def weight_gradient(x: Tensor, dy: Tensor, weight: Tensor, factor: float) -> Tensor:
    """Of `convolved`, times a factor."""
    if conv.takes(x, weight):
        return conv.weight_grad(x, dy, factor, like=weight)
    dweight = torch.ops.aten.convolution_backward(dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])[1]
    return dweight if factor == 1 else dweight.mul_(factor)


def mixed(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution [O, C, 1, 1] as a matrix product."""
    return image(rows(x) @ weight.flatten(1).T, x)


def mixing_gradient(x: Tensor, dy: Tensor, weight: Tensor, factor: float) -> Tensor:
    """Of `mixed` to its weight, times a factor."""
    dweight = (rows(dy).T @ rows(x)).view(weight.shape)
    return dweight if factor == 1 else dweight.mul_(factor)


def rows(x: Tensor) -> Tensor:
    """[N, C, H, W] that lies as NHWC -> [NHW, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def image(rows: Tensor, like: Tensor) -> Tensor:
    """The opposite, with the sides of `like`."""
    n, _, height, width = like.shape
    return rows.view(n, height, width, -1).permute(0, 3, 1, 2)


def resampled(x: Tensor, layer: Any) -> Tensor:
    """x resampled by 2 as a layers.Conv2d does before it convolves."""
    if layer.resample_filter is None:
        return x
    if layer.box:
        return _doubled(x) if layer.up else F.avg_pool2d(x, 2)
    filters = layer.filters(x)
    padding = (filters.shape[-1] - 1) // 2
    convolve = F.conv_transpose2d if layer.up else F.conv2d
    return in_memory_format(convolve(x, filters, None, 2, padding, groups=x.shape[1]))


def resampled_gradient(dy: Tensor, layer: Any) -> tuple[Tensor, float]:
    """Of `resampled`, but for a factor."""
    if layer.resample_filter is None:
        return dy, 1.0
    if layer.box:
        return (F.avg_pool2d(dy, 2), 4.0) if layer.up else (_doubled(dy), 0.25)
    filters = layer.filters(dy)
    padding = (filters.shape[-1] - 1) // 2
    convolve = F.conv2d if layer.up else F.conv_transpose2d
    return in_memory_format(convolve(dy, filters, None, 2, padding, groups=dy.shape[1])), 1.0


def _doubled(x: Tensor) -> Tensor:
    """Every pixel four times."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _keeps_nothing(x: Tensor, frozen: bool) -> bool:
    return frozen and x.requires_grad and torch.is_grad_enabled() and not by_definition()


class _FixedConv(Function):
    """A convolution, or its transpose, by a constant weight. The gradient to x is the other of the two, of dy."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, groups, transposed):
        ctx.save_for_backward(weight)
        ctx.given, ctx.transposed, ctx.sides = (stride, padding, groups), transposed, x.shape[2:]
        if transposed:
            return F.conv_transpose2d(x, weight, bias, stride, padding, 0, groups)
        return F.conv2d(x, weight, bias, stride, padding, 1, groups)

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        stride, padding, groups = ctx.given
        if ctx.transposed:
            return F.conv2d(dy, weight, None, stride, padding, 1, groups), *[None] * 6
        k = weight.shape[-1]
        lost = [side - ((out - 1) * stride + k - 2 * padding) for side, out in zip(ctx.sides, dy.shape[2:], strict=True)]
        return F.conv_transpose2d(dy, weight, None, stride, padding, lost, groups), *[None] * 6


class _AveragePool(Function):
    """avg_pool2d(x, 2), which would keep x for its shape."""

    @staticmethod
    def forward(ctx, x):
        return F.avg_pool2d(x, 2)

    @staticmethod
    def backward(ctx, dy):
        return F.interpolate(dy / 4, scale_factor=2, mode="nearest")
