"""The denoiser D(x; σ): a U-Net inside its preconditioning, called alike whatever the scheme."""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill.engine.diffusion import precond as schemes
from potstill.engine.diffusion.precond import Coefficients
from potstill.engine.nets.unet import UNet
from potstill.kernels import Estimate


class Denoiser(nn.Module):
    """D(x; σ, labels) = c_skip·x + c_out·F(c_in·x, c_noise, labels) for images x [N, C, H, W] in [-1, 1].

    `precond` is one of EDM's names ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"), "GDDPrecond" or
    "ECMPrecond" (ECT's), `scheme` its constants and `kwargs` what `engine.nets.edm.from_kwargs` was called with, so that a weight file can say how to
    rebuild the net.
    `compute_dtype` is what F runs in; parameters, preconditioning and D stay float32.
    """

    u: Tensor  # an iDDPM net's levels

    def __init__(self, model: UNet, precond: str, scheme: dict[str, float], kwargs: dict[str, Any]):
        super().__init__()
        self.model, self.precond, self.scheme, self.kwargs = model, precond, scheme, kwargs
        self.img_resolution, self.img_channels = kwargs["img_resolution"], kwargs["img_channels"]
        self.label_dim = kwargs.get("label_dim", 0)
        self.sigma_min, self.sigma_max = scheme["sigma_min"], scheme["sigma_max"]
        self.compute_dtype = torch.float32
        if precond == "iDDPMPrecond":
            self.register_buffer("u", schemes.iddpm_levels(int(scheme["M"]), scheme["C_1"], scheme["C_2"]))
            self.register_load_state_dict_post_hook(_forget_levels)

    @property
    def knows_steps(self) -> bool:
        """Does it want `steps=`, the number of levels it is sampled with (`engine.nets.steps`)?"""
        return self.model.map_steps is not None

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        steps: int | None = None,
    ) -> Tensor:
        """D [N, C, H, W] float32. sigma: scalar or [N]; class_labels [N, label_dim] one-hot, or None for none.

        steps: the number of levels it is sampled with, for nets that know of it.
        """
        raw, x_t, c_skip, c_out = self._raw(x, sigma, class_labels, augment_labels, steps)
        return c_skip[:, None, None, None] * x_t + c_out[:, None, None, None] * raw.float()

    def estimate(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        *,
        guidance: float = 1.0,
        steps: int | None = None,
    ) -> Estimate:
        """D left unformed, for the fused losses; with guidance != 1 the net also runs without the labels, as one batch."""
        if guidance == 1.0:
            return Estimate(*self._raw(x, sigma, class_labels, None, steps))
        if class_labels is None:
            raise ValueError(f"guidance {guidance} wants class labels, got none")
        sigma = sigma.expand(len(x))
        labels = torch.cat([class_labels, torch.zeros_like(class_labels)])
        raw, x_t, c_skip, c_out = self._raw(torch.cat([x, x]), torch.cat([sigma, sigma]), labels, None, steps)
        n = len(x)
        return Estimate(raw[:n], x_t[:n], c_skip[:n], c_out[:n], raw[n:], guidance)

    def features(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """What the last encoder block sees in x: [N, C', h, w] float32."""
        return self.levels(x, sigma, class_labels)[-1].float()

    def levels(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> list[Tensor]:
        """What the encoder sees in x at every resolution, finest first: maps [N, C', h, w] in `compute_dtype`."""
        x, c = x.float(), self.coefficients(self._sigmas(sigma, x))
        return self.model.levels(self._input(x, c), c.c_noise, self._labels(class_labels, x))

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """The scheme's four coefficients at σ [N]."""
        match self.precond:
            case "EDMPrecond":
                return schemes.edm(sigma, self.scheme["sigma_data"])
            case "GDDPrecond":
                return schemes.gdd(sigma, self.scheme["sigma_data"])
            case "ECMPrecond":
                return schemes.gdd(sigma, self.scheme["sigma_data"], self.scheme["sigma_min"])
            case "VPPrecond":
                return schemes.vp(sigma, self.scheme["beta_d"], self.scheme["beta_min"], int(self.scheme["M"]))
            case "VEPrecond":
                return schemes.ve(sigma)
            case "iDDPMPrecond":
                return schemes.iddpm(sigma, self.u)
        raise AssertionError(self.precond)

    def round_sigma(self, sigma: float) -> float:
        """The noise level that EDM's samplers ask the net at where their schedule says σ > 0: of an iDDPM net the nearest of
        its own (never 0), of all others σ itself.
        """
        if self.precond != "iDDPMPrecond":
            return sigma
        return float(self.known_levels[np.abs(self.known_levels - sigma).argmin()])

    @cached_property
    def known_levels(self) -> np.ndarray:
        """An iDDPM net's levels above 0, on the host: a walk asks no device."""
        return np.array([level for level in self.u.tolist() if level > 0])

    def _raw(self, x: Tensor, sigma: Tensor, labels: Tensor | None, augment_labels: Tensor | None, steps: int | None):
        x = x.float()
        c = self.coefficients(self._sigmas(sigma, x))
        raw = self.model(self._input(x, c), c.c_noise, self._labels(labels, x), augment_labels, steps)
        return raw[:, : self.img_channels], x, c.c_skip, c.c_out  # iDDPM's net also predicts a variance, unused

    def _input(self, x: Tensor, c: Coefficients) -> Tensor:
        return (c.c_in[:, None, None, None] * x).to(self.compute_dtype)

    def _sigmas(self, sigma: Tensor, x: Tensor) -> Tensor:
        n = x.shape[0]  # torch.export would take len(x) for a constant
        if sigma.ndim == 0 and sigma.device != x.device:  # a number, not a copy from pageable memory that waits
            return x.new_ones(n, dtype=torch.float32) * sigma.float()
        return sigma.float().to(x.device).reshape(-1).expand(n)

    def _labels(self, labels: Tensor | None, x: Tensor) -> Tensor | None:
        if not self.label_dim:
            return None
        if labels is None:
            return torch.zeros(x.shape[0], self.label_dim, device=x.device)
        return labels.float().reshape(-1, self.label_dim).expand(x.shape[0], -1)


def _forget_levels(net: Denoiser, _: Any) -> None:
    """The cached levels are another file's after loading one."""
    net.__dict__.pop("known_levels", None)
