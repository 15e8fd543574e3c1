"""SFD's step and compare: one Euler step from x along the network's estimate, and how far it lands from the target.

    x_next = x + (sigma_next - sigma)·(x - D)/sigma        e = x_next - target
    l1: sum|e|        l2: sum e²        huber: sqrt(sum e² + c²) - c        each divided by C·H·W for a mean

Forward reads x, the raw output and the target once and writes x_next, which the next step starts from; backward reads
x_next and the target and writes the gradient of the raw output. x is a constant: no gradient crosses steps.
Source: arXiv 2409.19681, Alg. 1.
"""

# Triton's launches and device functions are untyped.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from torch import Tensor

from potstill.kernels import reference
from potstill.kernels._args import check_choice, check_constant, check_estimate, check_image, check_per_sample, check_root, flattened
from potstill.kernels._inference import takes_inference_tensors
from potstill.kernels._lib import BLOCK, Outputs, cdiv, empty_gradients, results, rows, splits, tl_dtype
from potstill.kernels._loss import define_loss, uses_reference
from potstill.kernels._tl import block_of, clean, is_finite, load, noisy, part, store_raw, total, weights
from potstill.kernels._triton import tl, triton
from potstill.kernels.estimate import Estimate, Losses, accum


@triton.jit
def _partials_kernel(
    x_ptr, e, sigma_ptr, sigma_next_ptr, target_ptr, x_next_ptr, partials_ptr, N, D,
    L1: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n, s, start, end = part(tl.program_id(0), D, S, BLOCK)
    sigma = tl.load(sigma_ptr + n).to(ACC)
    ratio = (tl.load(sigma_next_ptr + n).to(ACC) - sigma) / sigma
    distance = tl.zeros((BLOCK,), ACC)
    for j in range(start, end, BLOCK):
        offset = j + tl.arange(0, BLOCK)
        mask = offset < end
        i = n * D + offset
        x = load(x_ptr, i, mask, ACC)
        if e.x_t is not None:
            x_t = noisy(e, i, mask, ACC)
        else:
            x_t = x
        x_next = x + ratio * (x - clean(e, x_t, n, i, mask, ACC))
        tl.store(x_next_ptr + i, x_next, mask=mask)
        error = x_next - load(target_ptr, i, mask, ACC)
        if L1:
            distance += tl.abs(error)
        else:
            distance += error * error
    tl.store(partials_ptr + n * S + s, tl.sum(distance, 0))


@triton.jit
def _finish_kernel(
    partials_ptr, sigma_ptr, sigma_next_ptr, value_ptr, coef_ptr, nonfinite_ptr, N, D, c,
    L1: tl.constexpr, HUBER: tl.constexpr, MEAN: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    bad = tl.zeros((ROWS,), tl.int32)
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)
        valid = n < N
        distance = total(partials_ptr, 0, n, valid, N, S)
        scale = weights(None, n, valid, D, MEAN, distance.dtype)
        sigma = tl.load(sigma_ptr + n, mask=valid, other=1.0).to(distance.dtype)
        through = -(tl.load(sigma_next_ptr + n, mask=valid, other=1.0).to(distance.dtype) - sigma) / sigma  # dx_next/dD
        value = scale * distance
        coef = scale * through  # times sign(e), or e, is the gradient of D
        if HUBER:
            root = tl.sqrt(distance + c * c)
            value = value / (root + c)  # sqrt(s + c²) - c, without the cancellation
            coef = coef / root
        elif not L1:
            coef = 2 * coef
        ok = is_finite(value)
        tl.store(value_ptr + n, tl.where(ok, value, 0.0), mask=valid)
        tl.store(coef_ptr + n, tl.where(ok, coef, 0.0), mask=valid)
        bad += (valid & (ok == 0)).to(tl.int32)
    tl.store(nonfinite_ptr, tl.sum(bad, 0))


@triton.jit
def _gradient_kernel(
    e, de, x_next_ptr, target_ptr, coef_ptr, g_ptr, g_stride, D, chunks,
    L1: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n, i, mask = block_of(tl.program_id(0), D, chunks, BLOCK)
    error = load(x_next_ptr, i, mask, ACC) - load(target_ptr, i, mask, ACC)
    if L1:
        error = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, 0.0)).to(ACC)
    coef = tl.load(coef_ptr + n).to(ACC)
    d = coef * tl.load(g_ptr + n * g_stride).to(ACC) * error
    store_raw(e, de, d, coef != 0, n, i, mask, ACC)


