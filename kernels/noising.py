"""The forward process and what a network is fed: x_t = x + sigma·noise, and c_in·x_t cast, laid out and padded.

One pass reads x (and the noise, if it is given rather than drawn) and writes x_t in float32 for the loss's c_skip·x_t,
and the network input in bfloat16 or float16, NHWC, with zero channels appended so that the first convolution's channel
count suits tensor cores. Backward to x is one pass too. Normals are counted, not stored: a function of a seed, an
offset and the position (Philox4x32-10 and Box-Muller), both of them device tensors, so a captured CUDA graph draws new
noise at each replay once it advances the offset.
Source: arXiv 2206.00364, Eq. 7 and Table 1; Philox: Salmon et al., SC 2011.
"""

# Triton's launches and device functions are untyped.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from potstill.kernels import reference
from potstill.kernels._args import Layout, check_constant, check_image, check_per_sample, check_root, layout
from potstill.kernels._inference import takes_inference_tensors
from potstill.kernels._lib import BLOCK, REGISTERS, AotCase, aot_case, define, power_of_2, tl_dtype
from potstill.kernels._loss import uses_reference
from potstill.kernels._triton import tl, triton
from potstill.kernels.estimate import accum, per_sample


class Normals(NamedTuple):
    """Standard normals drawn inside the kernel; pass it where `add_noise` takes noise.

    The number at a position depends on seed, offset and position alone: not on device, layout, or batch size.
    """

    seed: Tensor  # [] int64, a key per run and rank
    offset: Tensor  # [] int64, counts the draws; modulo 2^32

    @classmethod
    def from_seed(cls, seed: int, device: torch.device | str = "cpu") -> "Normals":
        """The first draw of a key, on a device; seed is any integer of 64 bits."""
        return cls(torch.tensor(seed, device=device), torch.zeros((), dtype=torch.int64, device=device))

    def advance(self) -> None:
        """Count one draw, in place: what makes the next draw differ, also at a CUDA graph's replay."""
        self.offset.add_(1)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The numbers themselves, [N, ...] float32."""
        if uses_reference("noising", self.seed):
            return reference.normals(self.seed, self.offset, shape)
        return _normals_op(self.seed, self.offset, list(shape))


class NoisedInput(NamedTuple):
    """What `noised_input` makes: the noisy images, and what the network is fed of them."""

    x_t: Tensor  # [N, C, H, W] float32: goes into Estimate.x_t
    net_input: Tensor  # [N, C', H, W], c_in·x_t in the dtype and layout the network wants


@triton.jit
def _draw(seed_ptr, offset_ptr, n, c, first, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr):
    """Normals of pixels first to first + 4·BLOCK_Q, channels c: [4·BLOCK_Q, BLOCK_C]."""
    zero = tl.zeros((BLOCK_Q, BLOCK_C), tl.int32)
    quad = zero + (first // 4 + tl.arange(0, BLOCK_Q))[:, None]
    offset = zero + (tl.load(offset_ptr) & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    i1, i2, i3, i4 = tl.philox(tl.load(seed_ptr), quad, zero + c[None, :], zero + n.to(tl.int32), offset)
    n1, n2 = _box_muller(i1, i2)
    n3, n4 = _box_muller(i3, i4)
    four = tl.join(tl.join(n1, n2), tl.join(n3, n4))  # [BLOCK_Q, BLOCK_C, 2, 2]; number j of a quad at [j % 2, j // 2]
    return tl.reshape(tl.permute(four, (0, 3, 2, 1)), (4 * BLOCK_Q, BLOCK_C))


@triton.jit
def _box_muller(i, j):
    u = i.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # (i + 1/2)/2^32, never 0
    v = j.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(-2.0 * tl.log(u))
    angle = 6.283185307179586 * v
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _tile(pid, blocks_p, blocks_c, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sample, first pixel and channels of program pid."""
    n = (pid // (blocks_p * blocks_c)).to(tl.int64)
    first = (pid // blocks_c % blocks_p) * BLOCK_P
    return n, first, (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _at(n, c, p, C: tl.constexpr, P, NHWC: tl.constexpr):
    """Offsets [pixels, channels] of sample n in a tensor of C channels and P pixels."""
    if NHWC:
        i = p[:, None] * C + c[None, :]
    else:
        i = c[None, :] * P + p[:, None]
    return n * (C * P) + i


@triton.jit
def _noising_kernel(
    x_ptr, sigma_ptr, noise_ptr, seed_ptr, offset_ptr, c_in_ptr, x_t_ptr, scaled_ptr, P, blocks_p, blocks_c,
    C: tl.constexpr, NHWC: tl.constexpr, C_OUT: tl.constexpr, OUT_NHWC: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n, first, c = _tile(tl.program_id(0), blocks_p, blocks_c, 4 * BLOCK_Q, BLOCK_C)
    p = first + tl.arange(0, 4 * BLOCK_Q)
    mask = (p < P)[:, None] & (c < C)[None, :]
    at = _at(n, c, p, C, P, NHWC)
    if noise_ptr is not None:
        x_t = tl.load(noise_ptr + at, mask=mask, other=0.0).to(ACC)
    else:
        x_t = _draw(seed_ptr, offset_ptr, n, c, first, BLOCK_Q, BLOCK_C).to(ACC)
    if sigma_ptr is not None:
        x_t *= tl.load(sigma_ptr + n).to(ACC)
    if x_ptr is not None:
        x_t += tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    tl.store(x_t_ptr + at, x_t, mask=mask)
    if scaled_ptr is not None:
        x_t = tl.where(mask, x_t * tl.load(c_in_ptr + n).to(ACC), 0.0)  # zeros in the channels appended
        wide = (p < P)[:, None] & (c < C_OUT)[None, :]
        tl.store(scaled_ptr + _at(n, c, p, C_OUT, P, OUT_NHWC), x_t, mask=wide)


@triton.jit
def _gradient_kernel(
    dx_t_ptr, d_scaled_ptr, c_in_ptr, dx_ptr, P, blocks_p, blocks_c,
    C: tl.constexpr, NHWC: tl.constexpr, C_OUT: tl.constexpr, OUT_NHWC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n, first, c = _tile(tl.program_id(0), blocks_p, blocks_c, BLOCK_P, BLOCK_C)
    p = first + tl.arange(0, BLOCK_P)
    mask = (p < P)[:, None] & (c < C)[None, :]
    at = _at(n, c, p, C, P, NHWC)
    dx = tl.load(d_scaled_ptr + _at(n, c, p, C_OUT, P, OUT_NHWC), mask=mask, other=0.0).to(ACC)
    dx *= tl.load(c_in_ptr + n).to(ACC)
    if dx_t_ptr is not None:
        dx += tl.load(dx_t_ptr + at, mask=mask, other=0.0).to(ACC)
    tl.store(dx_ptr + at, dx, mask=mask)


def _blocks(c: int, p: int, across: bool) -> tuple[int, int, int, int]:
    """Pixels and channels of a tile, and how many tiles of each; across: a tile has all layouts of its elements.

    A tile of one plane keeps NCHW tensors contiguous; as soon as one tensor is NHWC, a tile holds several channels.
    """
    block_c = min(power_of_2(c), 32) if across else 1
    block_p = min(max(BLOCK // block_c, 4), max(power_of_2(p), 4))
    return block_p, block_c, -(-p // block_p), -(-c // block_c)


def _launch(
    x: Tensor | None, sigma: Tensor | None, noise: Tensor | None, seed: Tensor | None, offset: Tensor | None,
    x_t: Tensor, channels: int, nhwc: bool,
    c_in: Tensor | None = None, scaled: Tensor | None = None, scaled_nhwc: bool = False, scaled_channels: int = 0,
) -> None:  # fmt: skip
    (n, d), out = x_t.shape, scaled_channels or channels
    pixels = d // channels
    if noise is not None and scaled is None:
        channels, pixels, out, nhwc = 1, d, 1, False  # nothing depends on where the planes begin
    block_p, block_c, blocks_p, blocks_c = _blocks(out, pixels, nhwc or scaled_nhwc)
    if n > 0:
        _noising_kernel[(n * blocks_p * blocks_c,)](
            x, sigma, noise, seed, offset, c_in, x_t, scaled, pixels, blocks_p, blocks_c,
            C=channels, NHWC=nhwc, C_OUT=out, OUT_NHWC=scaled_nhwc,
            BLOCK_Q=block_p // 4, BLOCK_C=block_c, ACC=tl_dtype(x_t.dtype), num_warps=4, maxnreg=REGISTERS,
        )  # fmt: skip


def _images(t: Tensor, channels: int, nhwc: bool) -> Tensor:
    """[N, D] -> [N, C, P, 1]."""
    t = t.view(t.shape[0], -1, channels).mT if nhwc else t.view(t.shape[0], channels, -1)
    return t[..., None]


def _flat(t: Tensor, nhwc: bool) -> Tensor:
    """[N, C, P, 1] -> [N, D], in memory of its own."""
    return (t.permute(0, 2, 3, 1) if nhwc else t).reshape(t.shape[0], -1).clone()


def _normals_launch(seed: Tensor, offset: Tensor, shape: list[int]) -> Tensor:
    drawn = seed.new_empty(shape, dtype=torch.float32)
    flat = drawn.view(shape[0], drawn[:1].numel() if shape[0] else 1)
    _launch(None, None, None, seed, offset, flat, shape[1] if len(shape) == 4 else 1, False)
    return drawn


_normals_op = define(
    "normals(Tensor seed, Tensor offset, int[] shape) -> Tensor",
    triton=_normals_launch,
    reference=reference.normals,
    fake=lambda seed, offset, shape: seed.new_empty(shape, dtype=torch.float32),
)


def _add_noise_launch(
    x: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
    channels: int,
    nhwc: bool,
) -> Tensor:
    x_t = x.new_empty(x.shape, dtype=accum(x))
    _launch(x, sigma, noise, seed, offset, x_t, channels, nhwc)
    return x_t


def _add_noise_reference(
    x: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
    channels: int,
    nhwc: bool,
) -> Tensor:
    if noise is None:
        assert seed is not None and offset is not None
        noise = _flat(reference.normals(seed, offset, _images(x, channels, nhwc).shape), nhwc)
    return reference.add_noise(x, sigma, noise)


_add_noise_op = define(
    "add_noise(Tensor x, Tensor sigma, Tensor? noise, Tensor? seed, Tensor? offset, int channels, bool nhwc) -> Tensor",
    triton=_add_noise_launch,
    reference=_add_noise_reference,
    fake=lambda x, sigma, noise, seed, offset, channels, nhwc: x.new_empty(x.shape, dtype=accum(x)),
)


def _noised_input_launch(
    x: Tensor, sigma: Tensor, noise: Tensor | None, seed: Tensor | None, offset: Tensor | None, c_in: Tensor,
    channels: int, nhwc: bool, dtype: torch.dtype, out_nhwc: bool, out_channels: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x_t, scaled = _fake_noised_input(x, sigma, noise, seed, offset, c_in, channels, nhwc, dtype, out_nhwc, out_channels)
    _launch(x, sigma, noise, seed, offset, x_t, channels, nhwc, c_in, scaled, out_nhwc, out_channels)
    return x_t, scaled


def _noised_input_reference(
    x: Tensor, sigma: Tensor, noise: Tensor | None, seed: Tensor | None, offset: Tensor | None, c_in: Tensor,
    channels: int, nhwc: bool, dtype: torch.dtype, out_nhwc: bool, out_channels: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x_t = _add_noise_reference(x, sigma, noise, seed, offset, channels, nhwc)
    scaled = (c_in[:, None].to(x_t.dtype) * x_t).to(dtype)
    images = torch.nn.functional.pad(_images(scaled, channels, nhwc), (0, 0, 0, 0, 0, out_channels - channels))
    return x_t, _flat(images, out_nhwc)


def _fake_noised_input(
    x: Tensor, sigma: Tensor, noise: Tensor | None, seed: Tensor | None, offset: Tensor | None, c_in: Tensor,
    channels: int, nhwc: bool, dtype: torch.dtype, out_nhwc: bool, out_channels: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (n, d) = x.shape
    return x.new_empty((n, d), dtype=accum(x)), x.new_empty((n, d // channels * out_channels), dtype=dtype)


_noised_input_op = define(
    "noised_input(Tensor x, Tensor sigma, Tensor? noise, Tensor? seed, Tensor? offset, Tensor c_in, int channels, "
    "bool nhwc, ScalarType dtype, bool out_nhwc, int out_channels) -> (Tensor, Tensor)",
    triton=_noised_input_launch,
    reference=_noised_input_reference,
    fake=_fake_noised_input,
)


def _backward_launch(
    dx_t: Tensor | None, d_scaled: Tensor, c_in: Tensor, channels: int, nhwc: bool, out_nhwc: bool, out_channels: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    dx = _fake_backward(dx_t, d_scaled, c_in, channels, nhwc, out_nhwc, out_channels, dtype)
    n, pixels = dx.shape[0], dx.shape[1] // channels
    block_p, block_c, blocks_p, blocks_c = _blocks(channels, pixels, nhwc or out_nhwc)
    if n > 0:
        _gradient_kernel[(n * blocks_p * blocks_c,)](
            dx_t, d_scaled, c_in, dx, pixels, blocks_p, blocks_c,
            C=channels, NHWC=nhwc, C_OUT=out_channels, OUT_NHWC=out_nhwc,
            BLOCK_P=block_p, BLOCK_C=block_c, ACC=tl_dtype(accum(dx, dx_t)), num_warps=4,
        )  # fmt: skip
    return dx


def _backward_reference(
    dx_t: Tensor | None, d_scaled: Tensor, c_in: Tensor, channels: int, nhwc: bool, out_nhwc: bool, out_channels: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    dx = _flat(_images(d_scaled, out_channels, out_nhwc)[:, :channels], nhwc) * c_in[:, None]
    return (dx if dx_t is None else dx + dx_t).to(dtype)


def _fake_backward(
    dx_t: Tensor | None, d_scaled: Tensor, c_in: Tensor, channels: int, nhwc: bool, out_nhwc: bool, out_channels: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return d_scaled.new_empty((d_scaled.shape[0], d_scaled.shape[1] // out_channels * channels), dtype=dtype)


_backward_op = define(
    "noised_input_backward(Tensor? dx_t, Tensor d_scaled, Tensor c_in, int channels, bool nhwc, bool out_nhwc, "
    "int out_channels, ScalarType dtype) -> Tensor",
    triton=_backward_launch,
    reference=_backward_reference,
    fake=_fake_backward,
)


class _AddNoise(Function):
    @staticmethod
    def forward(ctx, x, sigma, noise, seed, offset):
        lay = layout(x)
        ctx.dtype = x.dtype
        return lay.image(_add_noise_op(lay.flat(x), sigma, lay.flat(noise), seed, offset, _channels(x), lay.channels_last))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g.to(ctx.dtype), None, None, None, None


class _NoisedInput(Function):
    @staticmethod
    def forward(ctx, x, sigma, noise, seed, offset, c_in, dtype, channels_last, channels):
        lay, out = layout(x), Layout(torch.Size((x.shape[0], channels, *x.shape[2:])), channels_last)
        x_t, scaled = _noised_input_op(
            lay.flat(x), sigma, lay.flat(noise), seed, offset, c_in, _channels(x), lay.channels_last, dtype,
            channels_last, channels,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(c_in)
        ctx.layout, ctx.out, ctx.dtype, ctx.channels = lay, out, x.dtype, _channels(x)
        return lay.image(x_t), out.image(scaled)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_t, d_scaled):
        dx = dx_t if dx_t is None else dx_t.to(ctx.dtype)
        if d_scaled is not None:
            (c_in,), lay, out = ctx.saved_tensors, ctx.layout, ctx.out
            dx = lay.image(
                _backward_op(
                    lay.flat(dx_t), out.flat(d_scaled), c_in, ctx.channels, lay.channels_last, out.channels_last,
                    out.shape[1], ctx.dtype,
                )
            )  # fmt: skip
        return dx, *[None] * 8


def _channels(x: Tensor) -> int:
    return x.shape[1] if x.ndim == 4 else 1


def _checked(op: str, x: Tensor, sigma: Tensor, noise: Tensor | Normals) -> Tensor:
    """sigma as [N]."""
    check_root(op, "x", x)
    if isinstance(noise, Tensor):
        check_image(op, "noise", noise, "x", x)
        check_constant(op, "noise", noise, "x")
        return check_per_sample(op, "sigma", sigma, "x", x, scalar=True)
    for name, t in (("seed", noise.seed), ("offset", noise.offset)):
        if t.dtype is not torch.int64 or t.ndim or t.device != x.device:
            raise ValueError(f"{op}: wanted {name} [] int64 on {x.device} like x, got {t.dtype} {tuple(t.shape)} on {t.device}")
    return check_per_sample(op, "sigma", sigma, "x", x, scalar=True)


def _drawn(noise: Tensor | Normals) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(noise, seed, offset), of which the first or the others are None."""
    return (noise, None, None) if isinstance(noise, Tensor) else (None, noise.seed, noise.offset)


def _native(x: Tensor) -> bool:
    """Whether PyTorch's own ops do: on a CPU, where a compiler or autograd knows them better than ours, or as asked for."""
    return uses_reference("noising", x)


def _plain_add_noise(x: Tensor, sigma: Tensor, noise: Tensor | Normals) -> Tensor:
    acc, given = accum(x), noise if isinstance(noise, Tensor) else noise.draw(x.shape)
    return torch.addcmul(x.to(acc), given.to(acc), per_sample(sigma.to(acc), x))


@takes_inference_tensors
def add_noise(x: Tensor, sigma: Tensor, noise: Tensor | Normals) -> Tensor:
    """x_t = x + sigma·noise in float32 (float64 for float64 x), differentiable in x.

    Args:
        x: clean images [N, C, H, W].
        sigma: noise levels, [N] or a scalar tensor, floating.
        noise: standard normals [N, C, H, W], or `Normals`, which are drawn in the kernel and never stored.

    Returns:
        x_t [N, C, H, W], NHWC where x is.

    Raises:
        ValueError: shapes or devices differ, sigma is not floating, or anything but x asks for a gradient.
    """
    sigma = _checked("add_noise", x, sigma, noise)
    if _native(x):
        return _plain_add_noise(x, sigma, noise)
    return _AddNoise.apply(x, sigma, *_drawn(noise))


@takes_inference_tensors
def noised_input(
    x: Tensor,
    sigma: Tensor,
    noise: Tensor | Normals,
    c_in: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    channels_last: bool = True,
    channels: int | None = None,
) -> NoisedInput:
    """x_t, and what the network is fed: c_in·x_t in the network's dtype and layout. Differentiable in x through both.

    Args:
        x: clean images [N, C, H, W].
        sigma, noise: as in `add_noise`.
        c_in: input scale [N] float32, 1/sqrt(sigma² + sigma_data²) for EDM.
        dtype: of the network input.
        channels_last: whether the network input is NHWC.
        channels: its number of channels, at least C; those appended are zero. None: C. 8 for images (C = 3) spares
            the first convolution and its weight gradient a slow path.

    Raises:
        ValueError: as `add_noise`, or x is no image, or `channels` is less than C.
    """
    if x.ndim != 4:
        raise ValueError(f"noised_input: wanted images [N, C, H, W], got {tuple(x.shape)}")
    sigma = _checked("noised_input", x, sigma, noise)
    c_in = check_per_sample("noised_input", "c_in", c_in, "x", x, scalar=True)
    channels = x.shape[1] if channels is None else channels
    if channels < x.shape[1]:
        raise ValueError(f"noised_input: wanted channels at least {x.shape[1]}, those of x, got {channels}")
    if not dtype.is_floating_point:
        raise ValueError(f"noised_input: wanted a floating dtype like x ({x.dtype}), got {dtype}")
    if _native(x):
        x_t = _plain_add_noise(x, sigma, noise)
        scaled = torch.mul(x_t, per_sample(c_in.to(x_t.dtype), x)).to(dtype)
        scaled = torch.nn.functional.pad(scaled, (0, 0, 0, 0, 0, channels - x.shape[1]))
        layout_wanted = torch.channels_last if channels_last else torch.contiguous_format
        return NoisedInput(x_t, scaled.contiguous(memory_format=layout_wanted))
    return NoisedInput(*_NoisedInput.apply(x, sigma, *_drawn(noise), c_in, dtype, channels_last, channels))


def aot_cases() -> list[AotCase]:
    """Noise given and drawn, x_t alone and with the network input in each dtype, NHWC padded to 8 and NCHW; backward."""
    cases = []
    for drawn, scaled in itertools.product((False, True), (None, "bf16", "fp16", "fp32")):
        given = {"x_ptr": "*fp32", "sigma_ptr": "*fp32", "noise_ptr": None if drawn else "*fp32"}
        given |= {"seed_ptr": "*i64" if drawn else None, "offset_ptr": "*i64" if drawn else None}
        given |= {"c_in_ptr": "*fp32" if scaled else None, "x_t_ptr": "*fp32"}
        given |= {"scaled_ptr": f"*{scaled}" if scaled else None, "P": "i32:16", "blocks_p": "i32"}
        for nhwc in (False, True) if scaled else (False,):
            given["blocks_c"] = 1 if nhwc or not (drawn or scaled) else "i32"
            name = f"noising[{'drawn' if drawn else 'given'}{f', {scaled}' if scaled else ''}{', nhwc' if nhwc else ''}]"
            block = {"BLOCK_Q": 32, "BLOCK_C": 8} if nhwc else {"BLOCK_Q": BLOCK // 4, "BLOCK_C": 1}
            cases.append(aot_case(name, _noising_kernel, given, maxnreg=REGISTERS, ACC=tl.float32, **_planes(nhwc), **block))
    for dtype, nhwc in itertools.product(("fp32", "bf16", "fp16"), (False, True)):
        given = {"dx_t_ptr": "*fp32", "d_scaled_ptr": f"*{dtype}", "c_in_ptr": "*fp32", "dx_ptr": "*fp32"}
        given |= {"P": "i32:16", "blocks_p": "i32", "blocks_c": 1 if nhwc else "i32"}
        block = {"BLOCK_P": 256, "BLOCK_C": 4} if nhwc else {"BLOCK_P": BLOCK, "BLOCK_C": 1}
        name = f"noising.gradient[{dtype}{', nhwc' if nhwc else ''}]"
        cases.append(aot_case(name, _gradient_kernel, given, ACC=tl.float32, **_planes(nhwc), **block))
    return cases


def _planes(nhwc: bool) -> dict[str, int | bool]:
    """Three NCHW channels; the network's side NHWC padded to eight, or the same."""
    return {"C": 3, "NHWC": False, "C_OUT": 8 if nhwc else 3, "OUT_NHWC": nhwc}
