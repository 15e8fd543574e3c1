"""GroupNorm, the embedding's scale and shift, SiLU and dropout in one op, on NHWC and NCHW, forward and backward.

    xhat = (x + add - mean) / sqrt(var + eps)        mean, var over H, W and the channels of a group
    h = (weight·xhat + bias)·(1 + scale) + shift     y = h·sigmoid(h)·kept/(1 - dropout)

Forward reads x and writes y; backward reads x and dy and writes dx; images of up to 16384 (8192) numbers per program are
read once, larger ones twice, the second time mostly from L2. Sums are float32. Kept for backward: x itself, and mean and
1/std [N, G]; h and the mask are computed again. Where weight and bias are frozen nothing is kept or computed for their gradients.
CPU: the C++ of csrc/ (kernels/native.py) on NHWC images, the definition, `plain`, on what that does not take.

For who writes the backward of a whole block (engine/nets/block.py), the op of the backward does three things more:
    dx = (gradient of dy_factor·dy) + skip_factor·skip       and y once more, which a convolution's weight gradient reads;
    and an NHWC dx in two images, of the channels before and from `split` on, of which x was put together
Source of the op: arXiv 2006.11239 (DDPM's norm), arXiv 2105.05233 (ADM's scale and shift).
"""

from functools import partial

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from potstill.kernels import _norm, cuda, native
from potstill.kernels._inference import takes_inference_tensors
from potstill.kernels._lib import define
from potstill.kernels._loss import uses_reference
from potstill.kernels._norm import gradients, outputs, threshold


def _compiled_forward(built, x, weight, bias, scale, shift, add, groups, eps, silu, dropout, key):
    """By the C++ of csrc/: `built` is the module that loads it, kernels.cuda or kernels.native."""
    out = outputs(x, groups)
    if x.numel():
        built.library().norm_silu(x, weight, bias, scale, shift, add, groups, eps, silu, dropout, key, *out)
    return out


def _cpu_backward(dy, x, mean, rstd, *given):
    *given, again, wanted, split = given
    dx, *out, y, _ = gradients(x, given[:5], again, wanted, 0)
    room = [t if want else None for t, want in zip((*out, y), (wanted[0], *wanted, again), strict=True)]
    native.library().norm_silu_grad(dy, x, mean, rstd, *given, dx, *room)
    return _split(dx, split, *out, y)


def _cuda_backward(dy, x, mean, rstd, *given):
    *given, again, wanted, split = given
    weight, bias, scale, *_ = given
    dx, *out, y, _ = gradients(x, given[:5], again, wanted, 0)
    if x.numel() == 0:
        return _split(dx, split, *(t.zero_() for t in out), y)
    sums = mean.new_empty(2, *x.shape[:2])
    cuda.library().norm_silu_grad(dy, x, mean, rstd, *given, dx, sums, out[4] if wanted[3] else None, y if again else None)
    if any(wanted[:3]):
        cuda.library().norm_silu_parameters(sums, weight, bias, scale, *(t if t.numel() else None for t in out[:4]))
    return _split(dx, split, *out, y)


def _split(dx, split, *others):
    """dx in two images where that is asked for, as Triton writes it."""
    if not split:
        return dx, *others, dx.new_empty(0)
    left, right = (t.contiguous(memory_format=torch.channels_last) for t in (dx[:, :split], dx[:, split:]))
    return left, *others, right


def _backward_shapes(dy, x, mean, rstd, *given):
    again, wanted, split = given[-3:]
    return tuple(gradients(x, given[:5], again, wanted, split))


_GIVEN = "Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor? add, int groups"
forward_op = define(
    f"norm_silu(Tensor x, {_GIVEN}, float eps, bool silu, float dropout, Tensor? key) -> (Tensor, Tensor, Tensor)",
    launchers={"triton": _norm.forward, "cuda": partial(_compiled_forward, cuda)},
    shapes=lambda x, weight, bias, scale, shift, add, groups, *_: outputs(x, groups),
    cpu=partial(_compiled_forward, native),
)
backward_op = define(
    f"norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, {_GIVEN}, bool silu, float dropout, Tensor? key, "
    "float dy_factor, Tensor? skip, float skip_factor, bool again, bool[4] wanted, int split)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launchers={"triton": _norm.backward, "cuda": _cuda_backward},
    shapes=_backward_shapes,
    cpu=_cpu_backward,
)


class _NormSilu(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, add, key, groups, eps, silu, dropout):
        y, mean, rstd = forward_op(x, weight, bias, scale, shift, add, groups, eps, silu, dropout, key)
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift, add, key)
        ctx.options = groups, silu, dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *rest, key = ctx.saved_tensors
        dy = dy.contiguous(memory_format=_format(x))  # .sum() sends a stride-0 gradient
        _, weight, bias, *each = ctx.needs_input_grad[:6]
        wanted = [weight or bias, *each]
        dx, *others, _, _ = backward_op(dy, x, *rest, *ctx.options, key, 1.0, None, 1.0, False, wanted, 0)
        others = [t if need else None for t, need in zip(others, (weight, bias, *each), strict=True)]
        return dx, *others, None, None, None, None, None


