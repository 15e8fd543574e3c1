"""The losses, forward and backward, beside plain PyTorch: at the shapes of the recipes, and at 600 MB on a GPU.

`eager` is what one would write for the same outputs: values per sample, zero where not finite, and how many those are.
Its arithmetic is that of the authors' code where there is any (DMD2, SiD, FastGen, SFD, GDD); `formula` stops before
the last two. Both, and ours, start from raw network outputs: forming the clean images is part of the work.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benches import harness
from potstill.kernels import (
    Estimate,
    add_noise,
    denoise,
    discriminator_adversarial,
    generator_adversarial,
    moments,
    score_implicit,
    score_match,
    trajectory,
)

CPU_SHAPES = [(256, 1, 8, 8), (64, 3, 32, 32), (64, 3, 64, 64), (16, 4, 64, 64)]
GPU_SHAPES = harness.smallest([(64, 3, 64, 64), (2048, 3, 64, 64), (64, 3, 32, 32), (16, 4, 64, 64)], [(2, 3, 4, 4)])


def per(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)


class Inputs:
    """One copy of everything a loss could ask for."""

    def __init__(self, shape: tuple[int, ...], place: harness.Place):
        n, raw = shape[0], torch.bfloat16 if place.kind == "cuda" else torch.float32
        device = place.device
        self.x, self.x_t, self.target, self.noise = (torch.randn(shape, device=device) for _ in range(4))
        self.real, self.fake = (torch.randn(shape, device=device, dtype=raw) for _ in range(2))
        c = [torch.rand(n, device=device) + 0.2 for _ in range(7)]
        self.skip_real, self.out_real, self.skip_fake, self.out_fake, self.weight, self.sigma, self.sigma_next = c
        self.logits = [torch.randn(n, size, device=device) for size in (64, 484)]  # GDD's two feature nets
        self.real_logits = [torch.randn(n, size, device=device) for size in (64, 484)]

    def pair(self) -> tuple[Estimate, Estimate]:
        real = Estimate(self.real, self.x_t, self.skip_real, self.out_real)
        return real, Estimate(self.fake, self.x_t, self.skip_fake, self.out_fake)

    def clean(self) -> tuple[Tensor, Tensor]:
        real = per(self.skip_real) * self.x_t + per(self.out_real) * self.real
        return real, per(self.skip_fake) * self.x_t + per(self.out_fake) * self.fake


def eager_score_match(i: Inputs) -> Tensor:
    with torch.no_grad():
        real, fake = i.clean()
        p_real, p_fake = i.x - real, i.x - fake
        g = torch.nan_to_num((p_real - p_fake) / p_real.abs().mean((1, 2, 3), keepdim=True))
    return 0.5 * ((i.x - (i.x - g).detach()) ** 2).mean((1, 2, 3))


def eager_sid(i: Inputs) -> Tensor:
    real, fake = i.clean()
    with torch.no_grad():
        weight = (i.x - real).abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5)
    return ((real - fake) * ((real - i.x) - 1.2 * (real - fake)) / weight).sum((1, 2, 3))


def eager_sim(i: Inputs) -> Tensor:
    real, fake = i.clean()
    delta = real - fake
    norm = (delta.pow(2).sum((1, 2, 3), keepdim=True) + 0.03**2).sqrt()
    return (delta / norm * (fake - i.x)).sum((1, 2, 3))


def eager_denoise(i: Inputs) -> Tensor:
    return (per(i.weight) * (i.clean()[1] - i.target) ** 2).mean((1, 2, 3))


def eager_moments(i: Inputs) -> Tensor:
    real, fake = i.clean()
    return (per(i.weight) * i.x * (fake - real).detach()).mean((1, 2, 3))


def eager_trajectory(i: Inputs) -> Tensor:
    d = (i.x_t - i.clean()[1]) / per(i.sigma)
    x_next = i.x_t + (per(i.sigma_next) - per(i.sigma)) * d
    return (x_next - i.target).abs().mean((1, 2, 3))


def eager_generator(i: Inputs) -> Tensor | int:
    return sum(F.softplus(-l).mean(1) for l in i.logits)  # noqa: E741


def eager_discriminator(i: Inputs) -> Tensor | int:
    pairs = zip(i.logits, i.real_logits, strict=True)
    return sum(F.softplus(fake).mean(1) + F.softplus(-real).mean(1) for fake, real in pairs)


def eager_add_noise(i: Inputs) -> Tensor:
    return i.x + per(i.sigma) * i.noise


class Bench(NamedTuple):
    ours: Callable[[Inputs], Any]
    eager: Callable[[Inputs], Any]
    wrt: str  # what gets a gradient
    moved: str  # tensors ours reads and writes, forward | backward; a tensor's gradient is as large as the tensor


BENCHES = {
    "score_match": Bench(lambda i: score_match(i.x, *i.pair()), eager_score_match, "x", "x x_t real fake | x_t real fake x"),
    "score_implicit l2 (SiD)": Bench(
        lambda i: score_implicit(i.x, *i.pair(), distance="l2", alpha=1.2),
        eager_sid,
        "x x_t real fake",
        "x x_t real fake | x x_t real fake x x_t real fake",
    ),
    "score_implicit huber (SIM)": Bench(
        lambda i: score_implicit(i.x, *i.pair()),
        eager_sim,
        "x x_t real fake",
        "x x_t real fake | x x_t real fake x x_t real fake",
    ),
    "denoise": Bench(
        lambda i: denoise(i.pair()[1], i.target, i.weight),
        eager_denoise,
        "fake",
        "x_t fake target | x_t fake target fake",
    ),
    "moments": Bench(lambda i: moments(i.x, *i.pair(), weight=i.weight), eager_moments, "x", "x x_t real fake | x_t real fake x"),
    "trajectory": Bench(
        lambda i: trajectory(i.x_t, i.pair()[1], i.sigma, i.sigma_next, i.target)[0],
        eager_trajectory,
        "fake",
        "x_t fake target x | x target fake",
    ),
    "generator_adversarial": Bench(lambda i: generator_adversarial(i.logits), eager_generator, "logits", "logits | logits logits"),
    "discriminator_adversarial": Bench(
        lambda i: discriminator_adversarial(i.logits, i.real_logits),
        eager_discriminator,
        "logits real_logits",
        "logits real_logits | logits real_logits logits real_logits",
    ),
    "add_noise": Bench(lambda i: add_noise(i.x, i.sigma, i.noise), eager_add_noise, "x", "x noise x | x x"),
}


def tensors(i: Inputs, name: str) -> list[Tensor]:
    found = getattr(i, name)
    return found if isinstance(found, list) else [found]


def bytes_moved(bench: Bench, i: Inputs) -> int:
    names = bench.moved.replace("|", " ").split()
    return sum(t.nbytes for n in names for t in tensors(i, n))


def counted(value: Tensor) -> tuple[Tensor, Tensor]:
    """The same outputs as ours: values with the non-finite ones zero, and their number."""
    finite = value.isfinite()
    return torch.where(finite, value, 0), (~finite).sum(dtype=torch.int32)


def stepping(function: Callable[[Inputs], Any], bench: Bench, copies: list[Inputs], guard: bool) -> harness.Run:
    """Forward and backward on copy k; returns what it computed."""

    def step(k: int) -> list[Tensor]:
        i = copies[k]
        out = function(i)
        if isinstance(out, Tensor):
            out = counted(out) if guard and out.ndim == 1 else (out,)
        total = out[0].mean()
        wanted = [t for name in bench.wrt.split() for t in tensors(i, name)]
        return [out[0].detach(), *torch.autograd.grad(total, wanted)]

    return step


def agree(ours: harness.Run, eager: harness.Run) -> None:
    """No time is reported of wrong numbers."""
    for a, b in zip(ours(0), eager(0), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if b.dtype is torch.bfloat16 else 1e-3, atol=1e-3 * float(b.abs().max()))


def cases():
    """On a GPU shape by shape, the most telling first: what there is no time for is then the same of all."""
    for name, shape in itertools.product(BENCHES, CPU_SHAPES):
        if use(name, shape, CPU_SHAPES):
            yield pytest.param(name, shape, harness.CPU, id=f"{name}-{'x'.join(map(str, shape))}-cpu")
    for shape, name in itertools.product(GPU_SHAPES, BENCHES):
        if use(name, shape, GPU_SHAPES):
            case = f"{name}-{'x'.join(map(str, shape))}-cuda"
            yield pytest.param(name, shape, harness.CUDA, id=case, marks=pytest.mark.gpu)


def use(name: str, shape: tuple[int, ...], shapes: Sequence[tuple[int, ...]]) -> bool:
    """The logits of a discriminator depend on the batch alone: two shapes are enough."""
    return not name.endswith("adversarial") or shape in shapes[:2]


@pytest.mark.parametrize(("name", "shape", "place"), list(cases()))
def test_loss(name, shape, place, record, request):
    torch.manual_seed(0)
    bench, first = BENCHES[name], Inputs(shape, place)
    moved = bytes_moved(bench, first)
    copies = [first, *(Inputs(shape, place) for _ in range(harness.copies_for(moved, place) - 1))]
    for i in copies:
        for wanted in bench.wrt.split():
            for t in tensors(i, wanted):
                t.requires_grad_()
    variants = {
        "ours": stepping(bench.ours, bench, copies, guard=False),
        "eager": stepping(bench.eager, bench, copies, guard=True),
        "formula": stepping(bench.eager, bench, copies, guard=False),
        "copy": harness.copy_of(moved, place),
    }
    agree(variants["ours"], variants["eager"])
    if request.config.option.compiled:
        torch.compiler.reset()  # each row is a function of its own to Dynamo's limit of recompilations
        compiled = torch.compile(bench.eager, fullgraph=True, dynamic=False)
        variants["compiled"] = stepping(compiled, bench, copies, guard=True)
    seconds = harness.seconds(variants, place, len(copies), budget=0.15)
    case = f"{name} {'x'.join(map(str, shape))}"
    record(harness.row("losses", case, place, variants, seconds, moved), variants["ours"])
