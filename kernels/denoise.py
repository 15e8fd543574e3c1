"""The weighted denoising loss that trains fake-score and auxiliary networks: w·|D - target|², mean or sum over C, H, W.

Forward reads the raw output, x_t and the target once and writes two numbers per sample; backward reads them once more
and writes the gradients of the raw output and, where asked for, of x_t.
Source: arXiv 2206.00364 Eq. 3 and 8 (w = lambda(sigma)); arXiv 2405.14867 and 2404.04057 train the fake score with it.
"""

# Triton's launches and device functions are untyped.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from torch import Tensor

from potstill.kernels import reference
from potstill.kernels._args import check_choice, check_constant, check_estimate, check_per_sample, check_root, flattened
from potstill.kernels._inference import takes_inference_tensors
from potstill.kernels._lib import BLOCK, Outputs, cdiv, empty_gradients, results, rows, splits, tl_dtype
from potstill.kernels._loss import define_loss, uses_reference
from potstill.kernels._tl import block_of, clean, finish_kernel, load, noisy, part, store_raw, through_x_t
from potstill.kernels._triton import tl, triton
from potstill.kernels.estimate import Estimate, Losses, accum


@triton.jit
def _partials_kernel(e, target_ptr, partials_ptr, N, D, S: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    n, s, start, end = part(tl.program_id(0), D, S, BLOCK)
    square = tl.zeros((BLOCK,), ACC)
    for j in range(start, end, BLOCK):
        offset = j + tl.arange(0, BLOCK)
        mask = offset < end
        i = n * D + offset
        error = clean(e, noisy(e, i, mask, ACC), n, i, mask, ACC) - load(target_ptr, i, mask, ACC)
        square += error * error
    tl.store(partials_ptr + n * S + s, tl.sum(square, 0))


@triton.jit
def _gradient_kernel(e, de, target_ptr, coef_ptr, g_ptr, g_stride, D, chunks, BLOCK: tl.constexpr, ACC: tl.constexpr):
    n, i, mask = block_of(tl.program_id(0), D, chunks, BLOCK)
    error = clean(e, noisy(e, i, mask, ACC), n, i, mask, ACC) - load(target_ptr, i, mask, ACC)
    coef = tl.load(coef_ptr + n).to(ACC)
    d = 2 * coef * tl.load(g_ptr + n * g_stride).to(ACC) * error
    store_raw(e, de, d, coef != 0, n, i, mask, ACC)
    if de.x_t is not None:
        tl.store(de.x_t + i, tl.where(coef != 0, through_x_t(e, d, n, ACC), 0.0), mask=mask)


def _forward(e: Estimate, target: Tensor, weight: Tensor | None, mean: bool) -> Outputs:
    (n, d), s, acc = target.shape, splits(*target.shape), accum(*e.images, target)
    value, nonfinite, coef = results(target, acc, (n,))
    if n > 0:
        partials = target.new_empty((1, n, s), dtype=acc)
        _partials_kernel[(n * s,)](e, target, partials, n, d, S=s, BLOCK=BLOCK, ACC=tl_dtype(acc), num_warps=4)
        finish_kernel[(1,)](partials, weight, value, coef, nonfinite, n, d, MEAN=mean, S=s, ROWS=rows(s), num_warps=4)
    return value, nonfinite, coef


def _backward(
    saved: list[Tensor], g: Tensor, e: Estimate, target: Tensor, weight: Tensor | None, mean: bool, needs: list[bool]
) -> list[Tensor]:
    (coef,), (n, d) = saved, target.shape
    de = empty_gradients(e, needs[:3])
    if n > 0:
        chunks = cdiv(d, BLOCK)
        _gradient_kernel[(n * chunks,)](e, de, target, coef, g, g.stride(0), d, chunks, BLOCK=BLOCK, ACC=tl_dtype(coef.dtype), num_warps=4)
    return [t for t in de.images if t is not None]


_denoise = define_loss(
    "denoise(Estimate e, Image target, Tensor? weight, bool mean)",
    forward={"triton": _forward},
    backward={"triton": _backward},
)


@takes_inference_tensors
def denoise(estimate: Estimate | Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: str = "mean") -> Losses:
    """Denoising loss w·|D - target|² per sample, differentiable in the estimate's raw outputs and x_t.

    Args:
        estimate: what the network says about its noisy input, or the clean image D itself.
        target: the images that were noised [N, C, H, W], a constant.
        weight: w [N] or [N, 1, 1, 1] float32, lambda(sigma); None is 1.
        reduction: over C, H, W of a sample: "mean" (DMD2), or "sum" (EDM, SiD).

    Raises:
        ValueError: shapes or devices differ, or `target` or `weight` asks for a gradient.
    """
    check_root("denoise", "target", target)
    e = check_estimate("denoise", "estimate", estimate, "target", target)
    check_constant("denoise", "target", target, "the estimate")
    check_choice("denoise", "reduction", reduction, ("mean", "sum"))
    if weight is not None:
        weight = check_per_sample("denoise", "weight", weight, "target", target)
    if uses_reference("denoise", target):
        return reference.denoise(e, target, weight, reduction=reduction)
    _, (e, target) = flattened(e, target)
    return Losses(*_denoise(*e, target, weight, reduction == "mean")[:2])
