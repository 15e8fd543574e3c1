"""EDM2's weights: each row w (what one output reads, n numbers) divided by eps + |w|/√n, on the way to a convolution and in place.

    normalized_weight      w/(eps + |w|/√n)·gain/√n, in the dtype of the images
    force_weight_norm_     w <- w/(eps + |w|/√n) for a whole net, which keeps Adam's steps from shrinking relative to the weights

Bytes a number of a float32 weight for bfloat16 images, forward | backward: ours 6 | 10; PyTorch's operations one by one 26 | 98, with a
gain that is learnt 26 | 114; as Inductor 2.13 schedules them for a CPU 6 | 10, and 6 | 16: of a number as gain a compiler makes the same.
In place: ours 8 in a few launches for a net, one by one 24 in four launches a weight.
Rows up to 16384 numbers, 3x3 of 1820 channels, stay in registers and are read once; of longer ones the second reading is not counted.
Nothing is kept for backward but the weight itself. float64 takes the definition, kernels/reference.py, as CPU tensors do.
Source: arXiv 2312.02696, Section 2.3, Algorithm 1 and Appendix B.
"""

# Triton's launches take constexpr parameters as plain values, and options like num_warps besides; its device functions are untyped.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.kernels import reference
from potstill.kernels._inference import takes_inference_tensors
from potstill.kernels._lib import cdiv, define, power_of_2
from potstill.kernels._loss import uses_reference
from potstill.kernels._triton import tl, triton
from potstill.kernels.tables import Rows, dense


