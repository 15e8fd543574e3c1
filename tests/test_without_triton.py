"""Without Triton, as on macOS and Windows: CPU tensors have everything, a CUDA tensor gets one sentence.

`HIDDEN` makes `import triton` fail as it does where the package is not installed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import Drawn
from places import IN_CUDA
from test_kernels_captured import CASE, OPS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from potstill import kernels
from potstill.engine.common.errors import UserError
from potstill.engine.common.packages import installed
from potstill.engine.models import opening as source
from potstill.engine.training import compile as switch
from potstill.kernels import compat, cuda, reference
from potstill.kernels._triton import NO_TRITON

ROOT = Path(__file__).parent.parent
HIDDEN = "import sys; sys.modules['triton'] = None\n"
SENTENCE = "want triton >= 3.6, got none: pip install triton, or set POTSTILL_BACKEND=reference"


def interpreter(code: str, *arguments: object, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [*([path] if path else []), ROOT, ROOT / "tests"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True)


def printed(code: str, *arguments: object, **environment: str) -> str:
    done = interpreter(code, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


IMPORTS = """
from importlib import import_module
from pathlib import Path

for file in sorted([*Path("kernels").glob("*.py"), *Path("engine").glob("**/*.py")]):
    if "standalone" not in file.parts:  # which is for diffusers to import
        import_module("potstill." + ".".join(file.with_suffix("").parts).removesuffix(".__init__"))
print([name for name, module in sys.modules.items() if name.split(".")[0] == "triton" and module])
"""


def test_the_ops_that_cuda_serves_are_those_of_csrc():
    assert cuda.AUTO.keys() == IN_CUDA


def test_everything_is_imported_and_nothing_of_triton():
    assert printed(HIDDEN + IMPORTS) == "[]"


@pytest.mark.skipif(not installed("diffusers"), reason="diffusers is not installed: pip install 'potstill[diffusers]'")
def test_diffusers_is_imported_from_a_checkout():
    """transformers asks any package named `kernels` for its version, ours too, and so imports it."""
    code = "import peft, diffusers; from diffusers import StableDiffusionPipeline as P; print(P.__name__, sys.modules['kernels'].__name__)"
    assert printed(HIDDEN + code) == "StableDiffusionPipeline potstill.kernels"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("import triton._C.libtriton", "ModuleNotFoundError: No module named 'triton._C'"),
        ("raise ImportError('libcuda.so.1: cannot open')", "ImportError: libcuda.so.1: cannot open"),
        ("", "ModuleNotFoundError: No module named 'triton.language'"),
    ],
)
def test_a_broken_triton_is_not_taken_for_a_missing_one(text, error, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text(text)
    done = interpreter("import potstill.kernels", path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == error


def numbers() -> list[torch.Tensor]:
    """Values and gradients of every public op and what AdamEMA makes of parameters, on CPU tensors."""
    found = [t for op in OPS.values() for t in op(Drawn(CASE))]
    torch.manual_seed(0)
    p = torch.randn(33).requires_grad_()
    ema, shadow = p.detach().clone(), p.detach().bfloat16()
    optimizer = kernels.AdamEMA([p], ema=[ema], ema_decay=0.9, shadow=[shadow])
    for _ in range(3):
        p.grad = torch.randn(33)
        optimizer.step()
    return [*found, p.detach(), ema, shadow]


def test_losses_and_gradients_are_those_with_triton(tmp_path):
    code = "import torch\nfrom test_without_triton import numbers\ntorch.save(numbers(), sys.argv[1])"
    printed(HIDDEN + code, tmp_path / "numbers.pt", TRITON_INTERPRET="0")
    theirs, ours = torch.load(tmp_path / "numbers.pt"), numbers()
    assert len(ours) > 25 and len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


#: What CUDA tensors take is what CPU tensors take after this, and no short way round it.
EXCHANGED = """
import contextlib, torch
impl = torch.library.impl
torch.library.impl = lambda op, where, function: impl(op, {"CUDA": "CPU", "CPU": "CUDA"}[where], function)
torch.cuda.device = lambda device: contextlib.nullcontext()
import potstill.kernels, potstill.kernels.compat
torch.library.impl = impl
for name in ("_loss", "norm_silu", "adam_ema"):
    sys.modules[f"potstill.kernels.{name}"].INTERPRET = True
"""
LAUNCHES = """
from test_without_triton import CASE, OPS, SENTENCE, Drawn, compat, kernels, pytest

