"""Triton, for the kernel modules: the real one where it is installed, else as much as they name when they are imported.

Without Triton (macOS, Windows) everything on CPU tensors works. A launch on CUDA tensors raises an error that says how to get it.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

NO_TRITON = (
    "kernels on CUDA tensors want triton >= 3.6, got none: pip install triton, or set POTSTILL_BACKEND=reference, "
    "which runs PyTorch's own operations in their place"
)


class Unlaunchable:
    """What `@triton.jit` makes of a function where there is no Triton."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn

    def __getitem__(self, grid: Any) -> NoReturn:
        raise RuntimeError(NO_TRITON)


if TYPE_CHECKING:
    import triton
    import triton.language as tl

    INSTALLED: bool
else:
    try:
        import triton
        import triton.language as tl

        INSTALLED = True
    except ModuleNotFoundError as error:
        if error.name != "triton":  # it is there, and lacks something itself
            raise
        triton = SimpleNamespace(jit=lambda fn=None, **options: Unlaunchable if fn is None else Unlaunchable(fn))
        tl = SimpleNamespace(constexpr=None, float16=None, bfloat16=None, float32=None, float64=None)
        INSTALLED = False
