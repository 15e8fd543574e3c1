"""GDD and GDD-I: a diffusion teacher becomes a one-step generator by a GAN alone (2405.20750; its revision 2506.09376).

The student G starts as the teacher, seen as a map from noise to images at σ = 80, and is never compared with it again:
teacher and student sit in different local minima, so only the distribution of the data is matched. A projected
discriminator judges patches through frozen feature nets n; l_n(x) are its logits on an image, mean over patches:

    L_G  =  Σ_i Σ_n  mean softplus(-l_n(G(80 z_i)))                                                  every iteration
    L_D  =  Σ_i Σ_n  mean softplus(l_n(G(80 z_i))) + mean softplus(-l_n(y_i))                         then
    L_R1 =  16 · mean_i  γ/2 · |∇_y Σ_n sum l_n(y_i)|²                          every 16th, its own optimiser step

G moves first; every turn has fresh z, and of few-step students a step of its own; classes are those of the real batch y. GDD-I freezes most convolutions of G
(`freeze: 1`, engine.skipping.freezing): the layers of a diffusion U-Net that are active at different noise levels can do one step as they are.

Few-step students (`steps`) are ours: G(80 z) is then what one of its steps makes of images of its own (`parts.Generator`).

The paper's Σ_i runs over the batch of one GPU, and so fixes how L_D weighs against L_R1. Here it is `sum_over` times the
mean, whatever the batch, the micro-batch and the number of ranks: 64 is the paper's batch per GPU, 128 on ImageNet.

Differs from the paper: EDM's preconditioning, not the consistency models' with σ - 0.002, which at σ = 80 is the same to
5e-5. Spectral norms take one power iteration an update, not one a forward. Samples that are not finite count as zero and
are reported (released code: gradients NaN -> 0). The class table of a conditional discriminator starts at random, not from
EfficientNet features. Feature nets are a choice: by default the teacher's own encoder, which needs no download.
Double backward: the R1 turn differentiates the feature nets twice, so they and the discriminator's heads stay uncompiled in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from potstill.engine.common.checks import Unused, above, at_least, one_of, wants
from potstill.engine.common.errors import UserError
from potstill.engine.methods.base import Batch, Logs, Method, MethodConfig, Needs, Turn, copied, frozen
from potstill.engine.methods.parts import Generator, check_generator, noise_like
from potstill.engine.methods.vitals import accuracy, variance
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.nets.discriminators import ProjectedDiscriminator
from potstill.engine.nets.features import FeatureNet, load_feature_net, timm_extras
from potstill.engine.nets.ops import definitions
from potstill.engine.skipping.freezing import FREEZE_LEVELS, freeze, freeze_named, proposed
from potstill.engine.skipping.plan import load_plan
from potstill.kernels import discriminator_adversarial, generator_adversarial
from potstill.kernels.estimate import accum


@dataclass
class GDDConfig(MethodConfig):
    """Defaults: GDD for CIFAR-10 (released code) but for the feature nets."""

    name: str = "gdd"  # set by method=…
    variants = ("gdd_i",)
    sigma: float = 80.0  # the student's only noise level, unless `steps` names others
    steps: list[int] = field(default_factory=list)  # the student's levels among the net's 1000, such as [999, 749, 499, 249]; []: sigma
    start: str = "sigma"  # what the student begins with: sigma (x = σ z) | unit (z is what enters the net)
    freeze: int = 0  # how much of the student stays the teacher's: 0: GDD, nothing; 1: GDD-I; 2 and 3 freeze still more (its ablations)
    freeze_plan: str | None = None  # of potstill probe: freeze what it proposes at as few trained parameters; ours, not the paper's
    features: list[str] = field(default_factory=lambda: ["teacher"])  # D's nets: teacher[:SIGMA] | timm:NAME | torchscript:FILE
    feature_noise: bool = False  # show teacher features noisy images, at their own level (diffusion GAN); not in the paper
    feature_dtype: str = "fp32"  # fp32 (the paper's) | bf16, for feature nets and projectors; heads are float32
    width: int = 64  # channels of the projectors' finest map
    loss: str = "softplus"  # of the GAN: softplus | hinge
    sum_over: float = 64.0  # images the losses are summed over: the paper's batch per GPU
    r1_gamma: float = 1e-4  # weight of the gradient penalty R1; 0: none
    r1_every: int = 16  # iterations between two penalties, each as much heavier

    def __post_init__(self):
        super().__post_init__()
        above(self, 0, "sigma", "sum_over")
        check_generator(self)
        wants(self, "freeze", self.freeze in FREEZE_LEVELS, f"one of {', '.join(map(str, FREEZE_LEVELS))}")
        wants(self, "features", bool(self.features), "at least one feature net (teacher needs no download)")
        one_of(self, "feature_dtype", ("fp32", "bf16"))
        one_of(self, "loss", ("softplus", "hinge"))
        at_least(self, 0, "r1_gamma")  # 0: no R1
        at_least(self, 1, "r1_every", "width")

    def needs(self) -> Needs:
        return Needs(nets=("student", "discriminator"), extras=timm_extras(self.features), batch_statistics=True, whole_teacher=True)

    def build(self, teacher: Denoiser, start: Denoiser) -> "GDD":
        if self.freeze and isinstance(start, DiffusersDenoiser):
            raise UserError(
                f"method.freeze = {self.freeze} names layers of EDM's U-Nets, got {start.name}: set it to 0, which is GDD itself"
            )
        dtype = torch.bfloat16 if self.feature_dtype == "bf16" else torch.float32
        features = [load_feature_net(name, frozen(teacher), dtype=dtype) for name in self.features]
        return GDD(self, copied(start).without_augmentation(), features)

    def unused(self) -> Unused:
        return (
            ({} if self.r1_gamma else {"r1_every": "method.r1_gamma=0"})
            | ({"sigma": "method.steps"} if self.steps else {})
            | (
                {}
                if any(name.startswith("teacher") for name in self.features)
                else {"feature_noise": "none of method.features is the teacher"}
            )
        )


class GDD(Method):
    """Three turns: generator, discriminator, and now and then R1."""

    def __init__(self, cfg: GDDConfig, student: Denoiser, features: Sequence[FeatureNet]):
        self.cfg, self.student, self.features = cfg, student, list(features)
        student.set_dropout(0.0)
        self.generate = Generator(student, cfg.sigma, cfg.steps, cfg.start)
        if cfg.freeze_plan:
            stay, total = freeze_named(student.model, proposed(load_plan(Path(cfg.freeze_plan).expanduser()), cfg.freeze))
        else:
            stay, total = freeze(student.model, cfg.freeze)
        self.notes = [
            f"freeze level {cfg.freeze}{' by ' * bool(cfg.freeze_plan)}{cfg.freeze_plan or ''}: {stay:,} of {total:,} parameters stay, {total - stay:,} train"
        ]
        self.discriminator = ProjectedDiscriminator([net.taps for net in features], width=cfg.width, label_dim=student.label_dim).to(
            next(student.parameters()).device
        )  # before frozen() takes the weights, which would not follow them
        self.frozen_discriminator = frozen(self.discriminator)
        self.nets = {"student": student, "discriminator": self.discriminator}
        self.state = torch.nn.ModuleList([net.drawn for net in features])
        r1 = Turn("discriminator", self.r1_loss, every=cfg.r1_every, after=cfg.r1_every, name="r1")
        self.turns = (
            Turn("student", self.student_loss),
            Turn("discriminator", self.discriminator_loss, name="gan"),
            *([r1] if cfg.r1_gamma else []),
        )
        self.sampler = self.generate.sampler

    def student_loss(self, it: Batch) -> tuple[Tensor, Logs]:
        """G fools the discriminator."""
        x = self.generate(self.student, it.draws, it.labels)
        loss, nonfinite = generator_adversarial(self.logits(self.frozen_discriminator, x, it), kind=self.cfg.loss)
        loss = loss.mean()
        return self.cfg.sum_over * loss, {"gan": loss, "nonfinite": nonfinite} | variance(x, self.data_variance)

    def discriminator_loss(self, it: Batch) -> tuple[Tensor, Logs]:
        """D tells generated images from real ones; they go in apart, since batch statistics differ."""
        with torch.no_grad():
            x = self.generate(self.student, it.draws, it.labels)
        fake, real = self.logits(self.discriminator, x, it), self.logits(self.discriminator, it.images, it)
        loss, nonfinite = discriminator_adversarial(fake, real, kind=self.cfg.loss)
        loss = loss.mean()
        logs = {"gan": loss, "fake": mean_logit(fake), "real": mean_logit(real), "accuracy": accuracy(fake, real), "nonfinite": nonfinite}
        return self.cfg.sum_over * loss, logs

    def r1_loss(self, it: Batch) -> tuple[Tensor, Logs]:
        """The discriminator's slope at real images, taken down to the pixels."""
        y = it.images.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH), definitions():  # the fused attentions and norms have no second derivative
            score = torch.stack([logits.sum() for logits in self.logits(self.discriminator, y, it)]).sum()
            (slope,) = torch.autograd.grad(score, y, create_graph=True)
        penalty = slope.to(accum(slope)).square().flatten(1).sum(1).mean()
        return self.cfg.r1_every * self.cfg.r1_gamma / 2 * penalty, {"r1": penalty}

    def after_step(self, name: str) -> None:
        if name == "discriminator":
            self.discriminator.renew_norms()

    def logits(self, discriminator: ProjectedDiscriminator, images: Tensor, it: Batch) -> list[Tensor]:
        """What a discriminator says of each image through each feature net: [N, L_n]."""
        noise = noise_like(images, it.draws) if self.cfg.feature_noise else None
        return discriminator([net(images, it.labels, noise) for net in self.features], it.labels)


def mean_logit(logits: Sequence[Tensor]) -> Tensor:
    """The mean over images of the mean over feature nets, for the log."""
    return torch.stack([one.detach().mean() for one in logits]).mean()
