"""The CUDA C++ versions of score_match and score_implicit, called as their Triton launchers are.

They take float32 x and x_t, and raw outputs of one dtype; what comes otherwise is cast first. float64 is Triton's alone.
"""

import torch
from torch import Tensor

from potstill.kernels import cuda
from potstill.kernels._lib import Outputs, empty_gradients, results, splits
from potstill.kernels.estimate import Estimate, accum


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


def _like(made: list[Tensor], needed: list[Tensor]) -> list[Tensor]:
    return [m.to(t.dtype) for m, t in zip(made, needed, strict=True)]


def match_forward(x: Tensor, real: Estimate, fake: Estimate, eps: float, needs: list[bool]) -> Outputs:
    value, nonfinite, coef = results(x, torch.float32, (x.shape[0],))
    x, real, fake = _cast(x, real, fake)
    if x.shape[0] > 0:
        partials = x.new_empty(2, x.shape[0], splits(*x.shape))
        cuda.library().score_match(x, *real, *fake, eps, partials, value, coef, nonfinite)
    return value, nonfinite, [coef], []


def match_backward(
    saved: list[Tensor], g: Tensor, x: Tensor, real: Estimate, fake: Estimate, eps: float, needs: list[bool]
) -> list[Tensor]:
    dx = torch.empty_like(x, dtype=torch.float32)
    _, real, fake = _cast(x, real, fake)
    if fake.x_t is None and fake.c_skip is not None and fake.c_skip is real.c_skip:
        real, fake = real._replace(x_t=None, c_skip=None), fake._replace(c_skip=None)  # c_skip·x_t cancels
    if x.shape[0] > 0:
        cuda.library().score_difference(*real, *fake, saved[0], g.float(), splits(*x.shape), dx)
    return [dx.to(x.dtype)]


def implicit_forward(
    x: Tensor, real: Estimate, fake: Estimate, weight: Tensor | None, distance: str, alpha: float, c: float,
    detach: str, needs: list[bool],
) -> Outputs:  # fmt: skip
    value, nonfinite, coefs = results(x, torch.float32, (3, x.shape[0]))
    x, real, fake = _cast(x, real, fake)
    if x.shape[0] > 0:
        partials = x.new_empty(3, x.shape[0], splits(*x.shape))
        cuda.library().score_implicit(
            x, *real, *fake, None if weight is None else weight.float(), distance == "huber",
            1 - alpha if distance == "l2" else 0.0, c, detach == "factor", detach == "normaliser", partials, value,
            coefs, nonfinite,
        )  # fmt: skip
    return value, nonfinite, [coefs], []


def implicit_backward(
    saved: list[Tensor], g: Tensor, x: Tensor, real: Estimate, fake: Estimate, weight: Tensor | None, distance: str,
    alpha: float, c: float, detach: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    needed = [t for t, need in zip((x, *real.images, *fake.images), needs, strict=True) if need and t is not None]
    x, real, fake = _cast(x, real, fake)
    dx = torch.empty_like(x) if needs[0] else None
    d_real, made_real = empty_gradients(real, needs[1:4])
    d_fake, made_fake = empty_gradients(fake, needs[4:7])
    if x.shape[0] > 0:
        cuda.library().score_implicit_grad(
            x, *real, *fake, saved[0], g.float(), splits(*x.shape), dx, d_real.raw, d_real.x_t, d_real.raw_uncond,
            d_fake.raw, d_fake.x_t, d_fake.raw_uncond,
        )  # fmt: skip
    return _like(([] if dx is None else [dx]) + made_real + made_fake, needed)
