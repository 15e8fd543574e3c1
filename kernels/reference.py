"""Every loss, and EDM2's operations, in plain PyTorch, differentiated by autograd: the specification the fused kernels are held to.

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
from potstill.kernels.norm_silu import kept


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
    inputs = [*images, *[None if t is None else t.to(dtype).reshape(-1) for t in each]]
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
    sigma, sigma_next = sigma.to(dtype).reshape(-1), sigma_next.to(dtype).reshape(-1)
    ratio_n = ((sigma_next - sigma) / sigma).expand(x.shape[0])

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


def sum_weights(t: float) -> tuple[float, float]:
    """What mp_sum multiplies its two tensors by: a sum of two independent ones of variance 1 has variance 1."""
    scale = ((1 - t) ** 2 + t**2) ** -0.5
    return (1 - t) * scale, t * scale


def cat_weights(a: int, b: int, t: float) -> tuple[float, float]:
    """What mp_cat multiplies images of a and b channels by: each adds to a convolution as if both had equally many."""
    scale = ((a + b) / ((1 - t) ** 2 + t**2)) ** 0.5
    return scale * (1 - t) / a**0.5, scale * t / b**0.5


def _mp_silu(x: Tensor) -> Tensor:
    """SiLU divided by the root mean square that it has of normal numbers."""
    return F.silu(x) / 0.596


@takes_inference_tensors
def pixel_norm(x: Tensor, eps: float = 1e-4) -> Tensor:
    """EDM2 (arXiv 2312.02696): each pixel of x [N, C, H, W] divided by eps + the root mean square of its channels."""
    return _pixel_norm(x, eps).to(x.dtype)


def _pixel_norm(x: Tensor, eps: float) -> Tensor:
    x = x.to(accum(x))
    return x / (eps + torch.linalg.vector_norm(x, dim=1, keepdim=True) / x.shape[1] ** 0.5)


@takes_inference_tensors
def pixel_norm_silu(x: Tensor, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """n = pixel_norm(x), and silu(n)/0.596."""
    n = _pixel_norm(x, eps)
    return n.to(x.dtype), _mp_silu(n).to(x.dtype)


@takes_inference_tensors
def mp_silu(x: Tensor, scale: Tensor | None = None, dropout: float = 0.0, key: Tensor | None = None) -> Tensor:
    """silu(x·scale)/0.596 with scale [N, C], then dropout by the mask of `norm_silu`."""
    u = x.to(accum(x))
    if scale is not None:
        u = u * scale.to(u.dtype).view(*scale.shape, *[1] * (x.ndim - 2))
    y = _mp_silu(u)
    if key is not None and dropout:
        n, c, height, width = (*x.shape, 1, 1)[:4]
        y = torch.where(kept(key, torch.Size((n, c, height, width)), dropout).view(x.shape), y / (1 - dropout), 0)
    return y.to(x.dtype)


@takes_inference_tensors
def mp_sum(x: Tensor, y: Tensor, t: float, clip: float | None = None) -> Tensor:
    """((1 - t)·x + t·y)/√((1 - t)² + t²), no further from 0 than `clip`."""
    of_x, of_y = sum_weights(t)
    v = of_x * x.to(accum(x)) + of_y * y.to(accum(y))
    return (v if clip is None else v.clamp(-clip, clip)).to(x.dtype)


@takes_inference_tensors
def mp_cat_silu(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """a and b side by side, each multiplied by its number of `cat_weights`, and silu/0.596 of that."""
    of_a, of_b = cat_weights(a.shape[1], b.shape[1], t)
    cat = torch.cat([of_a * a.to(accum(a)), of_b * b.to(accum(b))], 1)
    return cat.to(a.dtype), _mp_silu(cat).to(a.dtype)


def _normalized(weight: Tensor, eps: float) -> Tensor:
    w = weight.to(accum(weight))
    n = weight.shape[1:].numel()
    return w / (eps + torch.linalg.vector_norm(w, dim=tuple(range(1, w.ndim)), keepdim=True) / n**0.5)


@takes_inference_tensors
def normalized_weight(weight: Tensor, gain: Tensor | float, dtype: torch.dtype, eps: float = 1e-4) -> Tensor:
    """EDM2's weight [N, ...] of N outputs: each row divided by eps + its root mean square, times gain/√n, n numbers a row."""
    n = weight.shape[1:].numel()
    return (_normalized(weight, eps) * (gain * n**-0.5)).to(dtype)


def normalized_weight_grad(g: Tensor, weight: Tensor, eps: float = 1e-4) -> Tensor:
    """The gradient to the weight [N, ...] of normalized_weight(weight, 1.0, …), from g to its output."""
    w, g = weight.to(accum(weight)), g.to(accum(weight))
    dims, root = tuple(range(1, w.ndim)), w.shape[1:].numel() ** 0.5
    length = torch.linalg.vector_norm(w, dim=dims, keepdim=True)
    size = eps + length / root
    along = (g * w).sum(dims, keepdim=True) / (size * length.clamp(min=torch.finfo(w.dtype).tiny) * root)
    return ((g - along * w) / (size * root)).to(weight.dtype)


@torch.no_grad()
def force_weight_norm_(weights: Sequence[Tensor], eps: float = 1e-4) -> None:
    """Each row of each weight divided by eps + its root mean square, in place."""
    for weight in weights:
        weight.copy_(_normalized(weight, eps))
