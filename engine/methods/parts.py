"""What several papers share: the generator of one or few steps, what it is told, noise, what a teacher must be able to do, and what
score implicit matching is made of.
"""

import math
from typing import Any

import torch
from torch import Tensor

from potstill.engine.common.checks import Unused, above, at_least, one_of, probability, wants
from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.sampling import ONE_STEP, RENOISE, STARTS, Sampler, first_state
from potstill.engine.diffusion.sigmas import GRID, karras_at, lognormal
from potstill.engine.methods.base import Batch, Draws, Method, frozen
from potstill.engine.methods.vitals import Gaps
from potstill.engine.nets.conditions import Condition
from potstill.engine.nets.denoiser import Denoiser
from potstill.kernels import add_noise


class Generator:
    """x = D(σ z; σ, condition) in one step, or a few: noise again at the next level what came of the last (2405.14867, Sec. 4.4).

    In training a batch stops at one of its steps, drawn for all ranks alike, and only that step is differentiated: what goes into
    it is what the student makes itself, as in sampling (DMD2's backward simulation): at the levels at which the sampler asks it, and,
    where it is trained with dropout, by the net without.

    Args:
        net: whose levels these are.
        sigma: the only level, if `steps` is empty.
        steps: levels by their numbers on the net's grid of 1000, the noisiest first.
        start: one of `sampling.STARTS`.
    """

    def __init__(self, net: Denoiser, sigma: float, steps: list[int], start: str):
        host = {"dtype": torch.float64, "device": "cpu"}  # also where nets are planned on "meta"
        wanted = grid_level(net, torch.tensor(steps, **host)) if steps else torch.tensor([sigma], **host)
        told: list[float] = net.told(wanted).tolist()
        self.sampler = Sampler(RENOISE if len(told) > 1 else ONE_STEP, told, start=start)
        self.sampler.sigmas = self.sigmas = self.sampler.levels(net).tolist()

    def __call__(self, net: Denoiser, draws: Draws, condition: Condition | None, before: Denoiser | None = None) -> Tensor:
        """Images [N, C, H, W] from noise of `draws`. before: the net in eval mode, which takes the steps before the last; None: it has no dropout."""
        z = draws.normal(*net.shape)
        last = draws.choice(range(len(self.sigmas))) if len(self.sigmas) > 1 else 0
        sigma = z.new_full((len(z),), self.sigmas[0])
        x = self.first(net, z, sigma)
        for level in self.sigmas[1 : last + 1]:
            with torch.no_grad():
                clean = (before or net)(x, sigma, condition)
            sigma = z.new_full((len(z),), level)
            x = add_noise(clean, sigma, draws.normal(*net.shape))
        return net(x, sigma, condition)

    def first(self, net: Denoiser, z: Tensor, sigma: Tensor) -> Tensor:
        """The state that z [N, C, H, W] stands for at the first level, sigma [N]."""
        return self.sigmas[0] * z if self.sampler.start == "sigma" else first_state(net, z, sigma, self.sampler.start)


def check_generator(cfg: Any) -> None:
    """BadSetting for `start` and `steps` that no generator has."""
    one_of(cfg, "start", STARTS)
    falling = all(a > b for a, b in zip(cfg.steps, cfg.steps[1:], strict=False))
    good = falling and all(0 <= step < GRID for step in cfg.steps)
    wants(cfg, "steps", good, f"whole numbers of 0 … {GRID - 1}, each less than the one before, or [] for one step at sigma")


def conditions(net: Denoiser, batch: Batch, ask: int = 0) -> Condition | None:
    """What to draw, random: classes, or the prompts that the batch brings for the `ask`-th time an iteration asks. None for neither."""
    return batch.prompts[ask] if net.text else batch.draws.labels(net.label_dim)


def grid_level(net: Denoiser, index: Tensor) -> Tensor:
    """σ of integer indices on a grid of 1000 of the net's own levels, 0 being the smallest (DMD2's time steps)."""
    return net.level(index / (GRID - 1))


def noise_like(x: Tensor, draws: Draws) -> Tensor:
    """Standard normals of x's shape."""
    return draws.normal(*x.shape[1:])


