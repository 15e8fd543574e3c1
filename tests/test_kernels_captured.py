"""Every public op as training calls it on a GPU: nothing waits for the device, and a captured call reads new inputs.

AdamEMA's own file has the same of its step.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import BF16, Case, Drawn
from places import backends, on_gpu, public_ops

from benches.rehearse import REHEARSING
from potstill import kernels

CASE = Case((2, 3, 4, 4) if REHEARSING else (3, 3, 8, 8), BF16)


def losses(*names):
    """A loss as a function of the inputs drawn, and the inputs it has gradients for."""

    def wrap(f):
        def outputs(d):
            f(d)  # draws what it needs
            leaves = {name: d.tensors[name].detach().requires_grad_() for name in names}
            given, d.tensors = d.tensors, d.tensors | leaves
            found = f(d)
            d.tensors = given
            loss, *made = found if isinstance(found[0], tuple) else (found,)
            grads = torch.autograd.grad(loss.value.mean(), list(leaves.values()))
            return [loss.value.detach(), loss.nonfinite, *made, *grads]

        return outputs

    return wrap


def differentiated(f):
    """The outputs of f(x) and the gradient of their sum."""

    def outputs(d):
        x = d.image("x").detach().requires_grad_()
        found = f(d, x)
        found = list(found) if isinstance(found, tuple) else [found]
        return [*(t.detach() for t in found), *torch.autograd.grad(found, x, [torch.ones_like(t) for t in found])]

    return outputs


def norm(d, x):
    weight, bias, add = (d.image(name).flatten(1) for name in ("weight", "bias", "add"))
    return kernels.norm_silu(x, weight[0, :3], bias[0, :3], 1, 1e-5, add=add[:, :3])


def silu(d, x):
    """The key is computed on the device, so that a replay draws another mask."""
    return kernels.mp_silu(x, d.image("scale").flatten(1)[:, :3], 0.5, (d.image("key").flatten()[:1] * 2**30).to(torch.int64))


def forced(d):
    """In place, in memory that is filled anew."""
    weight = d.image("weight")
    weight.copy_(d.image("x"))
    kernels.force_weight_norm_([weight])
    return [weight.clone()]


#: public op -> what it makes of the inputs drawn
OPS = {
    "score_match": losses("x")(lambda d: kernels.score_match(d.image("x"), d.estimate("real"), d.estimate("fake"))),
    "score_implicit": losses("x", "x_t", "real", "fake")(
        lambda d: kernels.score_implicit(d.image("x"), d.estimate("real"), d.estimate("fake"))
    ),
    "denoise": losses("net", "x_t")(lambda d: kernels.denoise(d.estimate("net"), d.image("target"), d.positive("w"))),
    "moments": losses("x")(lambda d: kernels.moments(d.image("x"), d.estimate("real"), d.estimate("fake"), d.positive("w"))),
    "trajectory": losses("net")(
        lambda d: kernels.trajectory(d.image("x"), d.estimate("net", "x"), d.positive("s"), d.positive("t"), d.image("y"))
    ),
    "generator_adversarial": losses("a", "b")(lambda d: kernels.generator_adversarial([d.image("a", raw=True), d.image("b", raw=True)])),
    "discriminator_adversarial": losses("a", "b")(
        lambda d: kernels.discriminator_adversarial([d.image("a", raw=True)], [d.image("b", raw=True)])
    ),
    "add_noise": differentiated(lambda d, x: kernels.add_noise(x, d.positive("sigma"), d.image("noise"))),
    "norm_silu": differentiated(norm),
    "pixel_norm": differentiated(lambda d, x: kernels.pixel_norm(x)),
    "pixel_norm_silu": differentiated(lambda d, x: kernels.pixel_norm_silu(x)),
    "mp_silu": differentiated(silu),
    "mp_sum": differentiated(lambda d, x: kernels.mp_sum(x, d.image("y"), 0.3, 1.0)),
    "mp_cat_silu": differentiated(lambda d, x: kernels.mp_cat_silu(x, d.image("b")[:, :2], 0.4)),
    "normalized_weight": differentiated(lambda d, x: kernels.normalized_weight(x, d.image("gain").flatten()[0], BF16)),
    "force_weight_norm_": forced,
}
RUNS = [pytest.param(name, *place.values, id=f"{name}-{place.id}", marks=place.marks)
        for name in OPS for place in on_gpu(public_ops()[name])]  # fmt: skip


def refilled(d, seed):
    """New numbers where the inputs of d lie."""
    other = Drawn(CASE, d.device, seed)
    with torch.no_grad():
        for name, t in d.tensors.items():
            t.copy_(other.positive(name) if t.ndim == 1 else other.image(name))


@pytest.mark.parametrize(("op", "place"), RUNS, indirect=["place"])
def test_nothing_waits_for_the_device(op, place):
    d = Drawn(CASE, place)
    OPS[op](d)  # compiles, and draws the inputs
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        OPS[op](d)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("op", "place"), RUNS, indirect=["place"])
def test_a_captured_call_reads_new_inputs(op, place):
    d = Drawn(CASE, place)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        first = OPS[op](d)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OPS[op](d)
    for seed in (1, 2):
        refilled(d, seed)
        graph.replay()
        torch.cuda.synchronize()
        eager = OPS[op](d)
        assert len(eager) == len(captured)
        for a, b in zip(captured, eager, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(captured[0], first[0])


def test_every_public_op_runs_on_a_gpu_by_every_implementation_it_has():
    """Of the tests marked gpu, here and in the file named after the op's module; AdamEMA's capture is in its own file."""
    assert OPS.keys() | {"AdamEMA"} == public_ops().keys()
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *sorted(map(str, here.glob("test_kernels_*.py")))], capture_output=True, text=True, cwd=here.parent)
    assert done.returncode == 0, done.stdout[-2000:]
    ids = [line for line in done.stdout.splitlines() if "gpu-" in line]
    for op, module in public_ops().items():
        for backend in backends(module):
            own = [i for i in ids if f"test_kernels_{module}.py::" in i and f"gpu-{backend}" in i]
            assert own, f"{op} by {backend}"
            assert op == "AdamEMA" or sum(f"[{op}-gpu-{backend}]" in i for i in ids) == 2
    assert {m for m in public_ops().values() if "cuda" in backends(m)} == {"adam_ema", "norm_silu", "score_implicit", "score_match"}
