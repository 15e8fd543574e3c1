"""The launchers as a GPU would see them, up to the launch: Triton binds, specialises and compiles each call for sm_90.

A stand-in for the driver says there is an H100; every kernel call then goes the way it goes there, None pointers and
named tuples included, and stops before the launch. Looks at the machine code: 128-bit accesses where shapes allow.
"""

import importlib
import os
import re

import pytest
import torch
from kernel_cases import INTERPRET

from potstill.kernels import _mp, _norm, aot, mp_weights
from potstill.kernels._aot import NoGPU
from potstill.kernels.estimate import Estimate
from potstill.kernels.score_match import difference

triton = pytest.importorskip("triton", reason="of Triton's own launches, and it is not installed")
driver, JITFunction = triton.runtime.driver, triton.JITFunction
N, D = 4, 3 * 32 * 32
LAUNCHED = []  # kernel, and how Triton specialised it


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Every kernel called, compiled and not launched: name -> PTX."""
    assert not INTERPRET and os.environ.get("TRITON_INTERPRET") != "1"
    seen, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen[self.fn.__name__.strip("_")] = kernel.asm["ptx"]
        known = {path: what for path, what in kernel.src.attrs.items() if what} | {"maxnreg": kernel.metadata.maxnreg}
        LAUNCHED.append((self, kernel.src.signature, known))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    active = driver._active
    LAUNCHED.clear()
    driver.set_active(NoGPU())
    yield seen
    driver._active = active


@pytest.fixture(scope="module")
def ahead():
    """What kernels/aot.py compiles."""
    return aot.cases()


def image(dtype=torch.float32, d=D):
    return torch.randn(N, d).to(dtype)


def estimates():
    c = [torch.rand(N) for _ in range(4)]
    raw = [image(torch.bfloat16) for _ in range(3)]
    return Estimate(raw[0], image(), c[0], c[1], raw[1], 2.0), Estimate(raw[2], None, c[2], c[3])


def launch(op, x, g):
    module, (real, fake) = importlib.import_module(f"potstill.kernels.{op}"), estimates()
    w, logits = torch.rand(N), [torch.randn(N, 64), torch.randn(N, 1)]
    args = {
        "score_match": (x, real, fake, w, 1e-6, 0.0),
        "moments": (x, real, fake, w, True),
        "score_implicit": (x, real, fake, None, "huber", 1.0, 0.03, ""),
        "denoise": (real, x, w, True),
        "trajectory": (x, fake, w, w, x, "l1", 0.03, True),
        "adversarial": (logits, 1, "softplus"),
    }[op]
    needs = {
        "score_implicit": [True] * 5 + [False] * 2,
        "denoise": [True] * 3 + [False],
        "trajectory": [False, True, False, False, False],
        "adversarial": [True, False],
    }
    _, _, *saved = module._forward(*args)
    if op in ("score_match", "moments"):
        return difference(saved, g, *args, [True])
    module._backward(saved[0] if op == "adversarial" else saved, g, *args, needs[op])


def accesses(ptx):
    return re.findall(r"(?:ld|st)\.global[\w.]*\.(?:v\d\.)?[bf]\d+", ptx)


@pytest.mark.parametrize("op", ["score_match", "moments", "score_implicit", "denoise", "trajectory"])
def test_losses(op, compiled):
    launch(op, image(), torch.ones(()).expand(N))
    assert len(compiled) == 3
    for name in compiled.keys() - {"finish_kernel"}:
        wide = [a for a in accesses(compiled[name]) if "v4.b32" in a or "v2.b64" in a]
        assert any(a.startswith("ld") for a in wide), f"{name} reads nothing 128 bits wide"
        assert any(a.startswith("st") for a in wide) or name == "partials_kernel", f"{name} writes nothing 128 bits wide"


def test_adversarial(compiled):
    launch("adversarial", image(), torch.ones(N))
    assert compiled.keys() == {"forward_kernel", "finish_kernel", "gradient_kernel"}


def test_noising(compiled):
    importlib.import_module("potstill.kernels.noising")._launch(image(), torch.rand(N), image())
    assert {"v4.b32" in a or "v2.b64" in a for a in accesses(compiled["add_noise_kernel"]) if a.startswith("st")} == {True}


@pytest.mark.parametrize("op", ["score_match", "score_implicit", "moments", "denoise", "trajectory"])
def test_even_losses_are_launched_as_they_are_compiled_ahead(op, ahead, compiled, monkeypatch):
    """Triton's own specialisation of a call on 16 CIFAR images, but for constants, is that of a case of kernels/aot.py."""
    monkeypatch.setattr(f"{__name__}.N", 16)
    launch(op, image(), torch.ones(()).expand(N))
    cases = [c for c in ahead if c.kernel in {kernel for kernel, *_ in LAUNCHED}]
    known = [(list(c.signature.values()), c.attributes | {"maxnreg": c.maxnreg}) for c in cases]
    for kernel, signature, attributes in LAUNCHED:
        if kernel.fn.__name__.strip("_") != "finish_kernel":
            assert (list(signature.values()), attributes) in known, (kernel.fn.__name__, signature, attributes)


