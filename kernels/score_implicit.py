"""Score implicit matching: a loss on two denoisers at x_t whose gradient to the generator is that of a score divergence.

With delta = D_real - D_fake and v = D_fake - x, sums over C, H, W:

    huber:   w·<delta, v> / R,   R = sqrt(|delta|² + c²)                                       w = 1 by default
    l2:      w·<delta, v + (1 - alpha)·delta>                  w = 1 / max(mean|x - D_real|, 1e-5) by default

Gradients run into x, both raw outputs and x_t: as linear combinations of v and delta whose four factors per sample are
all that forward leaves behind. Forward reads x, x_t and the raw outputs once; backward reads them once more and writes
every gradient asked for. D_real, D_fake and x get gradients that sum to zero: the loss does not change under a shift.
Source: huber arXiv 2410.16794 (SIM), l2 arXiv 2404.04057 (SiD; alpha = 1 is SIM with a squared distance).
"""

# Triton's launches and device functions are untyped.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from torch import Tensor

from potstill.kernels import _score_cuda, reference
from potstill.kernels._args import check_choice, check_estimates, check_per_sample, check_root, flattened
from potstill.kernels._inference import takes_inference_tensors
from potstill.kernels._lib import BLOCK, Outputs, cdiv, empty_gradients, results, rows, splits, tl_dtype
from potstill.kernels._loss import define_loss, uses_reference
from potstill.kernels._tl import block_of, clean_pair, is_finite, load, part, store_raw, through_x_t, total
from potstill.kernels._triton import tl, triton
from potstill.kernels.estimate import Estimate, Losses, accum, shared


@triton.jit
def _partials_kernel(
    x_ptr, real, fake, partials_ptr, N, D, past,
    S: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n, s, start, end = part(tl.program_id(0), D, S, BLOCK)
    gap = tl.zeros((BLOCK,), ACC)
    product = tl.zeros((BLOCK,), ACC)
    square = tl.zeros((BLOCK,), ACC)
    for j in range(start, end, BLOCK):
        offset = j + tl.arange(0, BLOCK)
        mask = offset < end
        i = n * D + offset
        d_real, d_fake = clean_pair(real, fake, n, i, mask, ACC)
        x = load(x_ptr, i, mask, ACC)
        delta = d_real - d_fake
        gap += tl.abs(x - d_real)
        product += delta * (d_fake - x + past * delta)
        square += delta * delta
    tl.store(partials_ptr + n * S + s, tl.sum(gap, 0))
    tl.store(partials_ptr + (N + n) * S + s, tl.sum(product, 0))
    tl.store(partials_ptr + (2 * N + n) * S + s, tl.sum(square, 0))


@triton.jit
def _finish_kernel(
    partials_ptr, weight_ptr, value_ptr, coefs_ptr, nonfinite_ptr, N, D, past, c,
    HUBER: tl.constexpr, FACTOR: tl.constexpr, NORMALISER: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    bad = tl.zeros((ROWS,), tl.int32)
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)
        valid = n < N
        gap = total(partials_ptr, 0, n, valid, N, S) / D
        product = total(partials_ptr, 1, n, valid, N, S)
        square = total(partials_ptr, 2, n, valid, N, S)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + n, mask=valid, other=0.0).to(gap.dtype)
        elif HUBER:
            w = tl.full((ROWS,), 1.0, gap.dtype)
        else:
            w = 1 / tl.maximum(gap, 1e-5)
        if HUBER:
            w = w / tl.sqrt(square + c * c)
        value = w * product
        ok = is_finite(value) & is_finite(square)
        # gradients: D_real a·v + b·delta,   x -w·delta,   D_fake what makes the three sum to zero
        a = w
        b = 2 * past * w
        if FACTOR:  # the first factor, delta or delta/R, is a constant
            a = tl.zeros((ROWS,), gap.dtype)
            b = past * w
        elif HUBER and not NORMALISER:
            b = -value / (square + c * c)
        tl.store(value_ptr + n, tl.where(ok, value, 0.0), mask=valid)
        tl.store(coefs_ptr + n, tl.where(ok, a, 0.0), mask=valid)
        tl.store(coefs_ptr + N + n, tl.where(ok, b, 0.0), mask=valid)
        tl.store(coefs_ptr + 2 * N + n, tl.where(ok, w, 0.0), mask=valid)
        bad += (valid & (ok == 0)).to(tl.int32)
    tl.store(nonfinite_ptr, tl.sum(bad, 0))


