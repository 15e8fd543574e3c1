"""kernels/conv.py: 3×3 convolutions in C++ for CPU tensors, on every level of instructions that this machine has."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from kernel_cases import poisoned_memory
from torch import Tensor
from torch.nn import functional as F

from potstill.kernels import aot, conv, native
from potstill.kernels._lib import INTERPRET

ROOT = Path(__file__).parent.parent
LAST = torch.channels_last
LEVELS = aot._build_flags().LEVELS
pytestmark = pytest.mark.skipif(not native.LIBRARY.exists() or INTERPRET, reason="kernels/_cpu.so is not built, or Triton interprets")


class Case(NamedTuple):
    n: int
    c: int
    o: int
    height: int
    width: int


CASES = [
    Case(8, 32, 32, 8, 8),
    Case(1, 64, 64, 4, 4),  # one tile
    Case(64, 96, 64, 4, 4),
    Case(4, 64, 32, 32, 32),
    Case(2, 192, 64, 16, 16),
    Case(2, 16, 48, 7, 5),  # half a panel, odd sizes
    Case(3, 33, 20, 13, 11),  # nothing divides anything
    Case(2, 5, 3, 9, 2),
    Case(2, 1, 17, 3, 6),  # a weight whose two layouts are one
    Case(2, 17, 1, 4, 4),
    Case(1, 1, 1, 1, 1),
]


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory is NaN."""
    with poisoned_memory():
        yield


def inputs(case: Case, last: bool = False) -> dict[str, Tensor]:
    """A generator of its own: the same numbers in every process. `last`: the weight is channels_last, as images always are."""
    draw = torch.Generator().manual_seed(0)
    images = {"x": (case.n, case.c), "dy": (case.n, case.o), "skip": (case.n, case.o)}
    found = {k: torch.randn(*v, case.height, case.width, generator=draw).contiguous(memory_format=LAST) for k, v in images.items()}
    weight = torch.randn(case.o, case.c, 3, 3, generator=draw) / (9 * case.c) ** 0.5
    return found | {"weight": weight.contiguous(memory_format=LAST) if last else weight, "bias": torch.randn(case.o, generator=draw)}