p = torch.zeros(3, requires_grad=True)
p.grad = torch.zeros(3)
image = torch.ones(2, 3, 4, 4)
others = {
    "AdamEMA": lambda d: kernels.AdamEMA([p]).step(),
    "compat": lambda d: compat.variational_score_distillation_loss(image, image, image),
}
for name, op in (OPS | others).items():
    with pytest.raises(RuntimeError) as caught:
        op(Drawn(CASE))
    assert SENTENCE in str(caught.value) and "\\n" not in str(caught.value), name
    print(name)
"""


def test_a_launch_on_cuda_tensors_is_one_sentence():
    """The functions that are registered for CUDA, called with CPU tensors."""
    assert printed(HIDDEN + EXCHANGED + LAUNCHES).split() == [*OPS, "AdamEMA", "compat"]


CHOICES = """
from potstill.kernels import cuda
for there in (False, True):
    cuda.built = lambda: there
    print(*(f"{op}:{cuda.chosen(op)}:{cuda.lacking(op) is None}" for op in ("norm_silu", "denoise")))
cuda.set_backend("reference")
print(cuda.chosen("denoise"), cuda.lacking("denoise"))
try:
    cuda.set_backend("triton")
except RuntimeError as error:
    print(error)
"""


def test_what_csrc_has_runs_as_cuda_where_it_is_built():
    without, built, reference, refused = printed(HIDDEN + CHOICES, POTSTILL_BACKEND="auto").splitlines()
    assert without == "norm_silu:triton:False denoise:triton:False"
    assert built == "norm_silu:cuda:True denoise:triton:False"
    assert reference == "reference None"
    assert refused == NO_TRITON


class Seen(TorchDispatchMode):
    """Ops of ours that were called."""

    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "potstill":
            self.ops.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def calls() -> list[str]:
    """The ops of ours that forward passes on CUDA tensors call, which hold no numbers here."""
    with torch.no_grad(), FakeTensorMode(), Seen() as seen:
        x, row = torch.empty(2, 3, 8, 8, device="cuda"), torch.empty(2, device="cuda")
        e = kernels.Estimate(x, x, row, row)
        kernels.score_match(x, e, e), kernels.score_implicit(x, e, e), kernels.denoise(e, x), kernels.moments(x, e, e)
        kernels.trajectory(x, e, row, row, x), kernels.generator_adversarial([x]), kernels.discriminator_adversarial([x], [x])
        kernels.add_noise(x, row, x)
        compat.variational_score_distillation_loss(x, x, x, row)
    return sorted(seen.ops)


def test_the_backend_reference_takes_no_kernel_for_cuda_tensors(monkeypatch):
    """All but norm_silu, whose op asks for the backend itself. Of the definitions only who calls them can run without a GPU."""
    assert len(calls()) == 7
    monkeypatch.setattr(reference, "_losses", lambda *_: kernels.Losses(torch.empty(2), torch.empty(())))
    monkeypatch.setattr(reference, "euler", lambda x, *_: x)
    monkeypatch.setattr(cuda, "_backend", "reference")
    assert calls() == []


def test_commands_on_a_gpu_are_refused_before_they_begin(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "_backend", "auto")
    monkeypatch.setattr(cuda, "INSTALLED", True)
    monkeypatch.setattr(switch, "INSTALLED", True)
    assert source.device_named("auto") == source.device_named("cuda") == torch.device("cuda")
    switch.check_compile("blocks", torch.device("cuda"), "train.compile")
    monkeypatch.setattr(cuda, "INSTALLED", False)
    monkeypatch.setattr(switch, "INSTALLED", False)
    for name in ("auto", "cuda"):
        with pytest.raises(UserError, match=f"device={name}: kernels on CUDA tensors {SENTENCE}"):
            source.device_named(name)
    assert source.device_named("cpu") == torch.device("cpu")
    monkeypatch.setattr(cuda, "_backend", "reference")
    assert source.device_named("auto") == torch.device("cuda")
    with pytest.raises(UserError, match=r"^train\.compile=blocks on CUDA wants triton >= 3\.6, got none"):
        switch.check_compile("blocks", torch.device("cuda"), "train.compile")


def test_compiling_ahead_and_interpreting_say_what_they_want():
    main = "import runpy\nsys.argv = ['aot']\nrunpy.run_module('potstill.kernels.aot', run_name='__main__')"
    done = interpreter(HIDDEN + main)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: kernels.aot wants triton >= 3.6")
    done = interpreter(HIDDEN + "import potstill.kernels", TRITON_INTERPRET="1")
    assert done.stderr.splitlines()[-1].startswith("ImportError: TRITON_INTERPRET=1 wants triton >= 3.6, got none")
