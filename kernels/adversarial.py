"""Adversarial losses over the logits of several discriminator networks, one number per sample.

    generator        sum over nets of mean(softplus(-l))                          hinge: mean(-l)
    discriminator    sum over nets of mean(softplus(l_fake)) + mean(softplus(-l_real))
                                                                      hinge: relu(1 + l_fake), relu(1 - l_real)

The mean runs over one net's logits for that sample, so nets with different logit maps weigh the same. One launch reads
all nets' logits, one sums up, one writes all gradients. GDD sums the values over the batch (`.value.sum()`), DMD2
averages them.
Source: arXiv 2405.20750 (GDD), arXiv 2405.14867 (DMD2).
"""

# Triton's launches and device functions are untyped.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from potstill.kernels import reference
from potstill.kernels._args import check_choice
from potstill.kernels._inference import takes_inference_tensors
from potstill.kernels._lib import AotCase, aot_case, define, rows, tl_dtype
from potstill.kernels._loss import uses_reference
from potstill.kernels._tl import is_finite, load, total
from potstill.kernels._triton import tl, triton
from potstill.kernels.estimate import Losses, accum

_BLOCK = 512


@triton.jit
def _log1p(v):
    """log(1 + v) for v >= 0 to the last bits: what rounding 1 + v loses, the factor v/((1 + v) - 1) restores."""
    u = 1 + v
    return tl.where(u == 1, v, tl.log(u) * (v / (u - 1)))


@triton.jit
def _forward_kernel(logits, sizes, signs, sums_ptr, SOFTPLUS: tl.constexpr, HINGE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    value = tl.zeros((BLOCK,), ACC)
    for net in tl.static_range(len(logits)):
        size = sizes[net]
        term = tl.zeros((BLOCK,), ACC)
        for start in range(0, size, BLOCK):
            j = start + tl.arange(0, BLOCK)
            mask = j < size
            z = signs[net] * load(logits[net], n * size + j, mask, ACC)
            if SOFTPLUS:
                z = tl.where(z > 0, z, 0.0) + _log1p(tl.exp(-tl.abs(z)))
            elif HINGE:
                z = tl.where(z <= -1, 0.0, 1 + z)  # keeps NaN, which tl.maximum would drop
            term += tl.where(mask, z, 0.0)
        value += term / size
    tl.store(sums_ptr + n, tl.sum(value, 0))


@triton.jit
def _finish_kernel(sums_ptr, value_ptr, keep_ptr, nonfinite_ptr, N, ROWS: tl.constexpr):
    bad = tl.zeros((ROWS,), tl.int32)
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)
        valid = n < N
        value = total(sums_ptr, 0, n, valid, N, 1)
        ok = is_finite(value)
        tl.store(value_ptr + n, tl.where(ok, value, 0.0), mask=valid)
        tl.store(keep_ptr + n, ok, mask=valid)
        bad += (valid & (ok == 0)).to(tl.int32)
    tl.store(nonfinite_ptr, tl.sum(bad, 0))


