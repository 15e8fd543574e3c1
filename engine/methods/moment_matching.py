"""Moment matching: students of k steps whose every jump keeps the data's conditional means (2406.04103).

The student g_η guesses the clean image x̃ from z_t, and z_s follows by the posterior with fresh noise. If E[x̃ | z_s] is what
the teacher g_θ(z_s) says it is for data, k such jumps lead from noise to data. Everything in EDM's coordinates, z = x + S ε:

    s ~ U(0, 1),  t = min(s + U(0, 1/k), 1),  z_t = x + S_t ε,  x̃ = g_η(z_t)
    z_s = (1 - r) sg(x̃) + r z_t + S_s sqrt(1 - r) ξ,   r = S_s² / S_t²                          posterior q(z_s | z_t, x̃)

    Alg. 2   L_φ = w(s) ( |sg(x̃) - g_φ(z_s)|² + |g_θ(z_s) - g_φ(z_s)|² )       even iterations: φ learns E[x̃ | z_s]
             L_η = w(s) < x̃, sg(g_φ(z_s) - g_θ(z_s)) >                          odd iterations
    Alg. 3   μ = ∇_θ w(s) |sg(x̃) - g_θ(z_s)|² on one half of the batch,   ν = -Λ μ
             L_η = w(s) < x̃, sg(∂g_θ(z_s)/∂θ · ν) >  on the other: no φ; 2 L_η has the gradient of ½ |μ|²_Λ

Guidance is of the teacher, and in both losses; in Alg. 3 μ and the Jacobian are the guided prediction's.

Differs from the paper, or is not known from it: the weight w and the map S(t), a first-order choice for few steps (on a toy
two steps hardly learn with the edm weight on Karras levels, and learn well with it on cosine ones); Λ = 1 / (sqrt(v) + eps)
wants Adam's second moment v of the teacher's training, which published checkpoints lack, so v is measured on real data at
the start and every `measure_every` iterations; every micro-batch pairs its own two halves, which is unbiased too (without
`micro_batch`: the whole batch, over all ranks, whose means of μ and v are then taken); `batch` counts both halves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.engine.common.checks import Unused, above, at_least, one_of, probability, wants
from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.sampling import ANCESTRAL, Sampler
from potstill.engine.diffusion.sigmas import edm_weight, karras_at, lognormal
from potstill.engine.diffusion.solvers import posterior
from potstill.engine.methods.base import Batch, Logs, Method, MethodConfig, Needs, Turn, copied, frozen
from potstill.engine.methods.parts import check_guidance, noise_like
from potstill.engine.methods.vitals import Gaps, variance
from potstill.engine.nets.conditions import Condition, Text
from potstill.engine.nets.denoiser import Denoiser, per_sample
from potstill.engine.nets.weight_space import MODES, SecondMoment, WeightSpace
from potstill.kernels import add_noise, denoise, moments


@dataclass
class MomentMatchingConfig(MethodConfig):
    """Defaults: eight steps, as in the paper's best results; w and S(t) from public reimplementations."""

    name: str = "moment_matching"  # set by method=…
    variants = ("moment_matching_instant",)
    variant: str = "alternating"  # alternating (Alg. 2) | instant (Alg. 3; for k = 8, worse with fewer steps)
    steps: int = 8  # k: evaluations per image; the paper has 1, 2, 4 and 8
    levels: str = "karras"  # S(t): karras | cosine | log_uniform | own (the net's times)
    sigma_min: float = 0.002  # least noise level of S(t)
    sigma_max: float = 80.0  # greatest noise level of S(t), where sampling starts
    rho: float = 7.0  # of karras
    weight: str = "sqrt_karras"  # w at S_s: flat | sqrt_karras | edm | snr | sigmoid | own (1 on the raw output); the paper's is not known
    sigmoid_bias: float = -1.0  # b of w = e^λ sigmoid(b - λ), λ = -2 ln S; unverified
    guidance: float = 1.0  # of the teacher; 1 is none
    dropout: float = 0.0  # of the student; 0.1 helped two-step students (2606.30414)
    jvp: str = "forward"  # of instant's ∂g_θ/∂θ · ν: forward | difference (for nets with parts that have no forward mode)
    measure_every: int = 100  # iterations between measurements of v
    measure_batch: int = 16  # images per gradient whose square goes into v
    measure_decay: float = 0.99  # of v: the mean of all gradients at first, then of about the last hundred
    eps: float = 1e-8  # of instant's Λ = 1 / (sqrt(v) + eps)

    def __post_init__(self):
        super().__post_init__()
        for name, known in {
            "variant": ("alternating", "instant"),
            "levels": (*LEVELS, "own"),
            "weight": (*WEIGHTS, "own"),
            "jvp": MODES,
        }.items():
            one_of(self, name, known)
        at_least(self, 1, "steps", "measure_every", "measure_batch")
        above(self, 0, "sigma_min", "rho", "eps", "guidance")
        wants(self, "sigma_max", self.sigma_max > self.sigma_min, f"more than sigma_min = {self.sigma_min}")
        probability(self, "dropout", "measure_decay")

    def needs(self) -> Needs:
        instant = self.variant == "instant"
        nets = ("student",) if instant else ("student", "fake")
        return Needs(nets=nets, classes=self.guidance != 1, batch_statistics=instant, whole_teacher=instant)

    def build(self, teacher: Denoiser, start: Denoiser) -> "MomentMatching":
        if self.variant == "instant":
            return Instant(self, teacher, student=copied(start))
        return Alternating(self, teacher, student=copied(start), fake=copied(teacher, "fake"))

    def unused(self) -> Unused:
        measured = ("jvp", "measure_every", "measure_batch", "measure_decay", "eps")
        return (
            ({} if self.variant == "instant" else dict.fromkeys(measured, "method.variant=alternating"))
            | ({} if self.levels == "karras" else {"rho": f"method.levels={self.levels}"})
            | (dict.fromkeys(("sigma_min", "sigma_max"), "method.levels=own") if self.levels == "own" else {})
            | ({} if self.weight == "sigmoid" else {"sigmoid_bias": f"method.weight={self.weight}"})
        )


