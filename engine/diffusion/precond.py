"""Preconditioning: D(x; σ) = c_skip·x + c_out·F(c_in·x, c_noise), the four schemes of EDM (2206.00364, Table 1)
and that of GDD's and ECT's generators.

Every function takes noise levels σ of shape [N] and returns four [N] tensors in σ's dtype.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in and c_noise at some noise levels, each [N]."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def edm(sigma: Tensor, sigma_data: float = 0.5) -> Coefficients:
    """Unit variance in and out for data of standard deviation `sigma_data`."""
    total = (sigma**2 + sigma_data**2).sqrt()
    return Coefficients((sigma_data / total) ** 2, sigma * sigma_data / total, 1 / total, sigma.log() / 4)


def gdd(sigma: Tensor, sigma_data: float = 0.5, sigma_min: float = 0.002) -> Coefficients:
    """GDD's and ECT's, which are the consistency models' (2303.01469, App. C): close to EDM's, and D(x; sigma_min) = x.

    ECT (2406.14548) has sigma_min 0.003 and is sampled so; it is trained with EDM's.
    """
    shifted, total = sigma - sigma_min, (sigma**2 + sigma_data**2).sqrt()
    c_skip = sigma_data**2 / (shifted**2 + sigma_data**2)
    return Coefficients(c_skip, shifted * sigma_data / total, 1 / total, sigma.log() / 4)


def vp(sigma: Tensor, beta_d: float = 19.9, beta_min: float = 0.1, steps: int = 1000) -> Coefficients:
    """DDPM++ in its variance-preserving form; the net sees the time t(σ) scaled to 0 … steps - 1."""
    time = ((beta_min**2 + 2 * beta_d * (1 + sigma**2).log()).sqrt() - beta_min) / beta_d  # t(σ), the inverse of `vp_sigma`
    c_noise = (steps - 1) * time
    return Coefficients(torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise)


def vp_sigma(t: float, beta_d: float = 19.9, beta_min: float = 0.1) -> float:
    """σ(t) = sqrt(exp(β_d t²/2 + β_min t) - 1), in float32 as in EDM's code: at t = 1e-5 that is 2⁻¹⁰, and not 0.0010005."""
    time = torch.tensor(t, dtype=torch.float32, device="cpu")
    return ((0.5 * beta_d * time**2 + beta_min * time).exp() - 1).sqrt().item()


def ve(sigma: Tensor) -> Coefficients:
    """NCSN++ in its variance-exploding form."""
    one = torch.ones_like(sigma)
    return Coefficients(one, sigma, one, (0.5 * sigma).log())


def iddpm(sigma: Tensor, levels: Tensor) -> Coefficients:
    """Improved DDPM: the net sees the index of the nearest of its trained `levels` (from `iddpm_levels`)."""
    index = (sigma[:, None] - levels.to(sigma.dtype)).abs().argmin(1)
    c_noise = (len(levels) - 2 - index).to(sigma.dtype)
    return Coefficients(torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise)


def iddpm_levels(steps: int = 1000, c_1: float = 0.001, c_2: float = 0.008) -> Tensor:
    """The steps + 1 noise levels of the cosine schedule, from the largest to 0: EDM's recursion (Eq. 186-188).

    All of it in float32, as in EDM's code: the smallest level but 0 is then 0.006422, and not the exact 0.006432.
    """
    return _iddpm_levels(steps, c_1, c_2).clone()


@lru_cache(8)  # a loop of tiny steps, and a net that is read asks several times
def _iddpm_levels(steps: int, c_1: float, c_2: float) -> Tensor:
    kind = {"dtype": torch.float32, "device": "cpu"}  # also where a net is built on the meta device
    alpha_bar = (0.5 * math.pi * torch.arange(steps + 1, **kind) / steps / (c_2 + 1)).sin() ** 2
    shrinks = (alpha_bar[:-1] / alpha_bar[1:]).clip(min=c_1)
    u = torch.zeros(steps + 1, **kind)
    for j in range(steps, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / shrinks[j - 1] - 1).sqrt()
    return u
