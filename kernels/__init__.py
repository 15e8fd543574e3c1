"""Fused score-distillation losses for diffusion models: raw network outputs in, per-sample losses and gradients out.

    from potstill.kernels import Estimate, add_noise, score_match

    x_t = add_noise(x, sigma, noise)
    loss, nonfinite = score_match(x, real=Estimate(F_real, x_t, c_skip, c_out), fake=Estimate(F_fake, x_t, c_skip, c_out))
    loss.mean().backward()

On CUDA tensors these are Triton kernels, on CPU tensors plain PyTorch; `kernels.reference` is the definition of both.
"""

from potstill.kernels.adam_ema import AdamEMA
from potstill.kernels.adversarial import discriminator_adversarial, generator_adversarial
from potstill.kernels.denoise import denoise
from potstill.kernels.estimate import Estimate, Losses
from potstill.kernels.moments import moments
from potstill.kernels.mp import mp_cat_silu, mp_silu, mp_sum, pixel_norm, pixel_norm_silu
from potstill.kernels.mp_weights import force_weight_norm_, normalized_weight
from potstill.kernels.noising import add_noise
from potstill.kernels.norm_silu import norm_silu
from potstill.kernels.score_implicit import score_implicit
from potstill.kernels.score_match import score_match
from potstill.kernels.trajectory import trajectory

__all__ = [
    "AdamEMA",
    "Estimate",
    "Losses",
    "add_noise",
    "denoise",
    "discriminator_adversarial",
    "force_weight_norm_",
    "generator_adversarial",
    "moments",
    "mp_cat_silu",
    "mp_silu",
    "mp_sum",
    "norm_silu",
    "normalized_weight",
    "pixel_norm",
    "pixel_norm_silu",
    "score_implicit",
    "score_match",
    "trajectory",
]

if __name__ == "kernels":  # the short name in a checkout
    from potstill._short_names import share

    share(__name__)
