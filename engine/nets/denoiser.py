"""The denoiser D(x; σ): any net inside its preconditioning, and what a method must know of its noise levels.

Everything is in EDM's coordinates (2206.00364): x = y + σ n for an image y and standard normals n. A net of another kind, a
discrete one that predicts the noise or a flow, is the same D with other coefficients.
"""

from typing import Any

import torch
from torch import Tensor, nn

from potstill.engine.diffusion.precond import Coefficients
from potstill.engine.nets.conditions import Condition, cat
from potstill.engine.nets.lora import LoraConfig
from potstill.kernels import Estimate

CHECKPOINTING = ("off", "blocks")  # what a forward keeps for backward: every activation it wants | what enters each block


class Denoiser(nn.Module):
    """D(x; σ, condition) = c_skip·x + c_out·F(c_in·x, time(σ), condition) for samples x [N, *shape].

    shape: of one sample, [C, H, W] of images in [-1, 1] or of latents, [C, T, H, W] of video.
    label_dim: the classes it knows, told as one-hot rows; 0 for none. text: is it told prompts (`conditions.Text`) instead?
    sigma_min, sigma_max: the noise levels it was trained for. compute_dtype: what F runs in; parameters, preconditioning
    and D stay float32.
    """

    model: nn.Module  # F
    shape: tuple[int, ...]
    label_dim: int = 0
    text: bool = False
    sigma_min: float
    sigma_max: float
    forwards: tuple[str, ...] = ()  # methods of `model` that are called beside its forward
    waits: str = ""  # why a call of it waits for the device, so that no CUDA graph can hold it; "": it does not
    casts_weights = False  # do its layers ask for weights in `compute_dtype` (`nets.shadow`)?
    source: str = ""  # the file or folder that its weights, adapters apart, were read from
    guide: Any = None  # the worse net that guidance leads away from (`engine.nets.guide.Guide`), in the place of the same one untold
    forces_norms = False  # in training mode, does a forward put `weights_of_unit_length` back?
    adapters: LoraConfig | None = None  # that it has (`engine.nets.lora`)
    lora_of_copies: LoraConfig | None = None  # what students and fake nets get that start from it (`engine.methods.base.copied`)

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.compute_dtype = torch.float32

    @property
    def knows_steps(self) -> bool:
        """Does it want `steps=`, the number of levels it is sampled with (`engine.nets.steps`)?"""
        return False

    @property
    def img_channels(self) -> int:
        return self.shape[0]

    @property
    def img_resolution(self) -> int:
        return self.shape[-1]

    @property
    def conditional(self) -> bool:
        """Is it told what to draw?"""
        return bool(self.label_dim) or self.text

    @property
    def guidable(self) -> bool:
        """Can guidance lead away from what it draws when it is told nothing?"""
        return self.conditional or self.guide is not None

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition | None = None, **how: Any) -> Tensor:
        """D [N, *shape] float32. sigma: scalar or [N]; condition: N rows, or None for none; how: what else a net of its kind knows."""
        raw, x_t, c_skip, c_out = self._raw(x, sigma, condition, **how)
        return per_sample(c_skip, x_t) * x_t + per_sample(c_out, x_t) * raw.float()

    def estimate(self, x: Tensor, sigma: Tensor, condition: Condition | None = None, *, guidance: float = 1.0, **how: Any) -> Estimate:
        """D left unformed, for the fused losses; with guidance != 1 its guide runs, too, or the net itself unconditionally, as one batch."""
        if guidance == 1.0:
            return Estimate(*self._raw(x, sigma, condition, **how))
        if self.guide is not None:
            other = self.guide.net
            worse = other._raw(x, sigma, condition if other.conditional else None)[0]
            return Estimate(*self._raw(x, sigma, condition, **how), worse, guidance)
        if condition is None:
            raise ValueError(f"guidance {guidance} wants class labels or prompts, got none")
        n, sigma = len(x), sigma.expand(len(x))
        both = cat(condition, self.unconditional(condition))
        raw, x_t, c_skip, c_out = self._raw(torch.cat([x, x]), torch.cat([sigma, sigma]), both, **how)
        return Estimate(raw[:n], x_t[:n], c_skip[:n], c_out[:n], raw[n:], guidance)

    def estimate_and_features(
        self, x: Tensor, sigma: Tensor, condition: Condition | None = None, *, guidance: float = 1.0
    ) -> tuple[Estimate, Tensor]:
        """Both `estimate` and `features` of the same x; of nets that can, in one forward."""
        return self.estimate(x, sigma, condition, guidance=guidance), self.features(x, sigma, condition)

    def features(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        """What the last encoder block sees in x: [N, C', h, w] float32."""
        return self.levels(x, sigma, condition)[-1].float()

    # what a kind of net says of itself

    def _raw(self, x: Tensor, sigma: Tensor, condition: Condition | None, **how: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """F [N, *shape] in any dtype, x in float32, c_skip [N] and c_out [N]."""
        raise NotImplementedError(f"{type(self).__name__}._raw")

    def levels(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> list[Tensor]:
        """What the encoder sees in x at every resolution, finest first: maps [N, C', h, w] in `compute_dtype`."""
        raise NotImplementedError(f"{type(self).__name__}.levels")

    def taps(self) -> list[tuple[int, int, int]]:
        """Channels, height and width of each map of `levels`, known without running the net."""
        raise NotImplementedError(f"{type(self).__name__}.taps")

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """c_skip, c_out, c_in and the net's own time at σ [N]."""
        raise NotImplementedError(f"{type(self).__name__}.coefficients")

    def level(self, u: Tensor) -> Tensor:
        """σ at the quantiles u in [0, 1] of the levels that are uniform over the net's own times; 1 is all noise."""
        raise NotImplementedError(f"{type(self).__name__}.level")

    def weight(self, sigma: Tensor) -> Tensor:
        """λ(σ), the weight on |D - y|² that is 1 on F: 1 / c_out²."""
        return self.coefficients(sigma).c_out ** -2

    def logvar(self, sigma: Tensor) -> Tensor | None:
        """v [N], what the net has learnt of the log-variance of its own error at σ [N] (EDM2); None for nets without that head."""
        return None

    def told(self, sigma: Tensor) -> Tensor:
        """The levels nearest to σ that the net can be told; told(told(σ)) = told(σ). Noise is added at these."""
        return sigma

    def round_sigma(self, sigma: float) -> float:
        """The same for one level on the host, of which samplers' schedules are made."""
        return sigma

    def sampling_levels(self, steps: int) -> Tensor:
        """The `steps` levels over which a teacher is sampled, from the greatest down, without the 0 that follows: float64 on the host."""
        raise NotImplementedError(f"{type(self).__name__}.sampling_levels")

    def unconditional(self, condition: Condition) -> Condition:
        """As many rows that say nothing: no class, or the empty prompt."""
        assert isinstance(condition, Tensor)
        return torch.zeros_like(condition)

    def blocks(self) -> list[nn.Module]:
        """The parts, none within another, that are sharded, compiled and recomputed by themselves."""
        raise NotImplementedError(f"{type(self).__name__}.blocks")

    def beside(self) -> list[nn.Module]:
        """Parts with weights that are not in `model`."""
        return []

    def weights_of_unit_length(self) -> list[nn.Parameter]:
        """Weights [out, …] whose output channels training puts back to unit length in every iteration (EDM2)."""
        return []

    def recompute(self, mode: str) -> None:
        """What a forward keeps for backward, one of CHECKPOINTING."""
        raise NotImplementedError(f"{type(self).__name__}.recompute")

    def set_dropout(self, p: float) -> None:
        """Dropout of probability p in every block that has any."""
        raise NotImplementedError(f"{type(self).__name__}.set_dropout")

    def without_augmentation(self) -> "Denoiser":
        """The same net, changed, without a branch that nothing uses where images are not augmented."""
        return self

    # for the kinds

    def _sigmas(self, sigma: Tensor, x: Tensor) -> Tensor:
        """σ as [N] float32 on x's device."""
        n = x.shape[0]  # torch.export would take len(x) for a constant
        if sigma.ndim == 0 and sigma.device != x.device:  # a number, not a copy from pageable memory that waits
            return x.new_ones(n, dtype=torch.float32) * sigma.float()
        return sigma.float().to(x.device).reshape(-1).expand(n)


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """[N] as it is multiplied with x [N, …]."""
    return values.reshape(-1, *(1,) * (x.ndim - 1))
