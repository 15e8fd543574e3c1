"""What the kernels of norm_silu are made of: access to a tile, sums over groups, SiLU and dropout's mask of it."""

# Triton's device functions are untyped.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from potstill.kernels._triton import tl, triton


@triton.jit
def group_sum(v_c, c, K: tl.constexpr, KG: tl.constexpr):
    """[CB] numbers, one a channel -> [KG], their sums over each group."""
    member = tl.arange(0, KG)[:, None] == (c // K)[None, :]
    return tl.sum(tl.where(member, v_c[None, :], 0.0), 1)


@triton.jit
def spread(v_g, c, K: tl.constexpr, KG: tl.constexpr):
    """[KG] numbers, one a group -> [CB], each channel its group's."""
    member = tl.arange(0, KG)[:, None] == (c // K)[None, :]
    return tl.sum(tl.where(member, v_g[:, None], 0.0), 0)


@triton.jit
def modulation(scale_ptr, scale_n, shift_ptr, shift_n, n, channel, valid, ACC: tl.constexpr):
    """1 + scale and shift of sample n: [CB] each. An absent pointer is None."""
    factor = tl.full(channel.shape, 1.0, ACC)
    if scale_ptr is not None:
        factor += tl.load(scale_ptr + n * scale_n + channel, mask=valid, other=0.0).to(ACC)
    shift = tl.zeros(channel.shape, ACC)
    if shift_ptr is not None:
        shift += tl.load(shift_ptr + n * shift_n + channel, mask=valid, other=0.0).to(ACC)
    return factor, shift


@triton.jit
def get(ptr, at, mask, EVEN: tl.constexpr, ACC: tl.constexpr):
    if EVEN:  # every pixel and channel of the tile exists
        v = tl.load(ptr + at)
    else:
        v = tl.load(ptr + at, mask=mask, other=0.0)
    return v.to(ACC)


@triton.jit
def put(ptr, at, mask, v, EVEN: tl.constexpr):
    if EVEN:
        tl.store(ptr + at, v)
    else:
        tl.store(ptr + at, v, mask=mask)


@triton.jit
def put_split(ptr, beside_ptr, row, channel, at, mask, v, C: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr):
    """`put`, with the channels from SPLIT on in an NHWC image of their own."""
    if beside_ptr is None:
        put(ptr, at, mask, v, EVEN)
    else:
        left = (channel < SPLIT)[None, :] & mask
        right = (channel >= SPLIT)[None, :] & mask
        tl.store(ptr + row[:, None] * SPLIT + channel[None, :], v, mask=left)
        tl.store(beside_ptr + row[:, None] * (C - SPLIT) + (channel - SPLIT)[None, :], v, mask=right)


@triton.jit
def sigmoid(h, ASM: tl.constexpr):
    # PTX spares the branches for numbers near 0 and infinity, a fifth of the arithmetic. The interpreter has none.
    if ASM:
        h = h * -1.4426950408889634
        e = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [h], tl.float32, True, 1)
        s = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], tl.float32, True, 1)
    else:
        s = 1.0 / (1.0 + tl.exp(-h))
    return s


@triton.jit
def offsets(row, channel, C: tl.constexpr, HW: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """[ROWS, CB] offsets inside a sample."""
    if CHANNELS_LAST:
        at = row[:, None] * C + channel[None, :]
    else:
        at = row[:, None] + channel[None, :] * HW
    return at


@triton.jit
def halves(key_ptr):
    """The two halves of dropout's key, uint32."""
    low = tl.zeros((), tl.uint32)
    high = low
    if key_ptr is not None:
        key = tl.load(key_ptr)
        low = key.to(tl.uint32)
        high = (key >> 32).to(tl.uint32)
    return low, high


@triton.jit
def dropped(v, row, channel, first, low, high, least, C: tl.constexpr, DROP: tl.constexpr):
    """v where `kept` of kernels/norm_silu.py keeps it, else 0. `first`: the sample's place, modulo 2^32 as all here."""
    if DROP:
        bits = ((row[:, None] * C + channel[None, :]).to(tl.uint32) + first) ^ low
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        bits = (bits ^ (bits >> 15)) + high
        v = tl.where(bits * 0x846CA68B >= least.to(tl.uint32, bitcast=True), v, 0.0)
    return v


@triton.jit
def activated(
    h, row, channel, first, low, high, least, factor,
    C: tl.constexpr, DROP: tl.constexpr, SILU: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """SiLU and dropout of one tile."""
    y = h * sigmoid(h, ASM) if SILU else h
    return dropped(y * factor if DROP else y, row, channel, first, low, high, least, C, DROP)


@triton.jit
def fold(v, FOLD: tl.constexpr):
    """[ROWS, CB] -> [ROWS / FOLD, CB], sums of rows that one thread of 16 warps holds: many loads on their way, few sums."""
    if FOLD > 1:
        v = tl.sum(tl.reshape(v, (FOLD, v.shape[0] // FOLD, v.shape[1])), 0)
    return v


@triton.jit
def through(
    dh, h, row, channel, first, low, high, least,
    C: tl.constexpr, DROP: tl.constexpr, SILU: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The gradient to h from the one to y, and y of one tile, both but for their factors."""
    y = h
    if SILU:
        s = sigmoid(h, ASM)
        y *= s
        dh *= y * (1.0 - s) + s
    return dropped(dh, row, channel, first, low, high, least, C, DROP), dropped(y, row, channel, first, low, high, least, C, DROP)
