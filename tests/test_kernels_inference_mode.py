"""Constants made under torch.inference_mode, and ops called inside of it: the numbers and gradients of ordinary tensors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import F32, Case, Drawn
from places import needs_triton, public_ops
from torch.utils._python_dispatch import TorchDispatchMode

from potstill import kernels
from potstill.kernels import Losses, compat, modules, reference
from potstill.kernels._lib import INTERPRET

CASE = Case((2, 4, 4, 4), F32, guided=True)
NHWC = CASE._replace(layout="nhwc")


class Scheduler:
    """FastGen's."""

    alpha = sigma = staticmethod(lambda t: t)


def norm(d, op=kernels.norm_silu):
    weight, bias, scale, add = (d.image(name).flatten(1)[:, :4] for name in ("weight", "bias", "scale", "add"))
    return op(d.image("x"), weight[0], bias[0], 2, 1e-5, scale=scale, shift=bias, add=add)


def score(d, op, **options):
    return op(d.image("x"), d.estimate("real"), d.estimate("fake"), **options)


def step(d, op):
    return op(d.image("x"), d.estimate("net", "x"), d.positive("s"), d.positive("t"), d.image("y"))


#: name -> (what it makes of the inputs drawn, what of them has a gradient)
CALLS = {
    "score_match": (lambda d: score(d, kernels.score_match), "x"),
    "score_match of D": (lambda d: kernels.score_match(d.image("x"), d.image("real"), d.image("fake")), "x"),
    "score_implicit": (lambda d: score(d, kernels.score_implicit, weight=d.positive("w")), "x"),
    "score_implicit of x_t": (lambda d: score(d, kernels.score_implicit, distance="l2"), "x_t"),
    "score_implicit of fake": (lambda d: score(d, kernels.score_implicit, detach="factor"), "fake"),
    "moments": (lambda d: score(d, kernels.moments, weight=d.positive("w")), "x"),
    "denoise": (lambda d: kernels.denoise(d.estimate("net"), d.image("y"), d.positive("w")), "net"),
    "denoise of x_t": (lambda d: kernels.denoise(d.estimate("net"), d.image("y")), "x_t"),
    "trajectory": (lambda d: step(d, kernels.trajectory), "net"),
    "generator_adversarial": (lambda d: kernels.generator_adversarial([d.image("a"), d.image("b")]), "b"),
    "discriminator_adversarial": (lambda d: kernels.discriminator_adversarial(d.image("a"), d.image("b"), kind="hinge"), "b"),
    "add_noise": (lambda d: kernels.add_noise(d.image("x"), d.positive("sigma"), d.image("noise")), "x"),
    "norm_silu": (norm, "x"),
    "norm_silu of weight": (norm, "weight"),
    "norm_silu of add": (norm, "add"),
    "pixel_norm": (lambda d: kernels.pixel_norm(d.image("x")), "x"),
    "pixel_norm_silu": (lambda d: kernels.pixel_norm_silu(d.image("x")), "x"),
    "mp_silu": (lambda d: kernels.mp_silu(d.image("x"), d.image("scale").flatten(1)[:, :4]), "x"),
    "mp_silu of scale": (lambda d: kernels.mp_silu(d.image("x"), d.image("scale").flatten(1)[:, :4]), "scale"),
    "mp_sum": (lambda d: kernels.mp_sum(d.image("x"), d.image("y"), 0.3, 1.0), "y"),
    "mp_cat_silu": (lambda d: kernels.mp_cat_silu(d.image("x"), d.image("b"), 0.5), "b"),
    "normalized_weight": (lambda d: kernels.normalized_weight(d.image("x"), d.image("gain").flatten()[0], F32), "x"),
    "normalized_weight of gain": (lambda d: kernels.normalized_weight(d.image("x"), d.image("gain").flatten()[0], F32), "gain"),
    "Estimate.denoised": (lambda d: d.estimate("net").denoised(), "net"),
    "ScoreMatchLoss": (lambda d: score(d, modules.ScoreMatchLoss(reduction="none")), "x"),
    "TrajectoryLoss": (lambda d: step(d, modules.TrajectoryLoss("huber", reduction="none")), "net"),
    "DenoiseLoss": (lambda d: modules.DenoiseLoss(reduction="none")(d.estimate("net"), d.image("y"), d.positive("w")), "net"),
    "FastGen's VSD": (lambda d: compat.variational_score_distillation_loss(d.image("x"), d.image("real"), d.image("fake"), d.positive("w")), "x"),
    "FastGen's denoising": (lambda d: compat.denoising_score_matching_loss("v", d.image("net"), d.image("x"), d.image("eps"), Scheduler(), d.positive("t")), "net"),
    "FastGen's GAN": (lambda d: compat.gan_loss_discriminator(d.image("a"), d.image("b")), "a"),
    "DMD2's": (lambda d: compat.distribution_matching_loss(d.image("x"), d.image("real"), d.image("fake")), "x"),
    "SiD's": (lambda d: compat.sid_generator_loss(d.image("x"), d.image("real"), d.image("fake")), "fake"),
    "plain score_match": (lambda d: score(d, reference.score_match), "x"),
    "plain score_implicit": (lambda d: score(d, reference.score_implicit), "fake"),
    "plain denoise": (lambda d: reference.denoise(d.estimate("net"), d.image("y"), d.positive("w")), "net"),
    "plain moments": (lambda d: score(d, reference.moments), "x"),
    "plain trajectory": (lambda d: step(d, reference.trajectory), "net"),
    "plain norm_silu": (lambda d: norm(d, sys.modules[kernels.norm_silu.__module__].plain), "x"),
}  # fmt: skip


