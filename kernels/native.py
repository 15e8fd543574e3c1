"""The C++ of csrc/ for CPU tensors: norm_silu on NHWC images in float32 and bfloat16, in vectors of what the processor has.

Optional: setup.py compiles it where it finds a C++ compiler and PyTorch. Elsewhere, and with the backend "reference", CPU
tensors take PyTorch's own operations. POTSTILL_CPU=any|avx2|avx512|avx512_bf16 picks the instructions by hand.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kernels import cuda

#: Where setup.py puts it.
LIBRARY = Path(__file__).parent / "_cpu.so"

_built = LIBRARY.exists()


def used() -> bool:
    """Is it there, and not turned off by the backend "reference"?"""
    return _built and cuda.backend() != "reference"


def takes(x: Tensor) -> bool:
    """Does norm_silu of x run in it?"""
    fits = x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous(memory_format=torch.channels_last)
    return fits and x.device.type == "cpu" and used()


@cache
def library() -> Any:
    """Its ops, `torch.ops.potstill_cpu`, loaded on first use. They write into tensors given to them.

    Raises:
        RuntimeError: it was built for another PyTorch or another machine.
    """
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise RuntimeError(
            f"wanted {LIBRARY.name} built for PyTorch {torch.__version__} on this machine, got one that does not load "
            f"({error}): build it again with `pip install -e . --no-build-isolation`, or do without: POTSTILL_BACKEND=reference"
        ) from error
    return torch.ops.potstill_cpu


def forward(x, weight, bias, scale, shift, add, groups, eps, silu) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, and mean and 1/std [N, G]."""
    y = torch.empty_like(x)
    mean = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    library().norm_silu(x, weight, bias, scale, shift, add, groups, eps, silu, y, mean, rstd)
    return y, mean, rstd


def backward(dy, x, mean, rstd, weight, bias, scale, shift, add, groups, silu, out) -> Tensor:
    """dx like x; the gradients of weight, bias, scale, shift and add go to `out`, where it is not None."""
    dx = torch.empty_like(x)
    library().norm_silu_grad(dy, x, mean, rstd, weight, bias, scale, shift, add, groups, silu, dx, *out)
    return dx


class NormSilu(Function):
    """norm_silu outside of compiled code: no dispatcher between autograd and the loops."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, scale, shift, add, silu):
        y, mean, rstd = forward(x, weight, bias, scale, shift, add, groups, eps, silu)
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift, add)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mean, rstd, *given = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)  # .sum() sends a stride-0 gradient
        needs = ctx.needs_input_grad
        out = [
            torch.empty_like(t, memory_format=torch.contiguous_format) if needed else None
            for t, needed in zip(given, (*needs[1:3], *needs[5:8]), strict=True)
        ]
        dx = backward(dy, x, mean, rstd, *given, ctx.groups, ctx.silu, out)
        dweight, dbias, dscale, dshift, dadd = out
        return dx, dweight, dbias, None, None, dscale, dshift, dadd, None
