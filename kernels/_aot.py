"""How a kernel module lists its kernels for kernels/aot.py, which compiles them for GPUs that are not there."""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from potstill.kernels.estimate import Estimate


class AotCase(NamedTuple):
    """One kernel in one shipped configuration, as `triton.compile(ASTSource(kernel, signature, constexprs))` wants it.

    Every kernel module has `aot_cases() -> list[AotCase]`; `kernels/aot.py` compiles them for sm_80 and sm_90.
    """

    name: str  # "score_match.partials[bf16]"
    kernel: Any  # the triton.JITFunction
    signature: dict[str, Any]  # argument -> "*bf16", "i32", "i32:16", "fp32", "constexpr", or a (named) tuple of those
    constexprs: dict[Any, Any]  # argument, or (argument position, position inside it), -> value
    num_warps: int
    maxnreg: int | None = None


#: Triton compiles a kernel once more for integers that 16 divides (:16), and once more for a 1, which is then a constant.
SIZES = {"": "i32", ", D % 16 = 0": "i32:16"}


def fp32(names: str) -> dict[str, str]:
    """The types of these pointers to float32."""
    return dict.fromkeys(names.split(), "*fp32")


def aot_variants() -> Iterator[tuple[str, str, bool, str]]:
    """(what to call it, dtype of raw outputs, with guidance, size): what the kernels of most losses are compiled for."""
    for dtype, guided, (even, size) in product(("fp32", "bf16", "fp16"), (False, True), SIZES.items()):
        yield f"[{dtype}{', guided' if guided else ''}{even}]", dtype, guided, size


def aot_estimate(dtype: str, *, guided: bool = False, own_x_t: bool = True) -> Estimate:
    """The types of an estimate's fields: raw output in `dtype`, x_t and coefficients in float32."""
    uncond = f"*{dtype}" if guided else None
    return Estimate(f"*{dtype}", "*fp32" if own_x_t else None, "*fp32", "*fp32", uncond, "fp32")  # pyright: ignore[reportArgumentType]


def aot_gradients(dtype: str, *, guided: bool = False, own_x_t: bool = True) -> Estimate:
    """The types of where its gradients go."""
    return aot_estimate(dtype, guided=guided, own_x_t=own_x_t)._replace(c_skip=None, c_out=None)


def aot_case(
    name: str, kernel: Any, arguments: dict[str, Any], *, num_warps: int = 4, maxnreg: int | None = None, **constexprs: Any
) -> AotCase:
    """An AotCase from the types of the arguments; None, also inside an estimate, is an absent pointer, 1 the number 1."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = dict(constexprs)
    for argument, kind in arguments.items():
        position = kernel.arg_names.index(argument)
        if isinstance(kind, tuple):
            constants |= {(position, j): k for j, k in enumerate(kind) if not isinstance(k, str)}
            spelled = [k if isinstance(k, str) else "constexpr" for k in kind]
            signature[argument] = type(kind)(*spelled) if hasattr(kind, "_fields") else tuple(spelled)
        else:
            signature[argument] = kind if isinstance(kind, str) else "constexpr"
            if not isinstance(kind, str):
                constants[argument] = kind
    signature |= dict.fromkeys(constexprs, "constexpr")
    return AotCase(name, kernel, {a: signature[a] for a in kernel.arg_names}, constants, num_warps, maxnreg)
