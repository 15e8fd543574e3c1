"""The CUDA C++ of csrc/, without a GPU: run as C++ with a coroutine for each CUDA thread, and compiled by nvcc.

What runs here are the kernels as they are written, launches, template choice and PyTorch's registration included; what does
not are races between blocks, of which there are none to run, and the hardware's own arithmetic.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import test_kernels_adam_ema as adam
import test_kernels_norm_dropout as norm_dropout
import test_kernels_norm_silu as norm
import torch

from benches.rehearse import Tape
from potstill.kernels import Estimate, _score_cuda, adam_ema, aot, cuda, norm_silu, reference

ROOT = Path(__file__).parent.parent
CPU_HEADER = ROOT / "tests" / "cuda_on_cpu.h"
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
BUILT = ROOT / "build" / "tests"  # kept between runs, by content
FLAGS = aot._build_flags()

WIDE_ACCESSES = (r"LDG?\.E\.128", r"STG?\.E\.128")  # addresses out of a table are generic: LD, not LDG

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def digest(*more: str) -> str:
    text = b"".join(f.read_bytes() for f in [*sorted((ROOT / "csrc").glob("*")), CPU_HEADER] if f.is_file())
    return hashlib.sha256(text + "".join(more).encode()).hexdigest()[:16]


def make_room(outdated: str) -> None:
    BUILT.mkdir(parents=True, exist_ok=True)
    for file in BUILT.glob(outdated):
        file.unlink()


def compile_for_cpu(source: Path, folder: Path) -> Path:
    headers = ["-isystem", str(FLAGS.torch_folder() / "include"), "-include", str(CPU_HEADER)]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-cast-function-type"]
    command = ["g++", "-std=c++20", "-O1", "-fPIC", FLAGS.TARGET_VERSION, *warnings, *headers, "-x", "c++", "-c"]
    subprocess.run([*command, str(source), "-o", str(folder / f"{source.stem}.o")], check=True)
    return folder / f"{source.stem}.o"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """torch.ops.potstill_cuda, for CPU tensors."""
    library = BUILT / f"csrc-{digest(torch.__version__)}.so"
    if not library.exists():
        folder = tmp_path_factory.mktemp("csrc")
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: compile_for_cpu(source, folder), SOURCES))
        make_room("csrc-*.so")
        libraries = [f"-L{FLAGS.torch_folder() / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(folder / "a.so"), *libraries], check=True)
        os.replace(shutil.copy(folder / "a.so", BUILT / f"{os.getpid()}.so"), library)
    torch.ops.load_library(str(library))
    return torch.ops.potstill_cuda


@pytest.fixture
def on_cpu(compiled, monkeypatch):
    """Every op with a CUDA C++ version takes it, for CPU tensors."""
    monkeypatch.setattr(cuda, "library", lambda: compiled)
    monkeypatch.setattr(cuda, "chosen", lambda op: "cuda")
    monkeypatch.setattr(adam_ema, "INTERPRET", True)
    monkeypatch.setattr(norm.module, "uses_reference", lambda op, x: False)
    monkeypatch.setattr(norm.module, "forward_op", partial(norm.module._compiled_forward, cuda))
    monkeypatch.setattr(norm.module, "backward_op", norm.module._cuda_backward)


WIDE = norm.Case(1, 128, 32, 32, 32, extras=("add",))  # a slab kept in shared memory, 16-byte accesses throughout
LARGE = norm.Case(1, 64, 64, 64, 4, extras=("scale", "shift"))  # one that is read twice


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*norm.CASES.values(), WIDE, LARGE], ids=[*norm.CASES, "wide", "large"])
def test_norm_silu_is_no_worse_than_pytorch(case, dtype, on_cpu):
    norm.check(case, dtype)


@needs_compiler
@pytest.mark.parametrize("dropout", [0.13, 0.0])
@pytest.mark.parametrize("name", norm_dropout.CHECKED)
def test_norm_silu_in_a_blocks_backward(name, dropout, on_cpu):
    norm_dropout.check_block(name, dropout, norm.module.forward_op, norm.module.backward_op)


@needs_compiler
def test_norm_silu_parameters_of_another_dtype_and_off_the_grid(on_cpu):
    norm.test_parameters_may_be_float32_beside_16_bit_images()
    case = norm.CASES["digits"]
    x, g, given = norm.inputs(case)
    shifted = torch.empty(x.numel() + 1)[1:].view(2, 8, 8, 32).permute(0, 3, 1, 2).copy_(x)
    assert shifted.data_ptr() % 16
    expected = norm.outputs(norm_silu, case, x, g, given)["y"]
    ours = norm_silu(shifted, given["weight"], given["bias"], case.groups, 1e-5)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_the_order_of_threads_does_not_matter(on_cpu, monkeypatch):
    """A missing barrier would show: the threads of a block run in one order, then in the opposite one."""
    results = []
    for reverse in (False, True):
        if reverse:
            monkeypatch.setenv("CUDA_ON_CPU_REVERSED", "1")
        torch.manual_seed(0)
        results.append([norm.outputs(norm_silu, case, *norm.inputs(case)) for case in (WIDE, LARGE)])
        value, grads = score(_score_cuda.implicit_forward, _score_cuda.implicit_backward, IMPLICIT, guided())
        results[-1].append({"value": value} | {str(i): g for i, g in enumerate(grads)})
    for forward, backward in zip(*results, strict=True):
        torch.testing.assert_close(forward, backward, rtol=0, atol=0)


ADAM = [
    adam.test_ema_follows_moving_parameters_as_a_lerp_after_each_step,
    adam.test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_and_is_counted,
    adam.test_gradients_are_divided_by_grad_scale,
    adam.test_parameter_groups_have_their_own_options_and_share_one_verdict,
    adam.test_a_parameter_without_gradient_rests_and_its_ema_still_follows,
    adam.test_tensors_off_the_16_byte_grid,
    adam.test_nonfinite_ignore_lets_them_through,
]


@needs_compiler
@pytest.mark.parametrize(("kind", "options"), adam.KINDS)
def test_every_step_is_adams(kind, options, on_cpu):
    adam.test_every_step_is_adams(kind, options, torch.float32)


@needs_compiler
@pytest.mark.parametrize("test", ADAM, ids=lambda test: test.__name__.removeprefix("test_"))
def test_adam_ema(test, on_cpu):
    test()


@needs_compiler
def test_a_taped_step_of_adam_ema_finds_rates_given_later(on_cpu):
    """As a CUDA graph would: whatever way they are given, also to a tensor that was not there at the capture."""
    weight, twin = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    weight.grad, twin.grad, ema = torch.full((5,), 0.5), torch.full((5,), 0.5), torch.zeros(5)
    ours, theirs = adam.AdamEMA([weight], lr=0.1, ema=[ema]), torch.optim.Adam([twin], lr=0.1)
    (group,), (reference,) = ours.param_groups, theirs.param_groups
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, theirs)]
    ours.step()
    theirs.step()
    with Tape() as tape:
        ours.step()
    theirs.step()
    for k, rate in enumerate((0.3, torch.tensor(0.2), torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.4]), 1)):
        group["lr"], reference["lr"], group["ema_decay"] = rate, float(rate), k / 8
        for scheduler in schedulers:
            scheduler.step()
        last = ema.clone()
        tape.replay()
        theirs.step()
        torch.testing.assert_close(weight, twin, rtol=0, atol=1e-6)
        torch.testing.assert_close(ema, last.lerp(twin.detach(), 1 - k / 8))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adam_ema_shadows(dtype, on_cpu):
    adam.test_shadows_are_the_parameters_rounded_to_nearest(dtype)


MATCH = (None, 1e-6, 0.0)  # weight, eps, plus
IMPLICIT = (None, "huber", 1.0, 0.03, "")  # weight, distance, alpha, c, detach


def estimate(n, d, dtype=torch.float32, x_t=True, uncond=False):
    images = [torch.randn(n, d) for _ in range(3)]
    return Estimate(
        images[0].to(dtype), images[1] if x_t else None, torch.rand(n) + 0.2, torch.rand(n) + 0.2,
        images[2].to(dtype) if uncond else None, 2.5 if uncond else 1.0,
    )  # fmt: skip


def guided(n=3, d=3 * 64, dtype=torch.float32):
    return torch.randn(n, d), estimate(n, d, dtype, uncond=True), estimate(n, d, dtype, x_t=False)


def score(forward, backward, options, given):
    """The values of a loss and the gradients to its images, by csrc."""
    x, real, fake = given
    images = [x, *real.images, *fake.images]
    needs = [t is not None for t in images]
    value, _, *saved = forward(x, real, fake, *options)
    grads = backward(saved, torch.linspace(-1, 2, len(x)), x, real, fake, *options, needs)
    return value, grads


def expected_score(loss, given, dtype=torch.float64, **options):
    """Values and gradients of the definition, in this dtype."""
    x, real, fake = given

    def leaf(t):
        return None if t is None else t.detach().to(dtype).requires_grad_()

    def leaves(e):
        return Estimate(leaf(e.raw), leaf(e.x_t), e.c_skip.to(dtype), e.c_out.to(dtype), leaf(e.raw_uncond), e.guidance)

    x, real, fake = leaf(x), leaves(real), leaves(fake)
    images = [t for t in (x, *real.images, *fake.images) if t is not None]
    value = loss(x, real, fake if fake.x_t is not None else fake._replace(x_t=real.x_t), **options).value
    grads = torch.autograd.grad(value, images, torch.linspace(-1, 2, len(x), dtype=dtype), allow_unused=True)
    return value.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(images, grads, strict=True)]


SCORES = {
    "vectors": lambda: guided(),
    "16-bit": lambda: guided(dtype=torch.bfloat16),
    "half": lambda: guided(dtype=torch.float16),
    "odd": lambda: guided(d=77),
    "one sample in parts": lambda: (torch.randn(1, 12288), estimate(1, 12288), estimate(1, 12288)),
    "own x_t": lambda: (torch.randn(2, 96), estimate(2, 96), estimate(2, 96, uncond=True)),
}


def assert_no_worse(ours, exact, plain):
    for a, e, p in zip(ours, exact, plain, strict=True):
        allowed = 2 * (p.double() - e).abs().max() + 1e-6 * max(1.0, e.abs().max())
        assert (a.double() - e).abs().max() <= allowed


@needs_compiler
@pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 1.2, "distance": "l2"}, {"detach": "normaliser"}, {"detach": "factor"}, {"weight": True}],
    ids=["huber", "l2", "normaliser", "factor", "weight"],
)
def test_score_implicit_is_no_worse_than_pytorch(make, options, on_cpu):
    given = make()
    options = {**options, "weight": torch.rand(len(given[0]))} if "weight" in options else dict(options)
    exact, exact_grads = expected_score(reference.score_implicit, given, **options)
    plain, plain_grads = expected_score(reference.score_implicit, given, torch.float32, **options)
    full = {"weight": None, "distance": "huber", "alpha": 1.0, "c": 0.03, "detach": ""} | options
    value, grads = score(_score_cuda.implicit_forward, _score_cuda.implicit_backward, tuple(full.values()), given)
    for g, t in zip(grads, [t for t in [given[0], *given[1].images, *given[2].images] if t is not None], strict=True):
        assert g.dtype == t.dtype
    plain_grads = [p.to(g.dtype) for p, g in zip(plain_grads, grads, strict=True)]
    assert_no_worse([value, *grads], [exact, *exact_grads], [plain, *plain_grads])


@needs_compiler
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
def test_score_match_is_no_worse_than_pytorch(make, weighed, on_cpu):
    given = make()
    options = {"weight": torch.rand(len(given[0])), "eps": 1e-6, "plus": 0.5} if weighed else {}
    exact, (exact_dx, *_) = expected_score(reference.score_match, given, **options)
    plain, (plain_dx, *_) = expected_score(reference.score_match, given, torch.float32, **options)
    x, real, fake = given
    value, nonfinite, *saved = _score_cuda.match_forward(x, real, fake, *(options.values() or MATCH))
    (dx,) = _score_cuda.match_backward(saved, torch.linspace(-1, 2, len(x)), x, real, fake, *MATCH, [True])
    assert nonfinite == 0
    assert_no_worse([value, dx], [exact, exact_dx], [plain, plain_dx])


SPOILED = {
    f"{side}.{name}": (side, name) for side, names in (("real", Estimate._fields[:5]), ("fake", ("raw", "c_skip", "c_out"))) for name in names
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("distance", ["huber", "l2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("side", "name"), SPOILED.values(), ids=SPOILED)
def test_a_sample_left_out_has_no_gradient_whatever_of_it_is_not_finite(side, name, bad, distance, on_cpu):
    """A coefficient times 0 is no zero where the coefficient is NaN: x_t once got that."""
    x, real, fake = guided()
    spoiled = (real if side == "real" else fake)._asdict()[name]
    spoiled[(1,) + (0,) * (spoiled.ndim - 1)] = bad
    options = (None, distance, 1.2, 0.03, "")
    value, grads = score(_score_cuda.implicit_forward, _score_cuda.implicit_backward, options, (x, real, fake))
    assert value[1] == 0
    for grad in grads:
        torch.testing.assert_close(grad[1], torch.zeros_like(grad[1]), rtol=0, atol=0)
        assert grad[[0, 2]].isfinite().all()
        assert grad[[0, 2]].any()


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_count_for_nothing(bad, on_cpu):
    given = guided()
    given[1].raw[1, 5] = bad
    for forward, backward, options in [
        (_score_cuda.match_forward, _score_cuda.match_backward, MATCH),
        (_score_cuda.implicit_forward, _score_cuda.implicit_backward, IMPLICIT),
    ]:
        value, grads = score(forward, backward, options, given)
        assert forward(*given, *options)[1] == 1
        assert value[1] == 0
        assert value.isfinite().all()
        for g in grads:
            assert g.isfinite().all() and g[0].ne(0).any()
            torch.testing.assert_close(g[1], torch.zeros_like(g[1]), rtol=0, atol=0)


@needs_nvcc
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_nvcc_compiles_it_without_spills_and_with_16_byte_accesses(source, arch, tmp_path):
    kept = BUILT / f"{source.stem}-sm_{arch}-{digest(*WIDE_ACCESSES)}.txt"
    if not kept.exists():
        report = aot.nvcc(source, arch, tmp_path / "a.cubin")
        command = [aot.tool("cuobjdump"), "-sass", str(tmp_path / "a.cubin")]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        wide = [f"{kind}: {len(re.findall(kind, sass))}" for kind in WIDE_ACCESSES]
        make_room(f"{source.stem}-sm_{arch}-*")
        kept.write_text("\n".join([*wide, report]))
    loads, stores, report = kept.read_text().split("\n", 2)
    usages = aot.parse_ptxas(report, arch, source.name)
    assert usages
    assert [u for u in usages if u.problem] == []
    assert not loads.endswith(": 0")
    assert not stores.endswith(": 0")


@pytest.fixture
def checkout(tmp_path):
    """What setup.py needs of this one."""
    for name in ("csrc", "kernels", "potstill"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_text((ROOT / name).read_text() if (ROOT / name).exists() else "")
    for name, file in (
        ("engine", "__init__.py"),
        ("engine/measure", "report.html"),
        ("configs", "digits.yaml"),
        ("tests", "test_nothing.py"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    return tmp_path


def test_a_source_distribution_can_build_itself(checkout):
    command = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True, env=os.environ | {"POTSTILL_NO_CPU": "1"})
    (archive,) = (checkout / "dist").iterdir()
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert names >= {f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir() if file.is_file()}
    assert names >= {"potstill/__init__.py", "potstill/kernels/norm_silu.py", "potstill/engine/__init__.py", "potstill/configs/digits.yaml"}
    assert {name.partition("/")[0] for name in names} & {"kernels", "engine", "configs", "tests"} == set()


def test_setup_says_once_what_is_missing_and_builds_pure_python(checkout):
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", "built"]
    done = subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, check=True,
        env=os.environ | {"POTSTILL_NO_CUDA": "1", "POTSTILL_NO_CPU": "1"},
    )  # fmt: skip
    assert done.stderr.count("potstill.kernels._cuda is not compiled, POTSTILL_NO_CUDA=1; the kernels run as Triton.") == 1
    assert (
        done.stderr.count(
            "potstill.kernels._cpu is not compiled, POTSTILL_NO_CPU=1; norms, 3x3 convolutions and AdamEMA on CPUs run as PyTorch's own"
        )
        == 1
    )
    assert (checkout / "built/lib/potstill/kernels/norm_silu.py").exists()
    assert not list(checkout.rglob("*.so"))


COMPILER = """#!/bin/sh
# A compiler that fails where $FAILS is among its arguments, and else writes an object that says "built".
said="$*"
while [ $# -gt 0 ]; do case "$1" in -o) output="$2";; -MF) echo x: > "$2";; esac; shift; done
case "$said" in *"$FAILS"*) echo "a.h(1): warning: never mind"; echo "a.h(2): error: no such luck" >&2; exit 2;; esac
echo built > "$output"
"""


@pytest.fixture
def build(checkout):
    """Runs setup.py with an nvcc, a C++ compiler and a PyTorch with CUDA that are not real. `fails`: with what they fail."""
    for tool in ("nvcc", "c++"):
        (checkout / "tools" / tool).parent.mkdir(exist_ok=True)
        (checkout / "tools" / tool).write_text(COMPILER)
        (checkout / "tools" / tool).chmod(0o755)
    package = checkout / "fakes" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("class version:\n    cuda = '13.0'\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("POTSTILL") and k != "CXX"}
    path = f"{checkout / 'tools'}:{Path(shutil.which('ninja') or sys.executable).parent}:/usr/bin:/bin"

    def run(*command, fails="nothing", **environment):
        changes = {"PATH": path, "PYTHONPATH": str(checkout / "fakes"), "FAILS": fails} | environment
        arguments = [sys.executable, "setup.py", "-q", *command]
        return subprocess.run(arguments, cwd=checkout, capture_output=True, text=True, env=clean | changes)

    return run


IN_PLACE = ("editable_wheel", "--dist-dir", "wheels")  # what `pip install -e .` calls


def parts(checkout):
    """What lies beside the Python files."""
    return {file.name: file.read_text().strip() for file in (checkout / "kernels").glob("*.so")}


@pytest.mark.parametrize(
    ("fails", "left", "what"),
    [
        ("score_match.cu", {"_cpu.so": "built"}, "csrc/score_match.cu does not compile (a.h(2): error: no such luck)"),
        ("-ltorch_cuda", {"_cpu.so": "built"}, "the link fails (a.h(2): error: no such luck)"),
        ("norm_silu_loops_any", {"_cuda.so": "built"}, "csrc/norm_silu_loops.cpp does not compile (a.h(2): error: no such luck)"),
    ],
)
def test_what_does_not_compile_is_said_once_and_an_earlier_one_goes(fails, left, what, build, checkout):
    for name in ("_cpu.so", "_cuda.so"):
        (checkout / "kernels" / name).write_text("earlier")
    done = build(*IN_PLACE, fails=fails)
    assert done.returncode == 0
    name, instead, advice = (
        ("_cuda", "the kernels run as Triton", "POTSTILL_CUDA=1 makes this an error, POTSTILL_NO_CUDA=1 leaves it out")
        if "_cpu.so" in left
        else ("_cpu", "norms, 3x3 convolutions and AdamEMA on CPUs run as PyTorch's own operations", "POTSTILL_NO_CPU=1 leaves it out")
    )
    sentences = [line for line in done.stderr.splitlines() if line.startswith("potstill:")]
    assert sentences == [f"potstill: potstill.kernels.{name} is not compiled, {what}; {instead} ({advice})."]
    assert "a.h(1): warning" in done.stdout
    assert parts(checkout) == left
    assert len(list((checkout / "wheels").glob("*.whl"))) == 1


@pytest.mark.parametrize(("fails", "what"), [("score_match.cu", "csrc/score_match.cu does not"), ("-ltorch_cuda", "the link")])
def test_potstill_cuda_makes_a_failed_compilation_an_error(fails, what, build, checkout):
    (checkout / "kernels" / "_cuda.so").write_text("earlier")
    done = build(*IN_PLACE, fails=fails, POTSTILL_CUDA="1", POTSTILL_NO_CPU="1")
    assert done.returncode == 1
    assert f"potstill: POTSTILL_CUDA=1 wants potstill.kernels._cuda compiled, but {what}" in done.stderr
    assert "Traceback" not in done.stderr
    assert parts(checkout) == {"_cuda.so": "earlier"}  # nothing was installed


def test_without_a_compiler_an_earlier_part_goes_and_potstill_cuda_is_an_error(build, checkout):
    (checkout / "kernels" / "_cuda.so").write_text("earlier")
    (checkout / "tools" / "nvcc").unlink()
    nowhere = {"PATH": str(checkout / "tools"), "POTSTILL_NO_CPU": "1"}
    done = build(*IN_PLACE, **nowhere, POTSTILL_CUDA="1")
    assert done.returncode == 1
    assert "POTSTILL_CUDA=1 wants potstill.kernels._cuda compiled, but no nvcc on PATH: nothing is installed." in done.stderr
    assert parts(checkout) == {"_cuda.so": "earlier"}
    assert build(*IN_PLACE, **nowhere).returncode == 0
    assert parts(checkout) == {}


def test_a_wheel_holds_what_compiled_now_and_the_checkout_keeps_its_own(build, checkout):
    (checkout / "kernels" / "_cuda.so").write_text("earlier")
    for fails, held in (("nothing", {"_cpu.so", "_cuda.so"}), ("-ltorch_cuda", {"_cpu.so"})):
        assert build("bdist_wheel", "--dist-dir", fails, fails=fails).returncode == 0
        (wheel,) = (checkout / fails).iterdir()
        assert {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")} == held
        (checkout / "csrc" / "common.cuh").touch()
        shutil.rmtree(checkout / "build" / next(f.name for f in (checkout / "build").iterdir() if f.name.startswith("temp")))
    assert parts(checkout) == {"_cuda.so": "earlier"}


def test_a_wheel_is_one_package_whatever_an_earlier_build_left(build, checkout):
    """Wheels of before had `kernels` and `engine` at their top; setuptools packs the whole build folder."""
    (checkout / "elsewhere" / "kernels").mkdir(parents=True)
    for left in ("kernels/old.py", "engine/old.py", "potstill/kernels/old.py", "potstill/kernels/_cuda.so"):
        (checkout / "elsewhere" / left).parent.mkdir(parents=True, exist_ok=True)
        (checkout / "elsewhere" / left).touch()
    (checkout / "tools" / "nvcc").unlink()
    assert build("build", "--build-lib", "elsewhere", "bdist_wheel", "--dist-dir", "wheels", PATH=str(checkout / "tools")).returncode == 0
    (wheel,) = (checkout / "wheels").iterdir()
    names = [name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name]
    assert {name.partition("/")[0] for name in names} == {"potstill"}
    assert {"potstill/kernels/norm_silu.py", "potstill/configs/digits.yaml", "potstill/engine/measure/report.html"} <= set(names)
    assert not [name for name in names if name.endswith(("old.py", "_cuda.so"))]


def test_a_checkout_without_links_runs_and_is_not_packed(build, checkout):
    """What git makes on Windows where symbolic links are not allowed."""
    for name in ("kernels", "engine", "configs"):
        (checkout / "potstill" / name).unlink()
        (checkout / "potstill" / name).write_text(f"../{name}")
    done = build(*IN_PLACE)
    assert "potstill/kernels is a text file and no link, git has made this checkout without symbolic links" in done.stderr
    assert done.returncode == 1 and "Traceback" not in done.stderr
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]  # of an installation that would help
from kernels import score_match
import kernels.compat, potstill
assert score_match is potstill.score_match and kernels.compat is sys.modules["potstill.kernels.compat"]
print(potstill.kernels.__file__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert done.stdout.strip() == str(checkout / "kernels" / "__init__.py"), done.stderr


def test_architectures_that_are_not_numbers_are_explained(build):
    done = build(*IN_PLACE, POTSTILL_CUDA_ARCHS="8.0 9.0")
    assert done.returncode == 1
    assert 'POTSTILL_CUDA_ARCHS wants compute capabilities such as "80 90", got "8.0 9.0".' in done.stderr


def test_every_macro_of_pytorch_has_its_own_header_included():
    """Which header brings which one along changes from release to release: 2.11 has none that brings macros.h."""
    include = FLAGS.torch_folder() / "include"
    stable = [f for folder in ("torch/csrc/stable", "torch/headeronly") for f in (include / folder).rglob("*.h")]
    homes = {name: str(f.relative_to(include)) for f in stable for name in re.findall(r"^#define (\w+)\(", f.read_text(), re.M)}
    for sources in ("*.cu*", "*.cpp"):
        text = "".join(file.read_text() for file in (ROOT / "csrc").glob(sources))
        used = set(re.findall(r"\b((?:STD|STABLE|TORCH)_[A-Z_]+)\(", text))
        assert used >= {"STD_TORCH_CHECK", "STABLE_TORCH_LIBRARY_IMPL"}
        assert {homes[name] for name in used} <= set(re.findall(r"#include <(torch/.*)>", text))


@pytest.fixture
def torches(monkeypatch, tmp_path):
    """csrc/torches.py, which keeps what it fetches in an empty folder, and whose pip has only `tmp_path` to fetch from."""
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    spec = importlib.util.spec_from_file_location("torches", ROOT / "csrc" / "torches.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "KEPT", tmp_path / "kept")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return module


def test_the_versions_of_torches_are_what_the_project_says(torches):
    assert f'"torch>={torches.oldest()}"' in (ROOT / "pyproject.toml").read_text()
    assert f"\ntorch=={torches.pinned()} \\\n" in (ROOT / "constraints.txt").read_text()


@needs_compiler
@needs_nvcc
def test_torches_without_a_network_is_one_sentence(torches, capsys):
    assert torches.main(["oldest"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "wants the headers of PyTorch and has none to compile against: pip download torch==" in told[0]
    assert torches.main(["newest"]) == 2


def test_torches_keeps_the_headers_of_a_wheel_and_needs_no_second_download(torches, tmp_path):
    wheel = tmp_path / f"torch-2.12.9-cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-macosx_14_0_arm64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("torch/include/torch/a.h", "// here")
        archive.writestr("torch/lib/large.dylib", "not wanted")
        archive.writestr("torch-2.12.9.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.12.9\n")
        archive.writestr("torch-2.12.9.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("torch-2.12.9.dist-info/RECORD", "")
    folder = torches.headers("2.12.9")
    wheel.unlink()
    assert torches.headers("2.12.9") == folder
    assert (folder / "torch" / "a.h").read_text() == "// here"
    assert [file.name for file in torches.KEPT.rglob("*") if file.is_file()] == ["a.h"]


@needs_compiler
@needs_nvcc
def test_torches_fails_where_a_header_is_not_there(torches, capsys, monkeypatch):
    (torches.KEPT / "2.12.9" / "include").mkdir(parents=True)
    monkeypatch.setattr(torches.build_flags, "LEVELS", {})
    assert torches.check(["2.12.9"], processes=2) == 2 * len(SOURCES) + len(FLAGS.CPU_SOURCES)
    told = capsys.readouterr().out
    assert "FAILED torch 2.12.9 adam_ema.cu for sm_80: " in told
    assert "torch/csrc/stable/accelerator.h: No such file" in told
    assert "FAILED torch 2.12.9 norm_silu_cpu.o: " in told


def test_torches_reads_both_architectures_of_one_report(torches):
    one = """ptxas info    : Compiling entry function '_Z8a_kernelPf' for 'sm_{0}'