class _Recomputed(Function):
    """The definition, computed again in backward: what is kept is the arguments."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, add, key, *options):
        ctx.save_for_backward(x, weight, bias, scale, shift, add, key)
        ctx.options = options
        return _positional(x, weight, bias, scale, shift, add, key, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        given = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)]
        with torch.enable_grad():
            y = _positional(*given, *ctx.options)
        found = iter(torch.autograd.grad(y, [t for t in given if t is not None and t.requires_grad], dy))
        return *(next(found) if needed else None for needed in ctx.needs_input_grad[:6]), None, None, None, None, None


def in_one_op(x: Tensor) -> bool:
    """Is there a kernel for x, or is the definition what runs?"""
    return native.takes(x) or not uses_reference("norm_silu", x)


def _positional(x, weight, bias, scale, shift, add, key, groups, eps, silu, dropout):
    return plain(x, weight, bias, groups, eps, scale=scale, shift=shift, add=add, silu=silu, dropout=dropout, key=key)


def _format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


@takes_inference_tensors
def norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    silu: bool = True,
    dropout: float = 0.0,
    key: Tensor | None = None,
) -> Tensor:
    """h = GroupNorm(x + add)·(1 + scale) + shift, then SiLU: an image like x, in x's dtype and memory format.

    ADM passes scale and shift, DDPM++ passes add. Differentiable in every tensor, once: for a second derivative there
    is `plain`. Where weight and bias do not require a gradient, nothing is computed for theirs.

    Args:
        x: [N, C, H, W], any floating dtype, NCHW or channels-last. Statistics are taken in float32.
        weight, bias: [C].
        groups: number of groups, a divisor of C.
        eps: added to the variance.
        scale, shift, add: [N, C], from the embedding.
        silu: False leaves out the SiLU.
        dropout: the part of y, in [0, 1), that becomes 0 while the rest is divided by 1 - dropout.
        key: [1] int64 on x's device, which fixes the mask (`kept`): another random number for every call. Wanted with dropout.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit.
    """
    # A graph for other programs holds PyTorch's own operations. PyTorch 2.11 calls what it compiles exporting as well.
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return plain(x, weight, bias, groups, eps, scale=scale, shift=shift, add=add, silu=silu, dropout=dropout, key=key)
    _check(x, weight, bias, groups, scale, shift, add)
    _check_dropout(x, dropout, key)
    if not in_one_op(x):
        if torch.compiler.is_compiling():  # torch.compile itself decides what it computes again
            return plain(x, weight, bias, groups, eps, scale=scale, shift=shift, add=add, silu=silu, dropout=dropout, key=key)
        return _Recomputed.apply(x, weight, bias, scale, shift, add, key, groups, eps, silu, dropout)
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    scale, shift, add = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (scale, shift, add))
    return _NormSilu.apply(x, weight.contiguous(), bias.contiguous(), scale, shift, add, key, groups, eps, silu, dropout)


@takes_inference_tensors
def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    silu: bool = True,
    dropout: float = 0.0,
    key: Tensor | None = None,
) -> Tensor:
    """The definition of norm_silu, in PyTorch's own operations."""
    if add is not None:
        x = x + add[:, :, None, None].to(x.dtype)
    h = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None:
        h = h * (1 + scale[:, :, None, None].to(x.dtype))
    if shift is not None:
        h = h + shift[:, :, None, None].to(x.dtype)
    h = F.silu(h) if silu else h
    return h if key is None or not dropout else torch.where(kept(key, h.shape, dropout), h / (1 - dropout), 0)


def kept(key: Tensor, shape: torch.Size, dropout: float) -> Tensor:
    """What dropout leaves of an image [N, C, H, W], as booleans of that shape: a function of (key [1] int64, shape, dropout).

    One 32-bit number a value, hashed from its place in NHWC order and the key's two halves: Wellons' `lowbias32` with the
    second half added in the middle (https://nullprogram.com/blog/2018/07/31/). A value stays where it is at least dropout·2^32.
    """
    n, c, height, width = shape
    place = torch.arange(n * c * height * width, device=key.device).view(n, height, width, c).permute(0, 3, 1, 2)
    low, high = key & _32, (key >> 32) & _32
    bits = (place & _32) ^ low
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D & _32  # int64 wraps, and its low half is right
    bits = ((bits ^ (bits >> 15)) + high) & _32
    return (bits * 0x846CA68B & _32) >= threshold(dropout)


_32 = 0xFFFFFFFF  # also the largest number of 32 bits


def _check_dropout(x: Tensor, dropout: float, key: Tensor | None) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"norm_silu: wanted dropout in [0, 1), got {dropout}")
    if dropout and (key is None or key.shape != (1,) or key.dtype is not torch.int64 or key.device != x.device):
        got = "none" if key is None else f"{key.dtype} {tuple(key.shape)} on {key.device}"
        raise ValueError(f"norm_silu: wanted with dropout a key [1] in int64 on {x.device}, got {got}")


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, *modulation: Tensor | None) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"norm_silu: wanted a floating x [N, C, H, W], got {x.dtype} {tuple(x.shape)}")
    n, c = x.shape[:2]
    if groups < 1 or c % groups:
        raise ValueError(f"norm_silu: wanted groups to divide C = {c} of x, got {groups}")
    wanted = [("weight", weight, (c,)), ("bias", bias, (c,))]
    wanted += [(name, t, (n, c)) for name, t in zip(("scale", "shift", "add"), modulation, strict=True)]
    for name, t, shape in wanted:
        if t is None:
            continue
        if t.shape != shape or t.device != x.device or not t.is_floating_point():
            raise ValueError(
                f"norm_silu: wanted a floating {name} {shape} on {x.device} for x {tuple(x.shape)}, "
                f"got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