@triton.jit
def _gradient_kernel(
    logits, gradients, sizes, signs, keep_ptr, g_ptr, g_stride,
    SOFTPLUS: tl.constexpr, HINGE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    keep = tl.load(keep_ptr + n) != 0
    g = tl.load(g_ptr + n * g_stride).to(ACC)
    for net in tl.static_range(len(logits)):
        if gradients[net] is not None:
            size = sizes[net]
            for start in range(0, size, BLOCK):
                j = start + tl.arange(0, BLOCK)
                mask = j < size
                d = tl.full((BLOCK,), 1.0, ACC)
                if SOFTPLUS:
                    d = 1 / (1 + tl.exp(-signs[net] * load(logits[net], n * size + j, mask, ACC)))
                elif HINGE:
                    d = tl.where(signs[net] * load(logits[net], n * size + j, mask, ACC) > -1, 1.0, 0.0).to(ACC)
                tl.store(gradients[net] + n * size + j, tl.where(keep, d * (g * signs[net] / size), 0.0), mask=mask)


def _typed(signs: Sequence[int]) -> tuple[float, ...]:
    return tuple(float(s) for s in signs)


def _forward(logits: list[Tensor], signs: list[int], form: str, needs: list[bool]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    like, n, acc = logits[0], logits[0].shape[0], accum(*logits)
    value, sums, keep = like.new_empty(n, dtype=acc), like.new_empty(n, dtype=acc), like.new_empty(n, dtype=torch.int8)
    nonfinite = like.new_empty((), dtype=torch.int32) if n else like.new_zeros((), dtype=torch.int32)
    if n > 0:
        _forward_kernel[(n,)](
            tuple(logits), tuple(logit.shape[1] for logit in logits), _typed(signs), sums,
            SOFTPLUS=form == "softplus", HINGE=form == "hinge", BLOCK=_BLOCK, ACC=tl_dtype(acc), num_warps=4,
        )  # fmt: skip
        _finish_kernel[(1,)](sums, value, keep, nonfinite, n, ROWS=rows(1), num_warps=4)
    return value, nonfinite, [keep], []


def _backward(saved: list[Tensor], g: Tensor, logits: list[Tensor], signs: list[int], form: str, needs: list[bool]) -> list[Tensor]:
    n, room = (
        logits[0].shape[0],
        [logit.new_empty(logit.shape) if needed else None for logit, needed in zip(logits, needs, strict=True)],
    )
    if n > 0:
        _gradient_kernel[(n,)](
            tuple(logits), tuple(room), tuple(logit.shape[1] for logit in logits), _typed(signs), saved[0], g, g.stride(0),
            SOFTPLUS=form == "softplus", HINGE=form == "hinge", BLOCK=_BLOCK, ACC=tl_dtype(g.dtype), num_warps=4,
        )  # fmt: skip
    return [r for r in room if r is not None]


def _fake_forward(logits: list[Tensor], signs: list[int], form: str, needs: list[bool]):
    like, n, acc = logits[0], logits[0].shape[0], accum(*logits)
    return like.new_empty(n, dtype=acc), like.new_empty((), dtype=torch.int32), [like.new_empty(n, dtype=torch.int8)], []


_forward_op = define(
    "adversarial(Tensor[] logits, int[] signs, str form, bool[] needs) -> (Tensor, Tensor, Tensor[], Tensor[])",
    triton=_forward,
    fake=_fake_forward,
)
_backward_op = define(
    "adversarial_backward(Tensor[] saved, Tensor g, Tensor[] logits, int[] signs, str form, bool[] needs) -> Tensor[]",
    triton=_backward,
    fake=lambda saved, g, logits, signs, form, needs: [logit.new_empty(logit.shape) for logit, k in zip(logits, needs, strict=True) if k],
)


class _Adversarial(Function):
    @staticmethod
    def forward(ctx, signs, form, *logits):
        flat = [logit.reshape(logit.shape[0], logit.shape[1:].numel()).contiguous() for logit in logits]
        needs = list(ctx.needs_input_grad[2:])
        value, nonfinite, saved, _ = _forward_op(flat, signs, form, needs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(nonfinite)
        ctx.save_for_backward(*saved, *flat)
        ctx.saves, ctx.signs, ctx.form, ctx.needs = len(saved), signs, form, needs
        ctx.shapes = [logit.shape for logit in logits]
        return value, nonfinite

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        gradients: list[Tensor | None] = [None] * len(ctx.shapes)
        if g is not None:
            saved, flat = list(ctx.saved_tensors[: ctx.saves]), list(ctx.saved_tensors[ctx.saves :])
            made = iter(_backward_op(saved, g, flat, ctx.signs, ctx.form, ctx.needs))
            gradients = [next(made).view(s) if k else None for s, k in zip(ctx.shapes, ctx.needs, strict=True)]
        return None, None, *gradients


def _adversarial(logits: Sequence[Tensor], signs: list[int], form: str) -> Losses:
    return Losses(*_Adversarial.apply(signs, form, *logits))


def _checked(op: str, name: str, logits: Sequence[Tensor] | Tensor) -> list[Tensor]:
    nets = [logits] if isinstance(logits, Tensor) else list(logits)
    if not nets:
        raise ValueError(f"{op}: wanted {name} of at least one net, got none")
    for i, logit in enumerate(nets):
        if not logit.is_floating_point() or logit.ndim == 0 or (logit.shape[0] > 0 and logit.numel() == 0):
            raise ValueError(f"{op}: wanted floating {name}[{i}] [N, ...], got {logit.dtype} {tuple(logit.shape)}")
        _check_pair(op, f"{name}[{i}]", logit, f"{name}[0]", nets[0])
    return nets


def _check_pair(op: str, name: str, logit: Tensor, ref_name: str, ref: Tensor) -> None:
    if logit.shape[0] != ref.shape[0] or logit.device != ref.device:
        raise ValueError(
            f"{op}: wanted as many samples in {name} as in {ref_name}, {ref.shape[0]} on {ref.device}, "
            f"got {logit.shape[0]} on {logit.device}"
        )


@takes_inference_tensors
def generator_adversarial(logits: Sequence[Tensor] | Tensor, *, kind: str = "softplus") -> Losses:
    """The generator's side: per sample, the sum over nets of the mean over that net's logits of softplus(-l).

    Args:
        logits: of the generated images, one tensor [N, ...] a net, of any size and floating dtype.
        kind: "softplus", the non-saturating loss, or "hinge", the mean of -l.

    Raises:
        ValueError: no logits, batch sizes or devices differ, or an unknown kind.
    """
    nets = _checked("generator_adversarial", "logits", logits)
    check_choice("generator_adversarial", "kind", kind, ("softplus", "hinge"))
    if uses_reference("adversarial", nets[0]):
        return reference.generator_adversarial(nets, kind=kind)
    return _adversarial(nets, [-1] * len(nets), "softplus" if kind == "softplus" else "linear")


@takes_inference_tensors
def discriminator_adversarial(
    fake_logits: Sequence[Tensor] | Tensor, real_logits: Sequence[Tensor] | Tensor, *, kind: str = "softplus"
) -> Losses:
    """The discriminator's side: per pair of a generated and a real image, summed over nets.

    Args:
        fake_logits: of generated images, one tensor [N, ...] a net.
        real_logits: of real images, likewise; the same N.
        kind: "softplus": mean(softplus(l_fake)) + mean(softplus(-l_real)), or "hinge": relu(1 + l_fake), relu(1 - l_real).

    Raises:
        ValueError: no logits, batch sizes or devices differ, or an unknown kind.
    """
    fakes = _checked("discriminator_adversarial", "fake_logits", fake_logits)
    reals = _checked("discriminator_adversarial", "real_logits", real_logits)
    _check_pair("discriminator_adversarial", "real_logits[0]", reals[0], "fake_logits[0]", fakes[0])
    check_choice("discriminator_adversarial", "kind", kind, ("softplus", "hinge"))
    if uses_reference("adversarial", fakes[0]):
        return reference.discriminator_adversarial(fakes, reals, kind=kind)
    return _adversarial(fakes + reals, [1] * len(fakes) + [-1] * len(reals), kind)


def aot_cases() -> list[AotCase]:
    """One and two nets for the generator, two pairs for the discriminator, in each dtype; DMD2's single logit."""
    finish = {"sums_ptr": "*fp32", "value_ptr": "*fp32", "keep_ptr": "*i8", "nonfinite_ptr": "*i32", "N": "i32"}
    cases = [aot_case("adversarial.finish", _finish_kernel, finish, ROWS=rows(1))]
    counts = [(nets, "i32") for nets in (1, 2, 4)] + [(1, 1), (2, 1)]
    for (nets, size), form, dtype in itertools.product(counts, ("softplus", "hinge"), ("fp32", "bf16", "fp16")):
        name = f"[{nets} x {dtype}{'' if size == 'i32' else ', 1 logit'}, {form}]"
        given = {"logits": (f"*{dtype}",) * nets, "sizes": (size,) * nets, "signs": ("fp32",) * nets}
        flags = {"SOFTPLUS": form == "softplus", "HINGE": form == "hinge", "BLOCK": _BLOCK, "ACC": tl.float32}
        grads = {"gradients": (f"*{dtype}",) * nets, "keep_ptr": "*i8", "g_ptr": "*fp32", "g_stride": "i32"}
        cases.append(aot_case(f"adversarial.forward{name}", _forward_kernel, given | {"sums_ptr": "*fp32"}, **flags))
        cases.append(aot_case(f"adversarial.gradient{name}", _gradient_kernel, given | grads, **flags))
    return cases
