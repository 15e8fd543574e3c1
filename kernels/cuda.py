"""Which implementation of an op runs: Triton, the CUDA C++ of csrc/, or the plain PyTorch definition.

    potstill.set_backend("cuda")                  # for the process; or POTSTILL_BACKEND=cuda in the environment

`auto` takes for each op what the table AUTO says, and the CUDA C++ where there is no Triton. CPU tensors take the C++
of kernels/native.py, where that has the op and the backend is not "reference", else the definition. The CUDA C++ is optional:
setup.py builds it where it finds nvcc and a PyTorch with CUDA. Ops that it does not have take Triton.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from potstill.kernels._triton import INSTALLED, NO_TRITON

BACKENDS = ("auto", "triton", "cuda", "reference")

#: Where setup.py puts the compiled csrc/.
LIBRARY = Path(__file__).parent / "_cuda.so"


class Choice(NamedTuple):
    """What `auto` takes for an op, and why."""

    backend: str  # "triton" or "cuda"
    evidence: str  # the file under benches/results that compares the two on a GPU, or "unmeasured", which means Triton


#: The ops that csrc/ has. All others are Triton or the definition.
AUTO = {
    "adam_ema": Choice("triton", "unmeasured"),
    "norm_silu": Choice("triton", "unmeasured"),
    "score_implicit": Choice("triton", "unmeasured"),
    "score_match": Choice("triton", "unmeasured"),
}

_backend: str | None = None


def set_backend(name: str) -> None:
    """Choose the implementation for CUDA tensors from here on: "auto", "triton", "cuda" or "reference".

    Raises:
        ValueError: another name.
        RuntimeError: "cuda" where csrc/ was not built, "triton" where it is not installed.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"set_backend wants one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "cuda":
        library()
    if name == "triton" and not INSTALLED:
        raise RuntimeError(NO_TRITON)
    _backend = name


def backend() -> str:
    """The choice in force: what set_backend said, else POTSTILL_BACKEND, else "auto"."""
    if _backend is None:
        set_backend(os.environ.get("POTSTILL_BACKEND", "auto"))
    assert _backend is not None
    return _backend


def built() -> bool:
    """Whether the CUDA C++ of csrc/ is there to load."""
    return LIBRARY.exists()


@cache
def library() -> Any:
    """The ops of csrc/, `torch.ops.potstill_cuda`, loaded on first use. They write into tensors given to them."""
    if not built():
        raise RuntimeError(
            f"backend 'cuda' wants {LIBRARY.name} beside kernels/cuda.py, got none: it is built by `pip install -e . "
            "--no-build-isolation` where nvcc and a PyTorch with CUDA are found, and with POTSTILL_CUDA=1 before that command "
            "it says why not, in the compiler's words; backend 'triton' needs no build"
        )
    torch.ops.load_library(str(LIBRARY))
    return torch.ops.potstill_cuda


def chosen(op: str) -> str:
    """The implementation `op` takes on CUDA tensors now: "triton", "cuda" or "reference"."""
    name = backend()
    if name == "reference":
        return name
    if op not in AUTO:
        return "triton"
    if name == "auto":
        name = AUTO[op].backend if INSTALLED else "cuda"
        return name if built() else "triton"
    return name


def lacking(op: str) -> str | None:
    """The sentence on what `op` wants for CUDA tensors and does not find here, or None."""
    return NO_TRITON if chosen(op) == "triton" and not INSTALLED else None