def _forward(
    x: Tensor, e: Estimate, sigma: Tensor, sigma_next: Tensor, target: Tensor, metric: str, c: float, mean: bool,
) -> Outputs:  # fmt: skip
    (n, d), s, acc = x.shape, splits(*x.shape), accum(x, *e.images, target)
    value, nonfinite, coef = results(x, acc, (n,))
    x_next = x.new_empty((n, d), dtype=acc)
    if n > 0:
        l1, partials = metric == "l1", x.new_empty((1, n, s), dtype=acc)
        _partials_kernel[(n * s,)](
            x, e, sigma, sigma_next, target, x_next, partials, n, d,
            L1=l1, S=s, BLOCK=BLOCK, ACC=tl_dtype(acc), num_warps=4,
        )  # fmt: skip
        _finish_kernel[(1,)](
            partials, sigma, sigma_next, value, coef, nonfinite, n, d, c,
            L1=l1, HUBER=metric == "huber", MEAN=mean, S=s, ROWS=rows(s), num_warps=4,
        )  # fmt: skip
    return value, nonfinite, coef, x_next


def _backward(
    saved: list[Tensor], g: Tensor, x: Tensor, e: Estimate, sigma: Tensor, sigma_next: Tensor, target: Tensor,
    metric: str, c: float, mean: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    (coef, x_next), (n, d) = saved, x.shape
    de = empty_gradients(e, needs[1:4])
    if n > 0:
        chunks = cdiv(d, BLOCK)
        _gradient_kernel[(n * chunks,)](
            e, de, x_next, target, coef, g, g.stride(0), d, chunks,
            L1=metric == "l1", BLOCK=BLOCK, ACC=tl_dtype(coef.dtype), num_warps=4,
        )  # fmt: skip
    return [t for t in de.images if t is not None]


_trajectory = define_loss(
    "trajectory(Image x, Estimate e, Tensor sigma, Tensor sigma_next, Image target, str metric, float c, bool mean)",
    forward={"triton": _forward},
    backward={"triton": _backward},
    makes=1,
)


@takes_inference_tensors
def trajectory(
    x: Tensor,
    estimate: Estimate | Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    target: Tensor,
    *,
    metric: str = "l1",
    c: float = 0.03,
    reduction: str = "mean",
) -> tuple[Losses, Tensor]:
    """One Euler step of the student and its distance from the teacher's state there; differentiable in raw outputs.

    Args:
        x: the state [N, C, H, W] at noise level sigma, a constant.
        estimate: what the student says about x (its x_t is x), or its clean image D.
        sigma, sigma_next: noise levels before and after the step, [N], [N, 1, 1, 1] or a scalar tensor, floating.
        target: the teacher's state [N, C, H, W] at sigma_next, a constant.
        metric: "l1" (SFD's), "l2" (squared) or "huber" (sqrt(sum e² + c²) - c, norm over C, H, W).
        c: of "huber" only, in units of the image. The paper's value is not known; as in `score_implicit`.
        reduction: over C, H, W of a sample: "mean", or "sum" as SFD's code has it.

    Returns:
        The losses, and x_next [N, C, H, W] in at least float32, without a graph: where the next step starts.

    Raises:
        ValueError: shapes or devices differ, sigma is not floating, or a constant asks for a gradient.
    """
    check_root("trajectory", "x", x)
    e = check_estimate("trajectory", "estimate", estimate, "x", x)
    check_image("trajectory", "target", target, "x", x)
    for name, t in (("x", x), ("estimate.x_t", e.x_t), ("target", target)):
        check_constant("trajectory", name, t, "the estimate's raw outputs")
    sigma = check_per_sample("trajectory", "sigma", sigma, "x", x, scalar=True)
    sigma_next = check_per_sample("trajectory", "sigma_next", sigma_next, "x", x, scalar=True)
    check_choice("trajectory", "metric", metric, ("l1", "l2", "huber"))
    check_choice("trajectory", "reduction", reduction, ("mean", "sum"))
    if uses_reference("trajectory", x):
        return reference.trajectory(x, e, sigma, sigma_next, target, metric=metric, c=c, reduction=reduction)
    layout, (x, e, target) = flattened(x, e._replace(x_t=None) if e.x_t is x else e, target)
    value, nonfinite, _, x_next = _trajectory(x, *e, sigma, sigma_next, target, metric, c, reduction == "mean")
    return Losses(value, nonfinite), layout.image(x_next)
