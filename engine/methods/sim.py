"""SIM: score implicit matching (2410.16794), and with `distance: l2` the family it generalises, SiD (2404.04057).

The student g turns noise into images x in one step. Two denoisers look at x_t = x + σ n: the teacher D_q knows the data,
the fake net D_ψ has learnt the student's images. SIM makes a distance d of their scores small, averaged over σ. That
distance contains the score of the student's own law, which has no gradient; the paper's score-gradient identity gives the
same gradient without it. With δ = D_q(x_t) - D_ψ(x_t), and sums over the pixels of a sample:

    huber    L_g = w < δ / sqrt(|δ|² + c²), D_ψ - x >                  d = sqrt(|·|² + c²) - c, the paper's choice
    l2       L_g = w < δ, (D_q - x) - α δ >,   w = 1 / mean|x - D_q|   α = 1: SIM with d = |·|²; α = 1.2: SiD
    L_ψ      λ(σ) |D_ψ(x + σ n) - x|²,   ln σ ~ N(-1.2, 1.2²)          EDM's loss on the student's images

Text-to-image (SiD-LSG 2406.01561, SiD-DiT 2509.25127): `levels` takes both σ from the net's own times or from one log-normal law,
`fake_guidance` guides ψ as well, in its own training too, and `steps` makes a few-step student, trained on inputs that it makes
itself (`parts.Generator`).

θ enters L_g everywhere: through x, and through x_t into both nets. Only their *weights* stand still, so gradients flow
through both nets to their inputs; cutting either is another, biased method. No real image is looked at.

Differs from the paper: its training code is not public, so the skeleton (order of turns, laws of σ, loss scale) is that of
SiD's. SiD takes each image's class from the next real one, so in the data's proportions; here classes are uniform, which is
the same where all are equally frequent. c is constant in units of D, where the paper's c is one of scores (c/σ²); its value there is not known. EDM's
augmentation of the images that ψ learns from is left out. Samples that are not finite count as zero and are reported.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from potstill.engine.common.checks import Unused
from potstill.engine.methods.base import Batch, Logs, MethodConfig, Needs, Turn, copied
from potstill.engine.methods.parts import Implicit, check_implicit, conditions, noise_like, unused_of_implicit
from potstill.engine.methods.vitals import variance
from potstill.engine.nets.conditions import Condition
from potstill.engine.nets.denoiser import Denoiser
from potstill.kernels import Losses, add_noise, denoise, score_implicit


@dataclass
class SIMConfig(MethodConfig):
    """Defaults: SiD's CIFAR-10 settings (released code) with SIM's distance."""

    name: str = "sim"  # set by method=…
    variants = ("sim_l2", "sid")
    distance: str = "huber"  # of the scores: huber (SIM) | l2 (SiD)
    weight: str = "own"  # w: own (huber's 1, l2's 1 / mean|x - D_q|) | one_minus_t (1 / (1 + σ): a flow's 1 - t; SiD-DiT)
    c: float | None = None  # of huber; null: 0.00054·sqrt(C·H·W), 0.03 for CIFAR-10 (from 2310.14189; SIM's is unverified)
    alpha: float = 1.0  # of l2; 1.2 is SiD's best except on AFHQv2, 0.5 the gradient of the whole Fisher divergence
    sigma: float = 2.5  # σ_init: the student's only noise level, unless `steps` names others
    steps: list[int] = field(default_factory=list)  # the student's levels among the net's 1000, such as [999, 749, 499, 249]; []: sigma
    start: str = "sigma"  # what the student begins with: sigma (x = σ z) | unit (z is what enters the net)
    levels: str = "karras"  # laws of σ: karras (L_g's by Karras, L_ψ's log-normal) | own (both by the net's times) | lognormal (both)
    t_min: float = 0.0  # of [0, 1]: L_g's σ is uniform on Karras' map of 0.002 … 80, or on the net's own times, from here (0.002)
    t_max: float = 0.8  # up to here (24.4)
    fake_per_student: int = 1  # updates of the fake net for one of the student; SiD's and SIM's is 1
    scale: float = 100.0  # of L_g; under Adam it matters only against eps
    guidance: float = 1.0  # of the teacher; 1 is none
    fake_guidance: float = 1.0  # of the fake net, also in its own training loss
    dropout: float | None = None  # of student and fake net, each in its own turn; null: what the teacher was trained with
    P_mean: float = -1.2  # mean of ln σ where its law is log-normal: a logit-normal t of a flow is the same law
    P_std: float = 1.2  # standard deviation of ln σ there

    def __post_init__(self):
        super().__post_init__()
        check_implicit(self)

    def needs(self) -> Needs:
        return Needs(data=False, nets=("student", "fake"), classes=self.guidance != 1 or self.fake_guidance != 1)

    def build(self, teacher: Denoiser, start: Denoiser) -> "SIM":
        return SIM(self, teacher, student=copied(start), fake=copied(teacher, "fake"))

    def unused(self) -> Unused:
        return unused_of_implicit(self)


class SIM(Implicit):
    """Two turns on images of their own: ψ learns the student's images, then the student moves."""

    asks = 2  # each turn draws its own

    def __init__(self, cfg: SIMConfig, teacher: Denoiser, student: Denoiser, fake: Denoiser):
        super().__init__(cfg, teacher, student, fake)
        self.turns = (Turn("fake", self.fake_loss), Turn("student", self.student_loss, every=cfg.fake_per_student))

    def fake_loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        """L_ψ: denoise the student's images."""
        labels = conditions(self.fake, batch, ask=0)
        with torch.no_grad():
            x = self.generate(self.frozen_student, batch.draws, labels)
        sigma = self.fake_level(batch.draws)
        x_t = add_noise(x, sigma, noise_like(x, batch.draws))
        estimate = self.fake.estimate(x_t, sigma, labels, guidance=self.cfg.fake_guidance)
        loss, nonfinite = denoise(estimate, x, self.teacher.weight(sigma), reduction="sum")
        loss = loss.mean()
        return loss, {"denoise": loss, "nonfinite": nonfinite}

    def student_loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        """L_g on fresh noise and labels."""
        labels = conditions(self.student, batch, ask=1)
        x = self.generate(self.student, batch.draws, labels, before=self.frozen_student)
        sigma = self.teacher_level(batch.draws.level())
        weight = 1 / (1 + sigma) if self.cfg.weight == "one_minus_t" else None
        (loss, nonfinite), gaps = self.implicit_distance(x, sigma, noise_like(x, batch.draws), labels, weight)
        loss = loss.mean()
        return self.cfg.scale * loss, {"implicit": loss, "nonfinite": nonfinite} | gaps | variance(x, self.data_variance)

    def implicit_distance(
        self, x: Tensor, sigma: Tensor, noise: Tensor, labels: Condition | None, weight: Tensor | None = None
    ) -> tuple[Losses, Logs]:
        """Per sample, what has the gradient of w·d(score of x's law - score of the data) at x_t, averaged; and the gaps there.

        weight [N]: w; None is 1 for huber, and for l2 SiD's 1 / mean|x - D_q|.
        """
        x_t = add_noise(x, sigma, noise)
        real = self.teacher.estimate(x_t, sigma, labels, guidance=self.cfg.guidance)
        fake = self.frozen_fake.estimate(x_t, sigma, labels, guidance=self.cfg.fake_guidance)
        losses = score_implicit(x, real, fake, distance=self.cfg.distance, alpha=self.cfg.alpha, c=self.c, weight=weight)
        return losses, self.gaps(real, fake, sigma)
