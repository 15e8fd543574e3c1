"""DMD and DMD2: distribution matching distillation (2311.18828, 2405.14867).

The student G maps noise to images in one step. Two denoisers judge its images x after noising them to x_t: the teacher
knows the score of the data, the fake net μ_fake is trained on the student's own images and knows theirs. G moves along the
difference, which is the gradient of KL(student || data) averaged over noise levels:

    g = (μ_fake(x_t) - μ_real(x_t)) / mean|x - μ_real(x_t)|                                   DMD Eq. 7-8
    L_student = ½ mean (x - sg(x - g))²   [+ w_G  softplus(-l(x_s))]                           DMD2 Eq. 3
                [+ w_R  d(G(z'), y')]   on pairs (z', y') of noise and the teacher's ODE sample    DMD Eq. 9
    L_fake    = λ(σ) mean (μ_fake(x_σ) - x)²  [+ w_D (softplus(l(x_s)) + softplus(-l(y_s)))]

l is a head on μ_fake's encoder, x_s and y_s are generated and real images with noise of their own (diffusion GAN).
TTUR: `fake_per_student` updates of μ_fake for each of G, on G's turns with the very images G was trained on.

Few-step students (DMD2's `steps`) are trained on the inputs that they make themselves (`parts.Generator`); the regression is then of
their first step alone, since on fresh noise no pair is known. Text-to-image: the
noise levels are the net's own, the weights are 1 on its raw output, `start: unit` gives the net z itself, as the released code
does, and `fake_guidance` guides the fake net as well, in its own training too (SiD-LSG, 2406.01561).

Differs from the paper: the weight's denominator is kept above 1e-6 (the released code divides by whatever it is and then
replaces NaN); samples that are not finite count as zero and are reported; the regression's metric can be pixels' L2.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from potstill.engine.common.checks import Unused, above, at_least, one_of, window
from potstill.engine.diffusion.sigmas import GRID
from potstill.engine.methods.base import Batch, Logs, Method, MethodConfig, Needs, PairsNeeded, Turn, copied, frozen, integer_at
from potstill.engine.methods.parts import Generator, check_generator, check_guidance, conditions, grid_level, noise_like
from potstill.engine.methods.vitals import Gaps, accuracy, mean_finite, variance
from potstill.engine.nets.conditions import Condition
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.discriminators import Critic
from potstill.engine.nets.features import LPIPS, lpips_extra
from potstill.kernels import add_noise, denoise, discriminator_adversarial, generator_adversarial, score_match


@dataclass
class DMDConfig(MethodConfig):
    """Defaults: DMD2's ImageNet-64 recipe (released code)."""

    name: str = "dmd"  # set by method=…
    variants = ("dmd2",)
    sigma: float = 80.0  # the student's only noise level, unless `steps` names others
    steps: list[int] = field(default_factory=list)  # the student's levels among the net's 1000, such as [999, 749, 499, 249]; []: sigma
    start: str = "sigma"  # what the student begins with: sigma (x = σ z) | unit (z is what enters the net)
    fake_per_student: int = 5  # updates of the fake net for one of the student (TTUR); DMD 1 used 1
    match_index: list[int] = field(default_factory=lambda: [20, 980])  # first and last level matched, of the 1000-point grid
    fake_index: list[int] = field(default_factory=lambda: [0, 999])  # the fake net's levels in its training, likewise
    guidance: float = 1.0  # of the teacher; 1 is none
    fake_guidance: float = 1.0  # of the fake net, also in its own training loss
    gan: bool = False  # a GAN head on the fake net's encoder: DMD2
    gan_index: list[int] = field(default_factory=lambda: [0, 999])  # levels that the head sees; [0, 0] for (almost) clean images
    gan_student: float = 3e-3  # w_G: weight of the GAN in the student's loss
    gan_fake: float = 1e-2  # w_D: weight of the GAN in the fake net's loss
    regression: float = 0.0  # w_R: weight of the regression on pairs; DMD 1 has 0.25 (conditional) or 0.5, with fake_per_student 1
    regression_metric: str = "lpips"  # lpips (the paper's; the extra of that name) | l2
    pairs: int = 25_000  # of noise and teacher sample, made once; the paper's number for ImageNet-64
    pair_steps: int = 256  # of Heun, for each

    def __post_init__(self):
        super().__post_init__()
        above(self, 0, "sigma", "guidance", "fake_guidance")
        check_generator(self)
        at_least(self, 1, "fake_per_student", "pairs", "pair_steps")
        at_least(self, 0, "gan_student", "gan_fake", "regression")
        for name in ("match_index", "fake_index", "gan_index"):
            window(self, name, GRID - 1)
        one_of(self, "regression_metric", ("lpips", "l2"))

    def needs(self) -> Needs:
        perceptual = self.regression > 0 and self.regression_metric == "lpips"
        return Needs(
            data=self.gan,
            nets=("student", "fake"),
            classes=self.guidance != 1 or self.fake_guidance != 1,
            pairs=PairsNeeded(self.pairs, self.pair_steps) if self.regression else None,
            extras=[lpips_extra("method.regression", "set method.regression_metric=l2")] if perceptual else [],
        )

    def build(self, teacher: Denoiser, start: Denoiser) -> "DMD":
        return DMD(self, teacher, student=copied(start), fake=copied(teacher, "fake"))

    def unused(self) -> Unused:
        gan: Unused = {} if self.gan else dict.fromkeys(("gan_index", "gan_student", "gan_fake"), "method.gan=false")
        pairs: Unused = {} if self.regression else dict.fromkeys(("regression_metric", "pairs", "pair_steps"), "method.regression=0")
        return gan | pairs | ({"sigma": "method.steps"} if self.steps else {})


