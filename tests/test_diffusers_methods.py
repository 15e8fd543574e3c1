"""Methods on every family of diffusers' denoisers: twenty iterations of each, and their gradients by hand from the bare models."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import draws

diffusers = pytest.importorskip("diffusers")
import diffusers_cases as cases  # noqa: E402
import diffusers_models  # noqa: E402
from diffusers_models import TINY  # noqa: E402

from potstill.engine.common.errors import UserError  # noqa: E402
from potstill.engine.methods.base import Batch, Method  # noqa: E402
from potstill.engine.methods.dmd import DMDConfig  # noqa: E402
from potstill.engine.methods.gdd import GDDConfig  # noqa: E402
from potstill.engine.methods.moment_matching import MomentMatchingConfig  # noqa: E402
from potstill.engine.methods.sim import SIMConfig  # noqa: E402
from potstill.engine.nets.conditions import expanded  # noqa: E402
from potstill.engine.nets.diffusers import DiffusersDenoiser  # noqa: E402
from potstill.engine.training.optim import OptimConfig  # noqa: E402
from potstill.engine.training.run import Run, TrainConfig  # noqa: E402

N, ITERATIONS = 2, 20
#: Iterations of each method; of nets that differ from another only in settings, a quarter.
LONG = {"few": ITERATIONS, "lognormal": ITERATIONS, "moments": ITERATIONS, "sfd": ITERATIONS, "dmd": 4, "sim": 4}


def bits(net) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in [*net.named_parameters(), *net.named_buffers()]}


def fake_loss(method: Method, batch: Batch) -> float:
    """Of the turn that trains the fake net, with no other before it."""
    turn = next(turn for turn in method.turns if turn.trains == "fake")
    result = turn.loss(method.begin(batch))
    assert result is not None
    return result[0].item()


@pytest.mark.parametrize("name", TINY)
def test_every_method_trains_every_family(name):
    """All numbers are finite; student and fake net start as the teacher, of which no bit moves; the student leaves it, and a fake net
    denoises the student's images better than the teacher, which it was, does (but for moment matching's, which is held to it)."""
    for kind, iterations in LONG.items():
        teacher = cases.denoiser(name)
        before = bits(teacher)
        optim = {"student": OptimConfig(lr=3e-4), "fake": OptimConfig(lr=1e-3)}
        run, feed = cases.new_run(name, kind, teacher=teacher, batch=N, optim=optim)
        nets = {key: getattr(net, "denoiser", net) for key, net in run.method.nets.items()}
        for net in nets.values():
            assert net is not teacher and all(value.equal(before[key]) for key, value in bits(net).items())
        curve = cases.advance(run, feed, iterations if name in cases.FAMILIES else 4)
        assert all(math.isfinite(value) for line in curve for value in line.values())
        assert all(value.equal(before[key]) for key, value in bits(teacher).items())
        moved = bits(nets["student"])
        assert any(not moved[key].equal(value) for key, value in before.items())
        if len(curve) == ITERATIONS and kind in ("few", "lognormal"):
            more, losses = diffusers_models.condition(name, 8, seed=1), []
            batch = lambda: Batch(torch.empty(0), None, draws(8, 11), (more,))  # noqa: E731
            for state in (nets["fake"].state_dict(), teacher.state_dict()):
                nets["fake"].load_state_dict(copy.deepcopy(state))
                losses.append(fake_loss(run.method, batch()))
            assert losses[0] < 0.995 * losses[1], f"{kind}: the fake net's loss {losses[1]:.5g} -> {losses[0]:.5g}"


def finite(cfg: Any, teacher: DiffusersDenoiser, name: str) -> dict[str, float]:
    """What is logged of three iterations without prompts or with those of the data."""
    run = Run(cfg.build(teacher, teacher), TrainConfig(batch=4, kimg=1), 0, torch.device("cpu"))
    for seed in range(3):
        run.take(torch.randn(4, *teacher.shape), diffusers_models.condition(name, 4, seed))
    logs = run.meter.read()
    assert all(math.isfinite(value) for value in logs.values())
    return logs


@pytest.mark.parametrize("name", ["unet", "sd15", "pixart", "sd3"])
def test_a_gan_by_the_features_of_the_teacher(name):
    """GDD looks through the teacher's first half; which layers GDD-I freezes is only known of EDM's nets."""
    teacher = cases.denoiser(name)
    logs = finite(GDDConfig(sigma=14.6, r1_every=2, width=8), teacher, name)
    assert min(logs["student/grad_norm"], logs["discriminator/r1/grad_norm"]) > 0
    with pytest.raises(UserError, match=r"^method\.freeze = 1 names layers of EDM's U-Nets, got \w+: set it to 0, [^\n]*$"):
        GDDConfig(freeze=1).build(teacher, teacher)


@pytest.mark.parametrize("name", ["sd15", "pixart", "sd3"])
def test_moments_without_a_second_net(name):
    """Instant moment matching differentiates the teacher by its weights, forwards and backwards."""
    cfg = MomentMatchingConfig(variant="instant", steps=2, levels="own", weight="own", measure_every=2, measure_batch=2)
    assert finite(cfg, cases.denoiser(name), name)["student/grad_norm"] > 0


# Gradients by hand, in float64, in the coordinates of diffusers' schedulers: latents √ᾱ x₀ + √(1-ᾱ) n, of a flow (1-t) x₀ + t n. A level
# is a timestep 0 … 999 of the table of the scheduler, of a flow t.

ROWS = 3
NAMES = ["pixart", "sd21", "sd3"]  # noise, velocity, flow


class ByHand:
    def __init__(self, name: str):
        self.name, scheduler = name, diffusers_models.scheduler(name)
        self.flow = name == "sd3"
        self.alpha_bar = torch.ones(1) if self.flow else scheduler.alphas_cumprod.double()
        self.null = diffusers_models.null(name)

    def own(self, u: Tensor) -> Tensor:
        """The level at a quantile."""
        return 0.001 + 0.999 * u.double() if self.flow else (u * 999).round().long()

    def of(self, sigma: Tensor) -> Tensor:
        """The level nearest to σ = noise / signal."""
        if self.flow:
            return sigma / (1 + sigma)
        table = ((1 - self.alpha_bar) / self.alpha_bar).sqrt()
        return (table - sigma[:, None]).abs().argmin(1)

    def parts(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """How much of image and of noise."""
        a, b = (1 - level, level) if self.flow else (self.alpha_bar[level].sqrt(), (1 - self.alpha_bar[level]).sqrt())
        return a.reshape(-1, 1, 1, 1), b.reshape(-1, 1, 1, 1)

    def noised(self, x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        a, b = self.parts(level)
        return a * x + b * noise.double()

    def raw(self, model, latents: Tensor, level: Tensor, text, w: float = 1.0) -> Tensor:
        """What the model predicts; guided by w."""

        def plain(text):
            embeds = text.embeds.double()
            match self.name:
                case "pixart":
                    mask, none = text.mask.long(), {"resolution": None, "aspect_ratio": None}
                    return model(latents, embeds, level, none, encoder_attention_mask=mask).sample.chunk(2, 1)[0]
                case "sd21":
                    return model(latents, level, embeds).sample
            return model(latents, embeds, text.pooled.double(), 1000 * level).sample

        told = plain(text)
        return told if w == 1 else (1 - w) * plain(expanded(self.null, len(latents))) + w * told

    def D(self, model, latents: Tensor, level: Tensor, text, w: float = 1.0) -> Tensor:
        """pred_original_sample."""
        (a, b), raw = self.parts(level), self.raw(model, latents, level, text, w)
        return {"pixart": lambda: (latents - b * raw) / a, "sd21": lambda: a * latents - b * raw, "sd3": lambda: latents - b * raw}[
            self.name
        ]()

    def target(self, x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """What the model should have predicted."""
        a, b = self.parts(level)
        return {"pixart": noise, "sd21": a * noise - b * x, "sd3": noise - x}[self.name]

    def generated(self, model, d, shape, text, steps: list[int], start: str) -> Tensor:
        """Backward simulation: one of the steps for the whole batch, which alone is differentiated."""
        z = d.normal(*shape).double()
        last = d.host.choice(range(len(steps)))
        assert last == len(steps) - 1  # by the seed
        levels = [self.own(torch.full((len(z),), step / 999, dtype=torch.float64)) for step in steps]
        latents = z if start == "unit" else self.parts(levels[0])[1] * z
        for level, after in zip(levels, levels[1:], strict=False):
            clean = self.D(model, latents, level, text).detach()
            latents = self.noised(clean, d.normal(*shape), after)
        return self.D(model, latents, levels[-1], text)


STEPS, GUIDED = {"steps": [999, 749, 499]}, {"guidance": 2.5, "fake_guidance": 1.5}
CASES = {
    "dmd": DMDConfig(**STEPS, **GUIDED, start="unit"),
    "dmd sigma": DMDConfig(**STEPS, fake_guidance=1.5),
    "sid": SIMConfig(**STEPS, **GUIDED, distance="l2", alpha=1.2, levels="own", t_max=0.9),
    "sim": SIMConfig(**STEPS, **GUIDED, start="unit", weight="one_minus_t", levels="lognormal", P_mean=0.4, P_std=1.1),
}
SEED = 6  # of which the last of three steps follows


def set_up(case: str, name: str):
    """A method in the middle of training, its batch, and what it works on: by hand, bare models in float64, draws and prompts anew."""
    teacher = cases.denoiser(name)
    method = CASES[case].build(teacher, cases.denoiser(name, seed=1))
    nets = {key: getattr(net, "denoiser", net) for key, net in method.nets.items()}
    with torch.no_grad():
        for p in nets["fake"].parameters():
            p.mul_(1.02)
    prompts = tuple(diffusers_models.condition(name, ROWS, seed) for seed in (1, 2))
    batch = Batch(torch.zeros(ROWS, *teacher.shape), None, draws(ROWS, SEED), prompts)
    models = {key: copy.deepcopy(net.model).double() for key, net in (nets | {"teacher": teacher}).items()}
    return method, nets, batch, ByHand(name), models, draws(ROWS, SEED), prompts


def agree(net, loss: Tensor, model, by_hand: Tensor) -> None:
    """Gradients of both for the weights, of which each has some that it never uses."""
    found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(by_hand, list(model.parameters()), allow_unused=True)
    assert [g is None for g in found] == [g is None for g in wanted]
    a, b = (torch.cat([g.double().flatten() for g in grads if g is not None]) for grads in (found, wanted))
    assert b.norm() > 0 and (a - b).norm() < 1e-3 * b.norm(), ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_the_students_gradient_by_hand(case, name):
    """DMD's (D_fake - D_real) / mean|x - D_real|, SiD's <D_real - D_fake, D_real - x - α δ> / mean|x - D_real|, SIM's pseudo-Huber."""
    method, nets, batch, hand, models, d, prompts = set_up(case, name)
    cfg, dmd = CASES[case], case.startswith("dmd")
    turn = next(turn for turn in method.turns if turn.trains == "student")
    result = turn.loss(method.begin(batch))

    text, shape = prompts[0 if dmd else 1], nets["student"].shape
    x = hand.generated(models["student"], d, shape, text, cfg.steps, cfg.start)
    if dmd:
        level = hand.own(d.integers(20, 980) / 999)
    elif case == "sid":
        level = hand.own(0.9 * d.uniform())
    else:
        level = hand.of((0.4 + 1.1 * torch.special.ndtri(d.uniform().double())).exp())
    latents = hand.noised(x, d.normal(*shape), level)
    real = hand.D(models["teacher"], latents, level, text, cfg.guidance)
    fake = hand.D(models["fake"], latents, level, text, cfg.fake_guidance)
    scale = 1 / (x - real).abs().mean((1, 2, 3), keepdim=True).detach()
    if dmd:
        by_hand = (x * ((fake - real) * scale).detach()).mean()
    elif case == "sid":
        by_hand = 100 * (scale * (real - fake) * (real - x - 1.2 * (real - fake))).sum((1, 2, 3)).mean()
    else:
        a, b = hand.parts(level)
        delta, c = real - fake, 0.00054 * math.prod(shape) ** 0.5
        huber = delta / (delta.square().sum((1, 2, 3), keepdim=True) + c**2).sqrt()
        by_hand = 100 * (a / (a + b) * huber * (fake - x)).sum((1, 2, 3)).mean()
    agree(nets["student"], result[0], models["student"], by_hand)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_the_fake_nets_gradient_by_hand(case, name):
    """The plain loss of a text-to-image net on the student's images, but of its guided prediction (SiD-LSG)."""
    method, nets, batch, hand, models, d, prompts = set_up(case, name)
    cfg, dmd, text = CASES[case], case.startswith("dmd"), prompts[0]
    turn = next(turn for turn in method.turns if turn.trains == "fake")
    result = turn.loss(method.begin(batch))  # in an iteration in which the student's is not due

    shape = nets["student"].shape
    x = hand.generated(models["student"], d, shape, text, cfg.steps, cfg.start).detach()
    if dmd:
        level = hand.own(d.integers(0, 999) / 999)
    elif case == "sid":
        level = hand.own(0.9 * d.uniform())
    else:
        level = hand.of((0.4 + 1.1 * d.normal().double()).exp())
    noise = d.normal(*shape).double()
    raw = hand.raw(models["fake"], hand.noised(x, noise, level), level, text, cfg.fake_guidance)
    error = (raw - hand.target(x, noise, level)).square()
    by_hand = error.mean() if dmd else error.sum((1, 2, 3)).mean()
    agree(nets["fake"], result[0], models["fake"], by_hand)


