"""The input and the output of the losses: a network's estimate of the clean image (Estimate), and numbers per sample (Losses)."""

from typing import NamedTuple

import torch
from torch import Tensor

from potstill.kernels._inference import takes_inference_tensors


def accum(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of sums: float64 where any of the tensors is, else float32."""
    for t in tensors:
        if t is not None and t.dtype is torch.float64:
            return torch.float64
    return torch.float32


def per_sample(v_n: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, ..., 1] with as many axes as `like`."""
    return v_n.reshape(-1, *[1] * (like.ndim - 1))


class Estimate(NamedTuple):
    """A network's raw output F and what turns it into the clean image, not yet multiplied out:

        D = c_skip · x_t + c_out · (F_u + guidance · (F - F_u))

    The losses of this package take estimates as they are and form D in registers, in float32, whatever dtype and
    memory format F comes in. A plain tensor stands for an estimate whose raw output already is D. c_skip and c_out are one
    number per sample, [N] or, as EDM's preconditioning has them, [N, 1, 1, 1]. A loss that has a gradient for the student's
    images x alone, such as score_match, wants x_t made from x.detach().
    """

    raw: Tensor  # F [N, C, H, W], any floating dtype and memory format
    x_t: Tensor | None = None  # the noisy input [N, C, H, W], before c_in; None: F already is D
    c_skip: Tensor | None = None  # [N] or [N, 1, 1, 1] float32
    c_out: Tensor | None = None  # [N] or [N, 1, 1, 1] float32
    raw_uncond: Tensor | None = None  # F_u [N, C, H, W], without the condition, for classifier-free guidance
    guidance: float = 1.0  # F <- F_u + guidance·(F - F_u)

    @property
    def images(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The fields that are images and can have a gradient: raw, x_t, raw_uncond."""
        return self.raw, self.x_t, self.raw_uncond

    @takes_inference_tensors
    def denoised(self) -> Tensor:
        """D [N, C, H, W] in float32 (float64 where anything is), differentiable in every tensor."""
        dtype = accum(self.raw, self.x_t, self.raw_uncond)
        f = self.raw.to(dtype)
        if self.raw_uncond is not None:
            f_u = self.raw_uncond.to(dtype)
            f = f_u + self.guidance * (f - f_u)
        if self.x_t is None or self.c_skip is None or self.c_out is None:
            return f
        c_skip, c_out = per_sample(self.c_skip.to(dtype), f), per_sample(self.c_out.to(dtype), f)
        return c_skip * self.x_t.to(dtype) + c_out * f


def shared(fake: Estimate, real: Estimate) -> Estimate:
    """`fake` without its x_t where that is the very tensor `real` holds, so that it is read once."""
    return fake._replace(x_t=None) if fake.x_t is not None and fake.x_t is real.x_t else fake


def without_common_part(real: Estimate, fake: Estimate) -> tuple[Estimate, Estimate]:
    """Both without c_skip·x_t where it is the same in both, so that it cancels in the difference of their D."""
    if fake.x_t is None and fake.c_skip is not None and fake.c_skip is real.c_skip:
        return real._replace(x_t=None, c_skip=None), fake._replace(c_skip=None)
    return real, fake


class Losses(NamedTuple):
    """One number per sample, and the count of samples without one."""

    value: Tensor  # [N] float32, differentiable; a sample whose value is not finite has value 0 and gradient 0
    nonfinite: Tensor  # [] int32, on the device: how many those are
