"""Every loss in plain PyTorch, differentiated by autograd: the specification the fused kernels are held to.

Nothing here is fast. A formula sees clean images D already formed, in float32 or float64, and returns one number per
sample; `_losses` adds what all of them share: a sample whose value is not finite counts as 0 with zero gradient.
"""

import math
from collections.abc import Callable, Sequence

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
    return x.flatten(1).sum(1)


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1) if x.ndim > 1 else x


_REDUCTIONS = {"mean": _mean, "sum": _sum}


def _losses(formula: Callable[..., Tensor], *tensors: Tensor) -> Losses:
    """formula(*tensors) [N]; non-finite samples become 0 by replacing their inputs, so no NaN meets the backward."""
    with torch.no_grad():
        finite_n = formula(*tensors).isfinite()
    dtype = accum(*tensors)
    clean = [torch.where(per_sample(finite_n, t), t.to(dtype), torch.zeros((), dtype=dtype, device=t.device)) for t in tensors]
    value_n = torch.where(finite_n, formula(*clean), 0)
    return Losses(value_n, (~finite_n).sum(dtype=torch.int32))


@takes_inference_tensors
def score_match(
    x: Tensor, real: Estimate | Tensor, fake: Estimate | Tensor, *, eps: float = 1e-6, weight: Tensor | None = None, plus: float = 0.0
) -> Losses:
    """DMD (arXiv 2311.18828 Eq. 7-8): 0.5·mean((x - sg(x - g))²), g = (fake - real) / max(mean|x - real|, eps).

    Others multiply g by a weight [N] and add a little to its normaliser, `plus`.
    """

    def formula(x: Tensor, real: Tensor, fake: Tensor, weight_n: Tensor | None = None) -> Tensor:
        g = ((fake - real) / per_sample(_mean((x - real).abs()).clamp(min=eps) + plus, x)).detach()
        if weight_n is not None:
            g = g * per_sample(weight_n.detach(), x)
        return 0.5 * _mean((x - (x - g).detach()) ** 2)

    return _losses(formula, x, denoised(real).detach(), denoised(fake).detach(), *([] if weight is None else [weight]))


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

    def formula(x: Tensor, real: Tensor, fake: Tensor, weight_n: Tensor | None = None) -> Tensor:
        delta = real - fake
        towards = fake - x + (1 - alpha if distance == "l2" else 0) * delta
        if distance == "huber":
            norm_n = (_sum(delta**2) + c**2).sqrt()
            first = delta / per_sample(norm_n.detach() if detach == "normaliser" else norm_n, x)
        else:
            first = delta
            if weight_n is None:
                weight_n = 1 / _mean((x - real).abs()).detach().clamp(min=1e-5)
        value_n = _sum((first.detach() if detach == "factor" else first) * towards)
        return value_n if weight_n is None else weight_n * value_n

    return _losses(formula, x, denoised(real), denoised(fake), *([] if weight is None else [weight]))


@takes_inference_tensors
def denoise(estimate: Estimate | Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: str = "mean") -> Losses:
    """w · |D - target|², the mean or the sum over C, H, W."""

    def formula(d: Tensor, target: Tensor, weight_n: Tensor | float = 1.0) -> Tensor:
        return weight_n * _REDUCTIONS[reduction]((d - target) ** 2)

    return _losses(formula, denoised(estimate), target.detach(), *([] if weight is None else [weight]))


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

    def formula(x: Tensor, real: Tensor, fake: Tensor, weight_n: Tensor | float = 1.0) -> Tensor:
        return weight_n * _REDUCTIONS[reduction](x * (fake - real))

    return _losses(formula, x, denoised(real).detach(), denoised(fake).detach(), *([] if weight is None else [weight]))


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
    d = denoised(estimate)
    x, target = x.detach().to(d.dtype), target.detach().to(d.dtype)
    ratio_n = ((sigma_next.to(d.dtype) - sigma.to(d.dtype)) / sigma.to(d.dtype)).expand(x.shape[0])

    def formula(x: Tensor, d: Tensor, target: Tensor, ratio_n: Tensor) -> Tensor:
        e = euler(x, d, ratio_n) - target
        if metric == "l1":
            value_n = _sum(e.abs())
        elif metric == "l2":
            value_n = _sum(e**2)
        else:
            value_n = _sum(e**2) / ((_sum(e**2) + c**2).sqrt() + c)  # sqrt(s + c²) - c, without the cancellation
        return value_n / x.shape[1:].numel() if reduction == "mean" else value_n

    return _losses(formula, x, d, target, ratio_n), euler(x, d, ratio_n).detach()


