"""Other trainers' loss functions by their own names and signatures, on the fused kernels: replace one import line.

    from potstill.kernels.compat import variational_score_distillation_loss     # FastGen: fastgen/methods/common_loss.py
    from potstill.kernels.compat import distribution_matching_loss              # DMD2: main/edm/edm_guidance.py
    from potstill.kernels.compat import SiDLoss                                 # SiD: training/sid_loss.py, SID_EDMLoss

The formulas are the originals'; what differs is said beside each: sums in float32 whatever comes in, float32 out, no
host synchronisation, and samples that are not finite count as zero in place of being cut out of the batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from potstill.kernels._args import check_constant, check_image, check_per_sample, check_root
from potstill.kernels.adversarial import discriminator_adversarial, generator_adversarial
from potstill.kernels.denoise import denoise
from potstill.kernels.estimate import Estimate, per_sample
from potstill.kernels.noising import add_noise
from potstill.kernels.score_implicit import score_implicit
from potstill.kernels.score_match import weighted

__all__ = [
    "SiDLoss",
    "denoising_score_matching_loss",
    "distribution_matching_loss",
    "gan_loss_discriminator",
    "gan_loss_generator",
    "sid_generator_loss",
    "variational_score_distillation_loss",
]


def _match(op: str, x: Tensor, real: tuple[str, Tensor], fake: tuple[str, Tensor], scale: Tensor | None, eps: float) -> Tensor:
    check_root(op, "the generated images", x)
    for name, t in (real, fake):
        check_image(op, name, t, "the generated images", x)
        check_constant(op, name, t, "the generated images")
    # the originals never bound the normaliser from below; FastGen adds eps to it
    return weighted(x, Estimate(real[1]), Estimate(fake[1]), scale, eps=0.0, plus=eps).value.mean()


def variational_score_distillation_loss(
    gen_data: Tensor, teacher_x0: Tensor, fake_score_x0: Tensor, additional_scale: Tensor | None = None
) -> Tensor:
    """FastGen's VSD loss: 0.5·mse(x, sg(x - (F - T)·w)), w = additional_scale / (mean|x - T| + 1e-6).

    Differs: w and F - T stay in float32, where the original rounds both to the dtype of `gen_data`.

    Args:
        gen_data, teacher_x0, fake_score_x0: images [N, ...]; only the first may ask for a gradient.
        additional_scale: [N], f-distill's weight.
    """
    op = "variational_score_distillation_loss"
    if additional_scale is not None:
        additional_scale = check_per_sample(
            op, "additional_scale", additional_scale.flatten(), "gen_data", gen_data
        )  # fmt: skip
    real, fake = ("teacher_x0", teacher_x0.detach()), ("fake_score_x0", fake_score_x0.detach())
    return _match(op, gen_data, real, fake, additional_scale, 1e-6)


def denoising_score_matching_loss(
    pred_type: str,
    net_pred: Tensor,
    x0: Tensor | None = None,
    eps: Tensor | None = None,
    noise_scheduler: Any = None,
    t: Tensor | None = None,
) -> Tensor:
    """FastGen's denoising loss: mse of the net's output and what it predicts: "x0", "eps", "v" or "flow".

    `noise_scheduler` has alpha(t) and sigma(t), for v = alpha·eps - sigma·x0; "flow" is eps - x0.
    """
    wanted = {"x0": (x0,), "eps": (eps,), "v": (x0, eps, t, noise_scheduler), "flow": (x0, eps)}
    if pred_type not in wanted:
        raise NotImplementedError(f"Unknown prediction type {pred_type}")
    if any(given is None for given in wanted[pred_type]):
        raise ValueError(f"denoising_score_matching_loss: wanted all that {pred_type!r} is made of, got None among them")
    if pred_type == "x0":
        target = x0
    elif pred_type == "eps":
        target = eps
    elif pred_type == "flow":
        assert x0 is not None and eps is not None
        target = eps - x0
    else:
        assert x0 is not None and eps is not None
        alpha, sigma = (per_sample(f(t).to(x0), x0) for f in (noise_scheduler.alpha, noise_scheduler.sigma))
        target = alpha * eps - sigma * x0
    assert target is not None
    return denoise(net_pred, target.detach()).value.mean()


def gan_loss_generator(fake_logits: Tensor) -> Tensor:
    """FastGen's: mean softplus(-fake)."""
    return generator_adversarial(fake_logits).value.mean()


