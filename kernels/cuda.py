"""Which implementation of an op runs: Triton, the CUDA C++ of csrc/, or the plain PyTorch definition.

    potstill.set_backend("cuda")                  # for the process; or POTSTILL_BACKEND=cuda in the environment

`auto` takes Triton unless the benchmarks found the CUDA version of that op faster (FASTER_IN_CUDA), or there is no Triton.
CPU tensors take the definition, and norm_silu the C++ of kernels/native.py unless the backend is "reference". The CUDA C++ is
optional: setup.py builds it where it finds nvcc and a PyTorch with CUDA. Ops that it does not have (IN_CUDA) take Triton.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from potstill.kernels._triton import INSTALLED, NO_TRITON

BACKENDS = ("auto", "triton", "cuda", "reference")

#: Where setup.py puts the compiled csrc/.
LIBRARY = Path(__file__).parent / "_cuda.so"

#: Ops that csrc/ has. The others are Triton or the definition.
IN_CUDA = frozenset({"adam_ema", "norm_silu", "score_implicit", "score_match"})

#: Ops for which `auto` means the CUDA version. Empty until benches/ has compared the two on a GPU.
FASTER_IN_CUDA: frozenset[str] = frozenset()

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
    if name == "auto":
        name = "cuda" if (op in FASTER_IN_CUDA or not INSTALLED) and built() else "triton"
    return name if op in IN_CUDA else "triton"


def lacking(op: str) -> str | None:
    """The sentence on what `op` wants for CUDA tensors and does not find here, or None."""
    return NO_TRITON if chosen(op) == "triton" and not INSTALLED else None


def choose(
    op: str, *, triton: Callable[..., Any], cuda: Callable[..., Any], reference: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """One launcher out of several with the same arguments and outputs; it asks for the choice at every call.

    Without `reference`, whoever calls the op has already turned to the definition where that is the choice.
    """
    implementations = {"triton": triton, "cuda": cuda, "reference": reference}

    def launch(*args: Any) -> Any:
        implementation = implementations[chosen(op)]
        assert implementation is not None, f"{op} has no reference launcher"
        return implementation(*args)

    return launch
