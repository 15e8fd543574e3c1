"""Where a kernel test runs: on the CPU, as CPU tensors do in daily life, and on the GPU by each implementation there is.

    @everywhere("score_match")                        a test(place), place being a torch.device
    @everywhere("score_match", CASES, ON_GPU)         a test(case, place), with more cases on the GPU

The fixture `place` (conftest.py) chooses the implementation. Ids say it: cpu, gpu-triton, gpu-cuda.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill import kernels
from potstill.kernels import Estimate
from potstill.kernels._triton import INSTALLED

needs_triton = pytest.mark.skipif(not INSTALLED, reason="of Triton's own kernels, and it is not installed")

CPU = torch.device("cpu")
#: Modules of kernels/ that csrc/ has a CUDA C++ version of; the others have no other kernels than Triton's.
IN_CUDA = frozenset(file.stem for file in (Path(__file__).parent.parent / "csrc").glob("*.cu"))


def public_ops() -> dict[str, str]:
    """Everything public that launches a kernel -> the module of kernels/ it is in. The rest are named tuples of tensors."""
    found = {name: getattr(kernels, name).__module__.rpartition(".")[2] for name in kernels.__all__}
    return {name: module for name, module in found.items() if module != Estimate.__module__.rpartition(".")[2]}


def backends(module: str) -> list[str]:
    """The implementations that a kernel module has on a GPU."""
    return ["triton", "cuda"] if module in IN_CUDA else ["triton"]


def places(module: str) -> list[Any]:
    """The CPU, and the GPU once an implementation."""
    return [pytest.param("cpu", id="cpu"), *on_gpu(module)]


def on_gpu(module: str) -> list[Any]:
    return [pytest.param(backend, id=f"gpu-{backend}", marks=pytest.mark.gpu) for backend in backends(module)]


def everywhere(module: str, cases: Sequence[Any] | None = None, more: Iterable[Any] = (), *, gpu_cases: Sequence[Any] | None = None) -> Any:
    """Parametrises a test by place, or by case and place: on the GPU some more cases, or quite others.

    CUDA C++ holds no float64.
    """
    if cases is None:
        return pytest.mark.parametrize("place", places(module), indirect=True)
    pairs = []
    for place in places(module):
        (backend,) = place.values
        for case in cases if backend == "cpu" else gpu_cases or [*cases, *more]:
            if backend != "cuda" or getattr(case, "dtype", None) is not torch.float64:
                pairs.append(pytest.param(case, backend, id=f"{case}-{place.id}", marks=place.marks))
    return pytest.mark.parametrize(("case", "place"), pairs, indirect=["place"])
