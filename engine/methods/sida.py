"""SiDA: SiD with a GAN whose discriminator is the fake net's own encoder (2410.14919); SiD²A goes on from a SiD student.

SiD's two denoisers judge the student's images x at x_t = x + σ n: the teacher R = D_φ(x_t), and the fake net F = D_ψ(x_t), which
learns the student's images. Real images y come in by ψ's encoder, which learns to tell them from x beside its own work. Its logits
l(·) are the mean over the channels of what its last encoder block returns, one a pixel of that map: no parameter is added.
With δ = R - F, CHW the numbers of an image, and E the mean over samples (and logits):

    L_ψ    = E λ |D_ψ(x + σ n) - x|²  +  w_D · E λ · ½ (E softplus(-l(y + σ n)) + E softplus(l(x + σ n)))     ln σ ~ N(-1.2, 1.2²)
    L_sid  = s · E w < δ, (R - x) - α δ >,   w = 1 / mean|x - R|                                       Karras' σ of 0.002 … 24.4
    L_gan  = w_G · CHW · E w · g,   g = E softplus(-clamp(l(x_t), ±10))              no gradient from logits beyond, nor through w

In L_ψ generated and real image share σ, n and the class. g and the bracket are one number for all samples that they are the mean
of, so what weighs them is a mean, too: over a micro-batch where there are any, else over all ranks' samples.

Order and lengths (released code): in the first 100 thousand images ψ alone learns, to 200 thousand the student by L_sid,
then by (1 - b) L_sid + b L_gan with b = 0.5. The gradient of ψ is clipped number by number: `train.optim.fake.clip_value: 1`.

SiD²A: `students.start` names a run of SiD's, or a student's weight file. The student and its average start as that one's average, teacher
and fake net as the teacher; optimisers and lengths begin anew.

Nets that have learnt the log-variance v(σ) of their own error (EDM2): every term of the student is divided by e^v, λ by e^v, and CHW · v
added to L_ψ; v is ψ's, and the GAN trains it as well.

`distance: huber` is SIM's, with w = 1 in both losses: ours, not the paper's. Few steps, guidance and the laws of σ are as SIM's.

Differs from the released code: the student's classes are uniform, where it takes those of the next real images; the fake net's are the
data's. EDM's augmentation of what ψ sees is left out. Samples that are not finite count as zero and are reported, their logits, too,
where the released code replaces NaN and infinities in gradients.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from potstill.engine.common.checks import Unused, at_least, wants
from potstill.engine.methods.base import ALWAYS, Batch, Logs, MethodConfig, Needs, Turn, copied
from potstill.engine.methods.parts import Implicit, check_implicit, conditions, noise_like, unused_of_implicit
from potstill.engine.methods.vitals import accuracy, mean_finite, variance
from potstill.engine.nets.denoiser import Denoiser
from potstill.kernels import (
    Estimate,
    add_noise,
    denoise,
    discriminator_adversarial,
    generator_adversarial,
    score_implicit,
)

CLAMP = 10.0  # of the student's logits


@dataclass
class SIDAConfig(MethodConfig):
    """Defaults: SiDA's for EDM's nets (released code)."""

    name: str = "sida"  # set by method=…
    distance: str = "l2"  # of the scores: l2 (SiD) | huber (SIM)
    weight: str = "own"  # w: own (l2's 1 / mean|x - R|, huber's 1) | one_minus_t (1 / (1 + σ): a flow's 1 - t; SiD-DiT)
    c: float | None = None  # of huber; null: 0.00054·sqrt(C·H·W)
    alpha: float = 1.0  # of l2; SiD²A's best checkpoints were trained at 1 and at 1.2
    sigma: float = 2.5  # σ_init: the student's only noise level, unless `steps` names others
    steps: list[int] = field(default_factory=list)  # the student's levels among the net's 1000, such as [999, 749, 499, 249]; []: sigma
    start: str = "sigma"  # what the student begins with: sigma (x = σ z) | unit (z is what enters the net)
    levels: str = (
        "karras"  # laws of σ: karras (the student's by Karras, L_ψ's log-normal) | own (both by the net's times) | lognormal (both)
    )
    t_min: float = 0.0  # of [0, 1]: the student's σ is uniform on Karras' map of 0.002 … 80, or on the net's own times, from here (0.002)
    t_max: float = 0.8  # up to here (24.4)
    fake_per_student: int = 1  # updates of the fake net for one of the student
    scale: float = 100.0  # s, of L_sid; EDM2-M's SiD²A has 50
    gan_student: float = 0.01  # w_G, of L_gan
    gan_fake: float = 1.0  # w_D, of the discriminator in L_ψ; 100 with EDM2's nets
    gan_share: float = 0.5  # b: L_gan's share of the student's loss once it is in it
    student_after: float = 100.0  # thousands of images after which the student begins to learn, by L_sid
    gan_after: float = 200.0  # thousands of images after which L_gan joins
    logvar: bool = True  # divide by the fake net's own estimate of its error, where it has one (all EDM2 nets but S); false: never
    guidance: float = 1.0  # of the teacher; 1 is none
    fake_guidance: float = 1.0  # of the fake net, also in its own training loss
    dropout: float | None = None  # of student and fake net, each in its own turn; null: what the teacher was trained with
    P_mean: float = -1.2  # mean of ln σ where its law is log-normal; EDM2's is -0.4
    P_std: float = 1.2  # standard deviation of ln σ there; EDM2's is 1

    def __post_init__(self):
        super().__post_init__()
        check_implicit(self)
        at_least(self, 0, "gan_student", "gan_fake", "student_after")
        wants(self, "gan_share", 0 <= self.gan_share <= 1, "a share in [0, 1]")
        wants(self, "gan_after", self.gan_after >= self.student_after, f"at least student_after = {self.student_after}")

    def needs(self) -> Needs:
        return Needs(nets=("student", "fake"), classes=self.guidance != 1 or self.fake_guidance != 1, batch_statistics=True)

    def build(self, teacher: Denoiser, start: Denoiser) -> "SIDA":
        return SIDA(self, teacher, student=copied(start), fake=copied(teacher, "fake"))

    def unused(self) -> Unused:
        return unused_of_implicit(self)


class SIDA(Implicit):
    """ψ's turn, and two of the student's, of which the later takes the place of the earlier."""

    product_alone = True

    def __init__(self, cfg: SIDAConfig, teacher: Denoiser, student: Denoiser, fake: Denoiser):
        super().__init__(cfg, teacher, student, fake)
        begins, joined = (round(1000 * kimg) if kimg else ALWAYS[0] for kimg in (cfg.student_after, cfg.gan_after))
        alone = partial(self.student_loss, gan_share=None)
        both = partial(self.student_loss, gan_share=cfg.gan_share)
        self.turns = (
            Turn("fake", self.fake_loss),
            *([Turn("student", alone, every=cfg.fake_per_student, seen=(begins, joined))] if begins < joined else []),
            Turn("student", both, every=cfg.fake_per_student, seen=(joined, ALWAYS[1])),
        )

    def fake_loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        """L_ψ: denoise the student's images, and tell them from real ones of the same classes under the same noise."""
        labels, y = batch.labels, batch.images
        with torch.no_grad():
            x = self.generate(self.frozen_student, batch.draws, labels)
        sigma, noise = self.fake_level(batch.draws), noise_like(x, batch.draws)
        guidance = self.cfg.fake_guidance
        estimate, features = self.fake.estimate_and_features(add_noise(x, sigma, noise), sigma, labels, guidance=guidance)
        fake, real = logit_map(features), logit_map(self.fake.features(add_noise(y, sigma, noise), sigma, labels))
        weight, v = self.teacher.weight(sigma), self.log_variance(self.fake, sigma)
        own, nonfinite = denoise(estimate, x, weight, reduction="sum")
        told = discriminator_adversarial([fake], [real]).value / 2
        if v is not None:
            own, weight = own / v.exp() + x[0].numel() * v, weight / v.exp()
        own, gan = own.mean(), self.product_of_means(weight, told)
        logs = {"denoise": own, "gan": told.mean(), "nonfinite": nonfinite, "accuracy": accuracy([fake], [real])}
        logs |= {"logit_fake": mean_finite(fake), "logit_real": mean_finite(real)}
        return own + self.cfg.gan_fake * gan, logs

    def student_loss(self, batch: Batch, gan_share: float | None) -> tuple[Tensor, Logs]:
        """(1 - b) L_sid + b L_gan on fresh noise and labels, b = gan_share; None: L_sid alone."""
        labels = conditions(self.student, batch)
        x = self.generate(self.student, batch.draws, labels, before=self.frozen_student)
        sigma = self.teacher_level(batch.draws.level())
        x_t = add_noise(x, sigma, noise_like(x, batch.draws))
        real, guidance = self.teacher.estimate(x_t, sigma, labels, guidance=self.cfg.guidance), self.cfg.fake_guidance
        if gan_share is None:
            fake, logits = self.frozen_fake.estimate(x_t, sigma, labels, guidance=guidance), None
        else:
            fake, features = self.frozen_fake.estimate_and_features(x_t, sigma, labels, guidance=guidance)
            logits = logit_map(features)
        w = self.own_weight(x, real, sigma)
        distance, alpha = self.cfg.distance, self.cfg.alpha
        implicit, nonfinite = score_implicit(x, real, fake, distance=distance, alpha=alpha, c=self.c, weight=w)
        implicit = implicit.mean()
        loss, logs = self.cfg.scale * implicit, {"implicit": implicit, "nonfinite": nonfinite}
        if logits is not None and gan_share is not None:
            g = generator_adversarial([logits.clamp(-CLAMP, CLAMP)]).value
            gan = self.cfg.gan_student * x[0].numel() * self.product_of_means(w, g)
            loss, logs = (1 - gan_share) * loss + gan_share * gan, logs | {"gan": g.mean()}
        return loss, logs | self.gaps(real, fake, sigma) | variance(x, self.data_variance)

    @torch.no_grad()
    def own_weight(self, x: Tensor, real: Estimate, sigma: Tensor) -> Tensor:
        """w / e^v [N]; 0 for images that are not finite."""
        if self.cfg.weight == "one_minus_t":
            w = 1 / (1 + sigma)
        elif self.cfg.distance == "huber":
            w = torch.ones_like(sigma)
        else:
            w = 1 / (x - real.denoised()).abs().flatten(1).mean(1).clamp(min=1e-5)
        v = self.log_variance(self.frozen_fake, sigma)
        return (w if v is None else w / v.exp()).nan_to_num(0.0)

    def log_variance(self, net: Denoiser, sigma: Tensor) -> Tensor | None:
        """v [N]; None for 0."""
        return net.logvar(sigma) if self.cfg.logvar else None

    def product_of_means(self, a: Tensor, b: Tensor) -> Tensor:
        """mean(a) · mean(b) over the micro-batch, or over the batch of all ranks: this rank's share of it, with its gradient."""
        a, b = a.mean(), b.mean()
        if not self.together:
            return a * b
        of_all = torch.stack([a, b]).detach()
        self.ranks.average([of_all])
        return of_all[0] * b + of_all[1] * a - of_all[0] * of_all[1]


def logit_map(features: Tensor) -> Tensor:
    """Real or generated? The mean over channels of [N, C, h, w]: [N, 1, h, w] float32."""
    return features.mean(1, keepdim=True)
