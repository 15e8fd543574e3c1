"""How an op of this package is registered and launched, and what its launchers have in common."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from potstill.kernels import cuda
from potstill.kernels._triton import INSTALLED, tl, triton
from potstill.kernels.estimate import Estimate

NAMESPACE = "potstill"

#: True when Triton interprets kernels on the CPU (TRITON_INTERPRET=1): CPU tensors then take the Triton path too.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def check_interpreter(triton_version: str | None, numpy_version: str) -> None:
    """ImportError for a pair that cannot interpret our loops, or for no Triton (None).

    The interpreter of Triton 3.6 turns a loop's bound, an array of one element, into an int by NumPy's rule for scalars,
    which NumPy 2.4 dropped. Triton 3.7 does not, and on a GPU nothing of this matters.
    """
    if triton_version is None:
        raise ImportError("TRITON_INTERPRET=1 wants triton >= 3.6, got none: pip install triton, or unset TRITON_INTERPRET")
    if _version(triton_version) < (3, 7) and _version(numpy_version) >= (2, 4):
        raise ImportError(
            f"TRITON_INTERPRET=1 wants triton >= 3.7 or numpy < 2.4, got triton {triton_version} and numpy {numpy_version}: "
            "pip install 'numpy<2.4', or unset TRITON_INTERPRET"
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(".")[:2])


if INTERPRET:
    check_interpreter(triton.__version__ if INSTALLED else None, version("numpy"))

_ESTIMATE = "Tensor {0}, Tensor? {0}_x_t, Tensor? {0}_c_skip, Tensor? {0}_c_out, Tensor? {0}_raw_uncond, float {0}_guidance"


#: The most registers a thread may have. Without this limit ptxas stops some kernels at 32 to 48 registers and spills a word,
#: to fit one more block on a multiprocessor; with it, ptxas takes the one or two registers more.
REGISTERS = 128


#: The Triton launcher of each op, by its name.
TRITON: dict[str, Callable[..., Any]] = {}


def define(
    schema: str, *, launchers: Mapping[str, Callable[..., Any]], shapes: Callable[..., Any], cpu: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Register `potstill::<schema>` and return the op. CUDA tensors take the launcher of the backend in force at each call.

    Args:
        schema: "op(Tensor x, float eps) -> Tensor", as for torch.library.define, with two words of our own:
            "Image x" is a tensor [N, D], "Estimate e" the six fields of an estimate one after the other.
            The functions below get an estimate as one.
        launchers: "triton", and "cuda" where csrc/ has the op; of those by name that kernels/cuda.py chooses. They serve
            CPU tensors as well when TRITON_INTERPRET=1.
        shapes: outputs with the right shapes, strides and dtypes; never reads data.
        cpu: the same numbers on CPU tensors, and on CUDA with the backend "reference"; None: the caller turns to the
            reference before.
    """
    name, kinds, spelled, returns = parse(schema)
    family = name.removesuffix("_backward")
    TRITON[name] = launchers["triton"]

    def launch(*flat: Any) -> Any:
        device = _first_tensor(flat).device
        backend = cuda.chosen(family)
        launcher = cpu if backend == "reference" else launchers[backend]
        assert launcher is not None, f"{name} has no launcher for the backend {backend}"
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton launches on the current one
            return launcher(*_grouped(flat, kinds))

    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, f"({spelled}){returns}")
    torch.library.impl(qualified, "CUDA", launch)
    if on_cpu := launch if INTERPRET else cpu:
        torch.library.impl(qualified, "CPU", on_cpu)
    torch.library.register_fake(qualified, lambda *flat: shapes(*_grouped(flat, kinds)))
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def parse(schema: str) -> tuple[str, list[str], str, str]:
    """("op", the kind of each argument, the arguments as torch.library wants them, " -> Tensor")."""
    name, _, rest = schema.partition("(")
    arguments, arrow, returns = rest.partition(") ->")  # "Tensor(a!) x" has a bracket of its own
    split = [a.split() for a in arguments.removesuffix(")").split(",")]
    words = {"Estimate": _ESTIMATE, "Image": "Tensor {0}"}
    return name, [a[0] for a in split], ", ".join(words.get(a[0], " ".join(a)).format(a[1]) for a in split), arrow[1:] + returns


def _grouped(flat: Sequence[Any], kinds: list[str]) -> list[Any]:
    """Arguments with estimates as one, of those as the dispatcher passes them, field by field."""
    rest = iter(flat)
    return [Estimate(*islice(rest, len(Estimate._fields))) if kind == "Estimate" else next(rest) for kind in kinds]


def _first_tensor(arguments: Any) -> Tensor:
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument
        if isinstance(argument, (tuple, list)) and argument:
            return _first_tensor(argument)
    raise AssertionError("an op without a tensor argument")


#: What the forward launcher of a loss returns: value [N], nonfinite [], what backward needs per sample, images made besides.
Outputs = tuple[Tensor, ...]


def results(like: Tensor, acc: torch.dtype, coefs: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for a loss's value [N], count of non-finite samples [], and what its backward needs per sample."""
    nonfinite = like.new_empty((), dtype=torch.int32) if like.shape[0] else like.new_zeros((), dtype=torch.int32)
    return like.new_empty(like.shape[0], dtype=acc), nonfinite, like.new_empty(coefs, dtype=acc)


def empty_gradients(e: Estimate, needs: Sequence[bool]) -> Estimate:
    """Memory for the gradients of an estimate's raw, x_t and raw_uncond, those that are needed."""
    raw, x_t, uncond = (t.new_empty(t.shape) if needed and t is not None else None for t, needed in zip(e.images, needs, strict=True))
    return Estimate(raw, x_t, None, None, uncond)  # pyright: ignore[reportArgumentType]


#: Elements of one sample that one program handles at a time.
BLOCK = 1024
#: Programs wanted in a reduction before samples are no longer split; enough to fill the largest GPUs in use.
PROGRAMS = 1024
_MAX_SPLITS = 256


def splits(n: int, d: int) -> int:
    """The number of parts (a power of two) of the D numbers of a sample, so that a small batch still fills a GPU.

    A function of the shape alone, so the order of summation and thus the result does not depend on the device.
    """
    wanted = min(cdiv(PROGRAMS, max(n, 1)), cdiv(d, BLOCK), _MAX_SPLITS)
    return power_of_2(wanted)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def rows(s: int) -> int:
    """The number of samples that the finishing program of a reduction reads at a time, given `s` parts each."""
    return max(1, 2048 // s)


def tl_dtype(dtype: torch.dtype) -> Any:
    """The Triton dtype of sums."""
    return tl.float64 if dtype is torch.float64 else tl.float32
