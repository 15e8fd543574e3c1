"""A residual block as one node of autograd: what layers.UNetBlock computes up to its attention, forward and backward written out.

    h0 = silu(norm0(x))                                   c0 = conv0(resample(h0)), without its bias
    h1 = dropout(silu(norm1(c0 + bias0 + add)·(1 + scale) + shift))
    y  = (conv1(h1) + bias1 + skip(x) + bias_skip)·s

Kept for backward: x, c0, the statistics of the norms, and h1 where conv1 trains; h0, which conv0's weight gradient reads, comes
out of norm0's backward once more. No bias, sum or scale has a pass of its own but the last line, and in backward the sum of the
biases' gradient: bias0 is a part of norm1's `add`, s goes into both norms' factors, the skip's gradient into norm0's dx.
On a CPU the same is written in C++ (csrc/block_cpu.cpp): a call for each step took longer than a step of few pixels.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from potstill.engine.nets import ops
from potstill.engine.nets.shadow import in_dtype
from potstill.kernels import conv, native
from potstill.kernels.estimate import accum
from potstill.kernels.norm_silu import backward_op, forward_op


def residual_block(block: Any, x: Tensor, beside: Tensor | None, params: Tensor, key: Tensor | None) -> Tensor:
    """The block's output before its attention.

    Args:
        block: a layers.UNetBlock.
        x: [N, C, H, W], for which ops.fuses(x) holds.
        beside: the channels that follow x's in what the block reads, or None.
        params: [N, C'] that norm1 adds, conv0's bias and the embedding's part; or the embedding's scale and shift, [N, 2C'].
        key: of the dropout, or None.

    Raises:
        ValueError: params or beside are not for these images.
    """
    norm0, norm1, conv0, conv1, skip = block.norm0, block.norm1, block.conv0, block.conv1, block.skip
    if len(params) != len(x):
        raise ValueError(f"wanted a noise level and conditions for each of {len(x)} images, got {len(params)}")
    if beside is not None:
        if len(beside) != len(x) or beside.shape[2:] != x.shape[2:]:
            raise ValueError(f"wanted channels beside those of {list(x.shape)}, got {list(beside.shape)}")
        beside = ops.in_memory_format(beside)
    weight0, weight1, weight_s = conv0.weight, conv1.weight, None if skip is None else skip.weight
    function = _InOneOp if _in_one_op(x, conv0, weight0, weight1, weight_s) else _Residual
    return function.apply(
        block, key, x, beside, params, norm0.weight, norm0.bias, norm1.weight, norm1.bias,
        weight0, conv0.bias if block.adaptive_scale else None, weight1, conv1.bias, weight_s, None if skip is None else skip.bias,
    )  # fmt: skip


def _in_one_op(x: Tensor, layer: Any, weight0: Tensor, weight1: Tensor, weight_s: Tensor | None) -> bool:
    """Does csrc/block_cpu.cpp take the block, and is it faster there? It knows float32 and resampling with a box."""
    if not (x.is_cpu and native.used() and conv.takes_weight(weight0) and conv.takes_weight(weight1)):
        return False
    if x.dtype is not torch.float32 or (weight_s is not None and weight_s.dtype is not torch.float32):
        return False
    way = layer.up - layer.down
    height, width = (int(side * 2.0**way) for side in x.shape[2:])
    return (layer.box or not way) and conv.takes_sides(height, width)


@cache
def _in_cpp() -> tuple[Any, Any]:
    library = native.library()
    return library.residual_block.default, library.residual_block_grad.default


class _InOneOp(Function):
    """_Residual for float32 on a CPU, one call of C++ for each direction. h1 comes out of norm1's backward, as h0 does."""

    @staticmethod
    def forward(ctx, block, key, x, beside, params, gain0, offset0, gain1, offset1, weight0, bias0, weight1, bias1, weight_s, bias_s):
        norm0, norm1, conv0 = block.norm0, block.norm1, block.conv0
        dropout = 0.0 if key is None else block.dropout
        ctx.options = options = dropout, norm0.groups, norm1.groups, block.skip_scale, conv0.up - conv0.down
        ctx.own = x.shape[1]
        y, c0, mean0, rstd0, mean1, rstd1, both = _in_cpp()[0](
            x, beside, params, gain0, offset0, gain1, offset1, weight0, bias0, weight1, bias1, weight_s, bias_s, key,
            norm0.eps, norm1.eps, *options,
        )  # fmt: skip
        x = x if both is None else both
        ctx.save_for_backward(
            x, c0, mean0, rstd0, mean1, rstd1, params, gain0, offset0, gain1, offset1, weight0, bias0, weight1, weight_s, key
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        given = ops.in_memory_format(dy), *ctx.saved_tensors, *ctx.options, ctx.own
        return None, None, *native.gradients(_in_cpp()[1], ctx.needs_input_grad[2:], *given)


_INPUTS = (
    "block", "key", "x", "beside", "params", "gain0", "offset0", "gain1", "offset1", "weight0", "bias0", "weight1", "bias1",
    "weight_s", "bias_s",
)  # fmt: skip


class _Residual(Function):
    @staticmethod
    def forward(ctx, block, key, x, beside, params, gain0, offset0, gain1, offset1, weight0, bias0, weight1, bias1, weight_s, bias_s):
        ctx.own, ctx.weight1_trains = x.shape[1], weight1.requires_grad
        weight0, weight1 = in_dtype(weight0, x.dtype), in_dtype(weight1, x.dtype)
        weight_s = None if weight_s is None else in_dtype(weight_s, x.dtype)
        norm0, norm1, s = block.norm0, block.norm1, block.skip_scale
        dropout = 0.0 if key is None else block.dropout
        x = x if beside is None else torch.cat([x, beside], 1)
        h0, mean0, rstd0 = forward_op(x, gain0, offset0, None, None, None, norm0.groups, norm0.eps, True, 0.0, None)
        c0 = ops.convolved(ops.resampled(h0, block.conv0), weight0)
        scale, shift, add = _modulation(params, bias0)
        h1, mean1, rstd1 = forward_op(c0, gain1, offset1, scale, shift, add, norm1.groups, norm1.eps, True, dropout, key)
        y = ops.convolved_residual(h1, weight1, _skip(block, x, weight_s), bias1, bias_s, s)
        ctx.block, ctx.dropout = block, dropout
        kept = h1 if ctx.weight1_trains else None
        ctx.save_for_backward(
            x, c0, kept, mean0, rstd0, mean1, rstd1, params, key, gain0, offset0, gain1, offset1, weight0, bias0, weight1, weight_s
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        x, c0, h1, mean0, rstd0, mean1, rstd1, params, key, gain0, offset0, gain1, offset1, weight0, bias0, weight1, weight_s = (
            ctx.saved_tensors
        )
        needs = dict(zip(_INPUTS, ctx.needs_input_grad, strict=True))
        block, s, found = ctx.block, ctx.block.skip_scale, dict.fromkeys(_INPUTS)
        dy = ops.in_memory_format(dy)
        if needs["bias1"] or needs["bias_s"]:
            found["bias1"] = dy.sum((0, 2, 3), dtype=accum(dy)) * s
            found["bias_s"] = found["bias1"].clone() if needs["bias_s"] else None  # clipping writes to each
        if needs["weight1"]:
            found["weight1"] = ops.weight_gradient(h1, dy, weight1, s)

        scale, shift, add = _modulation(params, bias0)
        adaptive = scale is not None
        wanted = [
            needs["gain1"] or needs["offset1"],
            adaptive and needs["params"],
            adaptive and needs["params"],
            needs["bias0" if adaptive else "params"],
        ]
        dc0, found["gain1"], found["offset1"], dscale, dshift, dadd, _, _ = backward_op(
            ops.input_gradient(dy, weight1), c0, mean1, rstd1, gain1, offset1, scale, shift, add, block.norm1.groups, True, ctx.dropout, key,
            s, None, 1.0, False, wanted, 0,
        )  # fmt: skip
        if needs["bias0"]:
            found["bias0"] = dadd.sum(0)
        if needs["params"]:
            found["params"] = torch.cat([dscale, dshift], 1) if adaptive else dadd

        dh0, factor0 = ops.resampled_gradient(ops.input_gradient(dc0, weight0), block.conv0)
        dskip, factor_s, found["weight_s"] = _skip_gradient(block, x, dy, weight_s, needs["weight_s"])
        wanted = [needs["gain0"] or needs["offset0"], False, False, False]
        found["x"], found["gain0"], found["offset0"], _, _, _, h0, found["beside"] = backward_op(
            dh0, x, mean0, rstd0, gain0, offset0, None, None, None, block.norm0.groups, True, 0.0, None,
            factor0, dskip, factor_s * s, needs["weight0"], wanted, 0 if ctx.own == x.shape[1] else ctx.own,
        )  # fmt: skip
        if needs["weight0"]:
            found["weight0"] = ops.weight_gradient(ops.resampled(h0, block.conv0), dc0, weight0, 1.0)
        return tuple(found[name] if needs[name] else None for name in _INPUTS)


def _modulation(params: Tensor, bias0: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """norm1's scale, shift and add [N, C]. ADM has scale and shift, and adds conv0's bias."""
    if bias0 is None:
        return None, None, params
    scale, shift = params.chunk(2, dim=1)
    return scale, shift, bias0.expand(len(params), -1)


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
