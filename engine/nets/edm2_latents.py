"""EDM2's latents (2312.02696, Appendix B): what a VAE says of a picture, a mean and a standard deviation, and what a net sees of it.

    latents = (mean + std·n)·scale + bias,   n ~ N(0, 1)

Its VAE is Stable Diffusion's, which is fed, and gives, pictures in [0, 1] here, where diffusers' pipelines have [-1, 1]. Scale and bias
are chosen for a mean of 0 and a standard deviation of 0.5 in every channel; `STABILITY` has those of EDM2's code.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

VAE = "stabilityai/sd-vae-ft-mse"
RAW_MEAN, RAW_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)  # of ImageNet at 512x512, in each channel
FINAL_MEAN, FINAL_STD = 0.0, 0.5


class Affine(NamedTuple):
    """From a VAE's own latents to those that a net sees, channel by channel: x·scale + bias."""

    scale: tuple[float, ...]
    bias: tuple[float, ...]

    @classmethod
    def to(cls, mean: Sequence[float], std: Sequence[float], raw_mean: Sequence[float], raw_std: Sequence[float]) -> "Affine":
        """From latents of one mean and standard deviation, raw_mean and raw_std, to another; each one number a channel."""
        scale = [final / raw for final, raw in zip(std, raw_std, strict=True)]
        return cls(tuple(scale), tuple(m - raw * s for m, raw, s in zip(mean, raw_mean, scale, strict=True)))

    def __call__(self, x: Tensor) -> Tensor:
        scale, bias = _on(self, x.dtype, x.device)
        return x * scale + bias

    def inverse(self, x: Tensor) -> Tensor:
        scale, bias = _on(self, x.dtype, x.device)
        return (x - bias) / scale


@cache
def _on(affine: Affine, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Scale and bias as [C, 1, 1], copied to a device once: every step asks for them."""
    return [torch.tensor(values, dtype=dtype).view(-1, 1, 1).to(device) for values in affine]


STABILITY = Affine.to([FINAL_MEAN] * 4, [FINAL_STD] * 4, RAW_MEAN, RAW_STD)
#: What a weight file says of it, by the name of EDM2's class.
ENCODER: dict[str, Any] = {"class": "StabilityVAEEncoder", "vae": VAE, "scale": list(STABILITY.scale), "bias": list(STABILITY.bias)}


def drawn(moments: Tensor, noise: Tensor | None) -> Tensor:
    """Latents float32 […, C, H, W] of moments […, 2·C, H, W], means and after them deviations; noise None: of the means."""
    mean, std = moments.float().chunk(2, -3)
    return STABILITY(mean if noise is None else mean + std * noise)


@torch.no_grad()
def decoded(vae: Any, latents: Tensor, affine: Affine = STABILITY) -> Tensor:
    """Pictures [N, 3, H, W] float32, about in [-1, 1], of latents, by an AutoencoderKL of diffusers.

    EDM2 makes bytes of them by truncating 255·p, all others by truncating 127.5·x + 128: its p is therefore our x = 2 p - 256/255.
    """
    z = affine.inverse(latents.to(vae.device).float())
    return vae.decode(z.to(vae.dtype), return_dict=False)[0].float() * 2 - 256 / 255
