"""Between pictures and the latents that a net is trained on, with the shift and scale that a VAE's own settings say.

    latents = (z - shift)·scale      z: the VAE's encoding

Shift and scale are `shift_factor` and `scaling_factor`, or each channel's own `latents_mean` and 1 / `latents_std` (Qwen-Image, Wan), or
the statistics of a batch norm after 2×2 of z are packed into one latent of four times the channels (FLUX.2).
"""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode_latents(vae: Any, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents float32 of pictures [N, 3, H, W] in [-1, 1], or videos [N, 3, T, H, W].

    generator: draws them from the VAE's distribution; None: its mode.
    """
    x, still = _framed(vae, pictures.to(vae.device, vae.dtype))
    encoded = vae.encode(x)
    if hasattr(encoded, "latent_dist"):
        z = encoded.latent_dist.mode() if generator is None else encoded.latent_dist.sample(generator)
    else:
        z = encoded.latent  # of an autoencoder without a distribution, as Sana's
    z = z.float()
    if hasattr(vae, "bn"):
        z = torch.nn.functional.pixel_unshuffle(z, 2)
    shift, scale = _shift_and_scale(vae, z)
    z = (z - shift) * scale
    return z.squeeze(2) if still else z


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] float32, about in [-1, 1], or videos, of latents."""
    z, still = _framed(vae, latents.to(vae.device).float())
    shift, scale = _shift_and_scale(vae, z)
    z = z / scale + shift
    if hasattr(vae, "bn"):
        z = torch.nn.functional.pixel_shuffle(z, 2)
    pictures = vae.decode(z.to(vae.dtype), return_dict=False)[0].float()
    return pictures.squeeze(2) if still else pictures


def _framed(vae: Any, x: Tensor) -> tuple[Tensor, bool]:
    """As a video of one frame where the VAE is one of videos but x is not, and whether it was made one."""
    still = "temperal_downsample" in vae.config and x.ndim == 4
    return (x.unsqueeze(2) if still else x), still


def _shift_and_scale(vae: Any, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
    config, shape = vae.config, (1, -1, *[1] * (z.ndim - 2))
    if hasattr(vae, "bn"):
        deviation = (vae.bn.running_var.float() + config.batch_norm_eps).sqrt()
        return vae.bn.running_mean.float().view(shape).to(z.device), 1 / deviation.view(shape).to(z.device)
    scale = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is None:
        return config.get("shift_factor") or 0.0, scale
    mean, deviation = (torch.tensor(config[name], device=z.device).view(shape) for name in ("latents_mean", "latents_std"))
    return mean, scale / deviation