@dataclass
class Jump:
    """Where every sample starts and lands, but for the student's guess: all [N, C, H, W] and, of levels, [N]."""

    z_t: Tensor
    S_t: Tensor
    S_s: Tensor
    xi: Tensor
    labels: Condition | None
    batch: Batch

    def part(self, window: slice) -> "Jump":
        """The jumps of some samples of the batch."""
        return replace(self, **{name: value[window] for name, value in vars(self).items() if isinstance(value, Tensor | Text)})


class MomentMatching(Method):
    """What both algorithms share: the jumps, the student that makes them, and how it is sampled."""

    def __init__(self, cfg: MomentMatchingConfig, teacher: Denoiser, student: Denoiser):
        check_guidance(cfg.guidance, teacher)
        student.set_dropout(cfg.dropout)
        self.cfg, self.student = cfg, student
        grid = torch.arange(cfg.steps, 0, -1, dtype=torch.float64, device="cpu") / cfg.steps
        self.sampler = Sampler(ANCESTRAL, self.level(grid).tolist())  # Alg. 1

    def level(self, t: Tensor) -> Tensor:
        """S(t)."""
        return self.student.level(t) if self.cfg.levels == "own" else self.student.told(LEVELS[self.cfg.levels](t, self.cfg))

    def teacher_level(self, u: Tensor) -> Tensor:
        return self.level(u.double())

    def weight(self, S: Tensor) -> Tensor:
        """w [N] at levels S [N]."""
        return self.student.weight(S) if self.cfg.weight == "own" else WEIGHTS[self.cfg.weight](S, self.cfg)

    def begin(self, batch: Batch) -> Jump:
        x, labels, draws, *_ = batch
        s = draws.level().double()
        t = (s + draws.uniform() / self.cfg.steps).clamp(max=1)
        S_t, S_s = self.level(t).to(x.dtype), self.level(s).to(x.dtype)
        return Jump(add_noise(x, S_t, noise_like(x, draws)), S_t, S_s, noise_like(x, draws), labels, batch)

    def guess(self, jump: Jump) -> Tensor:
        """x̃ = g_η(z_t)."""
        return self.student(jump.z_t, jump.S_t, jump.labels)

    def state_at_s(self, jump: Jump, x: Tensor) -> Tensor:
        """z_s, without gradient; computed in float64, for S spans five decades."""
        S_t, S_s = per_sample(jump.S_t.double(), x), per_sample(jump.S_s.double(), x)
        return posterior(x.detach(), jump.z_t, S_t, S_s, jump.xi).to(x.dtype)


class Alternating(MomentMatching):
    """Algorithm 2: φ and the student take turns, one a batch."""

    def __init__(self, cfg: MomentMatchingConfig, teacher: Denoiser, student: Denoiser, fake: Denoiser):
        super().__init__(cfg, teacher, student)
        fake.set_dropout(0.0)
        self.fake, self.frozen_fake, self.teacher = fake, frozen(fake), frozen(teacher)
        self.nets = {"student": student, "fake": fake}
        self.turns = (Turn("fake", self.fake_loss, every=2), Turn("student", self.student_loss, every=2, after=1))
        self.gaps = Gaps(self.teacher_level, self.teacher.weight)

    def fake_loss(self, jump: Jump) -> tuple[Tensor, Logs]:
        """L_φ: denoise the student's guesses, but stay near the teacher."""
        with torch.no_grad():
            x = self.guess(jump)
            z_s = self.state_at_s(jump, x)
            real = self.teacher.estimate(z_s, jump.S_s, jump.labels, guidance=self.cfg.guidance).denoised()
        fake, w = self.fake.estimate(z_s, jump.S_s, jump.labels), self.weight(jump.S_s)
        own, nonfinite = denoise(fake, x, w, reduction="sum")
        near, _ = denoise(fake, real, w, reduction="sum")
        own, near = own.mean(), near.mean()
        return own + near, {"own": own, "near": near, "nonfinite": nonfinite}

    def student_loss(self, jump: Jump) -> tuple[Tensor, Logs]:
        """L_η: its value says nothing, its gradient moves x̃ along g_θ - g_φ."""
        x = self.guess(jump)
        with torch.no_grad():
            z_s = self.state_at_s(jump, x)
            real = self.teacher.estimate(z_s, jump.S_s, jump.labels, guidance=self.cfg.guidance)
            fake = self.frozen_fake.estimate(z_s, jump.S_s, jump.labels)
        loss, nonfinite = moments(x, real, fake, self.weight(jump.S_s), reduction="sum")
        loss = loss.mean()
        logs = {"inner": loss, "nonfinite": nonfinite} | self.gaps(real, fake, jump.S_s) | variance(x, self.data_variance)
        return loss, logs


