"""The losses as torch.nn.Modules, for trainers that hold their criterion as one.

Each returns one number (or [N] with reduction="none") and keeps the count of non-finite samples of the last batch, a
device tensor, in `nonfinite`.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from potstill.kernels._args import check_choice
from potstill.kernels.adversarial import discriminator_adversarial, generator_adversarial
from potstill.kernels.denoise import denoise
from potstill.kernels.estimate import Estimate, Losses
from potstill.kernels.moments import moments
from potstill.kernels.score_implicit import score_implicit
from potstill.kernels.score_match import score_match
from potstill.kernels.trajectory import trajectory


class _Loss(nn.Module):
    """Reduces the values of a batch: "mean", "sum" or "none" over samples."""

    nonfinite: Tensor | None = None

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        check_choice(type(self).__name__, "reduction", reduction, ("mean", "sum", "none"))
        self.reduction = reduction

    def _reduced(self, losses: Losses) -> Tensor:
        self.nonfinite = losses.nonfinite
        if self.reduction == "none":
            return losses.value
        return losses.value.mean() if self.reduction == "mean" else losses.value.sum()

    def extra_repr(self) -> str:
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in ("training", "nonfinite")}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items())


class ScoreMatchLoss(_Loss):
    """`score_match`: DMD's and DMD2's generator loss."""

    def __init__(self, *, eps: float = 1e-6, reduction: str = "mean"):
        super().__init__(reduction)
        self.eps = eps

    def forward(self, x: Tensor, real: Estimate | Tensor, fake: Estimate | Tensor) -> Tensor:
        return self._reduced(score_match(x, real, fake, eps=self.eps))


class ScoreImplicitLoss(_Loss):
    """`score_implicit`: SIM's and SiD's generator loss."""

    def __init__(self, distance: str = "huber", *, alpha: float = 1.0, c: float = 0.03, reduction: str = "mean"):
        super().__init__(reduction)
        self.distance, self.alpha, self.c = distance, alpha, c

    def forward(self, x: Tensor, real: Estimate | Tensor, fake: Estimate | Tensor, weight: Tensor | None = None) -> Tensor:
        losses = score_implicit(x, real, fake, distance=self.distance, alpha=self.alpha, c=self.c, weight=weight)
        return self._reduced(losses)


class DenoiseLoss(_Loss):
    """`denoise`: the fake score's and the auxiliary network's loss."""

    def __init__(self, *, per_sample: str = "mean", reduction: str = "mean"):
        super().__init__(reduction)
        self.per_sample = per_sample

    def forward(self, estimate: Estimate | Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        return self._reduced(denoise(estimate, target, weight, reduction=self.per_sample))


class MomentsLoss(_Loss):
    """`moments`: moment matching's student loss."""

    def __init__(self, *, per_sample: str = "mean", reduction: str = "mean"):
        super().__init__(reduction)
        self.per_sample = per_sample

    def forward(self, x: Tensor, real: Estimate | Tensor, fake: Estimate | Tensor, weight: Tensor | None = None) -> Tensor:
        return self._reduced(moments(x, real, fake, weight, reduction=self.per_sample))


class TrajectoryLoss(_Loss):
    """`trajectory`: SFD's step and compare. Returns (loss, x_next)."""

    def __init__(self, metric: str = "l1", *, c: float = 0.03, per_sample: str = "mean", reduction: str = "mean"):
        super().__init__(reduction)
        self.metric, self.c, self.per_sample = metric, c, per_sample

    def forward(self, x: Tensor, estimate: Estimate | Tensor, sigma: Tensor, sigma_next: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        losses, x_next = trajectory(x, estimate, sigma, sigma_next, target, metric=self.metric, c=self.c, reduction=self.per_sample)
        return self._reduced(losses), x_next


class AdversarialLoss(_Loss):
    """`generator_adversarial` of the generated images' logits; with real logits, the discriminator's side."""

    def __init__(self, kind: str = "softplus", *, reduction: str = "mean"):
        super().__init__(reduction)
        self.kind = kind

    def forward(self, fake: Sequence[Tensor] | Tensor, real: Sequence[Tensor] | Tensor | None = None) -> Tensor:
        if real is None:
            return self._reduced(generator_adversarial(fake, kind=self.kind))
        return self._reduced(discriminator_adversarial(fake, real, kind=self.kind))
