"""Self-attention over the pixels of an image, with its norm before it and its skip: (x + proj(softmax(q kᵀ/√d) v) + bias)·s.

Norm and map to q, k and v are one node of autograd, which keeps x alone: what the norm gives, and the map reads, comes out of the
norm's backward once more, and the gradient of the skip is added there. Few pixels on a CPU are one node for all of it.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from potstill.engine.nets import ops
from potstill.engine.nets.shadow import in_dtype
from potstill.kernels import native
from potstill.kernels.norm_silu import backward_op, forward_op
from potstill.kernels.residual import residual

#: Pixels for which csrc/attention_cpu.cpp is faster.
FEW = 64


def self_attention(block: Any, x: Tensor) -> Tensor:
    """What a layers.UNetBlock with heads makes of x [N, C, H, W] at its end; ops.fuses(x) holds."""
    n, c, height, width = x.shape
    norm, qkv, proj = block.norm2, block.qkv, block.proj
    if height * width <= FEW and native.takes(x) and x.dtype is qkv.weight.dtype is proj.weight.dtype is torch.float32:
        return _InOneOp.apply(block, x, norm.weight, norm.bias, qkv.weight, qkv.bias, proj.weight, proj.bias)
    q, k, v, skip = _Mapped.apply(block, x, norm.weight, norm.bias, qkv.weight, qkv.bias)
    a = ops.attention(q, k, v).transpose(1, 2).reshape(n, height * width, c)
    out = F.linear(a, in_dtype(proj.weight, x.dtype).flatten(1)).unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return residual(out, skip, proj.bias, None, block.skip_scale)


def ordered(rows: Tensor, heads: int) -> Tensor:
    """The 3C rows of a weight or bias from EDM's order, channel = (head, channel in head, {q, k, v}), to ({q, k, v}, head, channel).

    So q, k and v come out in pieces that SDPA takes without a copy.
    """
    return rows.view(heads, len(rows) // heads // 3, 3, -1).permute(2, 0, 1, 3).reshape(len(rows), -1)


def unordered(rows: Tensor, heads: int) -> Tensor:
    """The opposite."""
    return rows.view(3, heads, len(rows) // heads // 3, -1).permute(1, 2, 0, 3).reshape(len(rows), -1)


class _InOneOp(Function):
    """All of it for few pixels in float32 on a CPU, one call of C++ for each direction; keeps x and q, k, v."""

    @staticmethod
    def forward(ctx, block, x, gain, offset, weight, bias, proj, proj_bias):
        norm = block.norm2
        ctx.options = norm.groups, block.heads, block.skip_scale
        y, mean, rstd, mapped = _in_cpp()[0](
            x, gain, offset, weight, bias, proj, proj_bias, norm.groups, norm.eps, block.heads, block.skip_scale
        )
        ctx.save_for_backward(x, mean, rstd, mapped, gain, offset, weight, bias, proj)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        return None, *native.gradients(_in_cpp()[1], ctx.needs_input_grad[1:], ops.in_memory_format(dy), *ctx.saved_tensors, *ctx.options)


@cache
def _in_cpp() -> tuple[Any, Any]:
    library = native.library()
    return library.attention.default, library.attention_grad.default


class _Mapped(Function):
    """x -> q, k, v [N, heads, HW, C / heads], and x once more, for the skip."""

    @staticmethod
    def forward(ctx, block, x, gain, offset, weight, bias):
        norm, heads = block.norm2, block.heads
        n, c, height, width = x.shape
        y, mean, rstd = forward_op(x, gain, offset, None, None, None, norm.groups, norm.eps, False, 0.0, None)
        weight = in_dtype(weight, x.dtype).flatten(1)
        mapped = F.linear(ops.rows(y), ordered(weight, heads), ordered(in_dtype(bias, x.dtype), heads).flatten())
        ctx.block = block
        ctx.save_for_backward(x, mean, rstd, gain, offset, weight)
        return *mapped.view(n, height * width, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(), x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dx: Tensor):
        x, mean, rstd, gain, offset, weight = ctx.saved_tensors
        norm, heads = ctx.block.norm2, ctx.block.heads
        _, _, needs_gain, needs_offset, needs_weight, needs_bias = ctx.needs_input_grad
        d = torch.stack([g.transpose(1, 2) for g in (dq, dk, dv)], 2).view(-1, 3 * x.shape[1])
        dx, dgain, doffset, _, _, _, y, _ = backward_op(
            ops.image(d @ ordered(weight, heads), x), x, mean, rstd, gain, offset, None, None, None, norm.groups, False, 0.0, None,
            1.0, ops.in_memory_format(dx), 1.0, needs_weight, [needs_gain or needs_offset, False, False, False], 0,
        )  # fmt: skip
        dweight = unordered(d.T @ ops.rows(y), heads)[:, :, None, None] if needs_weight else None
        dbias = unordered(d.sum(0), heads).flatten() if needs_bias else None
        return None, dx, dgain if needs_gain else None, doffset if needs_offset else None, dweight, dbias
