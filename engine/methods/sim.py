"""SIM: score implicit matching (2410.16794), and with `distance: l2` the family it generalises, SiD (2404.04057).

The student g turns noise into images x in one step. Two denoisers look at x_t = x + σ n: the teacher D_q knows the data,
the fake net D_ψ has learnt the student's images. SIM makes a distance d of their scores small, averaged over σ. That
distance contains the score of the student's own law, which has no gradient; the paper's score-gradient identity gives the
same gradient without it. With δ = D_q(x_t) - D_ψ(x_t), and sums over the pixels of a sample:

    huber    L_g = w < δ / sqrt(|δ|² + c²), D_ψ - x >                  d = sqrt(|·|² + c²) - c, the paper's choice
    l2       L_g = w < δ, (D_q - x) - α δ >,   w = 1 / mean|x - D_q|   α = 1: SIM with d = |·|²; α = 1.2: SiD
    L_ψ      λ(σ) |D_ψ(x + σ n) - x|²,   ln σ ~ N(-1.2, 1.2²)          EDM's loss on the student's images

θ enters L_g everywhere: through x, and through x_t into both nets. Only their *weights* stand still, so gradients flow
through both nets to their inputs; cutting either is another, biased method. No real image is looked at.

Differs from the paper: its training code is not public, so the skeleton (order of turns, laws of σ, loss scale) is that of
SiD's. SiD takes each image's class from the next real one, so in the data's proportions; here classes are uniform, which is
the same where all are equally frequent. c is constant in units of D, where the paper's c is one of scores (c/σ²); its value there is not known. EDM's
augmentation of the images that ψ learns from is left out. Samples that are not finite count as zero and are reported.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.engine.common.checks import Unused, above, one_of, probability, wants
from potstill.engine.diffusion.sampling import one_step
from potstill.engine.diffusion.sigmas import edm_weight, karras_at, lognormal
from potstill.engine.methods.base import Batch, Logs, Method, MethodConfig, Needs, Turn, copied, frozen
from potstill.engine.methods.parts import check_guidance, generate, noise_like, set_dropout
from potstill.engine.methods.vitals import Gaps, variance
from potstill.engine.nets.denoiser import Denoiser
from potstill.kernels import Losses, add_noise, denoise, score_implicit


@dataclass
class SIMConfig(MethodConfig):
    """Defaults: SiD's CIFAR-10 settings (released code) with SIM's distance."""

    name: str = "sim"  # set by method=…
    distance: str = "huber"  # of the scores: huber (SIM) | l2 (SiD)
    c: float | None = None  # of huber; null: 0.00054·sqrt(C·H·W), 0.03 for CIFAR-10 (from 2310.14189; SIM's is unverified)
    alpha: float = 1.0  # of l2; 1.2 is SiD's best except on AFHQv2, 0.5 the gradient of the whole Fisher divergence
    sigma: float = 2.5  # σ_init: the student's only noise level
    t_max: float = 0.8  # of [0, 1]: L_g's σ is uniform on Karras' map of 0.002 … 80 up to here (24.4)
    scale: float = 100.0  # of L_g; under Adam it matters only against eps
    guidance: float = 1.0  # of the teacher; 1 is none
    dropout: float | None = None  # of student and fake net, each in its own turn; null: what the teacher was trained with
    P_mean: float = -1.2  # mean of ln σ in L_ψ, the fake net's loss
    P_std: float = 1.2  # standard deviation of ln σ in L_ψ

    def __post_init__(self):
        super().__post_init__()
        one_of(self, "distance", ("huber", "l2"))
        wants(self, "alpha", self.distance == "l2" or self.alpha == 1, "to be 1 with method.distance=huber (it is of l2)")
        above(self, 0, "c", "sigma", "scale", "P_std")
        wants(self, "t_max", 0 < self.t_max <= 1, "a share of the noise levels in (0, 1]")
        probability(self, "dropout")

    def needs(self) -> Needs:
        return Needs(data=False, classes=self.guidance != 1)

    def build(self, teacher: Denoiser, start: Denoiser) -> "SIM":
        return SIM(self, teacher, student=copied(start), fake=copied(teacher))

    def unused(self) -> Unused:
        return {"c": "method.distance=l2"} if self.distance == "l2" else {}


class SIM(Method):
    """Two turns on images of their own: ψ learns the student's images, then the student moves."""

    def __init__(self, cfg: SIMConfig, teacher: Denoiser, student: Denoiser, fake: Denoiser):
        check_guidance(cfg.guidance, teacher)
        if cfg.dropout is not None:
            set_dropout(student, cfg.dropout)
            set_dropout(fake, cfg.dropout)
        self.cfg, self.teacher = cfg, frozen(teacher)
        self.student, self.fake = student, fake
        self.frozen_student, self.frozen_fake = frozen(student), frozen(fake)
        self.nets = {"fake": fake, "student": student}
        self.turns = (Turn("fake", self.fake_loss), Turn("student", self.student_loss))
        self.sampler, self.gaps = one_step(cfg.sigma), Gaps(self.teacher_level)
        pixels = student.img_channels * student.img_resolution**2
        self.c = 0.00054 * pixels**0.5 if cfg.c is None else cfg.c

    def fake_loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        """L_ψ: denoise the student's images."""
        labels = batch.draws.labels(self.fake.label_dim)
        with torch.no_grad():
            x = generate(self.frozen_student, batch.draws, self.cfg.sigma, labels)
        sigma = lognormal(batch.draws.normal(), self.cfg.P_mean, self.cfg.P_std)
        x_t = add_noise(x, sigma, noise_like(x, batch.draws))
        loss, nonfinite = denoise(self.fake.estimate(x_t, sigma, labels), x, edm_weight(sigma), reduction="sum")
        loss = loss.mean()
        return loss, {"denoise": loss, "nonfinite": nonfinite}

    def student_loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        """L_g on fresh noise and labels."""
        labels = batch.draws.labels(self.student.label_dim)
        x = generate(self.student, batch.draws, self.cfg.sigma, labels)
        sigma = self.teacher_level(batch.draws.level())
        (loss, nonfinite), gaps = self.implicit_distance(x, sigma, noise_like(x, batch.draws), labels)
        loss = loss.mean()
        return self.cfg.scale * loss, {"implicit": loss, "nonfinite": nonfinite} | gaps | variance(x, self.data_variance)

    def teacher_level(self, u: Tensor) -> Tensor:
        return karras_at(self.cfg.t_max * u)

    def implicit_distance(
        self, x: Tensor, sigma: Tensor, noise: Tensor, labels: Tensor | None, weight: Tensor | None = None
    ) -> tuple[Losses, Logs]:
        """Per sample, what has the gradient of w·d(score of x's law - score of the data) at x_t, averaged; and the gaps there.

        weight [N]: w; None is 1 for huber, and for l2 SiD's 1 / mean|x - D_q|.
        """
        x_t = add_noise(x, sigma, noise)
        real = self.teacher.estimate(x_t, sigma, labels, guidance=self.cfg.guidance)
        fake = self.frozen_fake.estimate(x_t, sigma, labels)
        losses = score_implicit(x, real, fake, distance=self.cfg.distance, alpha=self.cfg.alpha, c=self.c, weight=weight)
        return losses, self.gaps(real, fake, sigma)