def made(outputs):
    """Its tensors: values, what has a gradient first."""
    flat = [outputs] if isinstance(outputs, torch.Tensor) else [t for o in outputs for t in (made(o) if isinstance(o, tuple) else [o])]
    return [t for t in flat if t.is_floating_point()]


def values_and_gradient(f, d, leaf):
    """d: inputs drawn before."""
    given = d.tensors
    d.tensors = given | {leaf: given[leaf].clone().requires_grad_()}
    outputs = made(f(d))
    gradient = torch.autograd.grad(sum(t.sum() for t in outputs if t.requires_grad), d.tensors[leaf])
    d.tensors = given
    return [*(t.detach() for t in outputs), *gradient]


def under_inference_mode(tensors, kept):
    with torch.inference_mode():
        return {name: t if name == kept else t.clone() for name, t in tensors.items()}


@pytest.mark.parametrize("case", [CASE, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_constants_made_under_it_are_constants(call, case):
    f, leaf = call
    d = Drawn(case)
    f(d)
    wanted = values_and_gradient(f, d, leaf)
    ordinary = d.tensors
    d.tensors = under_inference_mode(ordinary, leaf)
    assert all(t.is_inference() for name, t in d.tensors.items() if name != leaf)
    for a, b in zip(values_and_gradient(f, d, leaf), wanted, strict=True):
        assert torch.equal(a, b)
    if INTERPRET:
        return
    for name in ordinary.keys() - {leaf}:  # each alone
        d.tensors = ordinary | {
            name: d.tensors[name] if d.tensors[name].is_inference() else under_inference_mode({name: ordinary[name]}, "")[name]
        }
        assert d.tensors[name].is_inference()
        assert torch.equal(values_and_gradient(f, d, leaf)[-1], wanted[-1]), name


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_inside_of_it_an_op_makes_the_same_numbers(call):
    f, _ = call
    d = Drawn(CASE)
    wanted = made(f(d))
    with torch.inference_mode():
        found = made(f(d))
        assert all(t.is_inference() for t in found)
        d.tensors = under_inference_mode(d.tensors, "")
        again = made(f(d))
    for a, b, c in zip(wanted, found, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_every_public_op_is_here():
    assert public_ops().keys() - {"AdamEMA", "force_weight_norm_"} <= CALLS.keys()  # which have no gradient


class Copies(TorchDispatchMode):
    """Counts bytes that are copied."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            self.bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def test_only_what_was_made_under_it_is_copied_and_only_for_a_gradient():
    d = Drawn(CASE._replace(guided=False))
    x, real, fake = d.image("x").requires_grad_(), d.image("real"), d.image("fake")
    with torch.inference_mode():
        constant = real.clone()

    def copied(*given):
        with Copies() as copies:
            assert isinstance(kernels.score_match(*given), Losses)
        return copies.bytes

    assert copied(x, real, fake) == 0
    assert copied(x, constant, fake) == copied(x, constant, constant) == constant.nbytes
    assert copied(x.detach(), constant, constant) == 0
    with torch.no_grad():
        assert copied(x, constant, constant) == 0


def test_a_constant_changed_before_backward_changes_no_gradient():
    """Autograd cannot see that it was: the teacher's next evaluation may write into the same memory."""
    d = Drawn(CASE)
    x, real = d.image("x").requires_grad_(), d.image("real")
    wanted = torch.autograd.grad(kernels.moments(x, real, d.image("fake")).value.sum(), x)
    with torch.inference_mode():
        constant = real.clone()
    loss = kernels.moments(x, constant, d.image("fake")).value.sum()
    with torch.inference_mode():
        constant.zero_()
    assert torch.equal(*torch.autograd.grad(loss, x), *wanted)


if not INTERPRET:

    @needs_triton
    def test_this_holds_for_the_triton_kernels_under_the_interpreter(monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        some = "(constants and nchw and not (DMD2 or FastGen or SiD or plain or Loss)) or changed"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", some, str(Path(__file__))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert done.returncode == 0, done.stdout