# What a batch is


@pytest.mark.parametrize("name", ["sd15", "lumina2"])
@pytest.mark.parametrize("method", ["few", "gan", "sim", "moments", "sfd"])
def test_a_batch_is_its_rows_one_by_one(method, name):
    """Micro-batches of one row with the same draws and prompts: losses, gradients' norms, weights."""
    found = []
    for micro in (None, 1):
        run, feed = cases.new_run(name, method, batch=ROWS, micro_batch=micro)
        found.append((cases.advance(run, feed, 2), cases.weights(run)))
    (whole, weights), (rows, of_rows) = found
    for line, other in zip(whole, rows, strict=True):
        assert other == pytest.approx(line, rel=2e-5, abs=1e-5)
    for key, value in weights.items():
        torch.testing.assert_close(of_rows[key], value, rtol=0, atol=3e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["sd15", "dit", "sana", "flux"])
@pytest.mark.parametrize("method", ["gan", "sim", "moments"])
def test_guidance_1_is_none(method, name):
    """Bit for bit what a net without a null prompt does, which then is never looked at: it may be anything."""
    found = []
    for null in (None, math.nan):
        teacher = cases.denoiser(name, null=None)
        if null is not None and teacher.text:
            teacher.null = diffusers_models.null(name).map(lambda t: t if t.dtype is torch.bool else torch.full_like(t, math.nan))
        run, feed = cases.new_run(name, method, teacher=teacher, batch=N)
        found.append((cases.advance(run, feed, 2), cases.weights(run)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][key], value) for key, value in found[1][1].items())
