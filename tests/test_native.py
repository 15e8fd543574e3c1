"""The C++ of csrc/ for CPU tensors: norm_silu on NHWC images, on every level of instructions that this machine has."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import test_kernels_norm_silu as norm
import torch
from kernel_cases import poisoned_memory
from places import CPU

from potstill.engine.jobs import machine
from potstill.kernels import aot, native, norm_silu
from potstill.kernels._lib import INTERPRET

FLAGS = aot._build_flags()
ROOT = Path(__file__).parent.parent
needs_build = pytest.mark.skipif(not native.LIBRARY.exists() or INTERPRET, reason="kernels/_cpu.so is not built, or Triton interprets")
DTYPES = [torch.float32, torch.bfloat16]
NHWC = {name: case._replace(last=True) for name, case in norm.CASES.items()}
WIDE = [norm.Case(1, c, r, r, 32, extras=norm.MODULATED) for c, r in ((128, 64), (192, 64), (576, 32), (1536, 8))]


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory is NaN."""
    with poisoned_memory():
        yield


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_an_installation_with_a_compiler_has_it():
    """Or everything below would be skipped without a word: `make test` installs with --no-build-isolation."""
    if os.environ.get("POTSTILL_NO_CPU") != "1":
        assert native.LIBRARY.exists()


@needs_build
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*NHWC.values(), *WIDE], ids=[*NHWC, *(f"{c.c} wide" for c in WIDE)])
def test_no_worse_than_pytorch(case, dtype, monkeypatch):
    taken = []
    monkeypatch.setattr(native, "library", lambda library=native.library: taken.append(1) or library())
    ours = norm.check(case, dtype)
    assert len(taken) == 2  # forward and backward
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    assert ours["dx"].is_contiguous(memory_format=torch.channels_last)


LEVELS = """
import json, sys
import torch
sys.path[:0] = ["tests"]
import test_kernels_norm_silu as norm
from potstill.kernels import norm_silu
torch.set_num_threads(int(sys.argv[1]))
found = {}
for name, case in norm.CASES.items():
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        case = case._replace(last=True)
        x, g, given = norm.inputs(case, dtype)
        exact = norm.outputs(norm.plain, case, x, g, given, torch.float64)
        ours = norm.outputs(norm_silu, case, x, g, given)
        worst = max(norm.error(ours[k], v) / max(1.0, v.abs().max().item()) for k, v in exact.items())
        found[f"{name} {dtype}"] = [worst, [ours[k].double().sum().item() for k in ours]]
print(json.dumps(found))
"""


def run(level: str, threads: int = 1, script: str = LEVELS) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"POTSTILL_CPU": level, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", script, str(threads)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_build
@pytest.mark.parametrize("level", FLAGS.LEVELS)
def test_every_level_of_instructions_is_exact(level):
    done = run(level)
    if "POTSTILL_CPU to be any or what this processor has" in done.stderr:
        pytest.skip(f"this processor has no {level}")
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (worst, _) in json.loads(done.stdout).items():
        # of the largest value: a few roundings in float32, half a unit of bfloat16's eight bits and one rounding before
        assert worst <= (8e-3 if "bfloat16" in name else 1e-5), f"{level}: {name}: {worst:.1e}"


@needs_build
def test_a_level_that_is_none_is_named():
    done = run("sse")
    assert "wanted POTSTILL_CPU to be any or what this processor has of avx2, avx512 and avx512_bf16, got sse" in done.stderr


