"""norm_silu on CPU tensors that csrc's C++ does not take, in PyTorch's operations: how these are fastest in each memory format
(CPU time of one thread, 32 to 256 channels, 4 to 64 pixels a side).

NCHW: PyTorch's own GroupNorm in both directions, h computed again in between (`rows`).
16-bit channels-last: a few samples at a time, so that every pass but the first finds them in cache. PyTorch's forward takes
2 to 4 times as long as this on images below 32 x 32, and its backward 1.3 to 4 times on all.
32-bit channels-last: the definition, in kernels/norm_silu.py.
Sums are float32, float64 for float64 tensors.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from potstill.kernels.estimate import accum

_BLOCK = 1 << 17  # numbers at a time: 512 KB in float32
_PYTORCH_IS_FAST = 1024  # pixels: from here on its channels-last forward takes another way


class Norm(NamedTuple):
    """The parameters of one norm, and the shape of what it works on."""

    weight: Tensor  # [C]
    bias: Tensor  # [C]
    scale: Tensor | None  # [N, C]
    shift: Tensor | None  # [N, C]
    add: Tensor | None  # [N, C]
    groups: int
    silu: bool


def _pixels(x: Tensor) -> tuple[Tensor, int]:
    """x [N, C, H, W] as [N, H·W, C] or [N, C, H·W], as it lies in memory, and which axis the pixels are."""
    if x.is_contiguous():
        return x.flatten(2), 2
    return x.permute(0, 2, 3, 1).flatten(1, 2), 1


def _blocks(x: Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, x[:1].numel()))
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))


def _group_mean(v_nc: Tensor, groups: int, hw: int) -> Tensor:
    """Sums over pixels [n, C] -> means over pixels and the channels of a group [n, G]."""
    n, c = v_nc.shape
    return v_nc.view(n, groups, c // groups).sum(2) / (c // groups * hw)


def _affine(norm: Norm, n: slice, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """gain, offset [n, C] of h = gain·(x - mean) + offset."""
    dtype = rstd.dtype
    gain, offset = rstd * norm.weight.to(dtype), norm.bias.to(dtype).expand_as(rstd)
    if norm.scale is not None:
        factor = 1 + norm.scale[n].to(dtype)
        gain, offset = gain * factor, offset * factor
    return gain, offset if norm.shift is None else offset + norm.shift[n].to(dtype)


def forward(x: Tensor, norm: Norm, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, and mean and 1/std [N, G]."""
    if x.element_size() == 2 and x.shape[2:].numel() >= _PYTORCH_IS_FAST:
        return _pytorch_forward(x, norm, eps)
    groups, hw, k = norm.groups, x.shape[2:].numel(), x.shape[1] // norm.groups
    y = torch.empty_like(x)
    (xs, axis), (ys, _) = _pixels(x), _pixels(y)
    mean = x.new_empty(x.shape[0], groups, dtype=accum(x))
    rstd = torch.empty_like(mean)
    for n in _blocks(x):
        d = xs[n].to(mean.dtype, copy=True)
        if norm.add is not None:
            d += norm.add[n].to(d.dtype).unsqueeze(axis)
        mean[n] = _group_mean(d.sum(axis), groups, hw)
        d -= mean[n].repeat_interleave(k, 1).unsqueeze(axis)
        square = d * d
        rstd[n] = (_group_mean(square.sum(axis), groups, hw) + eps).rsqrt()
        gain, offset = _affine(norm, n, rstd[n].repeat_interleave(k, 1))
        h = torch.addcmul(offset.unsqueeze(axis), d, gain.unsqueeze(axis), out=square)
        ys[n] = F.silu(h, inplace=True) if norm.silu else h
    return y, mean, rstd


