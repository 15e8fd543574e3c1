"""Noise levels: schedules for sampling, laws to draw training noise from, the strata of a batch, and loss weights over σ.

Strata: [0, 1] is cut into n equal slices, and each of the n samples is drawn from its own, the same in every iteration. Low and
high slices alternate over the batch, like the digits of a number read backwards. So every micro-batch of a power-of-two batch
sees all of the law.
"""

import math

import torch
from torch import Tensor


def karras(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """`steps` levels from sigma_max down to sigma_min, float64 [steps] (2206.00364, Eq. 5 without the final 0)."""
    kind = {"dtype": torch.float64, "device": "cpu"}  # a schedule is numbers, also where nets are planned on "meta"
    u = torch.linspace(0, 1, steps, **kind) if steps > 1 else torch.zeros(1, **kind)
    return karras_at(1 - u, sigma_min, sigma_max, rho)


def karras_at(t: Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """The Karras map from t in [0, 1] (1 is all noise) to σ, elementwise."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + t * (high - low)) ** rho


def geometric(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """`steps` levels from sigma_max down to sigma_min, equal in log σ, float64 [steps]."""
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64, device="cpu").log()
    return (ends[0] + torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu") * (ends[1] - ends[0])).exp()


def vp_uniform(steps: int, sigma_min: float, sigma_max: float, rho: float = 1.0, epsilon: float = 1e-3) -> Tensor:
    """`steps` levels of the variance-preserving process that passes sigma_max at t = 1 and sigma_min at t = epsilon, at times
    equal in t^(1/rho), float64 [steps] (2206.00364, Table 1 has rho 1).
    """
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / epsilon - high) / (epsilon - 1)
    beta_min = high - beta_d / 2
    t = (1 + torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu") * (epsilon ** (1 / rho) - 1)) ** rho
    return (0.5 * beta_d * t**2 + beta_min * t).expm1().sqrt()


def with_zero(sigmas: Tensor) -> Tensor:
    """The schedule followed by σ = 0, where a sampler ends."""
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def lognormal(normal: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """EDM's training law from standard normals: ln σ ~ N(mean, std²), elementwise."""
    return (mean + std * normal).exp()


GRID = 1000  # levels of DMD2's grid


def edm_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """EDM's loss weight (σ² + σ_d²) / (σ σ_d)²: 1 on the raw output F (2206.00364, Table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def digit_reversal(n: int) -> list[int]:
    """A permutation of 0 … n - 1: digit reversal in the prime factors of n; bit reversal for powers of two."""
    order, p = [0], 2
    while len(order) < n:
        if n // len(order) % p:
            p += 1
        else:  # puts a digit in front of the index, and behind the slice
            order = [digit + p * rest for digit in range(p) for rest in order]
    return order


def strata(total: int, part: int, step: int = 1) -> list[int]:
    """The slice of each of `total` samples, which are cut into parts of `part`: each part has one sample in every 1/part of [0, 1].

    The samples of a part are `step` apart; those between them belong to the parts of other ranks.
    """
    parts = total // part
    assert parts * part == total and parts % step == 0, f"{part} samples every {step} do not divide {total}"
    within, among = digit_reversal(part), digit_reversal(parts)
    block = part * step
    return [within[i % block // step] * parts + among[i // block * step + i % step] for i in range(total)]
