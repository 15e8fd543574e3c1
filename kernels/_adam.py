"""The launches behind AdamEMA: look for non-finite gradients, coefficients of each tensor, update of everything.

All three walk the tables of kernels/tables.py. The formula stands in kernels/adam_ema.py.
"""

# Triton's launches take constexpr parameters as plain values, and options like num_warps besides; its device functions are untyped.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportPrivateImportUsage=false

import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from potstill.kernels import cuda, native
from potstill.kernels._groups import Group
from potstill.kernels._lib import cdiv
from potstill.kernels._triton import tl, triton
from potstill.kernels.tables import CHUNK, COEFS, Flags, Part

BLOCK, WARPS = 512, 4  # four elements a thread: one 16-byte access, and the same split for 32- and 16-bit tensors


@triton.jit
def _get(ptr, i, n, FULL: tl.constexpr):
    if FULL:  # no mask: one over a tensor of any length would split the 16-byte accesses
        x = tl.load(ptr + i)
    else:
        x = tl.load(ptr + i, mask=i < n, other=0.0)
    return x


@triton.jit
def _put(ptr, i, n, x, FULL: tl.constexpr):
    if FULL:
        tl.store(ptr + i, x)
    else:
        tl.store(ptr + i, x, mask=i < n)


@triton.jit
def _finite(g_ptr, first, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr):
    bad = tl.zeros((BLOCK,), tl.int32)
    for k in tl.static_range(0, CHUNK, BLOCK):
        g = _get(g_ptr, first + k + tl.arange(0, BLOCK), n, FULL)
        bad |= (tl.abs(g.to(tl.float32)) <= 3.402823466e38).to(tl.int32) ^ 1  # NaN compares false
    return tl.max(bad, 0) == 0