def _penalty(kind: str, logits: Tensor) -> Tensor:
    return F.softplus(-logits) if kind == "softplus" else F.relu(1 - logits)


@takes_inference_tensors
def generator_adversarial(logits: Sequence[Tensor], *, kind: str = "softplus") -> Losses:
    """Per sample, sum over nets of the mean over that net's logits of softplus(-l), or of -l for hinge."""

    def formula(*logits: Tensor) -> Tensor:
        terms = [_mean(F.softplus(-logit) if kind == "softplus" else -logit) for logit in logits]
        return torch.stack(terms).sum(0)

    return _losses(formula, *logits)


@takes_inference_tensors
def discriminator_adversarial(fake_logits: Sequence[Tensor], real_logits: Sequence[Tensor], *, kind: str = "softplus") -> Losses:
    """Per sample, sum over nets of mean(softplus(fake)) + mean(softplus(-real)); hinge: relu(1 ± l) instead."""
    fakes = len(fake_logits)

    def formula(*logits: Tensor) -> Tensor:
        terms = [_mean(_penalty(kind, -logit if i < fakes else logit)) for i, logit in enumerate(logits)]
        return torch.stack(terms).sum(0)

    return _losses(formula, *fake_logits, *real_logits)


@takes_inference_tensors
def add_noise(x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x_t = x + sigma·noise, in at least float32."""
    dtype = accum(x)
    return x.to(dtype) + per_sample(sigma.to(dtype).expand(x.shape[0]), x) * noise.to(dtype)


_MASK = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = 10) -> list[Tensor]:
    """Philox4x32 (Salmon et al., SC 2011): four 32-bit words from four counter and two key words, all held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # wraps modulo 2^64, as the 64-bit product is meant to
        c0, c1, c2, c3 = (b >> 32) & _MASK ^ c1 ^ k0, b & _MASK, (a >> 32) & _MASK ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def normals(seed: Tensor, offset: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normals [N, ...] in float32 as a function of seed, offset and position: what the kernels draw.

    Images [N, C, H, W] are numbered plane by plane, anything else as one plane: pixels 4q to 4q + 3 of channel c of
    sample n come from the counter (q, c, n, offset) by Box-Muller, so sample n does not depend on the batch size.
    """
    n, c = shape[0], shape[1] if len(shape) == 4 else 1
    p = math.prod(shape[1:]) // c
    quads = torch.arange(-(-p // 4), device=seed.device)
    zero = torch.zeros((n, c, len(quads)), dtype=torch.int64, device=seed.device)
    channel = torch.arange(c, device=seed.device)[:, None]
    sample = torch.arange(n, device=seed.device)[:, None, None]
    words = philox((zero + quads, zero + channel, zero + sample, zero + (offset & _MASK)), (seed & _MASK, (seed >> 32) & _MASK))
    u = [w.to(torch.float32) * 2.0**-32 + 2.0**-33 for w in words]  # in (0, 1]: 6.6 sigma at most
    drawn = []
    for u1, u2 in (u[:2], u[2:]):
        radius, angle = (-2 * u1.log()).sqrt(), 2 * math.pi * u2
        drawn += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(drawn, -1).flatten(2)[:, :, :p].reshape(*shape)


@takes_inference_tensors
def noised_input(
    x: Tensor, sigma: Tensor, noise: Tensor, c_in: Tensor, *, dtype: torch.dtype, channels: int | None = None
) -> tuple[Tensor, Tensor]:
    """x_t = x + sigma·noise, and c_in·x_t in `dtype` with zero channels appended up to `channels`."""
    x_t = add_noise(x, sigma, noise)
    scaled = (per_sample(c_in.to(x_t.dtype).expand(x.shape[0]), x) * x_t).to(dtype)
    return x_t, scaled if channels is None else F.pad(scaled, (0, 0, 0, 0, 0, channels - x.shape[1]))