def _pytorch_forward(x: Tensor, norm: Norm, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape
    if norm.add is not None:
        x = x + norm.add[:, :, None, None].to(x.dtype)
    # float32 parameters: it then returns float32 statistics
    y, mean, rstd = torch.native_group_norm(x, norm.weight.float(), norm.bias.float(), n, c, h * w, norm.groups, eps)
    if norm.scale is not None:
        y.mul_(1 + norm.scale[:, :, None, None].to(x.dtype))
    if norm.shift is not None:
        y.add_(norm.shift[:, :, None, None].to(x.dtype))
    return F.silu(y, inplace=True) if norm.silu else y, mean, rstd


def backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x; sums over pixels of dh and dh·xhat [2, N, C]; and the gradient to add [N, C]. dy lies as x does."""
    groups, hw, (n_all, c) = norm.groups, x.shape[2:].numel(), x.shape[:2]
    dx = torch.empty_like(x)
    (xs, axis), (dys, _), (dxs, _) = _pixels(x), _pixels(dy), _pixels(dx)
    sums = mean.new_empty(2, n_all, c)
    dadd = mean.new_empty(n_all if norm.add is not None else 0, c)
    for n in _blocks(x):
        rstd_c, centre = rstd[n].repeat_interleave(c // groups, 1), mean[n].repeat_interleave(c // groups, 1)
        if norm.add is not None:
            centre = centre - norm.add[n].to(centre.dtype)
        gain, offset = _affine(norm, n, rstd_c)
        d = xs[n].to(mean.dtype, copy=True).sub_(centre.unsqueeze(axis))
        dh = dys[n].to(mean.dtype, copy=True)
        work = torch.addcmul(offset.unsqueeze(axis), d, gain.unsqueeze(axis))
        if norm.silu:
            torch.ops.aten.silu_backward.grad_input(dh, work, grad_input=dh)
        dh_c, dhd_c = dh.sum(axis), torch.mul(dh, d, out=work).sum(axis)
        sums[0, n], sums[1, n] = dh_c, dhd_c * rstd_c
        along = _group_mean(gain * dh_c, groups, hw).repeat_interleave(c // groups, 1)
        across = _group_mean(gain * dhd_c, groups, hw).repeat_interleave(c // groups, 1) * rstd_c * rstd_c
        if norm.add is not None:
            dadd[n] = gain * dh_c - hw * along - across * d.sum(axis)
        dh.mul_(gain.unsqueeze(axis)).addcmul_(d, across.unsqueeze(axis), value=-1)
        dxs[n] = dh.sub_(along.unsqueeze(axis))
    return dx, sums, dadd


def parameters(sums: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight, bias [C], scale, shift [N, C] from the sums of `backward`."""
    dh, dhx = sums
    factor = 1 if norm.scale is None else 1 + norm.scale.to(dh.dtype)
    dscale = dhx * norm.weight.to(dh.dtype) + dh * norm.bias.to(dh.dtype)
    return (dhx * factor).sum(0), (dh * factor).sum(0), dscale, dh


def rows(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
    scale: Tensor | None, shift: Tensor | None, add: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    """norm_silu of NCHW images. With scale or shift, samples times channels are the channels of one image, so that every
    sample has weights of its own. x + add is kept in place of x."""
    n, c, h, w = x.shape
    weight, bias = weight.to(accum(x)), bias.to(accum(x))
    if add is not None:
        x = x + add[:, :, None, None].to(x.dtype)
    if scale is None and shift is None:
        return _Rows.apply(x, weight, bias, groups, eps, silu)
    if scale is not None:
        factor = 1 + scale.to(weight.dtype)
        weight, bias = weight * factor, bias * factor
    weight, bias = weight.expand(n, c), bias.expand(n, c) if shift is None else bias + shift.to(weight.dtype)
    return _Rows.apply(x.view(1, n * c, h, w), weight.flatten(), bias.flatten(), n * groups, eps, silu).view(n, c, h, w)


class _Rows(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu):
        n, c, h, w = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, n, c, h * w, groups, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.groups, ctx.silu = groups, silu
        return F.silu(y, inplace=True) if silu else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        n, c, h, w = x.shape
        dh = dy.contiguous()  # .sum() sends a stride-0 gradient
        if ctx.silu:
            shape = n, ctx.groups, c // ctx.groups
            gain = rstd.unsqueeze(2) * weight.view(shape[1:])
            offset = bias.view(shape[1:]) - mean.unsqueeze(2) * gain
            zero, one = gain.new_zeros(n * c), gain.new_ones(n * c)
            # h = gain·x + offset, each row its own: a BatchNorm at rest. F.batch_norm of PyTorch 2.11 wants an eps above 0.
            flat = x.view(1, n * c, h, w)
            rest = torch.batch_norm(flat, gain.flatten(), offset.flatten(), zero, one, False, 0.0, 0.0, False)
            dh = torch.ops.aten.silu_backward(dh, rest.view_as(x))
        given = mean, rstd, weight, n, c, h * w, ctx.groups
        return *torch.ops.aten.native_group_norm_backward(dh, x, *given, list(ctx.needs_input_grad[:3])), None, None, None
