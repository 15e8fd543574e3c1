"""Fused score-distillation losses for diffusion models: raw network outputs in, per-sample losses and gradients out.

    from kernels import Estimate, add_noise, score_match

    x_t = add_noise(x, sigma, noise)
    loss, nonfinite = score_match(x, real=Estimate(F_real, x_t, c_skip, c_out), fake=Estimate(F_fake, x_t, c_skip, c_out))
    loss.mean().backward()

On CUDA tensors these are Triton kernels, on CPU tensors plain PyTorch; `kernels.reference` is the definition of both.
"""

from kernels.adam_ema import AdamEMA
from kernels.adversarial import discriminator_adversarial, generator_adversarial
from kernels.denoise import denoise
from kernels.estimate import Estimate, Losses
from kernels.moments import moments
from kernels.noising import NoisedInput, Normals, add_noise, noised_input
from kernels.norm_silu import norm_silu
from kernels.score_implicit import score_implicit
from kernels.score_match import score_match
from kernels.trajectory import trajectory

__all__ = [
    "AdamEMA",
    "Estimate",
    "Losses",
    "NoisedInput",
    "Normals",
    "add_noise",
    "denoise",
    "discriminator_adversarial",
    "generator_adversarial",
    "moments",
    "noised_input",
    "norm_silu",
    "score_implicit",
    "score_match",
    "trajectory",
]