def gan_loss_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """FastGen's: mean softplus(fake) + mean softplus(-real), for as many real as generated samples."""
    return discriminator_adversarial(fake_logits, real_logits).value.mean()


def distribution_matching_loss(latents: Tensor, pred_real_image: Tensor, pred_fake_image: Tensor) -> Tensor:
    """The arithmetic of DMD2's `compute_distribution_matching_loss`: `loss_dm` from the two denoised images.

    0.5·mse(x, sg(x - g)), g = nan_to_num((p_real - p_fake)/mean|p_real|) with p = x - prediction.
    Differs: a sample whose g is infinite (the original's loss then is too) counts as zero, as NaN does in both.
    """
    real, fake = ("pred_real_image", pred_real_image.detach()), ("pred_fake_image", pred_fake_image.detach())
    return _match("distribution_matching_loss", latents, real, fake, None, 0.0)


def sid_generator_loss(y: Tensor, y_real: Tensor, y_fake: Tensor, alpha: float = 1.2) -> Tensor:
    """The arithmetic of SiD's `generator_loss`: (R - F)·((R - y) - alpha·(R - F)) / max(mean|y - R|, 1e-5), [N].

    Differs: summed over C, H, W here, where the original leaves that to its training loop's `.sum()`; NaN samples are
    zeros, not cut out, so the sum is the same and the shape does not depend on the data.
    """
    return score_implicit(y, y_real, y_fake, distance="l2", alpha=alpha).value


class SiDLoss:
    """SiD's `SID_EDMLoss`, both losses as [N] sums over C, H, W in place of images; training loops call `.sum()`."""

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5, **_: float):
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data

    def generator_loss(
        self,
        true_score: Callable[..., Tensor],
        fake_score: Callable[..., Tensor],
        images: Tensor,
        labels: Tensor | None = None,
        augment_pipe: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        alpha: float = 1.2,
        tmax: float = 800,
    ) -> Tensor:
        """The generator's loss [N] at noise levels drawn as SiD's code draws them; differentiable in `images`.

        Args:
            true_score, fake_score: denoisers D(x_t, sigma, labels, augment_labels=) -> [N, C, H, W].
            images: the generator's, [N, C, H, W].
            labels: passed on as they are.
            augment_pipe: images -> (images, augment_labels), as EDM's; None: no augmentation, and labels of zeros.
            alpha: SiD's, 1.2 by default.
            tmax: the largest index of noise levels of 1000.
        """
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        r = torch.rand([images.shape[0], 1, 1, 1], device=images.device) * tmax / 1000
        sigma = (high + (1 - r) * (low - high)) ** 7
        augmented = (images, torch.zeros(images.shape[0], 9, device=images.device))
        y, augment_labels = augmented if augment_pipe is None else augment_pipe(images)
        y_t = add_noise(y, sigma.flatten(), torch.randn_like(y))
        real, fake = (net(y_t, sigma, labels, augment_labels=augment_labels) for net in (true_score, fake_score))
        return sid_generator_loss(y, real, fake, alpha)

    def __call__(
        self,
        fake_score: Callable[..., Tensor],
        images: Tensor,
        labels: Tensor | None = None,
        augment_pipe: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """The fake score's denoising loss [N], EDM's, on the generator's `images` [N, C, H, W], which are a constant."""
        sigma = (torch.randn([images.shape[0], 1, 1, 1], device=images.device) * self.P_std + self.P_mean).exp()
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        y, augment_labels = (images, None) if augment_pipe is None else augment_pipe(images)
        y_t = add_noise(y, sigma.flatten(), torch.randn_like(y))
        d = fake_score(y_t, sigma, labels, augment_labels=augment_labels)
        return denoise(d, y.detach(), weight.flatten(), reduction="sum").value
