"""The tail of a residual block in one pass: (h + bias + skip + skip_bias)·scale, biases those of the two convolutions.

Reads both images and writes one; arithmetic in float32 (float64 for float64), rounded once. Backward: scale·dy for both images.
CPU: the C++ of csrc/ (kernels/native.py) on NHWC images, else `plain`, the definition.
"""

# Triton's launches and device functions are untyped.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.kernels import native
from potstill.kernels._inference import takes_inference_tensors
from potstill.kernels._lib import cdiv, define, tl_dtype
from potstill.kernels._triton import tl, triton
from potstill.kernels.estimate import accum


@triton.jit
def residual_kernel(
    h_ptr, skip_ptr, bias_ptr, skip_bias_ptr, out_ptr, scale, numel,
    C: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = start + i < numel
    v = tl.load(h_ptr + start + i, mask=mask, other=0.0).to(ACC)
    skip = tl.load(skip_ptr + start + i, mask=mask, other=0.0).to(ACC)
    channel = ((start % (C * INNER)).to(tl.int32) + i) // INNER % C  # INNER: numbers of one channel that lie together
    if bias_ptr is not None:
        v += tl.load(bias_ptr + channel).to(ACC)
    v += skip
    if skip_bias_ptr is not None:
        v += tl.load(skip_bias_ptr + channel).to(ACC)
    tl.store(out_ptr + start + i, v * scale, mask=mask)


_BLOCK = 2048  # two loads of 16 bytes a thread and image, in 16 bits


def _launch(h: Tensor, skip: Tensor, bias: Tensor | None, skip_bias: Tensor | None, scale: float) -> Tensor:
    out, (_, c, height, width) = torch.empty_like(h), h.shape
    if h.numel():
        inner = height * width if h.is_contiguous() else 1
        residual_kernel[(cdiv(h.numel(), _BLOCK),)](
            h, skip, bias, skip_bias, out, scale, h.numel(), C=c, INNER=inner, BLOCK=_BLOCK, ACC=tl_dtype(accum(h)), num_warps=4
        )
    return out


def _cpu(h: Tensor, skip: Tensor, bias: Tensor | None, skip_bias: Tensor | None, scale: float) -> Tensor:
    if not native.takes(h):
        return plain(h, skip, bias, skip_bias, scale)
    out = torch.empty_like(h)
    native.library().residual(h, skip, bias, skip_bias, scale, out)
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *biases, ctx.scale = inputs
    ctx.dtypes = [None if b is None else b.dtype for b in biases]


@once_differentiable
def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dh = dy if ctx.scale == 1.0 else dy * ctx.scale
    wanted = ctx.needs_input_grad[2:4]
    total = ctx.scale * dy.sum((0, 2, 3), dtype=accum(dy)) if any(wanted) else None
    images = [dh if need else None for need in ctx.needs_input_grad[:2]]
    biases = [total.to(dtype) if need and total is not None else None for need, dtype in zip(wanted, ctx.dtypes, strict=True)]
    return *images, *biases, None


_residual = define(
    "residual(Tensor h, Tensor skip, Tensor? bias, Tensor? skip_bias, float scale) -> Tensor",
    launchers={"triton": _launch},
    shapes=lambda h, *_: torch.empty_like(h),
    cpu=_cpu,
)
torch.library.register_autograd("potstill::residual", _backward, setup_context=_setup_context)


def plain(h: Tensor, skip: Tensor, bias: Tensor | None = None, skip_bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The definition of residual, in PyTorch's own operations."""
    v = h.to(accum(h))
    for t in (None if bias is None else bias[:, None, None], skip, None if skip_bias is None else skip_bias[:, None, None]):
        v = v if t is None else v + t.to(v.dtype)
    return (v * scale).to(h.dtype)


@takes_inference_tensors
def residual(h: Tensor, skip: Tensor, bias: Tensor | None = None, skip_bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """(h + bias + skip + skip_bias)·scale, an image like h; differentiable once in every tensor.

    Args:
        h, skip: [N, C, H, W], of one floating dtype, NCHW or channels-last.
        bias, skip_bias: [C], any floating dtype.
        scale: of the sum, sqrt(1/2) in DDPM++.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit.
    """
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return plain(h, skip, bias, skip_bias, scale)
    if h.ndim != 4 or not h.is_floating_point():
        raise ValueError(f"residual: wanted a floating h [N, C, H, W], got {h.dtype} {tuple(h.shape)}")
    if (skip.shape, skip.dtype, skip.device) != (h.shape, h.dtype, h.device):
        wanted, got = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (h, skip))
        raise ValueError(f"residual: wanted a skip like h, {wanted}, got {got}")
    for name, t in (("bias", bias), ("skip_bias", skip_bias)):
        if t is not None and (t.shape != h.shape[1:2] or t.device != h.device or not t.is_floating_point()):
            raise ValueError(
                f"residual: wanted a floating {name} ({h.shape[1]},) on {h.device}, got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
    if not (h.is_contiguous() or h.is_contiguous(memory_format=torch.channels_last)):
        h = h.contiguous()
    skip = skip.contiguous(memory_format=torch.contiguous_format if h.is_contiguous() else torch.channels_last)
    bias, skip_bias = (None if t is None else t.contiguous() for t in (bias, skip_bias))
    return _residual(h, skip, bias, skip_bias, scale)