@dataclass
class Shared:
    """One iteration: the batch, and the images that the first turn to need them generated."""

    batch: Batch
    labels: Condition | None
    images: Tensor | None = None


class DMD(Method):
    """Two turns; the student's is the rarer one."""

    may_be_new = ("head.",)  # the GAN's, which DMD 1 and MSD's first stage do without

    def __init__(self, cfg: DMDConfig, teacher: Denoiser, student: Denoiser, fake: Denoiser):
        check_guidance(cfg.guidance, teacher)
        check_guidance(cfg.fake_guidance, fake, "fake_guidance")
        for net in (student, fake):
            net.set_dropout(0.0)  # DMD and DMD2 train without
        self.cfg, self.teacher = cfg, frozen(teacher)
        critic = Critic(fake, with_head=cfg.gan)
        self.nets = {"student": student, "fake": critic}
        self.student, self.fake = student, critic
        self.frozen_fake = frozen(critic)
        self.turns = (
            Turn("student", self.student_loss, every=cfg.fake_per_student),
            Turn("fake", self.fake_loss),
        )
        self.generate = Generator(student, cfg.sigma, cfg.steps, cfg.start)
        self.sampler, self.gaps = self.generate.sampler, Gaps(self.teacher_level, self.teacher.weight)
        self.perceptual = LPIPS() if cfg.regression and cfg.regression_metric == "lpips" else None

    def teacher_level(self, u: Tensor) -> Tensor:
        return grid_level(self.teacher, integer_at(u, *self.cfg.match_index))

    def begin(self, batch: Batch) -> Shared:
        return Shared(batch, conditions(self.student, batch))

    def student_loss(self, it: Shared) -> tuple[Tensor, Logs]:
        """Move x along fake - real, and towards images the head takes for real."""
        x = self.generate(self.student, it.batch.draws, it.labels)
        it.images = x.detach()
        with torch.no_grad():
            sigma = grid_level(self.teacher, it.batch.draws.integer_level(*self.cfg.match_index))
            x_t = add_noise(x, sigma, noise_like(x, it.batch.draws))
            real = self.teacher.estimate(x_t, sigma, it.labels, guidance=self.cfg.guidance)
            fake = self.frozen_fake.estimate(x_t, sigma, it.labels, guidance=self.cfg.fake_guidance)
        loss, nonfinite = score_match(x, real, fake)
        loss = loss.mean()
        logs = {"match": loss, "nonfinite": nonfinite} | self.gaps(real, fake, sigma) | variance(it.images, self.data_variance)
        if self.cfg.gan:
            adversarial = generator_adversarial([self.logits(self.frozen_fake, x, it.labels, it)]).value.mean()
            loss, logs = loss + self.cfg.gan_student * adversarial, logs | {"gan": adversarial}
        if self.cfg.regression:
            distance = self.regression(it)
            loss, logs = loss + self.cfg.regression * distance, logs | {"regression": distance}
        return loss, logs

    def regression(self, it: Shared) -> Tensor:
        """d(G(z'), y') on as many pairs as the batch has images; every student of MSD sees the pairs of all classes."""
        assert self.pairs is not None
        chosen = it.batch.draws.integers(0, len(self.pairs.z) - 1)
        z, y = self.pairs.z[chosen], self.pairs.y[chosen]
        labels = None if self.pairs.labels is None else self.pairs.labels[chosen]
        sigma = z.new_full((len(z),), self.generate.sigmas[0])
        x = self.student(self.generate.first(self.student, z, sigma), sigma, labels)
        return self.perceptual(x, y).mean() if self.perceptual else denoise(x, y).value.mean()

    def fake_loss(self, it: Shared) -> tuple[Tensor, Logs]:
        """μ_fake learns to denoise the student's images, and its head to tell them from real ones."""
        if it.images is None:
            with torch.no_grad():
                it.images = self.generate(self.student, it.batch.draws, it.labels)
        x = it.images
        sigma = grid_level(self.teacher, it.batch.draws.integers(*self.cfg.fake_index))
        x_t = add_noise(x, sigma, noise_like(x, it.batch.draws))
        estimate = self.fake.estimate(x_t, sigma, it.labels, guidance=self.cfg.fake_guidance)
        loss, nonfinite = denoise(estimate, x, self.teacher.weight(sigma))
        loss = loss.mean()
        logs = {"denoise": loss, "nonfinite": nonfinite}
        if self.cfg.gan:
            y, real_labels = it.batch.images, it.batch.labels
            logits = self.logits(self.fake, x, it.labels, it), self.logits(self.fake, y, real_labels, it)
            adversarial = discriminator_adversarial([logits[0]], [logits[1]]).value.mean()
            mean_logits = {"logit_fake": mean_finite(logits[0]), "logit_real": mean_finite(logits[1])}
            loss = loss + self.cfg.gan_fake * adversarial
            logs |= {"gan": adversarial, "accuracy": accuracy(logits[:1], logits[1:])} | mean_logits
        return loss, logs

    def logits(self, critic: Critic, x: Tensor, labels: Condition | None, it: Shared) -> Tensor:
        """The head's opinion of x under fresh noise: [N, 1]."""
        sigma = grid_level(self.teacher, it.batch.draws.integers(*self.cfg.gan_index))
        return critic.logits(add_noise(x, sigma, noise_like(x, it.batch.draws)), sigma, labels)