@needs_build
def test_neither_threads_nor_the_rest_of_the_batch_change_a_bit():
    case = norm.Case(5, 128, 16, 16, 32, extras=("add",))
    x, g, given = norm.inputs(case, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = norm.outputs(norm_silu, case, x, g, given)
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            got = norm.outputs(norm_silu, case, x, g, given)
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
            alone = norm.outputs(norm_silu, case, x[:1], g[:1], given | {"add": given["add"][:1]})  # shared by its groups
            assert torch.equal(alone["dx"], expected["dx"][:1])
            assert torch.equal(alone["dadd"], expected["dadd"][:1])
    finally:
        torch.set_num_threads(threads)


ELSEWHERE = {
    "wide range of layouts": partial(norm.test_wide_range_of_layouts_gives_the_same_numbers, CPU),
    "gradient of a sum": partial(norm.test_the_gradient_of_a_sum_has_stride_zero, CPU),
    "empty batch": partial(norm.test_empty_batch, CPU),
    "float32 parameters": norm.test_parameters_may_be_float32_beside_16_bit_images,
    "what is kept": norm.test_only_x_and_statistics_are_kept,
    "bfloat16 weight gradient": partial(norm.test_bfloat16_weight_gradient_at_the_width_where_pytorch_was_wrong, CPU),
    "opcheck": norm.test_opcheck,
}


@needs_build
@pytest.mark.parametrize("test", ELSEWHERE.values(), ids=ELSEWHERE)
def test_as_elsewhere(test):
    test()


@needs_build
def test_frozen_weights_have_nothing_computed_for_them(monkeypatch):
    norm.test_frozen_weights_have_nothing_computed_for_them(monkeypatch)


@needs_build
# Dynamo's own doing, when it meets an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_one_graph():
    norm.test_compiles_into_one_graph(CPU)


@needs_build
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_so_and_in_its_group(bad, dtype):
    x, _, given = norm.inputs(norm.Case(2, 64, 4, 4, 16), dtype)
    x[1, 5, 2, 2] = bad
    y = norm_silu(x, given["weight"], given["bias"], 16, 1e-5)
    group = torch.zeros_like(y, dtype=torch.bool)
    group[1, 4:8] = True
    assert (~y.isfinite()).nonzero().tolist() == group.nonzero().tolist()


@needs_build
def test_silu_over_the_whole_range_of_its_exponential():
    """Black images: h is the shift, exactly; so what is seen is h·sigmoid(h) alone, and its derivative."""
    h = torch.linspace(-87, 87, 16 * 1000).view(1000, 16).requires_grad_()
    x = torch.zeros(1000, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    y = norm_silu(x, torch.ones(16), torch.zeros(16), 4, 1e-5, shift=h)[:, :, 0, 0]
    (slope,) = torch.autograd.grad(y.sum(), h)
    wide = h.detach().double()
    exact, exact_slope = wide * wide.sigmoid(), wide.sigmoid() * (1 + wide * (-wide).sigmoid())
    assert ((y - exact).abs() - 4e-7 * exact.abs()).max() <= 0
    # where h·(1 - sigmoid) is nearly -1 the slope is a difference, hence the second part
    assert ((slope - exact_slope).abs() - 4e-7 * (exact_slope.abs() + wide.abs() * wide.sigmoid())).max() <= 0


BLOCK = """
import itertools, json, sys
import torch
sys.path[:0] = ["tests"]
import test_kernels_norm_silu as norm
from potstill.kernels import native
module, library = norm.module, native.library()
torch.manual_seed(0)
wrong, worst = 0, {"torch.float32": 0.0, "torch.bfloat16": 0.0}
def compare(ours, exact):
    found = (ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1)
    worst[str(ours.dtype)] = max(worst[str(ours.dtype)], found.item())
for case, dtype in itertools.product((norm.CASES["6 a group"], norm.CASES["one group, odd"], norm.CASES["no SiLU"]), norm.DTYPES[::2]):
    x, g, given = norm.inputs(case, dtype)
    skip, key = torch.randn_like(x), torch.tensor([-(2**61) + 12345])
    given = {k: given.get(k) for k in ("weight", "bias", "scale", "shift", "add")}
    for dropout in (0.0, 0.1, 0.75):
        rest = (*given.values(), case.groups)
        y, mean, rstd = module.forward_op(x, *rest, 1e-5, case.silu, dropout, key)
        wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, *given.values())]
        exact = module._positional(*wide, key, case.groups, 1e-5, case.silu, dropout)
        left = module.kept(key, x.shape, dropout)
        wrong += ((y == 0) & left & (exact.abs() > 1e-6) | (y != 0) & ~left).sum().item()
        compare(y, exact)
        asked = [True, *(t is not None for t in list(given.values())[2:])]
        made = module.backward_op(g, x, mean, rstd, *rest, case.silu, dropout, key, 0.5, skip, 1.5, True, asked, 0)
        slopes = iter(torch.autograd.grad(exact, [t for t in wide if t is not None], 0.5 * g.double()))
        slopes = [None if t is None else next(slopes) for t in wide]
        compare(made[0], slopes[0] + 1.5 * skip.double())
        for ours, slope in zip(made[1:6], slopes[1:], strict=True):
            slope is None or compare(ours, slope)
        wrong += 0 if torch.equal(made[6], y) else 1
    for biases in ((None, None), (given["weight"], None), (given["weight"].double(), given["bias"])):
        sum_ = x.double() + skip.double() + sum(b.double()[:, None, None] for b in biases if b is not None)
        out = torch.empty_like(x)
        library.residual(x, skip, *biases, 0.7, out)
        compare(out, 0.7 * sum_)
        h = x.clone(memory_format=torch.channels_last)
        library.residual(h, skip, *biases, 0.7, h)
        wrong += 0 if torch.equal(h, out) else 1
print(json.dumps([wrong, worst]))
"""


@needs_build
@pytest.mark.parametrize("level", FLAGS.LEVELS)
def test_dropout_and_what_a_block_asks_for_are_the_definition(level):
    """Also: y again is y, bit for bit; the mask is that of `kept`; a residual may be written over its image."""
    done = run(level, script=BLOCK)
    if "POTSTILL_CPU to be any or what this processor has" in done.stderr:
        pytest.skip(f"this processor has no {level}")
    assert done.returncode == 0, done.stderr[-2000:]
    wrong, worst = json.loads(done.stdout)
    assert wrong == 0
    assert worst["torch.float32"] <= 1e-5
    assert worst["torch.bfloat16"] <= 8e-3


@needs_build
def test_the_backend_reference_does_without(monkeypatch):
    x, _, given = norm.inputs(NHWC["digits"])
    assert native.takes(x)
    monkeypatch.setattr("potstill.kernels.cuda._backend", "reference")
    assert not native.takes(x)
    monkeypatch.setattr(native, "library", lambda: pytest.fail("loaded"))
    norm_silu(x, given["weight"], given["bias"], 8, 1e-5)


def test_a_run_says_that_it_does_without(monkeypatch):
    monkeypatch.setattr(native, "_built", False)
    assert "csrc/ is not compiled (pip install -e . --no-build-isolation" in machine.uncompiled(torch.device("cpu"))
    assert machine.uncompiled(torch.device("cuda")) == ""
    monkeypatch.setattr(native, "_built", True)
    assert machine.uncompiled(torch.device("cpu")) == ""


def test_a_library_that_does_not_load_is_explained(monkeypatch, tmp_path):
    (tmp_path / "_cpu.so").write_bytes(b"not an object file")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_cpu.so")
    native.library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"(?s)built for PyTorch .*no-build-isolation.*POTSTILL_BACKEND"):
            native.library()
    finally:
        native.library.cache_clear()


def test_ninja_file_compiles_the_loops_once_a_level(tmp_path):
    (tmp_path / "build.ninja").write_text(FLAGS.cpu_ninja_file(tmp_path / "_cpu.so", "c++"))
    dry = subprocess.run(["ninja", "-C", str(tmp_path), "-n", "-v"], capture_output=True, text=True, check=True).stdout
    for name in ("adam_ema", "conv", "norm_silu"):
        assert dry.count(f"{name}_loops.cpp") == len(FLAGS.LEVELS)
        assert dry.count(f"{name}_cpu.cpp") == 1
    assert dry.count("_cpu.so") == 1


LOOPS = {"adam_ema_loops": "potstill::adam::LEVEL", "conv_loops": "potstill::conv::LEVEL", "norm_silu_loops": "potstill::LEVEL"}


@pytest.mark.skipif(shutil.which("c++") is None or shutil.which("nm") is None, reason="needs a C++ compiler and nm")
@pytest.mark.parametrize("level", FLAGS.LEVELS)
@pytest.mark.parametrize(("loops", "table"), LOOPS.items(), ids=LOOPS)
def test_loops_compile_without_warnings_and_share_nothing_with_the_linker(loops, table, level, tmp_path):
    """What the linker could merge with code for older processors would crash on them."""
    text = FLAGS.cpu_ninja_file(tmp_path / "_cpu.so", "c++ -Werror")
    (tmp_path / "build.ninja").write_text(text)
    done = subprocess.run(["ninja", "-C", str(tmp_path), f"{loops}_{level}.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    names = subprocess.run(["nm", "-C", str(tmp_path / f"{loops}_{level}.o")], capture_output=True, text=True, check=True).stdout
    visible = [line.split(maxsplit=2)[1:] for line in names.splitlines() if line.split()[-2] in "TDBWVRu"]
    assert visible in ([["D", f"{table}_{level}"]], [["R", f"{table}_{level}"]])
