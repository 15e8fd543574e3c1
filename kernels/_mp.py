"""The Triton kernels of EDM2's operations on images, and how they are launched. The formulas stand in kernels/mp.py.

Images are NHWC: pixels, the numbers of one pixel side by side. All arithmetic is float32.
"""

# Triton's launches take constexpr parameters as plain values, and options like num_warps besides; its device functions are untyped.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import torch
from torch import Tensor

from potstill.kernels._lib import cdiv, power_of_2
from potstill.kernels._norm import ASM, drop
from potstill.kernels._norm_tl import dropped, halves, sigmoid
from potstill.kernels._triton import tl, triton
from potstill.kernels.reference import cat_weights, sum_weights


@triton.jit
def _silu(u, ASM: tl.constexpr):
    return u * sigmoid(u, ASM) * (1.0 / 0.596)


@triton.jit
def _slope(u, ASM: tl.constexpr):
    """The derivative of silu(u)/0.596."""
    s = sigmoid(u, ASM)
    return (s + u * s * (1.0 - s)) * (1.0 / 0.596)


@triton.jit
def _get(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _whole_pixels(pixels, C: tl.constexpr, CB: tl.constexpr, ROWS: tl.constexpr):
    """The pixels of this program with all their channels: where they begin, their offsets [ROWS, CB] from there, which exist."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, c = tl.arange(0, ROWS), tl.arange(0, CB)
    return first * C, row[:, None] * C + c[None, :], (first + row < pixels)[:, None] & (c < C)[None, :], first + row


@triton.jit
def norm_kernel(
    x_ptr, n_ptr, s_ptr, r_ptr, pixels, eps,
    C: tl.constexpr, CB: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    start, at, mask, pixel = _whole_pixels(pixels, C, CB, ROWS)
    x = _get(x_ptr + start, at, mask)
    r = tl.sqrt(tl.sum(x * x, 1) / C)
    n = x * (1.0 / (eps + r))[:, None]
    tl.store(r_ptr + pixel, r, mask=pixel < pixels)
    tl.store(n_ptr + start + at, n, mask=mask)
    if s_ptr is not None:
        tl.store(s_ptr + start + at, _silu(n, ASM), mask=mask)


@triton.jit
def norm_grad_kernel(
    dn_ptr, ds_ptr, n_ptr, r_ptr, dx_ptr, pixels, eps,
    C: tl.constexpr, CB: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    start, at, mask, pixel = _whole_pixels(pixels, C, CB, ROWS)
    n = _get(n_ptr + start, at, mask)
    g = tl.zeros((ROWS, CB), tl.float32)
    if dn_ptr is not None:
        g += _get(dn_ptr + start, at, mask)
    if ds_ptr is not None:
        g += _get(ds_ptr + start, at, mask) * _slope(n, ASM)
    r = tl.load(r_ptr + pixel, mask=pixel < pixels, other=0.0)
    # n = x/(eps + r), and r changes with x by n·(eps + r)/(C·r); where r is 0, n is
    along = tl.sum(g * n, 1) / (C * tl.where(r > 0, r, 1.0))
    tl.store(dx_ptr + start + at, g * (1.0 / (eps + r))[:, None] - n * along[:, None], mask=mask)


@triton.jit
def _some_channels(pixels, tiles, PER: tl.constexpr, C: tl.constexpr, CB: tl.constexpr):
    """This program's sample, tile of PER pixels of it, its first pixel and its channels."""
    BLOCKS: tl.constexpr = (C + CB - 1) // CB
    channel = (tl.program_id(0) % BLOCKS) * CB + tl.arange(0, CB)  # neighbours in a sample run together and share cache lines
    tile = tl.program_id(0) // BLOCKS
    n = (tile // tiles).to(tl.int64)
    return n, tile, (tile % tiles) * PER, channel


@triton.jit(do_not_specialize=["least"])
def silu_kernel(
    x_ptr, scale_ptr, key_ptr, y_ptr, pixels, tiles, scale_n, least, factor,
    C: tl.constexpr, CB: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    DROP: tl.constexpr = key_ptr is not None
    n, _, first, channel = _some_channels(pixels, tiles, ROWS, C, CB)
    low, high = halves(key_ptr)
    row = tl.arange(0, ROWS)
    mask = (first + row < pixels)[:, None] & (channel < C)[None, :]
    start = (n * pixels + first) * C
    at = row[:, None] * C + channel[None, :]
    u = _get(x_ptr + start, at, mask)
    if scale_ptr is not None:
        u *= _get(scale_ptr + n * scale_n, channel, channel < C)[None, :]
    y = dropped(_silu(u, ASM) * factor, row, channel, start.to(tl.uint32), low, high, least, C, DROP)
    tl.store(y_ptr + start + at, y, mask=mask)


@triton.jit(do_not_specialize=["least"])
def silu_grad_kernel(
    dy_ptr, x_ptr, scale_ptr, key_ptr, dx_ptr, dscale_ptr, pixels, tiles, scale_n, least, factor,
    C: tl.constexpr, CB: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """dscale: [N, tiles, C], the sums over each tile's pixels."""
    DROP: tl.constexpr = key_ptr is not None
    n, tile, first, channel = _some_channels(pixels, tiles, ROWS * STEPS, C, CB)
    low, high = halves(key_ptr)
    row = tl.arange(0, ROWS)
    at = row[:, None] * C + channel[None, :]
    scale = tl.full((CB,), 1.0, tl.float32)
    if scale_ptr is not None:
        scale = _get(scale_ptr + n * scale_n, channel, channel < C)
    total = tl.zeros((ROWS, CB), tl.float32)
    for _ in range(STEPS):
        mask = (first + row < pixels)[:, None] & (channel < C)[None, :]
        start = (n * pixels + first) * C
        x = _get(x_ptr + start, at, mask)
        du = _get(dy_ptr + start, at, mask) * _slope(x * scale[None, :], ASM) * factor
        du = dropped(du, row, channel, start.to(tl.uint32), low, high, least, C, DROP)
        if dx_ptr is not None:
            tl.store(dx_ptr + start + at, du * scale[None, :], mask=mask)
        total += du * x
        first += ROWS
    if dscale_ptr is not None:
        tl.store(dscale_ptr + tile.to(tl.int64) * C + channel, tl.sum(total, 0), mask=channel < C)


@triton.jit
def sum_kernel(x_ptr, y_ptr, out_ptr, bits_ptr, weight_x, weight_y, clip, numel, CLIPS: tl.constexpr, BLOCK: tl.constexpr):
    """bits: of each number whether it was not clipped, eight a byte."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = start + i < numel
    v = weight_x * _get(x_ptr + start, i, mask) + weight_y * _get(y_ptr + start, i, mask)
    if CLIPS:
        inside = tl.where((v >= -clip) & (v <= clip), 1, 0)
        v = tl.where(v > clip, clip, tl.where(v < -clip, -clip, v))  # NaN stays
        if bits_ptr is not None:
            eights = tl.reshape(inside, (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
            byte = start // 8 + tl.arange(0, BLOCK // 8)
            tl.store(bits_ptr + byte, tl.sum(eights, 1).to(tl.uint8), mask=byte * 8 < numel)
    tl.store(out_ptr + start + i, v, mask=mask)


@triton.jit
def sum_grad_kernel(g_ptr, bits_ptr, dx_ptr, dy_ptr, weight_x, weight_y, numel, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = start + i < numel
    g = _get(g_ptr + start, i, mask)
    if bits_ptr is not None:
        byte = start // 8 + tl.arange(0, BLOCK // 8)
        bytes_ = tl.load(bits_ptr + byte, mask=byte * 8 < numel, other=0).to(tl.int32)
        inside = tl.reshape((bytes_[:, None] >> tl.arange(0, 8)[None, :]) & 1, (BLOCK,))
        g = tl.where(inside != 0, g, 0.0)
    if dx_ptr is not None:
        tl.store(dx_ptr + start + i, weight_x * g, mask=mask)
    if dy_ptr is not None:
        tl.store(dy_ptr + start + i, weight_y * g, mask=mask)


@triton.jit
def _tile_of(pixels, first, block, WIDTH: tl.constexpr, OFFSET: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, ROWS: tl.constexpr):
    """The offsets of a tile in an image of WIDTH channels and in the one of C that holds it from channel OFFSET on, and its mask."""
    row = tl.arange(0, ROWS)
    channel = block * CB + tl.arange(0, CB)
    mask = (first + row < pixels)[:, None] & (channel < WIDTH)[None, :]
    return first * WIDTH + (row[:, None] * WIDTH + channel[None, :]), first * C + (row[:, None] * C + OFFSET + channel[None, :]), mask


@triton.jit
def _put_part(
    part_ptr, cat_ptr, s_ptr, weight, pixels, first, block,
    WIDTH: tl.constexpr, OFFSET: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    inner, outer, mask = _tile_of(pixels, first, block, WIDTH, OFFSET, C, CB, ROWS)
    v = weight * _get(part_ptr, inner, mask)
    tl.store(cat_ptr + outer, v, mask=mask)
    tl.store(s_ptr + outer, _silu(v, ASM), mask=mask)


@triton.jit
def cat_kernel(
    a_ptr, b_ptr, cat_ptr, s_ptr, weight_a, weight_b, pixels,
    CA: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    OF_A: tl.constexpr = (CA + CB - 1) // CB
    BLOCKS: tl.constexpr = OF_A + (C - CA + CB - 1) // CB
    block = tl.program_id(0) % BLOCKS
    first = (tl.program_id(0) // BLOCKS).to(tl.int64) * ROWS
    if block < OF_A:
        _put_part(a_ptr, cat_ptr, s_ptr, weight_a, pixels, first, block, CA, 0, C, CB, ROWS, ASM)
    else:
        _put_part(b_ptr, cat_ptr, s_ptr, weight_b, pixels, first, block - OF_A, C - CA, CA, C, CB, ROWS, ASM)


@triton.jit
def _put_gradient(
    dcat_ptr, ds_ptr, cat_ptr, part_ptr, weight, pixels, first, block,
    WIDTH: tl.constexpr, OFFSET: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    inner, outer, mask = _tile_of(pixels, first, block, WIDTH, OFFSET, C, CB, ROWS)
    g = tl.zeros((ROWS, CB), tl.float32)
    if dcat_ptr is not None:
        g += _get(dcat_ptr, outer, mask)
    if ds_ptr is not None:
        g += _get(ds_ptr, outer, mask) * _slope(_get(cat_ptr, outer, mask), ASM)
    tl.store(part_ptr + inner, weight * g, mask=mask)


@triton.jit
def cat_grad_kernel(
    dcat_ptr, ds_ptr, cat_ptr, da_ptr, db_ptr, weight_a, weight_b, pixels,
    CA: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    OF_A: tl.constexpr = (CA + CB - 1) // CB
    BLOCKS: tl.constexpr = OF_A + (C - CA + CB - 1) // CB
    block = tl.program_id(0) % BLOCKS
    first = (tl.program_id(0) // BLOCKS).to(tl.int64) * ROWS
    if block < OF_A:
        if da_ptr is not None:
            _put_gradient(dcat_ptr, ds_ptr, cat_ptr, da_ptr, weight_a, pixels, first, block, CA, 0, C, CB, ROWS, ASM)
    else:
        if db_ptr is not None:
            _put_gradient(dcat_ptr, ds_ptr, cat_ptr, db_ptr, weight_b, pixels, first, block - OF_A, C - CA, CA, C, CB, ROWS, ASM)


#: Numbers of one image that a program of 4 warps handles at a time: in 16 bits four loads of 16 bytes a thread; backward reads two or three.
_FORWARD, _BACKWARD = 4096, 2048
_CHANNELS = 64  # of a tile: 128 bytes of a pixel in 16 bits; 64 divides the widths of all EDM2 nets
_STEPS = 8  # tiles that a program sums to the gradient of a scale: sums that are written are 1/256 of the image, for 32 pixels a tile
_BLOCK = 2048


def _numbers(t: Tensor) -> tuple[int, int]:
    """(pixels of all samples, channels) of an image [N, C, H, W] or of vectors [N, C]."""
    return t.numel() // t.shape[1], t.shape[1]


def _rows(c: int, numbers: int) -> dict[str, int]:
    """Whole pixels of c channels: as many as have so many numbers, at least one."""
    cb = power_of_2(c)
    return {"CB": cb, "ROWS": max(1, numbers // cb), "num_warps": min(16, max(4, cb // 1024))}


def _tile(c: int, numbers: int) -> dict[str, int]:
    """Some channels of some pixels."""
    cb = min(_CHANNELS, power_of_2(c))
    return {"CB": cb, "ROWS": numbers // cb}


def norm(x: Tensor, eps: float, activated: bool) -> tuple[Tensor, Tensor, Tensor]:
    n, s, r = norm_outputs(x, eps, activated)
    if x.numel():
        (pixels, c), p = _numbers(x), _rows(x.shape[1], _FORWARD)
        norm_kernel[(cdiv(pixels, p["ROWS"]),)](x, n, s if activated else None, r, pixels, eps, C=c, ASM=ASM, **p)
    return n, s, r


def norm_grad(dn: Tensor | None, ds: Tensor | None, n: Tensor, r: Tensor, eps: float) -> Tensor:
    dx = torch.empty_like(n)
    if n.numel():
        (pixels, c), p = _numbers(n), _rows(n.shape[1], _BACKWARD)
        norm_grad_kernel[(cdiv(pixels, p["ROWS"]),)](dn, ds, n, r, dx, pixels, eps, C=c, ASM=ASM, **p)
    return dx


def norm_outputs(x: Tensor, eps: float, activated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for n and s like x, s empty where not asked for, and for the root mean square of each pixel."""
    s = torch.empty_like(x) if activated else x.new_empty(0)
    return torch.empty_like(x), s, x.new_empty(x.numel() // x.shape[1], dtype=torch.float32)


def silu(x: Tensor, scale: Tensor | None, dropout: float, key: Tensor | None) -> Tensor:
    y = torch.empty_like(x)
    if x.numel():
        (pixels, samples, c), p = _samples(x, scale), _tile(x.shape[1], _FORWARD)
        (key, least, kept), tiles = drop(dropout, key), cdiv(pixels, p["ROWS"])
        silu_kernel[(samples * tiles * cdiv(c, p["CB"]),)](
            x, scale, key, y, pixels, tiles, 0 if scale is None else scale.stride(0), least, kept, C=c, ASM=ASM, num_warps=4, **p,
        )  # fmt: skip
    return y


def silu_grad(
    dy: Tensor, x: Tensor, scale: Tensor | None, dropout: float, key: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx, dscale = silu_gradients(dy, x, scale, dropout, key, wanted)
    if x.numel() == 0:
        return dx, dscale.zero_()
    (pixels, samples, c), p = _samples(x, scale), _tile(x.shape[1], _BACKWARD)
    steps = min(_STEPS, cdiv(pixels, p["ROWS"])) if wanted[1] else 1
    (key, least, kept), tiles = drop(dropout, key), cdiv(pixels, p["ROWS"] * steps)
    sums = x.new_empty((samples, tiles, c), dtype=torch.float32) if wanted[1] else None
    silu_grad_kernel[(samples * tiles * cdiv(c, p["CB"]),)](
        dy, x, scale, key, dx if wanted[0] else None, sums, pixels, tiles, 0 if scale is None else scale.stride(0), least, kept,
        C=c, STEPS=steps, ASM=ASM, num_warps=4, **p,
    )  # fmt: skip
    return dx, dscale if sums is None else sums.sum(1).to(dscale.dtype)


def _samples(x: Tensor, scale: Tensor | None) -> tuple[int, int, int]:
    """(pixels, samples, channels); without a scale all pixels are those of one sample."""
    pixels, c = _numbers(x)
    return (pixels, 1, c) if scale is None else (pixels // x.shape[0], x.shape[0], c)


def silu_gradients(
    dy: Tensor, x: Tensor, scale: Tensor | None, dropout: float, key: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Memory for the gradients of x and scale, empty where not wanted."""
    dscale = x.new_empty(0) if scale is None or not wanted[1] else scale.new_empty(scale.shape)
    return torch.empty_like(x) if wanted[0] else x.new_empty(0), dscale


def weighted_sum(x: Tensor, y: Tensor, t: float, clip: float | None, keep: bool) -> tuple[Tensor, Tensor]:
    out, bits = sum_outputs(x, y, t, clip, keep)
    if x.numel():
        sum_kernel[(cdiv(x.numel(), _BLOCK),)](
            x, y, out, bits if bits.numel() else None, *sum_weights(t), 0.0 if clip is None else clip, x.numel(),
            CLIPS=clip is not None, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out, bits


def sum_outputs(x: Tensor, y: Tensor, t: float, clip: float | None, keep: bool) -> tuple[Tensor, Tensor]:
    """Memory for the sum, and for a bit a number where backward will ask which of them were not clipped."""
    return torch.empty_like(x), x.new_empty(cdiv(x.numel(), 8) if keep and clip is not None else 0, dtype=torch.uint8)


def weighted_sum_grad(g: Tensor, bits: Tensor, t: float, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    dx, dy = sum_gradients(g, bits, t, wanted)
    if g.numel():
        given = dx if wanted[0] else None, dy if wanted[1] else None
        sum_grad_kernel[(cdiv(g.numel(), _BLOCK),)](
            g, bits if bits.numel() else None, *given, *sum_weights(t), g.numel(), BLOCK=_BLOCK, num_warps=4
        )
    return dx, dy


def sum_gradients(g: Tensor, bits: Tensor, t: float, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """Memory for the gradients of x and y, empty where not wanted."""
    dx, dy = (torch.empty_like(g) if want else g.new_empty(0) for want in wanted)
    return dx, dy


def cat(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
    joined, s = cat_outputs(a, b, t)
    if joined.numel():
        (pixels, c), ca = _numbers(joined), a.shape[1]
        p = _tile(max(ca, c - ca), _FORWARD)
        programs = cdiv(pixels, p["ROWS"]) * (cdiv(ca, p["CB"]) + cdiv(c - ca, p["CB"]))
        cat_kernel[(programs,)](a, b, joined, s, *cat_weights(ca, c - ca, t), pixels, CA=ca, C=c, ASM=ASM, num_warps=4, **p)
    return joined, s


def cat_outputs(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
    shape = (a.shape[0], a.shape[1] + b.shape[1], *a.shape[2:])
    like = torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=memory_format(a))
    return like, torch.empty_like(like)


def cat_grad(dcat: Tensor | None, ds: Tensor | None, joined: Tensor, t: float, width: int, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    da, db = cat_gradients(dcat, ds, joined, t, width, wanted)
    if joined.numel():
        pixels, c = _numbers(joined)
        p = _tile(max(width, c - width), _BACKWARD)
        programs = cdiv(pixels, p["ROWS"]) * (cdiv(width, p["CB"]) + cdiv(c - width, p["CB"]))
        given = da if wanted[0] else None, db if wanted[1] else None
        cat_grad_kernel[(programs,)](
            dcat, ds, joined, *given, *cat_weights(width, c - width, t), pixels, CA=width, C=c, ASM=ASM, num_warps=4, **p
        )
    return da, db


def cat_gradients(
    dcat: Tensor | None, ds: Tensor | None, joined: Tensor, t: float, width: int, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """Memory for the gradients of a and b, empty where not wanted."""
    n, c, *pixels = joined.shape
    widths = zip((width, c - width), wanted, strict=True)
    da, db = (
        torch.empty((n, w, *pixels), dtype=joined.dtype, device=joined.device, memory_format=memory_format(joined))
        if want
        else joined.new_empty(0)
        for w, want in widths
    )
    return da, db


def memory_format(t: Tensor) -> torch.memory_format:
    return torch.channels_last if t.ndim == 4 else torch.contiguous_format
