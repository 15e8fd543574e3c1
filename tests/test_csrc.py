"""The CUDA C++ of csrc/, without a GPU: run as C++ with a coroutine for each CUDA thread, and compiled by nvcc.

What runs here are the kernels as they are written, launches, template choice and PyTorch's registration included; what does
not are races between blocks, of which there are none to run, and the hardware's own arithmetic.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_kernels_adam_ema as adam
import test_kernels_norm_silu as norm
import torch

from kernels import Estimate, _score_cuda, adam_ema, aot, cuda, norm_silu, reference

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
    monkeypatch.setattr(norm.module, "INTERPRET", True)  # or a CPU takes other ways
    monkeypatch.setattr(norm.module, "_forward_op", norm.module._cuda_forward)
    monkeypatch.setattr(norm.module, "_backward_op", norm.module._cuda_backward)


WIDE = norm.Case(1, 128, 32, 32, 32, extras=("add",))  # a slab kept in shared memory, 16-byte accesses throughout
LARGE = norm.Case(1, 64, 64, 64, 4, extras=("scale", "shift"))  # one that is read twice


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*norm.CASES.values(), WIDE, LARGE], ids=[*norm.CASES, "wide", "large"])
def test_norm_silu_is_no_worse_than_pytorch(case, dtype, on_cpu):
    norm.check(case, dtype)


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
        assert all(torch.equal(forward[k], backward[k]) for k in forward)


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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adam_ema_shadows(dtype, on_cpu):
    adam.test_shadows_are_the_parameters_rounded_to_nearest(dtype)


MATCH = (1e-6,)  # eps
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
    value, _, saved, _ = forward(x, real, fake, *options, needs)
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
@pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
def test_score_match_is_no_worse_than_pytorch(make, on_cpu):
    given = make()
    exact, (exact_dx, *_) = expected_score(reference.score_match, given)
    plain, (plain_dx, *_) = expected_score(reference.score_match, given, torch.float32)
    x, real, fake = given
    value, nonfinite, saved, _ = _score_cuda.match_forward(x, real, fake, *MATCH, [True])
    (dx,) = _score_cuda.match_backward(saved, torch.linspace(-1, 2, len(x)), x, real, fake, *MATCH, [True])
    assert nonfinite == 0
    assert_no_worse([value, dx], [exact, exact_dx], [plain, plain_dx])


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
        assert forward(*given, *options, [True] * 7)[1] == 1
        assert value[1] == 0
        assert value.isfinite().all()
        assert all(g.isfinite().all() and g[1].eq(0).all() and g[0].ne(0).any() for g in grads)


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
    for name in ("csrc", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_text((ROOT / name).read_text() if (ROOT / name).exists() else "")
    (tmp_path / "engine").mkdir()
    return tmp_path


def test_a_source_distribution_can_build_itself(checkout):
    command = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True, env=os.environ | {"POTSTILL_NO_CPU": "1"})
    (archive,) = (checkout / "dist").iterdir()
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert names >= {f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir() if file.is_file()}


def test_setup_says_once_what_is_missing_and_builds_pure_python(checkout):
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", "built"]
    done = subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, check=True,
        env=os.environ | {"POTSTILL_NO_CUDA": "1", "POTSTILL_NO_CPU": "1"},
    )  # fmt: skip
    assert done.stderr.count("kernels._cuda is not compiled, POTSTILL_NO_CUDA=1; the kernels run as Triton.") == 1
    assert done.stderr.count("kernels._cpu is not compiled, POTSTILL_NO_CPU=1; norm_silu on CPUs runs as PyTorch's own") == 1
    assert (checkout / "built/lib/kernels/norm_silu.py").exists()
    assert not list(checkout.rglob("*.so"))


def test_ninja_file_compiles_every_source_and_links_them(tmp_path):
    text = FLAGS.cuda_ninja_file(tmp_path / "_cuda.so", archs=[80, 90])
    (tmp_path / "build.ninja").write_text(text)
    dry = subprocess.run(["ninja", "-C", str(tmp_path), "-n", "-v"], capture_output=True, text=True, check=True).stdout
    assert all(dry.count(str(source)) == 1 for source in SOURCES)
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
    with pytest.raises(RuntimeError, match=r"_cuda.so .*pip install -e . --no-build-isolation"):
        cuda.set_backend("cuda")
    assert cuda.backend() == "reference"
    monkeypatch.setattr(cuda, "_backend", None)
    monkeypatch.setenv("POTSTILL_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="got none"):
        cuda.backend()


def test_auto_takes_cuda_only_where_measured_faster_and_built(monkeypatch):
    monkeypatch.setattr(cuda, "_backend", "auto")
    monkeypatch.setattr(cuda, "FASTER_IN_CUDA", frozenset({"norm_silu"}))
    for there in (True, False):
        monkeypatch.setattr(cuda, "built", lambda there=there: there)
        assert cuda.chosen("norm_silu") == ("cuda" if there else "triton")
        assert cuda.chosen("score_match") == "triton"
