"""The tail of a residual block: one rounding of the sum in float64, on the CPU and by the Triton kernel under the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import BF16, INTERPRET, of_ops, poisoned_memory
from places import needs_triton

from potstill.kernels import native
from potstill.kernels.residual import _residual, plain, residual

LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}


@pytest.fixture(autouse=True)
def without_the_cpp(monkeypatch):
    """csrc's C++ for CPUs is tests/test_native.py's."""
    monkeypatch.setattr(native, "_built", False)


def images(shape, dtype, layout):
    return [torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(3)]


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (3, 7, 5, 3), (1, 5, 41, 13), (0, 4, 2, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounded_once_and_its_gradients(layout, shape, dtype, biases):
    h, skip, dy = images(shape, dtype, layout)
    given = [h, skip, *(torch.randn(shape[1]) if there else None for there in biases)]
    exact = [None if t is None else t.double().requires_grad_() for t in given]
    ours = [None if t is None else t.requires_grad_() for t in given]
    with poisoned_memory():
        out = residual(*ours, 0.7)
    expected = plain(*exact, 0.7)
    assert out.dtype == dtype and (out.stride() == h.stride() or out.numel() == 0)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(
        out.double(), expected, rtol=unit, atol=max(4 * unit, 2e-7 * (dtype is not torch.float64)) if INTERPRET else 4 * unit
    )
    there = [i for i, t in enumerate(given) if t is not None]
    found = torch.autograd.grad(out, [ours[i] for i in there], dy)
    wanted = torch.autograd.grad(expected, [exact[i] for i in there], dy.double())
    for d, e, i in zip(found, wanted, there, strict=True):
        assert d.dtype == given[i].dtype
        torch.testing.assert_close(d.double(), e, rtol=max(unit, 1e-6 * (i > 1)), atol=1e-5 * (i > 1))


def test_views_and_bad_input():
    h, skip, _ = images((2, 8, 6, 6), torch.float32, "NHWC")
    torch.testing.assert_close(residual(h[:, :, ::2], skip[:, :, ::2]), h[:, :, ::2] + skip[:, :, ::2])
    torch.testing.assert_close(residual(h, skip.contiguous()), h + skip)
    for wrong, message in (
        ((h[0], skip[0]), r"floating h \[N, C, H, W\]"),
        ((h, skip.half()), "skip like h, .* got torch.float16"),
        ((h, skip[:1]), r"skip like h, .* got torch.float32 \(1, 8, 6, 6\)"),
        ((h, skip, torch.zeros(4)), r"floating bias \(8,\) .* got torch.float32 \(4,\)"),
        ((h, skip, None, torch.zeros(8, dtype=torch.int32)), r"floating skip_bias \(8,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            residual(*wrong)


@of_ops
def test_opcheck():
    h, skip, _ = images((2, 6, 3, 3), torch.float32, "NHWC")
    torch.library.opcheck(_residual, (h.requires_grad_(), skip.requires_grad_(), torch.zeros(6, requires_grad=True), None, 0.5))


if not INTERPRET:

    @needs_triton
    def test_all_of_this_holds_for_the_triton_kernel_under_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=environment)
        assert done.returncode == 0, done.stdout
