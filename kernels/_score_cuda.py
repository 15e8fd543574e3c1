"""The CUDA C++ versions of score_match and score_implicit, called as their Triton launchers are.

They take float32 x and x_t, and raw outputs of one dtype; what comes otherwise is cast first. float64 is Triton's alone.
"""

from typing import Any

import torch
from torch import Tensor

from potstill.kernels import cuda
from potstill.kernels._lib import Outputs, empty_gradients, results, splits
from potstill.kernels.estimate import Estimate, accum, without_common_part


def _cast(x: Tensor, real: Estimate, fake: Estimate) -> tuple[Tensor, Estimate, Estimate]:
    """The same with float32 x and x_t and raw outputs of one dtype."""
    if accum(x, *real.images, *fake.images) is torch.float64:
        raise ValueError("backend 'cuda' wants float32, float16 or bfloat16 images, got float64: use backend 'triton'")
    raws = {t.dtype for e in (real, fake) for t in (e.raw, e.raw_uncond) if t is not None}
    dtype = raws.pop() if len(raws) == 1 else torch.float32

    def one(e: Estimate) -> Estimate:
        x_t, c_skip, c_out = (None if t is None else t.float() for t in (e.x_t, e.c_skip, e.c_out))
        uncond = None if e.raw_uncond is None else e.raw_uncond.to(dtype)
        return Estimate(e.raw.to(dtype), x_t, c_skip, c_out, uncond, e.guidance)

    return x.float(), one(real), one(fake)


def match_forward(x: Tensor, real: Estimate, fake: Estimate, weight: Tensor | None, eps: float, plus: float) -> Outputs:
    value, nonfinite, coef = results(x, torch.float32, (x.shape[0],))
    x, real, fake = _cast(x, real, fake)
    if x.shape[0] > 0:
        weight, partials = None if weight is None else weight.float(), x.new_empty(2, x.shape[0], splits(*x.shape))
        cuda.library().score_match(x, *real, *fake, weight, eps, plus, partials, value, coef, nonfinite)
    return value, nonfinite, coef


def match_backward(saved: list[Tensor], g: Tensor, x: Tensor, real: Estimate, fake: Estimate, *options: Any) -> list[Tensor]:
    dx = torch.empty_like(x, dtype=torch.float32)
    _, real, fake = _cast(x, *without_common_part(real, fake))
    if x.shape[0] > 0:
        cuda.library().score_difference(*real, *fake, saved[0], g.float(), splits(*x.shape), dx)
    return [dx.to(x.dtype)]


def implicit_forward(
    x: Tensor, real: Estimate, fake: Estimate, weight: Tensor | None, distance: str, alpha: float, c: float, detach: str
) -> Outputs:
    value, nonfinite, coefs = results(x, torch.float32, (3, x.shape[0]))
    x, real, fake = _cast(x, real, fake)
    if x.shape[0] > 0:
        weight, partials = None if weight is None else weight.float(), x.new_empty(3, x.shape[0], splits(*x.shape))
        past = 1 - alpha if distance == "l2" else 0.0
        flags = distance == "huber", past, c, detach == "factor", detach == "normaliser"
        cuda.library().score_implicit(x, *real, *fake, weight, *flags, partials, value, coefs, nonfinite)
    return value, nonfinite, coefs


def implicit_backward(saved: list[Tensor], g: Tensor, x: Tensor, real: Estimate, fake: Estimate, *options: Any) -> list[Tensor]:
    needs, images = options[-1], (x, *real.images, *fake.images)
    needed = [t for t, need in zip(images, needs, strict=True) if need and t is not None]
    x, real, fake = _cast(x, real, fake)
    dx = torch.empty_like(x) if needs[0] else None
    of_real, of_fake = empty_gradients(real, needs[1:4]).images, empty_gradients(fake, needs[4:7]).images
    if x.shape[0] > 0:
        cuda.library().score_implicit_grad(x, *real, *fake, saved[0], g.float(), splits(*x.shape), dx, *of_real, *of_fake)
    made = [t for t in (dx, *of_real, *of_fake) if t is not None]
    return [m.to(t.dtype) for m, t in zip(made, needed, strict=True)]
