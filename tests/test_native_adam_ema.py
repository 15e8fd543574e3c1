"""AdamEMA and total_norm in the C++ of csrc/ for CPU tensors: what takes it, threads, and every level of instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils import get_total_norm

from potstill.kernels import AdamEMA, aot, native
from potstill.kernels._lib import INTERPRET
from potstill.kernels.tables import CHUNK
from potstill.kernels.total_norm import total_norm

ROOT = Path(__file__).parent.parent
SIZES = [0, 1, 3, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 40 * CHUNK + 5, *range(1, 60)]
pytestmark = pytest.mark.skipif(not native.LIBRARY.exists() or INTERPRET, reason="kernels/_cpu.so is not built, or Triton interprets")


@pytest.fixture
def asked(monkeypatch):
    """Grows whenever an op is asked for."""
    times = []
    monkeypatch.setattr(native, "library", lambda library=native.library: times.append(1) or library())
    return times


def some(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator).to(dtype) for n in SIZES]


def stepped(steps=3):
    """What there is after some steps."""
    params, ema = [p.requires_grad_() for p in some()], some()
    shadow = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
    optimizer = AdamEMA(params, lr=1e-2, weight_decay=0.1, ema=ema, ema_decay=0.9, shadow=shadow)
    for k in range(steps):
        for p in params:
            p.grad = (p.detach() * (k + 1)).sin()
        optimizer.step(grad_scale=torch.tensor(3.0))
    return [*(p.detach() for p in params), *ema, *shadow, total_norm([p.grad for p in params])]


def test_float32_takes_it_and_nothing_else_does(asked, monkeypatch):
    def step(dtype):
        weight = torch.ones(3, dtype=dtype, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        AdamEMA([weight]).step()
        total_norm([weight.grad])
        return weight.detach()

    step(torch.float64)
    assert not asked
    step(torch.float32)
    assert len(asked) == 4
    monkeypatch.setattr("potstill.kernels.cuda._backend", "reference")
    step(torch.float32)
    assert len(asked) == 4


def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = stepped()
        for n in (2, 3, 7):
            torch.set_num_threads(n)
            torch.testing.assert_close(stepped(), expected, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("level", aot._build_flags().LEVELS)
def test_every_level_of_instructions_is_adams(level):
    code = """
import json, sys
sys.path[:0] = ["tests"]
from test_native_adam_ema import stepped, torch
print(json.dumps([t.double().norm().item() for t in stepped()]))
"""
    environment = os.environ | {"POTSTILL_CPU": level, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if "POTSTILL_CPU to be any or what this processor has" in done.stderr:
        pytest.skip(f"this processor has no {level}")
    assert done.returncode == 0, done.stderr[-2000:]
    exact, average = [p.requires_grad_() for p in some(torch.float64)], some(torch.float64)
    adam = torch.optim.Adam(exact, lr=1e-2, weight_decay=0.1)
    for k in range(3):
        scaled = [(p.detach() * (k + 1)).sin() for p in exact]
        for p, g in zip(exact, scaled, strict=True):
            p.grad = g / 3
        adam.step()
        for a, p in zip(average, exact, strict=True):
            a.lerp_(p.detach(), 1 - 0.9)
    expected = [p.detach() for p in exact] + average + [p.detach().bfloat16() for p in exact] + [get_total_norm(scaled)]
    for t, found in zip(expected, json.loads(done.stdout), strict=True):
        rounding = 4e-3 if t.dtype is torch.bfloat16 else 2e-5
        assert found == pytest.approx(t.double().norm().item(), rel=rounding, abs=rounding)


def test_a_level_that_is_none_is_named():
    code = "import sys; sys.path[:0] = ['tests']; from test_native_adam_ema import stepped; stepped()"
    environment = os.environ | {"POTSTILL_CPU": "sse", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "avx512_bf16, got sse" in done.stderr


LISTS = {
    "many sizes": some(),
    "nothing": [],
    "empty": [torch.zeros(0)],
    "another dtype": some(torch.float64),
    "large": [torch.full((5,), 1e30), torch.ones(3)],
    "small": [torch.full((70, 5), 1e-30)],
    "channels last": [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(3, 4).t()],
    "gaps": [torch.randn(8, 8)[:, :3], torch.randn(())],
    "overlapping": [torch.ones(1).expand(7)],
    "inf": [torch.ones(3), torch.full((2,), torch.inf)],
    "nan": [torch.tensor([1.0, torch.nan])],
}


@pytest.mark.parametrize("gradients", LISTS.values(), ids=LISTS)
def test_total_norm(gradients):
    norm, exact = total_norm(gradients), get_total_norm([g.double() for g in gradients])
    assert norm.shape == ()
    torch.testing.assert_close(norm, exact.to(norm.dtype), rtol=1e-6, atol=0, equal_nan=True)
