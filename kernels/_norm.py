"""The Triton kernels of norm_silu, and how they are launched. The formula stands in kernels/norm_silu.py.

One program takes a slab: one sample, a few whole groups, all pixels. A slab of few numbers stays in registers and is read
once; a larger one is read twice, the second time mostly from L2.
"""

# Triton's launches take constexpr parameters as plain values, and options like num_warps besides; its device functions are untyped.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import torch
from torch import Tensor

from potstill.kernels._lib import INTERPRET, cdiv, power_of_2, tl_dtype
from potstill.kernels._norm_tl import activated, fold, get, group_sum, halves, modulation, offsets, put, put_split, spread, through
from potstill.kernels._triton import tl, triton
from potstill.kernels.estimate import accum


@triton.jit(do_not_specialize=["least"])
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, add_ptr, y_ptr, mean_ptr, rstd_ptr, key_ptr,
    scale_n, shift_n, add_n, least, eps, factor_y,
    C: tl.constexpr, HW: tl.constexpr, G: tl.constexpr, KG: tl.constexpr, CB: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = C // G
    EVEN: tl.constexpr = (CB == KG * K) and (HW % ROWS == 0)
    n = (tl.program_id(0) // (G // KG)).to(tl.int64)
    block = tl.program_id(0) % (G // KG)  # neighbours in a sample run together and share cache lines
    g = block * KG + tl.arange(0, KG)
    c = tl.arange(0, CB)
    valid = c < KG * K
    channel = block * (KG * K) + c
    row = tl.arange(0, ROWS)
    x_ptr += n * (C * HW)
    y_ptr += n * (C * HW)
    DROP: tl.constexpr = key_ptr is not None
    low, high = halves(key_ptr)
    place = (n * (C * HW)).to(tl.uint32)
    add = tl.zeros((CB,), ACC)
    if add_ptr is not None:
        add += tl.load(add_ptr + n * add_n + channel, mask=valid, other=0.0).to(ACC)
    if ROWS >= HW:
        mask = (row < HW)[:, None] & valid[None, :]
        at = offsets(row, channel, C, HW, CHANNELS_LAST)
        x = get(x_ptr, at, mask, EVEN, ACC)
        mean = group_sum(tl.sum(x, 0) + HW * add, c, K, KG) / (K * HW)
        x -= (spread(mean, c, K, KG) - add)[None, :]
        square = x * x if EVEN else tl.where(mask, x * x, 0.0)
        var = group_sum(tl.sum(square, 0), c, K, KG) / (K * HW)
    else:  # sums about the first pixel: no cancellation where the mean is large
        pivot = get(x_ptr, channel if CHANNELS_LAST else channel * HW, valid, CB == KG * K, ACC)
        FOLD: tl.constexpr = ROWS * CB // 4096 if CHANNELS_LAST else 1
        first = tl.zeros((ROWS // FOLD, CB), ACC)
        second = tl.zeros((ROWS // FOLD, CB), ACC)
        for start in range(0, HW, ROWS):
            mask = (start + row < HW)[:, None] & valid[None, :]
            d = get(x_ptr, offsets(start + row, channel, C, HW, CHANNELS_LAST), mask, EVEN, ACC) - pivot[None, :]
            d = d if EVEN else tl.where(mask, d, 0.0)
            first += fold(d, FOLD)
            second += fold(d * d, FOLD)
        first_c = tl.sum(first, 0)
        mean_c = pivot + add + first_c / HW
        mean = group_sum(mean_c, c, K, KG) / K
        off = tl.where(valid, mean_c - spread(mean, c, K, KG), 0.0)
        square_c = tl.sum(second, 0) - first_c * first_c / HW
        var = group_sum(square_c + HW * off * off, c, K, KG) / (K * HW)
    rstd = 1.0 / tl.sqrt(tl.maximum(var, 0.0) + eps)
    tl.store(mean_ptr + n * G + g, mean)
    tl.store(rstd_ptr + n * G + g, rstd)
    factor, offset = modulation(scale_ptr, scale_n, shift_ptr, shift_n, n, channel, valid, ACC)
    gain = tl.load(weight_ptr + channel, mask=valid, other=0.0).to(ACC) * factor * spread(rstd, c, K, KG)
    offset += tl.load(bias_ptr + channel, mask=valid, other=0.0).to(ACC) * factor
    if ROWS >= HW:
        h = x * gain[None, :] + offset[None, :]
        put(y_ptr, at, mask, activated(h, row, channel, place, low, high, least, factor_y, C, DROP, SILU, ASM), EVEN)
    else:
        offset -= (spread(mean, c, K, KG) - add) * gain
        for start in range(0, HW, ROWS):
            mask = (start + row < HW)[:, None] & valid[None, :]
            at = offsets(start + row, channel, C, HW, CHANNELS_LAST)
            h = get(x_ptr, at, mask, EVEN, ACC) * gain[None, :] + offset[None, :]
            y = activated(h, start + row, channel, place, low, high, least, factor_y, C, DROP, SILU, ASM)
            put(y_ptr, at, mask, y, EVEN)


@triton.jit(do_not_specialize=["least"])
def backward_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, add_ptr, key_ptr, skip_ptr,
    dx_ptr, beside_ptr, dadd_ptr, sums_ptr, y_ptr, scale_n, shift_n, add_n, N, least, factor_dy, factor_skip, factor_y,
    C: tl.constexpr, HW: tl.constexpr, G: tl.constexpr, KG: tl.constexpr, CB: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, ASM: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = C // G
    EVEN: tl.constexpr = (CB == KG * K) and (HW % ROWS == 0)
    DROP: tl.constexpr = key_ptr is not None
    FOLD: tl.constexpr = ROWS * CB // 4096 if CHANNELS_LAST and ROWS < HW else 1
    n = (tl.program_id(0) // (G // KG)).to(tl.int64)
    block = tl.program_id(0) % (G // KG)  # neighbours in a sample run together and share cache lines
    g = block * KG + tl.arange(0, KG)
    c = tl.arange(0, CB)
    valid = c < KG * K
    channel = block * (KG * K) + c
    row = tl.arange(0, ROWS)
    x_ptr += n * (C * HW)
    dy_ptr += n * (C * HW)
    dx_ptr += n * (SPLIT * HW)  # SPLIT: channels of dx; those after them are in `beside`
    if beside_ptr is not None:
        beside_ptr += n * ((C - SPLIT) * HW)
    if skip_ptr is not None:
        skip_ptr += n * (C * HW)
    if y_ptr is not None:
        y_ptr += n * (C * HW)
    low, high = halves(key_ptr)
    place = (n * (C * HW)).to(tl.uint32)
    centre = spread(tl.load(mean_ptr + n * G + g), c, K, KG)
    rstd = spread(tl.load(rstd_ptr + n * G + g), c, K, KG)
    if add_ptr is not None:
        centre -= tl.load(add_ptr + n * add_n + channel, mask=valid, other=0.0).to(ACC)
    factor, offset = modulation(scale_ptr, scale_n, shift_ptr, shift_n, n, channel, valid, ACC)
    gain = tl.load(weight_ptr + channel, mask=valid, other=0.0).to(ACC) * factor * rstd
    offset += tl.load(bias_ptr + channel, mask=valid, other=0.0).to(ACC) * factor
    mask = (row < HW)[:, None] & valid[None, :]
    at = offsets(row, channel, C, HW, CHANNELS_LAST)
    d = get(x_ptr, at, mask, EVEN, ACC) - centre[None, :]
    h = d * gain[None, :] + offset[None, :]
    dy = get(dy_ptr, at, mask, EVEN, ACC)
    dh, y = through(dy, h, row, channel, place, low, high, least, C, DROP, SILU, ASM)
    if y_ptr is not None and ROWS >= HW:
        put(y_ptr, at, mask, y * factor_y, EVEN)
    dh_sum = fold(dh, FOLD)  # over pixels: of dh, dh·(x - mean) and x - mean
    dhd_sum = fold(dh * d, FOLD)  # dh is 0 where masked
    d_sum = fold(d if EVEN else tl.where(mask, d, 0.0), FOLD)
    for start in range(ROWS, HW, ROWS):  # empty where ROWS >= HW
        mask_s = (start + row < HW)[:, None] & valid[None, :]
        at_s = offsets(start + row, channel, C, HW, CHANNELS_LAST)
        d_s = get(x_ptr, at_s, mask_s, EVEN, ACC) - centre[None, :]
        h_s = d_s * gain[None, :] + offset[None, :]
        dy_s = get(dy_ptr, at_s, mask_s, EVEN, ACC)
        dh_s, _ = through(dy_s, h_s, start + row, channel, place, low, high, least, C, DROP, SILU, ASM)
        dh_sum += fold(dh_s, FOLD)
        dhd_sum += fold(dh_s * d_s, FOLD)
        if dadd_ptr is not None:
            d_sum += fold(d_s if EVEN else tl.where(mask_s, d_s, 0.0), FOLD)
    dh_c = tl.sum(dh_sum, 0) * factor_dy
    dhd_c = tl.sum(dhd_sum, 0) * factor_dy
    if sums_ptr is not None:
        tl.store(sums_ptr + n * C + channel, dh_c, mask=valid)
        tl.store(sums_ptr + (N + n) * C + channel, dhd_c * rstd, mask=valid)
    # dx = gain·dh - (mean over the group of gain·dh) - (x - mean)/var · (mean over the group of gain·dh·(x - mean))
    along = spread(group_sum(gain * dh_c, c, K, KG) / (K * HW), c, K, KG)
    across = spread(group_sum(gain * dhd_c, c, K, KG) / (K * HW), c, K, KG) * rstd * rstd
    if dadd_ptr is not None:
        dadd = gain * dh_c - HW * along - across * tl.sum(d_sum, 0)
        tl.store(dadd_ptr + n * C + channel, dadd, mask=valid)
    slope = gain * factor_dy
    if ROWS >= HW:
        dx = dh * slope[None, :] - (d * across[None, :] + along[None, :])
        if skip_ptr is not None:
            dx += factor_skip * get(skip_ptr, at, mask, EVEN, ACC)
        put_split(dx_ptr, beside_ptr, row, channel, at, mask, dx, C, SPLIT, EVEN)
    else:
        for start in range(0, HW, ROWS):
            mask = (start + row < HW)[:, None] & valid[None, :]
            at = offsets(start + row, channel, C, HW, CHANNELS_LAST)
            d = get(x_ptr, at, mask, EVEN, ACC) - centre[None, :]
            h = d * gain[None, :] + offset[None, :]
            dy = get(dy_ptr, at, mask, EVEN, ACC)
            dh, y = through(dy, h, start + row, channel, place, low, high, least, C, DROP, SILU, ASM)
            if y_ptr is not None:
                put(y_ptr, at, mask, y * factor_y, EVEN)
            dx = dh * slope[None, :] - (d * across[None, :] + along[None, :])
            if skip_ptr is not None:
                dx += factor_skip * get(skip_ptr, at, mask, EVEN, ACC)
            put_split(dx_ptr, beside_ptr, start + row, channel, at, mask, dx, C, SPLIT, EVEN)


@triton.jit
def parameters_kernel(
    sums_ptr, weight_ptr, bias_ptr, scale_ptr, dweight_ptr, dbias_ptr, dscale_ptr, dshift_ptr, scale_n, C,
    N: tl.constexpr, ROWS: tl.constexpr, CB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """From the sums over pixels of dh and dh·xhat [2, N, C]: gradients of weight, bias [C] and scale, shift [N, C]."""
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(ACC)
    dweight = tl.zeros((CB,), ACC)
    dbias = tl.zeros((CB,), ACC)
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)
        mask = (n < N)[:, None] & (c < C)[None, :]
        at = n[:, None].to(tl.int64) * C + c[None, :]
        dh = tl.load(sums_ptr + at, mask=mask, other=0.0)
        dhx = tl.load(sums_ptr + N * C + at, mask=mask, other=0.0)
        if dscale_ptr is not None:
            tl.store(dscale_ptr + at, dhx * weight[None, :] + dh * bias[None, :], mask=mask)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + at, dh, mask=mask)
        if dweight_ptr is not None:
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + n[:, None].to(tl.int64) * scale_n + c[None, :], mask=mask, other=0.0)
                dh += dh * scale.to(ACC)
                dhx += dhx * scale.to(ACC)
            dweight += tl.sum(dhx, 0)
            dbias += tl.sum(dh, 0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, dweight, mask=c < C)
        tl.store(dbias_ptr + c, dbias, mask=c < C)


#: Numbers of one tensor that one program holds in registers at most, to read them once. "block": backward with dropout or more images.
_SLAB = {"forward": 16384, "backward": 8192, "block": 8192}
#: Numbers at a time of a larger slab. 16 warps: one or two programs fill a multiprocessor, and their slabs stay in L2.
#: In 16 bits a thread has four loads of 16 bytes on their way: of x, or two of x and two of dy; block: of x, dy and skip.
_TILE = {"forward": 16384, "backward": 8192, "block": 4096}
_TILE_WARPS = 16
_SEGMENT = 64  # bytes of neighbouring channels a program reads per pixel; half where that keeps one pass, or L2 enough
_L2 = 2**18  # bytes of its images that a program reads twice: 132 of them are two thirds of an H200's L2
ASM = not INTERPRET


def plan(c: int, hw: int, groups: int, itemsize: int, channels_last: bool, direction: str) -> dict[str, int]:
    """Groups a program takes (KG), their channels and pixels at a time as powers of two (CB, ROWS), and its warps.

    A function of shape and dtype alone, so that the order of summation does not depend on the device.
    """
    k, rows = c // groups, power_of_2(hw)
    fits = []
    for segment in (_SEGMENT, _SEGMENT // 2) if channels_last else (1,):
        kg = 1
        while groups % (2 * kg) == 0 and (kg * k * itemsize < segment or kg * k * itemsize % 8) and kg * k < 128:
            kg *= 2
        fits.append((kg, power_of_2(kg * k)))
    limit, images = _SLAB[direction], 1 if direction == "forward" else 2
    kg, cb = next(((kg, cb) for kg, cb in fits if cb * rows <= limit), (0, 0))
    if kg:
        warps = min(8, max(4, cb * rows // 1024))
    else:
        kg, cb = next((f for f in fits if f[0] * k * hw * itemsize * images <= _L2), fits[-1])
        rows, warps = max(16, _TILE[direction] // cb), _TILE_WARPS
    return {"KG": kg, "CB": cb, "ROWS": rows, "num_warps": warps}


def threshold(dropout: float) -> int:
    """The least 32-bit number with which a value stays."""
    return min(round(dropout * 2**32), 2**32 - 1)


def drop(dropout: float, key: Tensor | None) -> tuple[Tensor | None, int, float]:
    """The key, the threshold as the int32 of its bits, and what is left is multiplied by; no dropout: no key."""
    if key is None or not dropout:
        return None, 0, 1.0
    least = threshold(dropout)
    return key, least - 2**32 * (least >= 2**31), 1 / (1 - dropout)


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def forward(x, weight, bias, scale, shift, add, groups, eps, silu, dropout, key):
    n, c, h, w = x.shape
    y, mean, rstd = outputs(x, groups)
    if x.numel() == 0:
        return y, mean, rstd
    channels_last = not x.is_contiguous()
    key, least, kept = drop(dropout, key)
    p = plan(c, h * w, groups, x.element_size(), channels_last, "forward")
    forward_kernel[(n * (groups // p["KG"]),)](
        x, weight, bias, scale, shift, add, y, mean, rstd, key, _stride(scale), _stride(shift), _stride(add), least, eps, kept,
        C=c, HW=h * w, G=groups, CHANNELS_LAST=channels_last, SILU=silu, ACC=tl_dtype(mean.dtype),
        ASM=ASM and x.dtype != torch.float64, **p,
    )  # fmt: skip
    return y, mean, rstd


def backward(
    dy, x, mean, rstd, weight, bias, scale, shift, add, groups, silu, dropout, key, dy_factor, skip, skip_factor, again, wanted, split
):  # fmt: skip
    n, c, h, w = x.shape
    params, want_scale, want_shift, want_add = wanted
    dx, *out, y, beside = gradients(x, (weight, bias, scale, shift, add), again, wanted, split)
    if x.numel() == 0:
        return dx, *(t.zero_() for t in out), y, beside
    sums = mean.new_empty(2, n, c) if params or want_scale or want_shift else None
    channels_last = not x.is_contiguous()
    key, least, kept = drop(dropout, key)
    direction = "backward" if key is None and skip is None and not again else "block"
    p = plan(c, h * w, groups, x.element_size(), channels_last, direction)
    backward_kernel[(n * (groups // p["KG"]),)](
        dy, x, mean, rstd, weight, bias, scale, shift, add, key, skip,
        dx, beside if split else None, out[4] if want_add else None, sums, y if again else None,
        _stride(scale), _stride(shift), _stride(add), n, least, dy_factor * kept, skip_factor, kept,
        C=c, HW=h * w, G=groups, CHANNELS_LAST=channels_last, SILU=silu, ACC=tl_dtype(mean.dtype),
        ASM=ASM and x.dtype != torch.float64, SPLIT=split or c, **p,
    )  # fmt: skip
    if sums is not None:
        dweight, dbias, dscale, dshift, _ = (t if t.numel() else None for t in out)
        parameters_kernel[(cdiv(c, 32),)](
            sums, weight, bias, scale if params else None, dweight, dbias, dscale, dshift, _stride(scale), c,
            N=n, ROWS=32, CB=32, ACC=tl_dtype(mean.dtype), num_warps=4,
        )  # fmt: skip
    return dx, *out, y, beside


def outputs(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for y like x, and mean and 1/std [N, G]."""
    mean = x.new_empty(x.shape[0], groups, dtype=accum(x))
    return torch.empty_like(x), mean, torch.empty_like(mean)


def gradients(x, parameters, again, wanted, split) -> list[Tensor]:
    """Memory for the gradients of x and of weight, bias, scale, shift and add, for y `again`, and for the channels of x's gradient from
    `split` on, if it is not 0; what is not wanted is empty."""
    (weight, bias, scale, shift, add), (params, *each) = parameters, wanted
    given = [(weight, params), (bias, params), *zip((scale, shift, add), each, strict=True)]
    made = [torch.empty_like(t, memory_format=torch.contiguous_format) if want else x.new_empty(0) for t, want in given]
    y = torch.empty_like(x) if again else x.new_empty(0)
    return [torch.empty_like(x[:, : split or None]), *made, y, torch.empty_like(x[:, split:]) if split else x.new_empty(0)]
