"""The C++ of csrc/ for CPU tensors, in vectors of what the processor has: norm_silu and residual on NHWC images in float32 and
bfloat16; 3x3 convolutions, whole blocks of U-Nets, AdamEMA and total_norm in float32.

Optional: setup.py compiles it where it finds a C++ compiler and PyTorch. Elsewhere, and with the backend "reference", CPU
tensors take the definition, such as `plain` in kernels/norm_silu.py. POTSTILL_CPU=any|avx2|avx512|avx512_bf16 picks the instructions by hand.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.kernels import cuda

#: Where setup.py puts it.
LIBRARY = Path(__file__).parent / "_cpu.so"

_built = LIBRARY.exists()


def used() -> bool:
    """Is it there, and not turned off by the backend "reference"?"""
    return _built and cuda.backend() != "reference"


def takes(x: Tensor) -> bool:
    """Does norm_silu of x run in it?"""
    fits = x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous(memory_format=torch.channels_last)
    return fits and x.numel() > 0 and x.device.type == "cpu" and used()


def gradients(op: Any, needs: Sequence[bool], *given: Any) -> tuple[Tensor | None, ...]:
    """What op(*given, wanted) returns, for a backward: None where none is needed. `wanted` has a bit for each need."""
    found = iter(op(*given, sum(need << i for i, need in enumerate(needs))))
    return tuple(next(found) if need else None for need in needs)


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