@triton.jit
def _place(rows, n, COLS: tl.constexpr, ROWS: tl.constexpr):
    """The rows of this program: where they begin, their offsets [ROWS, COLS] from there, the columns, which rows exist."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)[None, :]
    return first * n, row[:, None] * n + col, col, (first + row < rows)[:, None]


@triton.jit
def _get(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normalize(w_ptr, out_ptr, at, col, valid, n, factor, eps, COLS: tl.constexpr, ROWS: tl.constexpr, ONCE: tl.constexpr):
    """Each row times factor/(eps + its root mean square); out_ptr may be w_ptr."""
    if ONCE:
        w = _get(w_ptr, at, valid & (col < n))
        d = eps + tl.sqrt(tl.sum(w * w, 1) / n)
        tl.store(out_ptr + at, w * (factor / d)[:, None], mask=valid & (col < n))
    else:
        square = tl.zeros((ROWS, COLS), tl.float32)
        for i in range(0, n, COLS):
            w = _get(w_ptr + i, at, valid & (i + col < n))
            square += w * w
        d = eps + tl.sqrt(tl.sum(square, 1) / n)
        for i in range(0, n, COLS):
            mask = valid & (i + col < n)
            tl.store(out_ptr + i + at, _get(w_ptr + i, at, mask) * (factor / d)[:, None], mask=mask)


@triton.jit
def normalize_kernel(
    w_ptr, gain_ptr, out_ptr, rows, n, factor, eps,
    COLS: tl.constexpr, ROWS: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    start, at, col, valid = _place(rows, n, COLS, ROWS)
    w_ptr += start
    out_ptr += start
    if gain_ptr is not None:
        factor *= tl.load(gain_ptr).to(tl.float32)
    _normalize(w_ptr, out_ptr, at, col, valid, n, factor, eps, COLS, ROWS, ONCE)


@triton.jit
def normalize_grad_kernel(
    g_ptr, w_ptr, gain_ptr, dw_ptr, dots_ptr, rows, n, factor, eps,
    COLS: tl.constexpr, ROWS: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """dots: of each row the gradient that it gives to the gain."""
    start, at, col, valid = _place(rows, n, COLS, ROWS)
    w_ptr += start
    g_ptr += start
    if ONCE:
        w = _get(w_ptr, at, valid & (col < n))
        g = _get(g_ptr, at, valid & (col < n))
        square_r = tl.sum(w * w, 1)
        dot_r = tl.sum(g * w, 1)
    else:
        square = tl.zeros((ROWS, COLS), tl.float32)
        dot = tl.zeros((ROWS, COLS), tl.float32)
        for i in range(0, n, COLS):
            w = _get(w_ptr + i, at, valid & (i + col < n))
            g = _get(g_ptr + i, at, valid & (i + col < n))
            square += w * w
            dot += g * w
        square_r = tl.sum(square, 1)
        dot_r = tl.sum(dot, 1)
    r = tl.sqrt(square_r / n)
    d = eps + r
    if dots_ptr is not None:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        tl.store(dots_ptr + row, dot_r / d * factor, mask=row < rows)
    if dw_ptr is not None:
        dw_ptr += start
        if gain_ptr is not None:
            factor *= tl.load(gain_ptr).to(tl.float32)
        of_g = factor / d
        of_w = of_g * dot_r / (d * tl.where(r > 0, r, 1.0) * n)  # where r is 0, dot is
        if ONCE:
            tl.store(dw_ptr + at, g * of_g[:, None] - w * of_w[:, None], mask=valid & (col < n))
        else:
            for i in range(0, n, COLS):
                mask = valid & (i + col < n)
                dw = _get(g_ptr + i, at, mask) * of_g[:, None] - _get(w_ptr + i, at, mask) * of_w[:, None]
                tl.store(dw_ptr + i + at, dw, mask=mask)


@triton.jit
def force_kernel(
    weights_ptr, programs_ptr, eps,
    DTYPE: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, ONCE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """weights: [T, 3], address, rows, n; programs: [P, 2], the weight and which ROWS of it. One weight's rows a program."""
    weight = tl.load(programs_ptr + 2 * tl.program_id(0))
    block = tl.load(programs_ptr + 2 * tl.program_id(0) + 1)
    w_ptr = tl.load(weights_ptr + 3 * weight).to(tl.pointer_type(DTYPE))
    rows = tl.load(weights_ptr + 3 * weight + 1)
    n = tl.load(weights_ptr + 3 * weight + 2)
    if ALIGNED:
        w_ptr = tl.multiple_of(w_ptr, 16)
        n = tl.multiple_of(n, 16)
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)[None, :]
    valid = (block * ROWS + row < rows)[:, None]
    w_ptr += block * ROWS * n
    _normalize(w_ptr, w_ptr, row[:, None] * n + col, col, valid, n, 1.0, eps, COLS, ROWS, ONCE)


#: Numbers of one tensor that a program of 4 warps has, in whole rows; backward has two tensors.
_FORWARD, _BACKWARD = 4096, 2048
_LONGEST = 16384  # numbers of a row that stay in registers