@triton.jit
def _check_kernel(
    fixed_ptr, grads_ptr, chunks_ptr, flag_ptr, tensors,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    n = tl.load(fixed_ptr + 5 * tensors + tensor)
    address = tl.load(grads_ptr + tensor)
    if address != 0:
        g_ptr = address.to(tl.pointer_type(GRAD))
        if ALIGNED:
            g_ptr = tl.multiple_of(g_ptr, 16)
        if first + CHUNK <= n:
            finite = _finite(g_ptr, first, n, BLOCK, CHUNK, True)
        else:
            finite = _finite(g_ptr, first, n, BLOCK, CHUNK, False)
        if finite == 0:
            tl.store(flag_ptr, 1.0)  # every program that writes writes the same


@triton.jit
def _rate(rates_ptr, i):
    """The number at address i of the table, float32 or float64, as float64."""
    address = tl.load(rates_ptr + 2 * i)
    if tl.load(rates_ptr + 2 * i + 1) == 8:
        value = tl.load(address.to(tl.pointer_type(tl.float64)))
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return value


@triton.jit
def _coefs_kernel(
    steps_ptr, grads_ptr, rates_ptr, flag_ptr, found_inf_ptr, grad_scale_ptr, nonfinite_ptr, coefs_ptr, tensors,
    log2_beta1, rest1, log2_beta2, rest2, weight_decay,
    COUNTS: tl.constexpr, HAS_FOUND: tl.constexpr, HAS_SCALE: tl.constexpr, COEFS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bad = tl.load(flag_ptr)
    if HAS_FOUND:
        bad = tl.maximum(bad, tl.load(found_inf_ptr))
    if COUNTS and tl.program_id(0) == 0:
        tl.store(nonfinite_ptr, tl.load(nonfinite_ptr) + (bad != 0).to(tl.int32))
    address = tl.load(grads_ptr + i, mask=i < tensors, other=0)
    moves = tl.where(bad == 0, address, 0) != 0
    step = tl.load(steps_ptr + i, mask=i < tensors, other=0.0) + moves.to(tl.float32)
    tl.store(steps_ptr + i, step, mask=(i < tensors) & moves)
    t = tl.maximum(step, 1.0).to(tl.float64)  # a tensor that never moved divides by no zero
    # In float64: 1 - beta^t and 1 - ema_decay lose four digits to cancellation otherwise.
    lr = _rate(rates_ptr, 0)
    c = coefs_ptr + i * COEFS
    tl.store(c, (lr / (1.0 - tl.exp2(t * log2_beta1 + t * rest1))).to(tl.float32), mask=i < tensors)
    tl.store(c + 1, (1.0 / tl.sqrt(1.0 - tl.exp2(t * log2_beta2 + t * rest2))).to(tl.float32), mask=i < tensors)
    tl.store(c + 2, (lr * weight_decay + t * 0).to(tl.float32), mask=i < tensors)
    tl.store(c + 3, (1.0 - _rate(rates_ptr, 1) + t * 0).to(tl.float32), mask=i < tensors)
    inv_scale = 1.0 / tl.load(grad_scale_ptr) if HAS_SCALE else 1.0
    tl.store(c + 4, inv_scale + step * 0, mask=i < tensors)
    tl.store(c + 5, (bad == 0).to(tl.float32) + step * 0, mask=i < tensors)


@triton.jit
def _update(
    p_ptr, g_ptr, m_ptr, v_ptr, ema_ptr, shadow_ptr, c, first, n, moves, shadowed,
    one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay,
    DECAYS: tl.constexpr, DECOUPLED: tl.constexpr, HAS_EMA: tl.constexpr, HAS_SHADOW: tl.constexpr,
    FULL: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    step_size, rsqrt_bc2, lr_decay = tl.load(c), tl.load(c + 1), tl.load(c + 2)
    ema_weight, inv_scale = tl.load(c + 3), tl.load(c + 4)
    for k in tl.static_range(0, CHUNK, BLOCK):
        i = first + k + tl.arange(0, BLOCK)
        p = _get(p_ptr, i, n, FULL)
        if moves:
            g = _get(g_ptr, i, n, FULL).to(tl.float32) * inv_scale
            m = _get(m_ptr, i, n, FULL)
            v = _get(v_ptr, i, n, FULL)
            if DECAYS:
                if DECOUPLED:
                    p = p - lr_decay * p
                else:
                    g = g + weight_decay * p
            m = m + one_minus_beta1 * (g - m)
            v = beta2 * v + one_minus_beta2 * g * g
            p = p - step_size * m / (tl.sqrt(v) * rsqrt_bc2 + eps)
            _put(m_ptr, i, n, m, FULL)
            _put(v_ptr, i, n, v, FULL)
            _put(p_ptr, i, n, p, FULL)
        if HAS_EMA:
            ema = _get(ema_ptr, i, n, FULL)
            _put(ema_ptr, i, n, ema + ema_weight * (p - ema), FULL)
        if HAS_SHADOW and shadowed:
            _put(shadow_ptr, i, n, p.to(shadow_ptr.dtype.element_ty), FULL)


@triton.jit
def _update_kernel(
    fixed_ptr, grads_ptr, chunks_ptr, coefs_ptr, flag_ptr, tensors,
    one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay,
    GRAD: tl.constexpr, SHADOW: tl.constexpr, DECAYS: tl.constexpr, DECOUPLED: tl.constexpr, HAS_EMA: tl.constexpr,
    HAS_SHADOW: tl.constexpr, ALIGNED: tl.constexpr, COEFS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        tl.store(flag_ptr, 0.0)  # _coefs_kernel has read it; the next step's check starts clean
    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    c = coefs_ptr + tensor * COEFS
    if tl.load(c + 5) != 0.0:
        n = tl.load(fixed_ptr + 5 * tensors + tensor)
        address = tl.load(grads_ptr + tensor)
        p_ptr = tl.load(fixed_ptr + tensor).to(tl.pointer_type(tl.float32))
        m_ptr = tl.load(fixed_ptr + tensors + tensor).to(tl.pointer_type(tl.float32))
        v_ptr = tl.load(fixed_ptr + 2 * tensors + tensor).to(tl.pointer_type(tl.float32))
        ema_ptr = tl.load(fixed_ptr + 3 * tensors + tensor).to(tl.pointer_type(tl.float32))
        shadow = tl.load(fixed_ptr + 4 * tensors + tensor)
        shadow_ptr = shadow.to(tl.pointer_type(SHADOW))
        g_ptr = address.to(tl.pointer_type(GRAD))
        if ALIGNED:
            p_ptr, m_ptr, v_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
            ema_ptr, g_ptr = tl.multiple_of(ema_ptr, 16), tl.multiple_of(g_ptr, 16)
            shadow_ptr = tl.multiple_of(shadow_ptr, 16)
        if first + CHUNK <= n:
            _update(
                p_ptr, g_ptr, m_ptr, v_ptr, ema_ptr, shadow_ptr, c, first, n, address != 0, shadow != 0,
                one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, DECAYS, DECOUPLED, HAS_EMA, HAS_SHADOW, True,
                CHUNK, BLOCK,
            )  # fmt: skip
        else:
            _update(
                p_ptr, g_ptr, m_ptr, v_ptr, ema_ptr, shadow_ptr, c, first, n, address != 0, shadow != 0,
                one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, DECAYS, DECOUPLED, HAS_EMA, HAS_SHADOW, False,
                CHUNK, BLOCK,
            )  # fmt: skip


_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _triton_check(part: Part, flags: Flags) -> None:
    _check_kernel[(len(part.chunks),)](
        part.fixed, part.grad_table, part.chunks, flags.flag, len(part.where),
        GRAD=_TRITON[part.grad_dtype], ALIGNED=part.aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _triton_coefs(part: Part, flags: Flags, group: Group, counts: bool) -> None:
    found, scale = flags.found_inf, flags.grad_scale
    _coefs_kernel[(cdiv(len(part.where), 128),)](
        part.steps, part.grad_table, group.rates, flags.flag, flags.flag if found is None else found,
        flags.flag if scale is None else scale, flags.nonfinite, part.coefs, len(part.where),
        *_log2(group["betas"][0]), *_log2(group["betas"][1]), group["weight_decay"],
        COUNTS=counts, HAS_FOUND=found is not None, HAS_SCALE=scale is not None, COEFS=COEFS, BLOCK=128, num_warps=4,
    )  # fmt: skip


def _log2(beta: float) -> tuple[float, float]:
    """log2(beta) as the sum of two float32: numbers are given to a kernel as float32, and a new one compiles nothing."""
    log = math.log2(beta) if beta > 0 else -1074.0  # 2^-1074 is 0 in float32, and 1 - it is 1 in float64
    (first,) = struct.unpack("f", struct.pack("f", log))
    return first, log - first


def _triton_update(part: Part, flags: Flags, group: Group) -> None:
    beta1, beta2 = group["betas"]
    _update_kernel[(len(part.chunks),)](
        part.fixed, part.grad_table, part.chunks, part.coefs, flags.flag, len(part.where),
        1 - beta1, beta2, 1 - beta2, group["eps"], group["weight_decay"],
        GRAD=_TRITON[part.grad_dtype], SHADOW=_TRITON[part.shadow_dtype], DECAYS=group["weight_decay"] != 0,
        DECOUPLED=group["decoupled_weight_decay"], HAS_EMA=part.ema is not None, HAS_SHADOW=part.shadow is not None,
        ALIGNED=part.aligned, COEFS=COEFS, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _compiled(library: Callable[[], Any]) -> tuple[Callable[..., None], ...]:
    """csrc/'s: the same ops for CUDA and for CPUs."""

    def check(part: Part, flags: Flags) -> None:
        like = part.steps.new_empty(0, dtype=part.grad_dtype)
        library().adam_ema_check(part.fixed, part.grad_table, part.chunks, flags.flag, like)

    def coefs(part: Part, flags: Flags, group: Group, counts: bool) -> None:
        library().adam_ema_coefs(
            part.steps, part.grad_table, group.rates, flags.flag, flags.found_inf, flags.grad_scale, flags.nonfinite,
            part.coefs, *group["betas"], group["weight_decay"], counts,
        )  # fmt: skip

    def update(part: Part, flags: Flags, group: Group) -> None:
        library().adam_ema_update(
            part.fixed, part.grad_table, part.chunks, part.coefs, flags.flag, part.steps.new_empty(0, dtype=part.grad_dtype),
            part.steps.new_empty(0, dtype=part.shadow_dtype), *group["betas"], group["eps"], group["weight_decay"],
            group["decoupled_weight_decay"],
        )  # fmt: skip

    return check, coefs, update


LAUNCHERS = {
    "triton": (_triton_check, _triton_coefs, _triton_update),
    "cuda": _compiled(lambda: cuda.library()),
    "cpu": _compiled(lambda: native.library()),
}


def in_torch(group: Group, part: Part, bad: Tensor, grad_scale: Tensor | None) -> None:
    """The update in PyTorch's own fused operations; 0-dim `bad` says whether to rest."""
    rows = [part.params, part.grads, part.exp_avg, part.exp_avg_sq, part.each_step]
    if any(g is None for g in part.grads):
        rows = [[t for t, g in zip(row, part.grads, strict=True) if g is not None] for row in rows]
    params, grads, exp_avg, exp_avg_sq, steps = rows
    on_cpu = bad.device.type == "cpu"  # where `bad` is known to be 0
    if params:
        torch._foreach_add_(steps, 1)
        fused = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        fused(
            params, grads, exp_avg, exp_avg_sq, [], steps,
            lr=float(group["lr"]) if on_cpu else group["lr"].to(torch.float32).reshape(()), beta1=group["betas"][0],
            beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
            maximize=False, grad_scale=grad_scale, found_inf=None if on_cpu else bad,
        )  # fmt: skip
        if not on_cpu:
            torch._foreach_sub_(steps, [bad] * len(steps))
    if part.ema is not None:
        weight = (1 - group["ema_decay"].reshape(())) * (bad == 0)
        if on_cpu:
            torch._foreach_lerp_(part.ema, part.params, float(weight))
        else:
            for e, p in zip(part.ema, part.params, strict=True):
                e.lerp_(p, weight.to(e.dtype))
    round_(part)


def round_(part: Part) -> None:
    """Parameters into their shadows."""
    pairs = [(s, p) for s, p in zip(part.shadow or (), part.params, strict=False) if s is not None]
    if pairs:
        torch._foreach_copy_([s for s, _ in pairs], [p for _, p in pairs])
