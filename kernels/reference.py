"""Every loss in plain PyTorch, differentiated by autograd: the specification the fused kernels are held to.

CPU tensors are computed by it, and CUDA tensors with the backend "reference". A formula takes images and estimates and
returns one number per sample; `_losses` adds what all of them share: a sample whose value is not finite counts as 0 with
zero gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.kernels._inference import takes_inference_tensors
from potstill.kernels.estimate import Estimate, Losses, accum, per_sample


def denoised(estimate: Estimate | Tensor) -> Tensor:
    """D of an estimate, or the tensor itself, in at least float32."""
    if isinstance(estimate, Tensor):
        return estimate.to(accum(estimate))
    return estimate.denoised()


def _sum(x: Tensor) -> Tensor:
    """[N, ...] -> [N]."""
    return x.sum(tuple(range(1, x.ndim)))


def _mean(x: Tensor) -> Tensor:
    """[N, ...] -> [N]."""
    return x.mean(tuple(range(1, x.ndim))) if x.ndim > 1 else x


_REDUCTIONS = {"mean": _mean, "sum": _sum}


def _losses(formula: Callable[..., Tensor], images: Sequence[Estimate | Tensor], *each: Tensor | None) -> Losses:
    """formula(*images, *each) [N]; the inputs of samples whose value is not finite are replaced by 0, so no NaN meets the backward.

    Args:
        formula: of the images or estimates, in their own dtypes, and of numbers [N], in the dtype of accumulation.
        images: images and estimates; their dtypes decide the dtype of the sums.
        each: one number per sample each, or None.
    """
    dtype = accum(*[t for given in images for t in (given.images if isinstance(given, Estimate) else [given])])
    inputs = [*images, *[None if t is None else t.to(dtype) for t in each]]
    with torch.no_grad():
        finite_n = formula(*inputs).isfinite()
    value_n = torch.where(finite_n, formula(*[_zeros_where_not(finite_n, given) for given in inputs]), 0)
    return Losses(value_n, (~finite_n).sum(dtype=torch.int32))


def _zeros_where_not(finite_n: Tensor, given: Any) -> Any:
    """The tensors of an input with zeros in the samples that are not finite."""
    if isinstance(given, Estimate):
        return Estimate(*[_zeros_where_not(finite_n, field) for field in given])
    return torch.where(per_sample(finite_n, given), given, 0) if isinstance(given, Tensor) else given


@takes_inference_tensors
def score_match(
    x: Tensor, real: Estimate | Tensor, fake: Estimate | Tensor, *, eps: float = 1e-6, weight: Tensor | None = None, plus: float = 0.0
) -> Losses:
    """DMD (arXiv 2311.18828 Eq. 7-8): 0.5·mean((x - sg(x - g))²), g = (fake - real) / max(mean|x - real|, eps).

    Its value is 0.5·mean(g²) and its gradient g/(C·H·W), that of mean(g·x): x - (x - g) would round g to the last bit of x.
    Others multiply g by a weight [N] and add a little to its normaliser, `plus`.
    """

    def formula(x: Tensor, real: Estimate | Tensor, fake: Estimate | Tensor, weight_n: Tensor | None) -> Tensor:
        with torch.no_grad():
            d_real = denoised(real)
            scale_n = 1 / (_mean((x - d_real).abs()).clamp(min=eps) + plus)
            g = (denoised(fake) - d_real) * per_sample(scale_n if weight_n is None else weight_n * scale_n, x)
        along_n = _mean(g * x)
        return 0.5 * _mean(g**2) + (along_n - along_n.detach())

    return _losses(formula, (x, real, fake), weight)


@takes_inference_tensors
def score_implicit(
    x: Tensor,
    real: Estimate | Tensor,
    fake: Estimate | Tensor,
    *,
    distance: str = "huber",
    alpha: float = 1.0,
    c: float = 0.03,
    weight: Tensor | None = None,
    detach: str | None = None,
) -> Losses:
    """SIM (arXiv 2410.16794) and SiD (arXiv 2404.04057), with delta = D_real - D_fake, sums over C, H, W:

    huber:  w · <delta / sqrt(|delta|² + c²), D_fake - x>                             w = 1 by default
    l2:     w · <delta, (D_real - x) - alpha·delta>,       w = 1 / max(mean|x - D_real|, 1e-5) by default
    """

    def formula(x: Tensor, real: Estimate | Tensor, fake: Estimate | Tensor, weight_n: Tensor | None) -> Tensor:
        d_real, d_fake = denoised(real), denoised(fake)
        delta = d_real - d_fake
        towards = d_fake - x + (1 - alpha if distance == "l2" else 0) * delta
        if distance == "huber":
            norm_n = (_sum(delta**2) + c**2).sqrt()
            first = delta / per_sample(norm_n.detach() if detach == "normaliser" else norm_n, x)
        else:
            first = delta
            if weight_n is None:
                weight_n = 1 / _mean((x - d_real).detach().abs()).clamp(min=1e-5)
        value_n = _sum((first.detach() if detach == "factor" else first) * towards)
        return value_n if weight_n is None else weight_n * value_n

    return _losses(formula, (x, real, fake), weight)


@takes_inference_tensors
def denoise(estimate: Estimate | Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: str = "mean") -> Losses:
    """w · |D - target|², the mean or the sum over C, H, W."""

    def formula(estimate: Estimate | Tensor, target: Tensor, weight_n: Tensor | None) -> Tensor:
        value_n = _REDUCTIONS[reduction]((denoised(estimate) - target) ** 2)
        return value_n if weight_n is None else weight_n * value_n

    return _losses(formula, (estimate, target.detach()), weight)


@takes_inference_tensors
def moments(
    x: Tensor,
    real: Estimate | Tensor,
    fake: Estimate | Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
) -> Losses:
    """Moment matching (arXiv 2406.04103, Alg. 2): w · <x, sg(fake - real)>, the mean or the sum over C, H, W."""

    def formula(x: Tensor, real: Estimate | Tensor, fake: Estimate | Tensor, weight_n: Tensor | None) -> Tensor:
        with torch.no_grad():
            towards_real = denoised(fake) - denoised(real)
        value_n = _REDUCTIONS[reduction](x * towards_real)
        return value_n if weight_n is None else weight_n * value_n

    return _losses(formula, (x, real, fake), weight)


def euler(x: Tensor, d: Tensor, ratio_n: Tensor) -> Tensor:
    """One Euler step of dx/dsigma = (x - D)/sigma: x + ratio·(x - D), ratio = (sigma_next - sigma)/sigma."""
    return x + per_sample(ratio_n, x) * (x - d)


@takes_inference_tensors
def trajectory(
    x: Tensor,
    estimate: Estimate | Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    target: Tensor,
    *,
    metric: str = "l1",
    c: float = 0.03,
    reduction: str = "mean",
) -> tuple[Losses, Tensor]:
    """SFD (arXiv 2409.19681): the distance e of an Euler step from where the teacher's solver arrived, and the step.

    l1: sum|e|.   l2: sum e².   huber: sqrt(sum e² + c²) - c.   reduction "mean" divides each by C·H·W.
    """
    x, target = x.detach(), target.detach()
    dtype = accum(x, target, *(estimate.images if isinstance(estimate, Estimate) else [estimate]))
    ratio_n = ((sigma_next.to(dtype) - sigma.to(dtype)) / sigma.to(dtype)).expand(x.shape[0])

    def formula(x: Tensor, estimate: Estimate | Tensor, target: Tensor, ratio_n: Tensor) -> Tensor:
        e = euler(x, denoised(estimate), ratio_n) - target
        if metric == "l1":
            value_n = _sum(e.abs())
        elif metric == "l2":
            value_n = _sum(e**2)
        else:
            square_n = _sum(e**2)
            value_n = square_n / ((square_n + c**2).sqrt() + c)  # sqrt(s + c²) - c, without the cancellation
        return value_n / x.shape[1:].numel() if reduction == "mean" else value_n

    with torch.no_grad():
        x_next = euler(x.to(dtype), denoised(estimate), ratio_n)
    return _losses(formula, (x, estimate, target), ratio_n), x_next


def _penalty(kind: str, logits: Tensor) -> Tensor:
    return F.softplus(-logits) if kind == "softplus" else F.relu(1 - logits)


@takes_inference_tensors
def generator_adversarial(logits: Sequence[Tensor], *, kind: str = "softplus") -> Losses:
    """Per sample, sum over nets of the mean over that net's logits of softplus(-l), or of -l for hinge."""

    def formula(*logits: Tensor) -> Tensor:
        terms = [_mean(F.softplus(-logit) if kind == "softplus" else -logit) for logit in map(denoised, logits)]
        return torch.stack(terms).sum(0)

    return _losses(formula, logits)


@takes_inference_tensors
def discriminator_adversarial(fake_logits: Sequence[Tensor], real_logits: Sequence[Tensor], *, kind: str = "softplus") -> Losses:
    """Per sample, sum over nets of mean(softplus(fake)) + mean(softplus(-real)); hinge: relu(1 ± l) instead."""
    fakes = len(fake_logits)

    def formula(*logits: Tensor) -> Tensor:
        terms = [_mean(_penalty(kind, -logit if i < fakes else logit)) for i, logit in enumerate(map(denoised, logits))]
        return torch.stack(terms).sum(0)

    return _losses(formula, [*fake_logits, *real_logits])


@takes_inference_tensors
def add_noise(x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x_t = x + sigma·noise, in at least float32."""
    dtype = accum(x)
    return torch.addcmul(x.to(dtype), noise.to(dtype), per_sample(sigma.to(dtype).expand(x.shape[0]), x))