@triton.jit
def _gradient_kernel(
    x_ptr, real, fake, dx_ptr, d_real_ptrs, d_fake_ptrs, coefs_ptr, g_ptr, g_stride, N, D, chunks,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n, i, mask = block_of(tl.program_id(0), D, chunks, BLOCK)
    w = tl.load(coefs_ptr + 2 * N + n).to(ACC)
    keep = w != 0
    g = tl.load(g_ptr + n * g_stride).to(ACC)
    clean_real, clean_fake = clean_pair(real, fake, n, i, mask, ACC)
    delta = clean_real - clean_fake
    v = clean_fake - load(x_ptr, i, mask, ACC)
    d_real = g * (tl.load(coefs_ptr + n).to(ACC) * v + tl.load(coefs_ptr + N + n).to(ACC) * delta)
    d_fake = g * w * delta - d_real
    if dx_ptr is not None:
        tl.store(dx_ptr + i, tl.where(keep, -g * w * delta, 0.0), mask=mask)
    store_raw(real, d_real_ptrs, d_real, keep, n, i, mask, ACC)
    store_raw(fake, d_fake_ptrs, d_fake, keep, n, i, mask, ACC)
    if d_real_ptrs.x_t is not None:
        dx_t = through_x_t(real, d_real, n, ACC)
        if fake.x_t is None and fake.c_skip is not None:
            dx_t += through_x_t(fake, d_fake, n, ACC)
        tl.store(d_real_ptrs.x_t + i, tl.where(keep, dx_t, 0.0), mask=mask)
    if d_fake_ptrs.x_t is not None:
        tl.store(d_fake_ptrs.x_t + i, tl.where(keep, through_x_t(fake, d_fake, n, ACC), 0.0), mask=mask)


def _forward(
    x: Tensor, real: Estimate, fake: Estimate, weight: Tensor | None, distance: str, alpha: float, c: float,
    detach: str,
) -> Outputs:  # fmt: skip
    (n, d), s, acc = x.shape, splits(*x.shape), accum(x, *real.images, *fake.images)
    value, nonfinite, coefs = results(x, acc, (3, n))
    if n > 0:
        past = 1 - alpha if distance == "l2" else 0.0  # delta's share in the second factor
        partials = x.new_empty((3, n, s), dtype=acc)
        _partials_kernel[(n * s,)](x, real, fake, partials, n, d, past, S=s, BLOCK=BLOCK, ACC=tl_dtype(acc), num_warps=4)
        _finish_kernel[(1,)](
            partials, weight, value, coefs, nonfinite, n, d, past, c,
            HUBER=distance == "huber", FACTOR=detach == "factor", NORMALISER=detach == "normaliser",
            S=s, ROWS=rows(s), num_warps=4,
        )  # fmt: skip
    return value, nonfinite, coefs


def _backward(
    saved: list[Tensor], g: Tensor, x: Tensor, real: Estimate, fake: Estimate, weight: Tensor | None, distance: str,
    alpha: float, c: float, detach: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    (coefs,), (n, d) = saved, x.shape
    dx = x.new_empty(x.shape) if needs[0] else None
    d_real, d_fake = empty_gradients(real, needs[1:4]), empty_gradients(fake, needs[4:7])
    if n > 0:
        chunks = cdiv(d, BLOCK)
        _gradient_kernel[(n * chunks,)](
            x, real, fake, dx, d_real, d_fake, coefs, g, g.stride(0), n, d, chunks,
            BLOCK=BLOCK, ACC=tl_dtype(coefs.dtype), num_warps=4,
        )  # fmt: skip
    return [t for t in (dx, *d_real.images, *d_fake.images) if t is not None]


_score_implicit = define_loss(
    "score_implicit(Image x, Estimate real, Estimate fake, Tensor? weight, str distance, float alpha, float c, str detach)",
    forward={"triton": _forward, "cuda": _score_cuda.implicit_forward},
    backward={"triton": _backward, "cuda": _score_cuda.implicit_backward},
    coefs=lambda n: (3, n),
)


@takes_inference_tensors
def score_implicit(
    x: Tensor,
    real: Estimate | Tensor,
    fake: Estimate | Tensor,
    *,
    distance: str = "huber",
    alpha: float = 1.0,
    c: float = 0.03,
    weight: Tensor | None = None,
    detach: str | None = None,
) -> Losses:
    """SIM's or SiD's generator loss per sample, summed over C, H, W; differentiable in x, x_t and both raw outputs.

    Both networks must be evaluated with a graph from x_t to their raw outputs (parameters frozen), and x_t must be
    x + sigma·noise with a graph to x: the gradients of this op are partial ones, and autograd joins them.

    Args:
        x: the generator's images [N, C, H, W].
        real, fake: what teacher and online network say about x_t; estimates, or clean images D.
            When both hold the same x_t, it is read once and gets one gradient.
        distance: "huber", SIM's pseudo-Huber, <delta/sqrt(|delta|² + c²), D_fake - x>; or "l2", SiD's
            <delta, (D_real - x) - alpha·delta>.
        alpha: of "l2" only. 1 is SIM's squared distance, SiD uses 1.2 (1.0 for AFHQv2).
        c: of "huber" only, in units of the image, its norm being over all of C, H, W. The paper's value is not
            known; 0.03 is 0.00054·sqrt(3·32·32), the constant of arXiv 2310.14189. At 0 a delta of exactly 0 counts
            as non-finite.
        weight: w [N] or [N, 1, 1, 1] float32, replacing the default: 1 for "huber", SiD's 1/max(mean|x - D_real|, 1e-5) for "l2",
            through which no gradient runs.
        detach: for ablations: "normaliser" holds sqrt(|delta|² + c²) constant, "factor" the whole first factor,
            which halves the gradient of some directions and not of others.

    Raises:
        ValueError: shapes or devices differ, a choice is unknown, or `weight` or a coefficient asks for a gradient.
    """
    check_root("score_implicit", "x", x)
    real, fake = check_estimates("score_implicit", real, fake, "x", x)
    check_choice("score_implicit", "distance", distance, ("huber", "l2"))
    if detach is not None:
        check_choice("score_implicit", "detach", detach, ("normaliser", "factor"))
    if distance == "huber" and alpha != 1.0:
        raise ValueError(f"score_implicit: wanted alpha with distance='l2', got alpha={alpha} with 'huber'")
    if distance == "l2" and detach == "normaliser":
        raise ValueError("score_implicit: wanted detach='normaliser' with distance='huber', got 'l2', which has none")
    if weight is not None:
        weight = check_per_sample("score_implicit", "weight", weight, "x", x)
    if uses_reference("score_implicit", x):
        return reference.score_implicit(x, real, fake, distance=distance, alpha=alpha, c=c, weight=weight, detach=detach)
    _, (x, real, fake) = flattened(x, real, shared(fake, real))
    return Losses(*_score_implicit(x, *real, *fake, weight, distance, alpha, c, detach or "")[:2])