class Instant(MomentMatching):
    """Algorithm 3: what φ would learn in one small step from θ takes φ's place."""

    state: SecondMoment

    def __init__(self, cfg: MomentMatchingConfig, teacher: Denoiser, student: Denoiser):
        super().__init__(cfg, teacher, student)
        self.teacher = WeightSpace(frozen(teacher), cfg.guidance)
        self.state = SecondMoment(self.teacher.parameters(), cfg.measure_decay, cfg.eps)
        self.nets = {"student": student}
        self.turns = (Turn("student", self.measure, every=cfg.measure_every), Turn("student", self.student_loss))

    def measure(self, jump: Jump) -> None:
        """No step: v from the teacher's own loss on real images (EDM's, without dropout)."""
        y, labels, draws, *_ = jump.batch
        sigma = self.teacher.net.told(lognormal(draws.normal()))
        x_t = add_noise(y, sigma, noise_like(y, draws))
        ranks = self.ranks.count
        size = max(self.cfg.measure_batch // ranks, 1) if self.together else self.cfg.measure_batch
        for i in range(0, len(y), size):
            n = slice(i, i + size)
            estimate = self.teacher.net.estimate(x_t[n], sigma[n], labels[n] if labels is not None else None)
            loss = denoise(estimate, y[n], self.teacher.net.weight(sigma[n]), reduction="sum").value.mean()
            gradient = self.teacher.gradient(loss)
            if self.together:
                self.ranks.average(gradient)
            squares = [g.square() for g in gradient]
            if not self.together:
                self.ranks.average(squares)
            self.state.add(squares, 1 if self.together else ranks)

    def student_loss(self, jump: Jump) -> tuple[Tensor, Logs]:
        n = len(jump.z_t)
        if n < 2:
            raise UserError("instant moment matching halves its batch: wanted 2 images or more per rank and micro-batch, got 1")
        return self.matched(jump.part(slice(n // 2)), jump.part(slice(n // 2, n)))

    def matched(self, first: Jump, second: Jump) -> tuple[Tensor, Logs]:
        """L_η on the second half, along ν from the first. Logs ½ |μ|²_Λ, which falls as the student learns."""
        mu = self.moment(first)
        if self.together:
            self.ranks.average(mu)
        nu = [-m for m in self.state.scaled(mu)]
        x = self.guess(second)
        direction = self.teacher.derivative(nu, self.state_at_s(second, x), second.S_s, second.labels, self.cfg.jvp)
        loss, nonfinite = moments(x, torch.zeros_like(x), direction, self.weight(second.S_s), reduction="sum")
        moment = -0.5 * torch.stack([(m * n).sum() for m, n in zip(mu, nu, strict=True)]).sum()
        return loss.mean(), {"moment": moment, "nonfinite": nonfinite} | variance(x, self.data_variance)

    def moment(self, jump: Jump) -> list[Tensor]:
        """μ: the teacher's gradient on the student's guesses, one tensor per parameter."""
        with torch.no_grad():
            x = self.guess(jump)
        estimate = self.teacher.estimate(self.state_at_s(jump, x), jump.S_s, jump.labels)
        return self.teacher.gradient(denoise(estimate, x, self.weight(jump.S_s), reduction="sum").value.mean())


LEVELS: dict[str, Callable[[Tensor, MomentMatchingConfig], Tensor]] = {
    "karras": lambda t, cfg: karras_at(t, cfg.sigma_min, cfg.sigma_max, cfg.rho),
    "cosine": lambda t, cfg: (t * math.pi / 2).tan().clamp(cfg.sigma_min, cfg.sigma_max),
    "log_uniform": lambda t, cfg: cfg.sigma_min * (cfg.sigma_max / cfg.sigma_min) ** t,
}
WEIGHTS: dict[str, Callable[[Tensor, MomentMatchingConfig], Tensor]] = {
    "flat": lambda S, cfg: torch.ones_like(S),
    "sqrt_karras": lambda S, cfg: (S**2 + 0.5**2).sqrt() / (S * 0.5),
    "edm": lambda S, cfg: edm_weight(S),
    "snr": lambda S, cfg: 1 / S**2,
    "sigmoid": lambda S, cfg: 1 / (S**2 + math.exp(-cfg.sigmoid_bias)),
}
