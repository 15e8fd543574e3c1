"""The operations of EDM2's blocks on images, each in one pass forward and one backward, arithmetic in float32, rounded once.

    pixel_norm_silu   n = x/(eps + |x|/√C), |x| over the channels of a pixel;  s = silu(n)/0.596
    mp_silu           silu(x·scale)/0.596, scale [N, C], then dropout
    mp_sum            ((1 - t)·x + t·y)/√((1 - t)² + t²), no further from 0 than `clip`
    mp_cat_silu       cat[wa·a, wb·b], wa = K(1 - t)/√Ca, wb = K·t/√Cb, K = √((Ca + Cb)/((1 - t)² + t²));  s = silu(cat)/0.596

Images read and written, forward | backward, in 16 bits: by ours; by PyTorch's operations one by one; by what torch.compile makes of
those, as Inductor 2.13 schedules them for a CPU (its Triton may fuse more). Numbers per pixel or per channel of a sample are left out.

                                ours              one by one    compiled
    pixel_norm_silu             1 + 2 | 3 + 1     7 | 37        3 | 10
    pixel_norm                  1 + 1 | 2 + 1     3 | 29        2 | 3
    mp_silu, scale, dropout     1 + 1 | 2 + 1     8.5 | 13.5    3 | 6.5
    mp_sum, clip                2 + 1 | 1 + 2     7 | 13        3.5 | 3.5     ours: and the bits, 1/16 of an image each way
    mp_cat_silu                 1 + 2 | 3 + 1     8 | 10        4 | 9         a and b together are one image

Kept for backward: n, which is the block's skip, and 4 bytes a pixel; x and scale; with a clip a bit a number, and without one nothing;
cat, which the block's own 1x1 convolution reads. What dropout leaves is computed again.
Kernels read NHWC images: others are copied first, and float64 takes the definition, kernels/reference.py, as CPU tensors do.
Source of the operations: arXiv 2312.02696, Section 2 and Appendix B.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.kernels import _mp, reference
from potstill.kernels._inference import takes_inference_tensors
from potstill.kernels._lib import NAMESPACE, define
from potstill.kernels._loss import uses_reference

_pixel_norm = define(
    "pixel_norm(Tensor x, float eps, bool activated) -> (Tensor, Tensor, Tensor)",
    launchers={"triton": _mp.norm},
    shapes=_mp.norm_outputs,
)
_pixel_norm_backward = define(
    "pixel_norm_backward(Tensor? dn, Tensor? ds, Tensor n, Tensor r, float eps) -> Tensor",
    launchers={"triton": _mp.norm_grad},
    shapes=lambda dn, ds, n, r, eps: torch.empty_like(n),
)
_mp_silu = define(
    "mp_silu(Tensor x, Tensor? scale, float dropout, Tensor? key) -> Tensor",
    launchers={"triton": _mp.silu},
    shapes=lambda x, *_: torch.empty_like(x),
)
_mp_silu_backward = define(
    "mp_silu_backward(Tensor dy, Tensor x, Tensor? scale, float dropout, Tensor? key, bool[2] wanted) -> (Tensor, Tensor)",
    launchers={"triton": _mp.silu_grad},
    shapes=_mp.silu_gradients,
)
_mp_sum = define(
    "mp_sum(Tensor x, Tensor y, float t, float? clip, bool keep) -> (Tensor, Tensor)",
    launchers={"triton": _mp.weighted_sum},
    shapes=_mp.sum_outputs,
)
_mp_sum_backward = define(
    "mp_sum_backward(Tensor g, Tensor bits, float t, bool[2] wanted) -> (Tensor, Tensor)",
    launchers={"triton": _mp.weighted_sum_grad},
    shapes=_mp.sum_gradients,
)
_mp_cat_silu = define(
    "mp_cat_silu(Tensor a, Tensor b, float t) -> (Tensor, Tensor)",
    launchers={"triton": _mp.cat},
    shapes=_mp.cat_outputs,
)
_mp_cat_silu_backward = define(
    "mp_cat_silu_backward(Tensor? dcat, Tensor? ds, Tensor cat, float t, int width, bool[2] wanted) -> (Tensor, Tensor)",
    launchers={"triton": _mp.cat_grad},
    shapes=_mp.cat_gradients,
)


def _pixel_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    n, s, r = output
    ctx.eps, activated = inputs[1:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((r,) if activated else (s, r)))
    ctx.save_for_backward(n, r)


@once_differentiable
def _of_pixel_norm(ctx: Any, dn: Tensor | None, ds: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    n, r = ctx.saved_tensors
    if dn is None and ds is None:
        return None, None, None
    return _pixel_norm_backward(_like_it(dn), _like_it(ds), n, r, ctx.eps), None, None


def _mp_silu_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, ctx.dropout, key = inputs
    ctx.save_for_backward(x, scale, key)


@once_differentiable
def _of_mp_silu(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, key = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    dx, dscale = _mp_silu_backward(_like_it(dy), x, scale, ctx.dropout, key, wanted)
    return dx if wanted[0] else None, dscale if wanted[1] else None, None, None


def _mp_sum_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    bits = output[1]
    ctx.t = inputs[2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(bits)
    ctx.save_for_backward(bits)


@once_differentiable
def _of_mp_sum(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:2])
    if g is None:
        return None, None, None, None, None
    found = _mp_sum_backward(_like_it(g), *ctx.saved_tensors, ctx.t, wanted)
    return *(d if want else None for d, want in zip(found, wanted, strict=True)), None, None, None


def _mp_cat_silu_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, ctx.t = inputs
    ctx.width = a.shape[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0])


@once_differentiable
def _of_mp_cat_silu(ctx: Any, dcat: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:2])
    if dcat is None and ds is None:
        return None, None, None
    found = _mp_cat_silu_backward(_like_it(dcat), _like_it(ds), *ctx.saved_tensors, ctx.t, ctx.width, wanted)
    return *(d if want else None for d, want in zip(found, wanted, strict=True)), None


for _name, _backward, _context in (
    ("pixel_norm", _of_pixel_norm, _pixel_norm_context),
    ("mp_silu", _of_mp_silu, _mp_silu_context),
    ("mp_sum", _of_mp_sum, _mp_sum_context),
    ("mp_cat_silu", _of_mp_cat_silu, _mp_cat_silu_context),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _backward, setup_context=_context)


def _like_it(t: Any) -> Any:
    """A tensor as the kernels read it: NHWC; .sum() sends a gradient whose strides are 0. None stays."""
    return None if t is None else t.contiguous(memory_format=_mp.memory_format(t))


def _by_definition(op: str, x: Tensor) -> bool:
    """Is it float64, where there is no kernel, or in a graph for other programs, which holds PyTorch's own operations?"""
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return exporting or x.dtype is torch.float64 or uses_reference(op, x)


