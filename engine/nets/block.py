"""A residual block as one node of autograd: what layers.UNetBlock computes up to its attention, forward and backward written out.

    h0 = silu(norm0(x))                                   c0 = conv0(resample(h0)), without its bias
    h1 = dropout(silu(norm1(c0 + bias0 + add)·(1 + scale) + shift))
    y  = (conv1(h1) + bias1 + skip(x) + bias_skip)·s

Kept for backward: x, c0 and the statistics of the norms; h0 and h1, which the convolutions' weight gradients read, come out of
the norms' backward once more. No bias, sum or scale has a pass of its own but the last line, and in backward the sum of the
biases' gradient: bias0 is a part of norm1's `add`, s goes into both norms' factors, the skip's gradient into norm0's dx.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from potstill.engine.nets import ops
from potstill.engine.nets.shadow import in_dtype
from potstill.kernels.estimate import accum
from potstill.kernels.norm_silu import backward_op, forward_op


def residual_block(block: Any, x: Tensor, params: Tensor, key: Tensor | None) -> Tensor:
    """The block's output before its attention.

    Args:
        block: a layers.UNetBlock.
        x: [N, C, H, W], for which ops.fuses(x) holds.
        params: the embedding's [N, C'] that norm1 adds, or [N, 2C'], its scale and shift.
        key: of the dropout, or None.
    """
    x = ops.in_memory_format(x)
    norm0, norm1 = block.norm0, block.norm1
    skip = (None, None) if block.skip is None else (block.skip.weight, block.skip.bias)
    convs = (block.conv0.weight, block.conv0.bias, block.conv1.weight, block.conv1.bias)
    return _Residual.apply(block, key, x, params, norm0.weight, norm0.bias, norm1.weight, norm1.bias, *convs, *skip)  # pyright: ignore[reportReturnType]


class _Residual(Function):
    @staticmethod
    def forward(ctx, block, key, x, params, gain0, offset0, gain1, offset1, weight0, bias0, weight1, bias1, weight_s, bias_s):
        weight0, weight1, weight_s = (None if w is None else in_dtype(w, x.dtype) for w in (weight0, weight1, weight_s))
        norm0, norm1, s = block.norm0, block.norm1, block.skip_scale
        dropout = 0.0 if key is None else block.dropout
        h0, mean0, rstd0 = forward_op(x, gain0, offset0, None, None, None, norm0.groups, norm0.eps, True, 0.0, None)
        c0 = ops.convolved(ops.resampled(h0, block.conv0), weight0)
        scale, shift, add = _modulation(block, params, bias0)
        h1, mean1, rstd1 = forward_op(c0, gain1, offset1, scale, shift, add, norm1.groups, norm1.eps, True, dropout, key)
        y = ops.convolved_residual(h1, weight1, _skip(block, x, weight_s), bias1, bias_s, s)
        ctx.block, ctx.dropout = block, dropout
        ctx.save_for_backward(x, c0, mean0, rstd0, mean1, rstd1, params, key, gain0, offset0, gain1, offset1, weight0, bias0, weight1, weight_s)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        x, c0, mean0, rstd0, mean1, rstd1, params, key, gain0, offset0, gain1, offset1, weight0, bias0, weight1, weight_s = ctx.saved_tensors
        needs = dict(zip(_INPUTS, ctx.needs_input_grad, strict=True))
        block, s, found = ctx.block, ctx.block.skip_scale, dict.fromkeys(_INPUTS)
        dy = ops.in_memory_format(dy)
        if needs["bias1"] or needs["bias_s"]:
            found["bias1"] = found["bias_s"] = dy.sum((0, 2, 3), dtype=accum(dy)) * s

        scale, shift, add = _modulation(block, params, bias0)
        modulated = needs["params"] and scale is not None
        wanted = [needs["gain1"] or needs["offset1"], modulated, modulated, needs["params"] and scale is None or needs["bias0"]]
        dc0, found["gain1"], found["offset1"], dscale, dshift, dadd, h1 = backward_op(
            ops.input_gradient(dy, weight1), c0, mean1, rstd1, gain1, offset1, scale, shift, add, block.norm1.groups, True, ctx.dropout, key,
            s, None, 1.0, needs["weight1"], wanted,
        )  # fmt: skip
        if needs["weight1"]:
            found["weight1"] = ops.weight_gradient(h1, dy, weight1, s)
        del h1
        if needs["bias0"]:
            found["bias0"] = dadd.sum(0)
        if needs["params"]:
            found["params"] = dadd if scale is None else torch.cat([dscale, dshift], 1)

        dh0, factor0 = ops.resampled_gradient(ops.input_gradient(dc0, weight0), block.conv0)
        dskip, factor_s, found["weight_s"] = _skip_gradient(block, x, dy, weight_s, needs["weight_s"])
        wanted = [needs["gain0"] or needs["offset0"], False, False, False]
        found["x"], found["gain0"], found["offset0"], _, _, _, h0 = backward_op(
            dh0, x, mean0, rstd0, gain0, offset0, None, None, None, block.norm0.groups, True, 0.0, None,
            factor0, dskip, factor_s * s, needs["weight0"], wanted,
        )  # fmt: skip
        if needs["weight0"]:
            found["weight0"] = ops.weight_gradient(ops.resampled(h0, block.conv0), dc0, weight0, 1.0)
        return tuple(found[name] if needs[name] else None for name in _INPUTS)


_INPUTS = (
    "block", "key", "x", "params", "gain0", "offset0", "gain1", "offset1", "weight0", "bias0", "weight1", "bias1", "weight_s", "bias_s",
)  # fmt: skip


def _modulation(block: Any, params: Tensor, bias0: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """norm1's scale, shift and add [N, C]; conv0's bias is added there."""
    if block.adaptive_scale:
        scale, shift = params.chunk(2, dim=1)
        return scale, shift, bias0.expand(len(params), -1)
    return None, None, params + bias0


def _skip(block: Any, x: Tensor, weight: Tensor | None) -> Tensor:
    """The skip path without its bias. A 1x1 convolution and nearest neighbours change places, for a quarter of the work."""
    if (layer := block.skip) is None:
        return x
    if weight is None:
        return ops.resampled(x, layer)
    return ops.resampled(ops.mixed(x, weight), layer) if layer.up else ops.mixed(ops.resampled(x, layer), weight)


def _skip_gradient(block: Any, x: Tensor, dy: Tensor, weight: Tensor | None, trains: bool) -> tuple[Tensor, float, Tensor | None]:
    """From the gradient to y/s: that to x with a factor, and that to the weight, s included."""
    if (layer := block.skip) is None:
        return dy, 1.0, None
    if weight is None:
        return *ops.resampled_gradient(dy, layer), None
    s = block.skip_scale
    if layer.up:
        low, factor = ops.resampled_gradient(dy, layer)
        return ops.mixed(low, weight.transpose(0, 1)), factor, ops.mixing_gradient(x, low, weight, s * factor) if trains else None
    dweight = ops.mixing_gradient(ops.resampled(x, layer), dy, weight, s) if trains else None
    return *ops.resampled_gradient(ops.mixed(dy, weight.transpose(0, 1)), layer), dweight


def normed_and_skip(x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """GroupNorm of x, and x itself as what the skip path takes: their gradients meet in the norm's backward."""
    return _NormedAndSkip.apply(x, norm.weight, norm.bias, norm.groups, norm.eps)  # pyright: ignore[reportReturnType]


class _NormedAndSkip(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        y, mean, rstd = forward_op(x, weight, bias, None, None, None, groups, eps, False, 0.0, None)
        ctx.groups = groups
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dx: Tensor):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        _, gain, offset, *_ = ctx.needs_input_grad
        found = backward_op(
            ops.in_memory_format(dy), x, mean, rstd, weight, bias, None, None, None, ctx.groups, False, 0.0, None,
            1.0, ops.in_memory_format(dx), 1.0, False, [gain or offset, False, False, False],
        )  # fmt: skip
        return found[0], found[1] if gain else None, found[2] if offset else None, None, None
