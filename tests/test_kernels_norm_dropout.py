"""Dropout in norm_silu, and what a block's backward asks of its op: against the definition in float64, mask for mask."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import poisoned_memory
from places import needs_triton
from test_kernels_norm_silu import CASES, inputs, needs_kernels

from potstill.kernels import native, norm_silu
from potstill.kernels._lib import INTERPRET
from potstill.kernels._norm import threshold
from potstill.kernels.norm_silu import backward_op, forward_op, kept, plain

CHECKED = ("digits", "digits NCHW", "18 a group", "two passes", "two passes masked", "two passes NCHW", "one group, odd", "no SiLU")
KEY = -0x123456789ABCDEF


@pytest.fixture(autouse=True)
def without_the_cpp(monkeypatch):
    """csrc's C++ for CPUs is tests/test_native.py's."""
    monkeypatch.setattr(native, "_built", False)


def options(case, given):
    return [given["weight"], given["bias"], *(given.get(name) for name in ("scale", "shift", "add")), case.groups]


def definition(case, x, given, dropout, key):
    extras = {name: given[name] for name in case.extras}
    return plain(x, given["weight"], given["bias"], case.groups, 1e-5, silu=case.silu, dropout=dropout, key=key, **extras)


def close(ours, exact, name):
    assert (ours.double() - exact).abs().max() <= 1e-5 * exact.abs().max(), name


def check_block(name, dropout, forward=forward_op, backward=backward_op, trained=True):
    """y, its mask bit for bit, and every output of the backward op with skip, factors and y once more."""
    case, key = CASES[name], torch.tensor([KEY])
    x, dy, given = inputs(case)
    skip = torch.randn_like(x)
    with poisoned_memory():
        y, mean, rstd = forward(x, *options(case, given), 1e-5, case.silu, dropout, key)
        wanted = [trained, *(n in given for n in ("scale", "shift", "add"))]
        dx, *out, again, _ = backward(
            dy, x, mean, rstd, *options(case, given), case.silu, dropout, key, 0.7, skip, -0.3, True, wanted, 0
        )  # fmt: skip
    leaves = {"x": x, **given}
    leaves = {n: t.double().requires_grad_() for n, t in leaves.items()}
    exact = definition(case, leaves["x"], leaves, dropout, key)
    gradients = dict(zip(leaves, torch.autograd.grad(exact, list(leaves.values()), 0.7 * dy.double()), strict=True))
    assert torch.equal(y != 0, kept(key, x.shape, dropout))
    assert {t.stride() for t in (y, dx, again)} == {x.stride()}
    close(y, exact, "y")
    close(again, exact, "y again")
    close(dx, gradients["x"] - 0.3 * skip.double(), "dx")
    for n, d in zip(("weight", "bias", "scale", "shift", "add"), out, strict=True):
        if n in given and (trained or n not in ("weight", "bias")):
            close(d, gradients[n], f"d{n}")
        else:
            assert d.numel() == 0


@needs_kernels
@pytest.mark.parametrize("dropout", [0.13, 0.5, 0.0])
@pytest.mark.parametrize("name", CHECKED)
def test_a_blocks_backward(name, dropout):
    check_block(name, dropout)


@needs_kernels
def test_a_blocks_backward_of_frozen_parameters():
    check_block("6 a group", 0.13, trained=False)


@pytest.mark.parametrize("name", ["digits", "digits NCHW", "two passes", "6 a group"])
def test_autograd(name):
    case, key = CASES[name], torch.tensor([KEY])
    x, dy, given = inputs(case)
    ours, exact = ({n: t.to(d).requires_grad_() for n, t in {"x": x, **given}.items()} for d in (torch.float32, torch.float64))
    extras = {n: ours[n] for n in case.extras}
    y = norm_silu(ours["x"], ours["weight"], ours["bias"], case.groups, 1e-5, silu=case.silu, dropout=0.13, key=key, **extras)
    expected = definition(case, exact["x"], exact, 0.13, key)
    close(y, expected, "y")
    found = torch.autograd.grad(y, list(ours.values()), dy)
    for n, d, e in zip(ours, found, torch.autograd.grad(expected, list(exact.values()), dy.double()), strict=True):
        close(d, e, n)


def test_the_mask_is_as_random_as_it_says():
    shape, p = torch.Size((4, 32, 64, 64)), 0.13
    count = shape.numel()
    keys = torch.randint(-(2**63), 2**63 - 1, (3,)).split(1)
    a, b, c = (kept(key, shape, p).double() for key in keys)
    sigma = (p * (1 - p) / count) ** 0.5
    for mask in (a, b, c):
        assert abs(mask.mean() - (1 - p)) < 4 * sigma
    flat = [m.permute(0, 2, 3, 1).flatten() - (1 - p) for m in (a, b, c)]
    pairs = [(flat[0], flat[1]), (flat[0], flat[2]), *((flat[0][step:], flat[0][:-step]) for step in (1, 2, 32, 32 * 64))]
    for u, v in pairs:
        assert abs((u * v).mean()) < 4 * p * (1 - p) / len(u) ** 0.5
    assert (threshold(0.0), threshold(0.5), threshold(1 - 2**-53)) == (0, 2**31, 2**32 - 1)
    assert abs(threshold(p) / 2**32 - p) <= 2**-33


if not INTERPRET:

    @needs_triton
    def test_all_of_this_holds_for_the_triton_kernels_under_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-W", "ignore::RuntimeWarning"]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=environment)
        assert done.returncode == 0, done.stdout