@takes_inference_tensors
def pixel_norm(x: Tensor, eps: float = 1e-4) -> Tensor:
    """x/(eps + |x|/√C), |x| the norm over the channels of a pixel; differentiable once.

    Args:
        x: [N, C, H, W] or [N, C], any floating dtype.
        eps: added to the root mean square.

    Raises:
        ValueError: x is not such an image.
    """
    _check("pixel_norm", "x", x)
    if _by_definition("pixel_norm", x):
        return reference.pixel_norm(x, eps)
    return _pixel_norm(_like_it(x), eps, False)[0]


@takes_inference_tensors
def pixel_norm_silu(x: Tensor, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """n = pixel_norm(x) and silu(n)/0.596, as an encoder block begins; differentiable once, also where one of the two is not used.

    Args:
        x: [N, C, H, W] or [N, C], any floating dtype.
        eps: added to the root mean square.

    Raises:
        ValueError: x is not such an image.
    """
    _check("pixel_norm_silu", "x", x)
    if _by_definition("pixel_norm", x):
        return reference.pixel_norm_silu(x, eps)
    return _pixel_norm(_like_it(x), eps, True)[:2]


@takes_inference_tensors
def mp_silu(x: Tensor, scale: Tensor | None = None, dropout: float = 0.0, key: Tensor | None = None) -> Tensor:
    """silu(x·scale)/0.596, then dropout: an image like x, differentiable once in x and scale.

    Args:
        x: [N, C, H, W] or [N, C], any floating dtype.
        scale: [N, C], any floating dtype; EDM2's is 1 + what the embedding says.
        dropout: the part of the numbers, in [0, 1), that becomes 0 while the rest is divided by 1 - dropout.
        key: [1] int64 on x's device, which fixes the mask as `norm_silu`'s does: another random number for every call. Wanted
            with dropout.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit.
    """
    _check("mp_silu", "x", x)
    if scale is not None and (scale.shape != x.shape[:2] or scale.device != x.device or not scale.is_floating_point()):
        raise ValueError(
            f"mp_silu: wanted a floating scale {tuple(x.shape[:2])} on {x.device}, got {scale.dtype} {tuple(scale.shape)} on {scale.device}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"mp_silu: wanted dropout in [0, 1), got {dropout}")
    if dropout and (key is None or key.shape != (1,) or key.dtype is not torch.int64 or key.device != x.device):
        got = "none" if key is None else f"{key.dtype} {tuple(key.shape)} on {key.device}"
        raise ValueError(f"mp_silu: wanted with dropout a key [1] in int64 on {x.device}, got {got}")
    if _by_definition("mp_silu", x):
        return reference.mp_silu(x, scale, dropout, key)
    if scale is not None and scale.stride(1) != 1:
        scale = scale.contiguous()
    return _mp_silu(_like_it(x), scale, dropout, key)


@takes_inference_tensors
def mp_sum(x: Tensor, y: Tensor, t: float, clip: float | None = None) -> Tensor:
    """((1 - t)·x + t·y)/√((1 - t)² + t²), no further from 0 than `clip`; differentiable once, with gradient 0 where it was clipped.

    Args:
        x, y: [N, C, H, W] or [N, C], of one floating dtype.
        t: the part of y, 0.3 in EDM2's blocks.
        clip: the largest magnitude, 256 in EDM2's blocks; None does not clip.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit, or a clip that is not above 0.
    """
    _check("mp_sum", "x", x)
    if (y.shape, y.dtype, y.device) != (x.shape, x.dtype, x.device):
        wanted, got = (f"{v.dtype} {tuple(v.shape)} on {v.device}" for v in (x, y))
        raise ValueError(f"mp_sum: wanted a y like x, {wanted}, got {got}")
    if clip is not None and not clip > 0:
        raise ValueError(f"mp_sum: wanted a clip above 0, got {clip}")
    if _by_definition("mp_sum", x):
        return reference.mp_sum(x, y, t, clip)
    keep = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    return _mp_sum(_like_it(x), _like_it(y), t, clip, keep)[0]


@takes_inference_tensors
def mp_cat_silu(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """(cat, silu(cat)/0.596) with cat = [wa·a, wb·b] along the channels, wa = K(1 - t)/√Ca, wb = K·t/√Cb, K = √((Ca + Cb)/((1 - t)² + t²)).

    Differentiable once, also where one of the two is not used.

    Args:
        a, b: [N, Ca, H, W] and [N, Cb, H, W], or [N, Ca] and [N, Cb], of one floating dtype.
        t: the part of b, 0.5 in EDM2.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit.
    """
    _check("mp_cat_silu", "a", a)
    if (b.shape[:1], b.shape[2:], b.dtype, b.device) != (a.shape[:1], a.shape[2:], a.dtype, a.device) or b.ndim != a.ndim:
        wanted, got = (f"{v.dtype} {tuple(v.shape)} on {v.device}" for v in (a, b))
        raise ValueError(f"mp_cat_silu: wanted a b like a but for its channels, {wanted}, got {got}")
    _check("mp_cat_silu", "b", b)
    if _by_definition("mp_cat_silu", a):
        return reference.mp_cat_silu(a, b, t)
    return _mp_cat_silu(_like_it(a), _like_it(b), t)


def _check(op: str, name: str, x: Tensor) -> None:
    if x.ndim not in (2, 4) or not x.is_floating_point() or x.shape[1] == 0:
        raise ValueError(f"{op}: wanted a floating {name} [N, C, H, W] or [N, C], C at least 1, got {x.dtype} {tuple(x.shape)}")
