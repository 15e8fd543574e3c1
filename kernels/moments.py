"""Moment matching's student loss: the inner product w·<x, D_fake - D_real>, whose gradient to x is w·(D_fake - D_real).

Its value has either sign and measures nothing; only the gradient, towards the teacher's moment, matters.
Forward reads x, x_t and both raw outputs once; backward (score_match's kernel) reads x_t and the raw outputs once.
Source: arXiv 2406.04103, Alg. 2.
"""

# Triton's launches and device functions are untyped.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from torch import Tensor

from potstill.kernels import reference
from potstill.kernels._args import check_choice, check_constant_estimate, check_estimates, check_per_sample, check_root, flattened
from potstill.kernels._inference import takes_inference_tensors
from potstill.kernels._lib import BLOCK, REGISTERS, Outputs, results, rows, splits, tl_dtype
from potstill.kernels._loss import define_loss, uses_reference
from potstill.kernels._tl import clean_pair, finish_kernel, load, part
from potstill.kernels._triton import tl, triton
from potstill.kernels.estimate import Estimate, Losses, accum, shared
from potstill.kernels.score_match import difference


@triton.jit
def _partials_kernel(x_ptr, real, fake, partials_ptr, N, D, S: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    n, s, start, end = part(tl.program_id(0), D, S, BLOCK)
    product = tl.zeros((BLOCK,), ACC)
    for j in range(start, end, BLOCK):
        offset = j + tl.arange(0, BLOCK)
        mask = offset < end
        i = n * D + offset
        d_real, d_fake = clean_pair(real, fake, n, i, mask, ACC)
        product += load(x_ptr, i, mask, ACC) * (d_fake - d_real)
    tl.store(partials_ptr + n * S + s, tl.sum(product, 0))


def _forward(x: Tensor, real: Estimate, fake: Estimate, weight: Tensor | None, mean: bool) -> Outputs:
    (n, d), s, acc = x.shape, splits(*x.shape), accum(x, *real.images, *fake.images)
    value, nonfinite, coef = results(x, acc, (n,))
    if n > 0:
        partials = x.new_empty((1, n, s), dtype=acc)
        _partials_kernel[(n * s,)](x, real, fake, partials, n, d, S=s, BLOCK=BLOCK, ACC=tl_dtype(acc), num_warps=4, maxnreg=REGISTERS)
        finish_kernel[(1,)](partials, weight, value, coef, nonfinite, n, d, MEAN=mean, S=s, ROWS=rows(s), num_warps=4)
    return value, nonfinite, coef


_moments = define_loss(
    "moments(Image x, Estimate real, Estimate fake, Tensor? weight, bool mean)",
    forward={"triton": _forward},
    backward={"triton": difference},
)


@takes_inference_tensors
def moments(
    x: Tensor,
    real: Estimate | Tensor,
    fake: Estimate | Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
) -> Losses:
    """Moment matching loss w·<x, D_fake - D_real> per sample, differentiable in x alone.

    Args:
        x: the student's clean images [N, C, H, W].
        real, fake: what teacher and auxiliary network say about z_s, noised from x; estimates, or clean images D.
        weight: w(s) [N] or [N, 1, 1, 1] float32; None is 1.
        reduction: over C, H, W of a sample: "mean", or "sum" as the paper writes it.

    Raises:
        ValueError: shapes or devices differ, or anything but `x` asks for a gradient.
    """
    check_root("moments", "x", x)
    real, fake = check_estimates("moments", real, fake, "x", x)
    check_constant_estimate("moments", "real", real, "x")
    check_constant_estimate("moments", "fake", fake, "x")
    check_choice("moments", "reduction", reduction, ("mean", "sum"))
    if weight is not None:
        weight = check_per_sample("moments", "weight", weight, "x", x)
    if uses_reference("moments", x):
        return reference.moments(x, real, fake, weight, reduction=reduction)
    _, (x, real, fake) = flattened(x, real, shared(fake, real))
    return Losses(*_moments(x, *real, *fake, weight, reduction == "mean")[:2])