def check_guidance(guidance: float, teacher: Denoiser, name: str = "guidance") -> None:
    """UserError if guidance is asked of a teacher, or of its copy, that is told nothing, or never learnt to do without."""
    if guidance == 1 or teacher.guidable:
        return
    got = "an unconditional one" if not teacher.conditional else "one that was never trained without (Flux has its guidance embedded)"
    other = ", or give teacher.guide=FILE, a worse net to lead away from" if name == "guidance" else ""  # a fake net has no guide
    raise UserError(
        f"method.{name} = {guidance} wants a teacher that knows classes or prompts, and none of them; got {got}: set it to 1{other}"
    )


class Implicit(Method):
    """What SIM, SiD and SiDA share: nets, a generator, and the laws of the levels at which the two score nets are asked.

    Args:
        cfg: settings that `check_implicit` has looked at.
    """

    def __init__(self, cfg: Any, teacher: Denoiser, student: Denoiser, fake: Denoiser):
        check_guidance(cfg.guidance, teacher)
        check_guidance(cfg.fake_guidance, fake, "fake_guidance")
        if cfg.dropout is not None:
            student.set_dropout(cfg.dropout)
            fake.set_dropout(cfg.dropout)
        self.cfg, self.teacher = cfg, frozen(teacher)
        self.student, self.fake = student, fake
        self.frozen_student, self.frozen_fake = frozen(student), frozen(fake)
        self.nets = {"fake": fake, "student": student}
        self.generate = Generator(student, cfg.sigma, cfg.steps, cfg.start)
        self.sampler, self.gaps = self.generate.sampler, Gaps(self.teacher_level, self.teacher.weight)
        self.c = 0.00054 * math.prod(student.shape) ** 0.5 if cfg.c is None else cfg.c

    def teacher_level(self, u: Tensor) -> Tensor:
        t = self.cfg.t_min + (self.cfg.t_max - self.cfg.t_min) * u
        match self.cfg.levels:
            case "own":
                return self.teacher.level(t)
            case "lognormal":
                return self.teacher.told(lognormal(torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7)), self.cfg.P_mean, self.cfg.P_std))
        return self.teacher.told(karras_at(t))

    def fake_level(self, draws: Draws) -> Tensor:
        """σ [N] of L_ψ."""
        if self.cfg.levels == "own":
            return self.teacher.level(self.cfg.t_min + (self.cfg.t_max - self.cfg.t_min) * draws.uniform())
        return self.teacher.told(lognormal(draws.normal(), self.cfg.P_mean, self.cfg.P_std))


def check_implicit(cfg: Any) -> None:
    """BadSetting for what no `Implicit` can use."""
    one_of(cfg, "distance", ("huber", "l2"))
    one_of(cfg, "weight", ("own", "one_minus_t"))
    one_of(cfg, "levels", ("karras", "own", "lognormal"))
    check_generator(cfg)
    wants(cfg, "alpha", cfg.distance == "l2" or cfg.alpha == 1, "to be 1 with method.distance=huber (it is of l2)")
    above(cfg, 0, "c", "sigma", "scale", "P_std", "guidance", "fake_guidance")
    wants(cfg, "t_max", 0 < cfg.t_max <= 1, "a share of the noise levels in (0, 1]")
    wants(cfg, "t_min", 0 <= cfg.t_min < cfg.t_max, f"a share of the noise levels, from 0 and below t_max = {cfg.t_max}")
    probability(cfg, "dropout")
    at_least(cfg, 1, "fake_per_student")


def unused_of_implicit(cfg: Any) -> Unused:
    """Settings of an `Implicit` that do nothing beside the others, and why."""
    law = dict.fromkeys(("t_min", "t_max") if cfg.levels == "lognormal" else ("P_mean", "P_std"), f"method.levels={cfg.levels}")
    return (
        ({"c": "method.distance=l2"} if cfg.distance == "l2" else {})
        | ({"sigma": "method.steps"} if cfg.steps else {})
        | (law if cfg.levels != "karras" else {})
    )
