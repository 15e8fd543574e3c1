"""DMD's distribution matching loss: move x along the normalised difference of two denoisers, D_fake - D_real.

    g_i = (D_fake - D_real) / max(mean|x - D_real|, eps)          value_i = 0.5·mean((x - sg(x - g))²) = 0.5·mean(g²)

The gradient to x is g_i/(C·H·W). Forward reads x, x_t and both raw outputs once and writes three numbers per sample;
backward reads x_t and the raw outputs once more and writes dx: nothing of image size is kept between the two.
Source: arXiv 2311.18828, Eq. 7 and 8; arXiv 2405.14867 keeps it.
"""

# Triton's launches and device functions are untyped.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Any

from torch import Tensor

from potstill.kernels import _score_cuda, reference
from potstill.kernels._args import check_constant_estimate, check_estimates, check_root, flattened
from potstill.kernels._inference import takes_inference_tensors
from potstill.kernels._lib import BLOCK, REGISTERS, Outputs, cdiv, results, rows, splits, tl_dtype
from potstill.kernels._loss import define_loss, uses_reference
from potstill.kernels._tl import block_of, clean_difference, clean_pair, is_finite, part, total
from potstill.kernels._triton import tl, triton
from potstill.kernels.estimate import Estimate, Losses, accum, shared, without_common_part


@triton.jit
def _partials_kernel(x_ptr, real, fake, partials_ptr, N, D, S: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    n, s, start, end = part(tl.program_id(0), D, S, BLOCK)
    gap = tl.zeros((BLOCK,), ACC)
    square = tl.zeros((BLOCK,), ACC)
    for j in range(start, end, BLOCK):
        offset = j + tl.arange(0, BLOCK)
        mask = offset < end
        i = n * D + offset
        d_real, d_fake = clean_pair(real, fake, n, i, mask, ACC)
        x = tl.load(x_ptr + i, mask=mask, other=0.0).to(ACC)
        gap += tl.abs(x - d_real)
        square += (d_fake - d_real) * (d_fake - d_real)
    tl.store(partials_ptr + n * S + s, tl.sum(gap, 0))
    tl.store(partials_ptr + (N + n) * S + s, tl.sum(square, 0))


@triton.jit
def _finish_kernel(partials_ptr, weight_ptr, value_ptr, coef_ptr, nonfinite_ptr, N, D, eps, plus, S: tl.constexpr, ROWS: tl.constexpr):
    bad = tl.zeros((ROWS,), tl.int32)
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)
        valid = n < N
        gap = total(partials_ptr, 0, n, valid, N, S) / D
        scale = 1 / (tl.maximum(gap, eps) + plus)
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr + n, mask=valid, other=0.0).to(gap.dtype)
        value = 0.5 * total(partials_ptr, 1, n, valid, N, S) / D * scale * scale
        ok = is_finite(gap) & is_finite(value)
        tl.store(value_ptr + n, tl.where(ok, value, 0.0), mask=valid)
        tl.store(coef_ptr + n, tl.where(ok, scale / D, 0.0), mask=valid)
        bad += (valid & (ok == 0)).to(tl.int32)
    tl.store(nonfinite_ptr, tl.sum(bad, 0))


@triton.jit
def _difference_kernel(real, fake, coef_ptr, g_ptr, g_stride, dx_ptr, D, chunks, BLOCK: tl.constexpr, ACC: tl.constexpr):
    n, i, mask = block_of(tl.program_id(0), D, chunks, BLOCK)
    difference = clean_difference(real, fake, n, i, mask, ACC)
    coef = tl.load(coef_ptr + n).to(ACC)
    dx = coef * tl.load(g_ptr + n * g_stride).to(ACC) * difference
    tl.store(dx_ptr + i, tl.where(coef == 0, 0.0, dx), mask=mask)  # 0, not 0·NaN, for the samples left out


def _forward(x: Tensor, real: Estimate, fake: Estimate, weight: Tensor | None, eps: float, plus: float) -> Outputs:
    (n, d), s, acc = x.shape, splits(*x.shape), accum(x, *real.images, *fake.images)
    value, nonfinite, coef = results(x, acc, (n,))
    if n > 0:
        partials = x.new_empty((2, n, s), dtype=acc)
        _partials_kernel[(n * s,)](x, real, fake, partials, n, d, S=s, BLOCK=BLOCK, ACC=tl_dtype(acc), num_warps=4, maxnreg=REGISTERS)
        _finish_kernel[(1,)](partials, weight, value, coef, nonfinite, n, d, eps, plus, S=s, ROWS=rows(s), num_warps=4)
    return value, nonfinite, coef


def difference(saved: list[Tensor], g: Tensor, x: Tensor, real: Estimate, fake: Estimate, *_: Any) -> list[Tensor]:
    """[dx], dx [N, D] = coef_n·g_n·(D_fake - D_real), with `saved` = [coef]: the backward launcher, of `moments` too."""
    (coef,), dx, (n, d) = saved, x.new_empty(x.shape), x.shape
    if n > 0:
        real, fake = without_common_part(real, fake)
        chunks, acc = cdiv(d, BLOCK), tl_dtype(coef.dtype)
        _difference_kernel[(n * chunks,)](real, fake, coef, g, g.stride(0), dx, d, chunks, BLOCK=BLOCK, ACC=acc, num_warps=4)
    return [dx]


_score_match = define_loss(
    "score_match(Image x, Estimate real, Estimate fake, Tensor? weight, float eps, float plus)",
    forward={"triton": _forward, "cuda": _score_cuda.match_forward},
    backward={"triton": difference, "cuda": _score_cuda.match_backward},
)


@takes_inference_tensors
def weighted(x: Tensor, real: Estimate, fake: Estimate, weight: Tensor | None, *, eps: float, plus: float) -> Losses:
    """The same with g_i multiplied by a weight [N] and `plus` added to its normaliser: what kernels.compat needs."""
    if uses_reference("score_match", x):
        return reference.score_match(x, real, fake, eps=eps, weight=weight, plus=plus)
    _, (x, real, fake) = flattened(x, real, shared(fake, real))
    return Losses(*_score_match(x, *real, *fake, weight, eps, plus)[:2])


@takes_inference_tensors
def score_match(x: Tensor, real: Estimate | Tensor, fake: Estimate | Tensor, *, eps: float = 1e-6) -> Losses:
    """Distribution matching loss of DMD and DMD2, differentiable in x alone.

    value_i = 0.5·mean(g_i²) with g_i = (D_fake - D_real) / max(mean|x_i - D_real|, eps); the gradient of value_i is
    g_i/(C·H·W), as if the loss were 0.5·mean((x - stopgrad(x - g))²). `loss.value.mean()` is DMD2's loss.

    Args:
        x: the student's images [N, C, H, W].
        real, fake: what teacher and fake score network say about the noised x; estimates, or clean images D.
            When both hold the same x_t, it is read once.
        eps: smallest normaliser; the paper and DMD2's code have none, FastGen adds 1e-6.

    Raises:
        ValueError: shapes or devices differ, or `real` or `fake` asks for a gradient.
    """
    check_root("score_match", "x", x)
    real, fake = check_estimates("score_match", real, fake, "x", x)
    check_constant_estimate("score_match", "real", real, "x")
    check_constant_estimate("score_match", "fake", fake, "x")
    return weighted(x, real, fake, None, eps=eps, plus=0.0)