def ours(x: Tensor, dy: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {
        "plain": conv.forward(x, weight),
        "biased": conv.forward(x, weight, bias, scale=2.0),
        "whole": conv.forward(x, weight, bias, skip, 0.5),
        "dx": conv.input_grad(dy, weight),
        "dweight": conv.weight_grad(x, dy, 0.25, like=weight),
    }


def pytorchs(x: Tensor, dy: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    plain = F.conv2d(x, weight, padding=1)
    biased = plain + bias[:, None, None]
    grads = torch.ops.aten.convolution_backward(dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
    return {"plain": plain, "biased": biased * 2, "whole": (biased + skip) * 0.5, "dx": grads[0], "dweight": grads[1] * 0.25}


def errors(case: Case, last: bool) -> dict[str, tuple[float, float]]:
    """Root mean square errors against float64: ours and PyTorch's, of the root mean square of what is right."""
    given = inputs(case, last)
    exact = pytorchs(**{k: v.double() for k, v in given.items()})
    found, plain = ours(**given), pytorchs(**given)

    def error(t: Tensor, right: Tensor) -> float:
        return ((t.double() - right).square().mean() / right.square().mean()).sqrt().item()

    return {k: (error(found[k], right), error(plain[k], right)) for k, right in exact.items()}


def wrong(case: Case, last: bool) -> list[str]:
    """What is worse than PyTorch by more than rounding. Sums of one or two terms are exact there: hence the second part."""
    limits = {k: (found, 8 * plain + 1e-6) for k, (found, plain) in errors(case, last).items()}
    return [f"{case} {k}: {found:.1e}, allowed {most:.1e}" for k, (found, most) in limits.items() if not found <= most]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_worse_than_rounding(case, last):
    given = inputs(case, last)
    found = ours(**given)
    assert not wrong(case, last)
    assert all(found[k].is_contiguous(memory_format=LAST) for k in ("plain", "biased", "whole", "dx"))
    assert found["dweight"].stride() == given["weight"].stride()


PROCESS = """
import json, sys
sys.path[:0] = ["tests"]
import test_conv as t
with t.poisoned_memory():
    print(json.dumps([said for case in t.CASES for last in (False, True) for said in t.wrong(case, last)]))
"""


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_instructions_is_exact(level):
    environment = os.environ | {"POTSTILL_CPU": level, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", PROCESS], cwd=ROOT, env=environment, capture_output=True, text=True)
    if "POTSTILL_CPU to be any or what this processor has" in done.stderr:
        pytest.skip(f"this processor has no {level}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("case", [Case(16, 64, 96, 8, 8), Case(5, 40, 24, 17, 9), Case(1, 64, 64, 4, 4)], ids=str)
def test_threads_do_not_change_a_bit(case):
    given = inputs(case)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ours(**given)
        for n in (2, 3, 7):
            torch.set_num_threads(n)
            torch.testing.assert_close(ours(**given), expected, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


def test_nothing_is_written_but_the_result():
    """Vectors and tiles reach beyond the channels and pixels of an image; memory around it stays as it was."""
    case = Case(2, 19, 21, 5, 6)
    given = inputs(case)
    for name, like in (("conv3x3", "dy"), ("conv3x3_input_grad", "x")):
        t = given[like]
        memory = torch.full((t.numel() + 200,), 7.0)
        out = memory[100:-100].view(t.shape[0], *t.shape[2:], t.shape[1]).permute(0, 3, 1, 2)
        more = (given["bias"], None, 1.0) if name == "conv3x3" else ()
        getattr(native.library(), name)(given["x" if name == "conv3x3" else "dy"], given["weight"], *more, out)
        assert (memory[:100] == 7).all() and (memory[-100:] == 7).all()
    for shape, back in (((21, 19, 3, 3), (0, 1, 2, 3)), ((21, 3, 3, 19), (0, 3, 1, 2))):
        memory = torch.full((given["weight"].numel() + 200,), 7.0)
        dweight = memory[100:-100].view(shape).permute(back)
        native.library().conv3x3_weight_grad(given["x"], given["dy"], 1.0, dweight)
        assert (memory[:100] == 7).all() and (memory[-100:] == 7).all()


def test_what_is_not_finite_spoils_no_other_sample():
    given = inputs(Case(3, 16, 16, 4, 4))
    given["x"][1, 2, 1, 1] = float("nan")
    spoiled = ~conv.forward(given["x"], given["weight"]).isfinite()
    assert spoiled[1].any() and not spoiled[0].any() and not spoiled[2].any()


def test_takes_what_it_can_and_is_faster_at(monkeypatch):
    given = inputs(Case(2, 32, 32, 8, 8))
    x, weight = given["x"], given["weight"]
    assert conv.takes(x, weight)
    assert conv.takes(x, weight.contiguous(memory_format=LAST))
    refused = {
        "float64": (x.double(), weight.double()),
        "a float64 weight": (x, weight.double()),
        "NCHW images": (x.contiguous(), weight),
        "no images": (x[:0], weight),
        "a weight of steps": (x, torch.empty(32, 32, 3, 6)[..., ::2]),
        "1×1": (x, weight[:, :, :1, :1].contiguous()),
        "groups": (x, weight[:16, :16].contiguous()),
        "few channels": (x, weight[:7]),
        "tiles with little in them": (x[:, :, :1, :1].contiguous(memory_format=LAST), weight),
        "another device": (x.to("meta"), weight),
    }
    assert [name for name, case in refused.items() if conv.takes(*case)] == []
    monkeypatch.setattr("potstill.kernels.cuda._backend", "reference")
    assert not conv.takes(x, weight)


def test_shapes_that_do_not_fit_are_named():
    given = inputs(Case(2, 32, 32, 8, 8))
    x, weight, bias = given["x"], given["weight"], given["bias"]
    with pytest.raises(ValueError, match=r"wanted a contiguous float32 bias \[32\], got torch.float32 \[31\]"):
        conv.forward(x, weight, bias[:31])
    with pytest.raises(ValueError, match=r"wanted a channels_last float32 skip \[2, 32, 8, 8\], got"):
        conv.forward(x, weight, skip=given["skip"].contiguous())
    with pytest.raises(RuntimeError, match="wanted a weight that is contiguous or channels_last"):
        conv.forward(x, torch.empty(32, 32, 3, 6)[..., ::2])
    with pytest.raises(RuntimeError, match="wanted images of the weight's channels"):
        conv.weight_grad(x, given["dy"][:, :16].contiguous(memory_format=LAST), like=weight)