ptxas info    : Function properties for _Z8a_kernelPf
    {1} bytes stack frame, {1} bytes spill stores, {1} bytes spill loads
ptxas info    : Used {0} registers, used 0 barriers, 128 bytes smem
"""
    said = one.format(80, 0) + one.format(90, 16)
    (lean,), (spilling,) = (aot.parse_ptxas(torches.of_arch(said, arch), arch, "a.cu") for arch in aot.ARCHITECTURES)
    assert lean[1:] == (80, 80, 128, 0, "")
    assert spilling[1:] == (90, 90, 128, 16, "16 bytes spilled")


def test_ninja_file_compiles_every_source_and_links_them(tmp_path):
    text = FLAGS.cuda_ninja_file(tmp_path / "_cuda.so", archs=[80, 90])
    (tmp_path / "build.ninja").write_text(text)
    dry = subprocess.run(["ninja", "-C", str(tmp_path), "-n", "-v"], capture_output=True, text=True, check=True).stdout
    assert {source.name: dry.count(str(source)) for source in SOURCES} == {source.name: 1 for source in SOURCES}
    assert dry.count("-gencode=arch=compute_90,code=compute_90") == len(SOURCES)
    assert dry.count("nvcc -shared") == 1


def test_backend_is_chosen_by_name_and_a_missing_build_is_explained(monkeypatch):
    monkeypatch.setattr(cuda, "_backend", None)
    monkeypatch.setattr(cuda, "LIBRARY", Path("nowhere") / "_cuda.so")
    cuda.library.cache_clear()
    assert cuda.backend() == "auto"
    assert cuda.chosen("norm_silu") == "triton"
    cuda.set_backend("reference")
    assert cuda.chosen("norm_silu") == "reference"
    with pytest.raises(ValueError, match="one of auto, triton, cuda, reference, got 'cupy'"):
        cuda.set_backend("cupy")
    with pytest.raises(RuntimeError, match=r"_cuda.so .*pip install -e . --no-build-isolation.*POTSTILL_CUDA=1"):
        cuda.set_backend("cuda")
    assert cuda.backend() == "reference"
    monkeypatch.setattr(cuda, "_backend", None)
    monkeypatch.setenv("POTSTILL_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="got none"):
        cuda.backend()


def test_auto_takes_cuda_only_where_measured_faster_and_built(monkeypatch):
    monkeypatch.setattr(cuda, "_backend", "auto")
    monkeypatch.setitem(cuda.AUTO, "norm_silu", cuda.Choice("cuda", "benches/results/of-a-gpu"))
    for there in (True, False):
        monkeypatch.setattr(cuda, "built", lambda there=there: there)
        assert cuda.chosen("norm_silu") == ("cuda" if there else "triton")
        assert cuda.chosen("score_match") == "triton"
