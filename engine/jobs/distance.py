"""The Fréchet distance of a run's nets from its data, as `eval.` says: features and reference are made once."""

from functools import cached_property
from typing import Any

import torch

from potstill.engine.config.tree import EvalConfig
from potstill.engine.data.images import Images
from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.measure.features import Features
from potstill.engine.measure.networks import features_by_name
from potstill.engine.measure.score import Reference, reference, score
from potstill.engine.nets.denoiser import Denoiser


class Distance:
    """From these images; nothing is loaded before it is asked for."""

    def __init__(self, cfg: EvalConfig, images: Images, device: torch.device):
        self.images, self.name, self.device = images, cfg.features, device
        self.settings: dict[str, Any] = {
            "n": cfg.n or min(len(images), 50_000), "seed": cfg.seed, "batch": cfg.batch, "device": device
        }  # fmt: skip

    @cached_property
    def features(self) -> Features:
        return features_by_name(self.name).to(self.device)

    @cached_property
    def reference(self) -> Reference:
        return reference(self.images, self.features, **self.settings)

    def try_features(self) -> None:
        """Fetch and load the features and show them one image: what fails does so before the training, not after it."""
        self.features.try_on(self.images.channels, self.images.resolution, self.device)

    def of(self, net: Denoiser, sampler: Sampler, progress: str | None = None) -> dict[str, Any]:
        """The distance of this net's images, with everything needed to repeat it."""
        settings = self.settings | {"against": self.reference, "progress": progress}
        return score(net.eval(), sampler, self.images, self.features, **settings)