@pytest.mark.parametrize("trained", [True, False])
def test_a_norm_of_the_networks_is_launched_as_it_is_compiled_ahead(trained, ahead, compiled, monkeypatch):
    """16 16-bit images, float32 weights, trained or frozen."""
    monkeypatch.setattr(f"{__name__}.N", 16)
    x, add = (torch.zeros(N, 256, 16, 16).bfloat16().to(memory_format=torch.channels_last), torch.zeros(N, 256).bfloat16())
    y, mean, rstd = _norm.forward(x, torch.ones(256), torch.zeros(256), None, None, add, 32, 1e-5, True, 0.0, None)
    given = torch.ones(256), torch.zeros(256), None, None, add, 32, True
    _norm.backward(y, x, mean, rstd, *given, 0.0, None, 1.0, None, 1.0, False, [trained, False, False, True], 0)
    known = [(c.signature, c.attributes | {"maxnreg": c.maxnreg}) for c in ahead if c.name.startswith("norm")]
    assert len(LAUNCHED) == 2 + trained
    for _, signature, attributes in LAUNCHED:
        assert (signature, attributes) in known, (signature, attributes)


def test_edm2s_operations_are_launched_as_they_are_compiled_ahead(ahead, compiled):
    """16 images, forward and backward, and a weight for them; every image is read and written 128 bits at a time."""
    x = torch.zeros(16, 192, 64, 64).bfloat16().to(memory_format=torch.channels_last)
    n, _, r = _mp.norm(x, 1e-4, True)
    _mp.norm_grad(x, x, n, r, 1e-4)
    drop = torch.zeros(16, 192).bfloat16(), 0.1, torch.zeros(1, dtype=torch.int64)
    _mp.silu(x, *drop)
    _mp.silu_grad(x, x, *drop, [True, True])
    _, bits = _mp.weighted_sum(x, x, 0.3, 256.0, True)
    _mp.weighted_sum_grad(x, bits, 0.3, [True, True])
    cat, _ = _mp.cat(x, x[:, :96].contiguous(memory_format=torch.channels_last), 0.5)
    _mp.cat_grad(cat, cat, cat, 0.5, 192, [True, True])
    weight = torch.zeros(192, 192, 3, 3)
    out = mp_weights._launch(weight, None, 1.0, torch.bfloat16, 1e-4)
    mp_weights._launch_grad(out, weight, None, 1.0, 1e-4, [True, False])
    mp_weights._force([weight, weight[:96]], 1e-4)
    known = [(c.signature, c.attributes) for c in ahead if c.name.startswith("mp")]
    assert len(LAUNCHED) == len(compiled) == 11
    for kernel, signature, attributes in LAUNCHED:
        assert (signature, {k: v for k, v in attributes.items() if k != "maxnreg"}) in known, (kernel.fn.__name__, signature, attributes)
    for name, ptx in compiled.items():
        narrow = [a for a in accesses(ptx) if "v4.b32" not in a]
        assert len(narrow) <= (5 if name == "force_kernel" else 2), (name, narrow)  # tables, keys, and a number a pixel or channel


@pytest.mark.parametrize("c", [128, 192])
def test_a_thread_of_a_norm_read_twice_has_four_loads_of_16_bytes_on_their_way(c, ahead):
    """In every loop over pixels, forward (four of x) and backward (two of x, two of dy), and none of any other width."""
    for direction in ("forward", "backward"):
        (case,) = [a for a in ahead if a.name.startswith(f"norm.{direction}[{c}x64x64 bf16") and "block" not in a.name]
        lines = aot.compile_case(case, 90)["ptx"].splitlines()
        labels, loops = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L")}, []
        for i, line in enumerate(lines):
            target = re.search(r"bra\S*\s+(\$L\w+);", line)
            if target and labels[target[1]] < i:
                loops.append([a for a in accesses("\n".join(lines[labels[target[1]] : i])) if a.startswith("ld")])
        assert len(loops) == 2
        assert all(len(loads) == 4 and all("v4.b32" in a for a in loads) for loads in loops), loops