def plan(n: int, numbers: int = _FORWARD) -> dict[str, Any]:
    """How many numbers of a row of n a program takes at a time (COLS), how many rows, whether it reads them once, and its warps."""
    cols = min(power_of_2(n), _LONGEST)
    return {"COLS": cols, "ROWS": max(1, numbers // cols), "ONCE": n <= cols, "num_warps": min(16, max(4, 4 * cols // numbers))}


def _launch(weight: Tensor, gain: Tensor | None, factor: float, dtype: torch.dtype, eps: float) -> Tensor:
    out = torch.empty_like(weight, dtype=dtype)
    if weight.numel():
        rows, n, p = *_sizes(weight), plan(_sizes(weight)[1])
        normalize_kernel[(cdiv(rows, p["ROWS"]),)](weight, gain, out, rows, n, factor * n**-0.5, eps, **p)
    return out


def _launch_grad(
    g: Tensor, weight: Tensor, gain: Tensor | None, factor: float, eps: float, wanted: list[bool]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dw, dots = _gradients(g, weight, gain, factor, eps, wanted)
    if weight.numel():
        rows, n, p = *_sizes(weight), plan(_sizes(weight)[1], _BACKWARD)
        given = dw if wanted[0] else None, dots if wanted[1] else None
        normalize_grad_kernel[(cdiv(rows, p["ROWS"]),)](g, weight, gain, *given, rows, n, factor * n**-0.5, eps, **p)
    return dw, dots


def _gradients(g: Tensor, weight: Tensor, gain: Tensor | None, factor: float, eps: float, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """Memory for the gradient of the weight and what each row adds to the gain's, empty where not wanted."""
    dw = torch.empty_like(weight) if wanted[0] else weight.new_empty(0)
    return dw, weight.new_empty(weight.shape[0] if wanted[1] else 0, dtype=torch.float32)


def _sizes(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1:].numel()


_rows = Rows()


def _force(weights: list[Tensor], eps: float) -> None:
    for (dtype, n, aligned), group in _groups(weights).items():
        launch_force(*_rows(group, plan(n)["ROWS"]), eps, dtype, n, aligned)


def launch_force(weights: Tensor, programs: Tensor, eps: float, dtype: torch.dtype, n: int, aligned: bool) -> None:
    """On the tables of weights whose rows have up to n numbers, or more than stay in registers."""
    force_kernel[(len(programs),)](weights, programs, eps, DTYPE=_DTYPES[dtype], ALIGNED=aligned, **plan(n))


def _groups(weights: Sequence[Tensor]) -> dict[tuple[torch.dtype, int, bool], list[Tensor]]:
    """Weights by dtype, by about how long their rows are (a launch each), and by whether all rows begin on the 16-byte grid."""
    found: dict[tuple[torch.dtype, int, bool], list[Tensor]] = {}
    for weight in weights:
        n = _sizes(weight)[1]
        length = next((most for most in (1024, 4096, _LONGEST) if n <= most), _LONGEST + 1)
        aligned = n % 16 == 0 and weight.data_ptr() % 16 == 0
        if weight.numel():
            found.setdefault((weight.dtype, length, aligned), []).append(weight)
    return found


#: Of weights that a kernel reads.
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_normalized_weight = define(
    "normalized_weight(Tensor weight, Tensor? gain, float factor, ScalarType dtype, float eps) -> Tensor",
    launchers={"triton": _launch},
    shapes=lambda weight, gain, factor, dtype, eps: torch.empty_like(weight, dtype=dtype),
)
_normalized_weight_backward = define(
    "normalized_weight_backward(Tensor g, Tensor weight, Tensor? gain, float factor, float eps, bool[2] wanted) -> (Tensor, Tensor)",
    launchers={"triton": _launch_grad},
    shapes=_gradients,
)
_force_weight_norm_ = define(
    "force_weight_norm_(Tensor(a!)[] weights, float eps) -> ()", launchers={"triton": _force}, shapes=lambda weights, eps: None
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, gain, ctx.factor, _, ctx.eps = inputs
    ctx.save_for_backward(weight, gain)


@once_differentiable
def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    weight, gain = ctx.saved_tensors
    if g.stride() != weight.stride():
        g = torch.empty_like(weight, dtype=g.dtype).copy_(g)
    wanted = list(ctx.needs_input_grad[:2])
    dw, dots = _normalized_weight_backward(g, weight, gain, ctx.factor, ctx.eps, wanted)
    return dw if wanted[0] else None, dots.sum().to(gain.dtype) if wanted[1] else None, None, None, None


torch.library.register_autograd("potstill::normalized_weight", _backward, setup_context=_context)


def _rows_lie_together(weight: Tensor) -> bool:
    return dense(weight) and (weight.shape[0] == 1 or weight.stride(0) == _sizes(weight)[1])


@takes_inference_tensors
def normalized_weight(weight: Tensor, gain: Tensor | float, dtype: torch.dtype, eps: float = 1e-4) -> Tensor:
    """w/(eps + |w|/√n)·gain/√n for each row w of n numbers: a weight like `weight` in `dtype`; differentiable once in weight and gain.

    Args:
        weight: [N, ...] of N outputs, any floating dtype; EDM2's are float32.
        gain: a number or a 0-dim tensor.
        dtype: of the result, that of the images.
        eps: added to the root mean square of a row.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit.
    """
    _check("normalized_weight", "weight", weight)
    if not dtype.is_floating_point:
        raise ValueError(f"normalized_weight: wanted a floating dtype, got {dtype}")
    if isinstance(gain, Tensor) and (gain.ndim or gain.device != weight.device or not gain.is_floating_point()):
        raise ValueError(
            f"normalized_weight: wanted gain as a number or a floating 0-dim tensor on {weight.device}, "
            f"got {gain.dtype} {tuple(gain.shape)} on {gain.device}"
        )
    if _by_definition("normalized_weight", weight, dtype):
        return reference.normalized_weight(weight, gain, dtype, eps)
    if not _rows_lie_together(weight):
        weight = weight.contiguous()
    given = (gain, 1.0) if isinstance(gain, Tensor) else (None, float(gain))
    return _normalized_weight(weight, *given, dtype, eps)


def normalized_weight_grad(g: Tensor, weight: Tensor, eps: float = 1e-4) -> Tensor:
    """What `normalized_weight(weight, 1.0, …)` sends back from g: for who has kept its output. Like weight; not differentiable.

    Args:
        g: like weight, any floating dtype.
        weight: [N, ...].

    Raises:
        ValueError: g is not like weight.
    """
    _check("normalized_weight_grad", "weight", weight)
    if g.shape != weight.shape or g.device != weight.device:
        raise ValueError(f"normalized_weight_grad: wanted g like weight {tuple(weight.shape)}, got {tuple(g.shape)} on {g.device}")
    if _by_definition("normalized_weight", weight, g.dtype):
        return reference.normalized_weight_grad(g, weight, eps)
    if not _rows_lie_together(weight):
        weight = weight.contiguous()
    if g.stride() != weight.stride():
        g = torch.empty_like(weight, dtype=g.dtype).copy_(g)
    return _normalized_weight_backward(g, weight, None, 1.0, eps, [True, False])[0]


@torch.no_grad()
def force_weight_norm_(weights: Sequence[Tensor], eps: float = 1e-4) -> None:
    """w <- w/(eps + |w|/√n) for each row w of n numbers of each weight, in place and without a gradient.

    At most four launches a dtype where all rows begin on the 16-byte grid, else up to eight, of a table that a first call makes and later calls find. A call that a CUDA graph captures wants
    an eager one of the same weights before it.

    Args:
        weights: tensors [N, ...] of N outputs each, on one device, any floating dtype.
        eps: added to the root mean square of a row.

    Raises:
        ValueError: what is no such list.
    """
    weights = list(weights)
    for i, weight in enumerate(weights):
        _check("force_weight_norm_", f"weights[{i}]", weight)
        if weight.device != weights[0].device:
            raise ValueError(f"force_weight_norm_: wanted weights on one device, got {weights[0].device} and {weight.device}")
    fused = [w for w in weights if not _by_definition("force_weight_norm_", w, w.dtype) and _rows_lie_together(w)]
    known = {id(w) for w in fused}
    reference.force_weight_norm_([w for w in weights if id(w) not in known], eps)
    if fused:
        _force_weight_norm_(fused, eps)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version([w for w in fused if not w.is_inference()])  # which have none


def _by_definition(op: str, weight: Tensor, dtype: torch.dtype) -> bool:
    """Is it of a dtype for which there is no kernel, or in a graph for other programs, which holds PyTorch's own operations?"""
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return exporting or not {weight.dtype, dtype} <= _DTYPES.keys() or uses_reference(op, weight)


def _check(op: str, name: str, weight: Tensor) -> None:
    if weight.ndim < 2 or not weight.is_floating_point() or (weight.numel() == 0 and weight.shape[0]):
        raise ValueError(
            f"{op}: wanted a floating {name} [N, ...] with at least one number per output, got {weight.dtype} {tuple(weight.shape)}"
        )
