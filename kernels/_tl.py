"""What the loss kernels share: masked loads, clean images from estimates, sums over parts, and one finishing kernel."""

# pyright: reportGeneralTypeIssues=false

from potstill.kernels._triton import tl, triton


@triton.jit
def load(ptr, i, mask, ACC: tl.constexpr):
    """ptr[i] in the dtype of accumulation, 0 where masked off."""
    return tl.load(ptr + i, mask=mask, other=0.0).to(ACC)


@triton.jit
def clean(e, x_t, n, i, mask, ACC: tl.constexpr):
    """D of sample n at the flat indices i: preconditioning and guidance of estimate e, x_t already loaded."""
    d = load(e.raw, i, mask, ACC)
    if e.raw_uncond is not None:
        u = load(e.raw_uncond, i, mask, ACC)
        d = u + e.guidance * (d - u)
    if e.c_out is not None:
        d = tl.load(e.c_out + n).to(ACC) * d
    if e.c_skip is not None:
        d += tl.load(e.c_skip + n).to(ACC) * x_t
    return d


@triton.jit
def noisy(e, i, mask, ACC: tl.constexpr):
    """x_t at the flat indices i; zeros where the estimate already is D."""
    if e.x_t is not None:
        x_t = load(e.x_t, i, mask, ACC)
    else:
        x_t = tl.zeros(i.shape, ACC)
    return x_t


@triton.jit
def clean_pair(real, fake, n, i, mask, ACC: tl.constexpr):
    """D_real and D_fake. A fake estimate with c_skip but no x_t of its own shares the real one's."""
    x_t = noisy(real, i, mask, ACC)
    d_real = clean(real, x_t, n, i, mask, ACC)
    if fake.x_t is not None:
        x_t = load(fake.x_t, i, mask, ACC)
    return d_real, clean(fake, x_t, n, i, mask, ACC)


@triton.jit
def clean_difference(real, fake, n, i, mask, ACC: tl.constexpr):
    """D_fake - D_real, exactly 0 for equal estimates: a fused multiply-add would leave the rounding of a product."""
    if fake.x_t is None and fake.c_out is not None and real.raw_uncond is None and fake.raw_uncond is None:
        f_real = load(real.raw, i, mask, ACC)
        out_real, out_fake = tl.load(real.c_out + n).to(ACC), tl.load(fake.c_out + n).to(ACC)
        difference = out_fake * (load(fake.raw, i, mask, ACC) - f_real) + (out_fake - out_real) * f_real
        if fake.c_skip is not None:
            skips = tl.load(fake.c_skip + n).to(ACC) - tl.load(real.c_skip + n).to(ACC)
            difference += skips * noisy(real, i, mask, ACC)
    else:
        d_real, d_fake = clean_pair(real, fake, n, i, mask, ACC)
        difference = d_fake - d_real
    return difference


@triton.jit
def store_raw(e, de, d, keep, n, i, mask, ACC: tl.constexpr):
    """Write the gradients of e's raw outputs where de has room for them; d is that of D. keep False: zeros."""
    if e.c_out is not None:
        d = tl.load(e.c_out + n).to(ACC) * d
    if de.raw is not None:
        if e.raw_uncond is not None:
            tl.store(de.raw + i, tl.where(keep, e.guidance * d, 0.0), mask=mask)
        else:
            tl.store(de.raw + i, tl.where(keep, d, 0.0), mask=mask)
    if de.raw_uncond is not None:
        tl.store(de.raw_uncond + i, tl.where(keep, (1 - e.guidance) * d, 0.0), mask=mask)


@triton.jit
def through_x_t(e, d, n, ACC: tl.constexpr):
    """The part of x_t's gradient that comes through e; d is the gradient of its D."""
    return tl.load(e.c_skip + n).to(ACC) * d


@triton.jit
def part(pid, D, S: tl.constexpr, BLOCK: tl.constexpr):
    """The sample of program pid, the number of its part (of S), and the first and last index of that part in the D numbers."""
    n = (pid // S).to(tl.int64)
    s = pid % S
    per_part = tl.cdiv(tl.cdiv(D, S), BLOCK) * BLOCK
    return n, s, s * per_part, tl.minimum(D, (s + 1) * per_part)


@triton.jit
def block_of(pid, D, chunks, BLOCK: tl.constexpr):
    """The sample of program pid, the indices of its block, and the mask of those inside the sample; `chunks` programs a sample."""
    n = (pid // chunks).to(tl.int64)
    offset = (pid % chunks) * BLOCK + tl.arange(0, BLOCK)
    return n, n * D + offset, offset < D


@triton.jit
def total(partials_ptr, k, n, valid, N, S: tl.constexpr):
    """Sum number k of the samples n over their S parts; partials are [K, N, S]."""
    at = (k * N + n[:, None]) * S + tl.arange(0, S)[None, :]
    return tl.sum(tl.load(partials_ptr + at, mask=valid[:, None], other=0.0), axis=1)


@triton.jit
def is_finite(v):
    """False for NaN and both infinities."""
    return tl.abs(v) < float("inf")


@triton.jit
def weights(weight_ptr, n, valid, D, MEAN: tl.constexpr, ACC: tl.constexpr):
    """The factors of the sums over D numbers: a sample's weight, and 1/D for a mean."""
    w = tl.full(n.shape, 1.0, ACC)
    if MEAN:
        w = w / D
    if weight_ptr is not None:
        w *= tl.load(weight_ptr + n, mask=valid, other=0.0).to(ACC)
    return w


@triton.jit
def finish_kernel(
    partials_ptr, weight_ptr, value_ptr, coef_ptr, nonfinite_ptr, N, D,
    MEAN: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The values w·sum and their coefficients w, 1/D included for a mean, from the parts of each sample's sum."""
    bad = tl.zeros((ROWS,), tl.int32)
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)
        valid = n < N
        sum_n = total(partials_ptr, 0, n, valid, N, S)
        w = weights(weight_ptr, n, valid, D, MEAN, sum_n.dtype)
        ok = is_finite(w * sum_n)
        tl.store(value_ptr + n, tl.where(ok, w * sum_n, 0.0), mask=valid)
        tl.store(coef_ptr + n, tl.where(ok, w, 0.0), mask=valid)
        bad += (valid & (ok == 0)).to(tl.int32)
    tl.store(nonfinite_ptr, tl.sum(bad, 0))
