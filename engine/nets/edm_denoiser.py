"""EDM's denoisers: one of its U-Nets inside one of its preconditioning schemes, called alike whatever the scheme."""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill.engine.diffusion import precond as schemes
from potstill.engine.diffusion.precond import Coefficients
from potstill.engine.diffusion.sigmas import edm_weight, karras, karras_at
from potstill.engine.nets.conditions import Condition
from potstill.engine.nets.denoiser import Denoiser, per_sample
from potstill.engine.nets.layers import ResidualBlock
from potstill.engine.nets.unet import UNet, channels_of
from potstill.kernels import Estimate


class EDMDenoiser(Denoiser):
    """D(x; σ, labels) = c_skip·x + c_out·F(c_in·x, c_noise, labels) for images x [N, C, H, W] in [-1, 1].

    `precond` is one of EDM's names ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"), "GDDPrecond",
    "ECMPrecond" (ECT's) or "EDM2Precond", `scheme` its constants and `kwargs` what `engine.nets.edm.from_kwargs` was called with, so that a weight file can say how to
    rebuild the net.
    """

    model: UNet
    forwards = ("levels",)
    casts_weights = True
    u: Tensor  # an iDDPM net's levels

    def __init__(self, model: UNet, precond: str, scheme: dict[str, float], kwargs: dict[str, Any]):
        super().__init__(model)
        self.precond, self.scheme, self.kwargs = precond, scheme, kwargs
        self.shape = (kwargs["img_channels"], kwargs["img_resolution"], kwargs["img_resolution"])
        self.label_dim = kwargs.get("label_dim", 0)
        self.sigma_min, self.sigma_max = scheme["sigma_min"], scheme["sigma_max"]
        if precond == "iDDPMPrecond":
            self.register_buffer("u", schemes.iddpm_levels(int(scheme["M"]), scheme["C_1"], scheme["C_2"]))
            self.register_load_state_dict_post_hook(_forget_levels)

    @property
    def knows_steps(self) -> bool:
        """Does it want `steps=`, the number of levels it is sampled with (`engine.nets.steps`)?"""
        return self.model.map_steps is not None

    def levels(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> list[Tensor]:
        x, c = x.float(), self.coefficients(self._sigmas(sigma, x))
        return self.model.levels(self._input(x, c), c.c_noise, self._labels(condition, x))

    def estimate_and_features(
        self, x: Tensor, sigma: Tensor, condition: Condition | None = None, *, guidance: float = 1.0
    ) -> tuple[Estimate, Tensor]:
        seen: list[Tensor] = []
        estimate = self.estimate(x, sigma, condition, guidance=guidance, seen=seen)
        return estimate, seen[0][: len(x)].float()  # a guided batch is the samples twice, those with a condition first

    def taps(self) -> list[tuple[int, int, int]]:
        channels = {int(name.partition("x")[0]): channels_of(layer) for name, layer in self.model.enc.items()}
        return [(channels[side], side, side) for side in sorted(channels, reverse=True)]

    def coefficients(self, sigma: Tensor) -> Coefficients:
        match self.precond:
            case "EDMPrecond" | "EDM2Precond":
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

    def level(self, u: Tensor) -> Tensor:
        """On the Karras map of 0.002 … 80, whatever the scheme: DMD2's grid and SiD's law."""
        return karras_at(u)

    def weight(self, sigma: Tensor) -> Tensor:
        """EDM's, whatever the scheme: that of its training and of DMD's and SiD's code."""
        return edm_weight(sigma)

    def sampling_levels(self, steps: int) -> Tensor:
        """EDM's; an iDDPM net's ends where the net does, as in EDM's code."""
        if self.precond == "iDDPMPrecond":
            return karras(steps, max(0.002, self.sigma_min), min(80.0, self.sigma_max))
        return karras(steps)

    def blocks(self) -> list[nn.Module]:
        return [b for b in (*self.model.enc.values(), *self.model.dec.values()) if isinstance(b, ResidualBlock)]

    def recompute(self, mode: str) -> None:
        for block in self.unet_blocks():
            block.checkpoint = mode == "blocks"

    def set_dropout(self, p: float) -> None:
        """EDM's files carry their training value."""
        for block in self.unet_blocks():
            block.dropout = p

    def without_augmentation(self) -> "EDMDenoiser":
        self.model.map_augment = None
        self.kwargs = self.kwargs | {"augment_dim": 0}
        return self

    def unet_blocks(self) -> list[ResidualBlock]:
        """Those within wrappers, too (`engine.skipping`)."""
        return [module for module in self.model.modules() if isinstance(module, ResidualBlock)]

    def _raw(
        self, x: Tensor, sigma: Tensor, condition: Condition | None, *, augment_labels: Tensor | None = None, steps: int | None = None,
        seen: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """augment_labels: for nets with such inputs. steps: the number of levels it is sampled with, for nets that know of it.
        seen: is given what the last encoder block returned."""
        x = x.float()
        c = self.coefficients(self._sigmas(sigma, x))
        raw = self.model(self._input(x, c), c.c_noise, self._labels(condition, x), augment_labels, steps, seen is not None)
        if seen is not None:
            raw, deepest = raw
            seen.append(deepest)
        return raw[:, : self.img_channels], x, c.c_skip, c.c_out  # iDDPM's net also predicts a variance, unused

    def _input(self, x: Tensor, c: Coefficients) -> Tensor:
        return (per_sample(c.c_in, x) * x).to(self.compute_dtype)

    def _labels(self, labels: Condition | None, x: Tensor) -> Tensor | None:
        assert labels is None or isinstance(labels, Tensor)
        if not self.label_dim:
            return None
        if labels is None:
            return torch.zeros(x.shape[0], self.label_dim, device=x.device)
        return labels.float().reshape(-1, self.label_dim).expand(x.shape[0], -1)


def _forget_levels(net: EDMDenoiser, _: Any) -> None:
    """The cached levels are another file's after loading one."""
    net.__dict__.pop("known_levels", None)
