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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.kernels import reference
from potstill.kernels._args import check_choice
from potstill.kernels._inference import takes_inference_tensors
from potstill.kernels._lib import define, rows, tl_dtype
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


def _options(logits: list[Tensor], fakes: int, form: str, acc: torch.dtype) -> tuple[tuple[int, ...], tuple[float, ...], dict[str, Any]]:
    """Logits per net, its sign in the exponent, and the constants of both kernels; the first `fakes` nets' logits push up."""
    signs = (1.0,) * fakes + (-1.0,) * (len(logits) - fakes)
    constants = {"SOFTPLUS": form == "softplus", "HINGE": form == "hinge", "BLOCK": _BLOCK, "ACC": tl_dtype(acc), "num_warps": 4}
    return tuple(logit.shape[1] for logit in logits), signs, constants


def _forward(logits: list[Tensor], fakes: int, form: str) -> tuple[Tensor, Tensor, Tensor]:
    n, acc = logits[0].shape[0], accum(*logits)
    value, nonfinite, keep = _shapes(logits, fakes, form)
    if n == 0:
        return value, nonfinite.zero_(), keep
    sums, (sizes, signs, constants) = torch.empty_like(value), _options(logits, fakes, form, acc)
    _forward_kernel[(n,)](tuple(logits), sizes, signs, sums, **constants)
    _finish_kernel[(1,)](sums, value, keep, nonfinite, n, ROWS=rows(1), num_warps=4)
    return value, nonfinite, keep


def _shapes(logits: list[Tensor], fakes: int, form: str) -> tuple[Tensor, Tensor, Tensor]:
    like, n = logits[0], logits[0].shape[0]
    return like.new_empty(n, dtype=accum(*logits)), like.new_empty((), dtype=torch.int32), like.new_empty(n, dtype=torch.int8)


def _backward(keep: Tensor, g: Tensor, logits: list[Tensor], fakes: int, form: str, needs: list[bool]) -> list[Tensor]:
    room = [logit.new_empty(logit.shape) if needed else None for logit, needed in zip(logits, needs, strict=True)]
    if len(g) > 0:
        sizes, signs, constants = _options(logits, fakes, form, g.dtype)
        _gradient_kernel[(len(g),)](tuple(logits), tuple(room), sizes, signs, keep, g, g.stride(0), **constants)
    return [t for t in room if t is not None]


_adversarial = define(
    "adversarial(Tensor[] logits, int fakes, str form) -> (Tensor, Tensor, Tensor)", launchers={"triton": _forward}, shapes=_shapes
)
_adversarial_backward = define(
    "adversarial_backward(Tensor keep, Tensor g, Tensor[] logits, int fakes, str form, bool[] needs) -> Tensor[]",
    launchers={"triton": _backward},
    shapes=lambda keep, g, logits, fakes, form, needs: [t.new_empty(t.shape) for t, needed in zip(logits, needs, strict=True) if needed],
)


def _setup_context(ctx: Any, inputs: tuple[list[Tensor], int, str], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, ctx.fakes, ctx.form = inputs
    _, nonfinite, keep = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(nonfinite, keep)
    ctx.save_for_backward(keep, *logits)


@once_differentiable
def _differentiate(ctx: Any, g: Tensor | None, *_: Any) -> tuple[list[Tensor | None], None, None]:
    (keep, *logits), needs = ctx.saved_tensors, ctx.needs_input_grad[0]
    if g is None:
        return [None] * len(logits), None, None
    made = iter(_adversarial_backward(keep, g, logits, ctx.fakes, ctx.form, needs))
    return [next(made) if needed else None for needed in needs], None, None


torch.library.register_autograd("potstill::adversarial", _differentiate, setup_context=_setup_context)


def _flat(logits: Sequence[Tensor]) -> list[Tensor]:
    """Each as contiguous [N, its logits]."""
    return [logit.reshape(logit.shape[0], logit.shape[1:].numel()).contiguous() for logit in logits]


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
    return Losses(*_adversarial(_flat(nets), 0, "softplus" if kind == "softplus" else "linear")[:2])


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
    return Losses(*_adversarial(_flat(fakes + reals), len(fakes), kind)[:2])
