"""One set of real images and several features at once: what a comparison measures every net against.

A net's images are made once and shown to all features. Beside every distance stands its floor, real against real.
"""

from collections.abc import Sequence
from typing import Any

from potstill.engine.data.images import Images
from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.measure.features import Features
from potstill.engine.measure.frechet import moments, squared_distance
from potstill.engine.measure.score import Device, check_fit, reference
from potstill.engine.models.classes import labels_for
from potstill.engine.models.generate import generate


class Judge:
    """Fréchet distances in several features from the same real images, at the same n and seeds."""

    def __init__(self, images: Images, features: Sequence[Features], *, n: int, seed: int = 0, batch: int = 256, device: Device = "cpu"):
        """Reads all images once per features. UserError where features do not take them."""
        self.images, self.n, self.seed, self.batch, self.device = images, n, seed, batch, device
        settings = {"n": n, "seed": seed, "batch": batch, "device": device}
        self.features = {one.title: one for one in features}
        self.references = {one.title: reference(images, one.to(device), **settings) for one in features}

    @property
    def floors(self) -> dict[str, float]:
        """Real against real by title."""
        return {title: one.floor for title, one in self.references.items() if one.floor is not None}  # all: there are images

    @property
    def floor_kind(self) -> str:
        return next(iter(self.references.values())).floor_kind

    def scores(self, net: Any, sampler: Sampler) -> dict[str, float]:
        """Distances by title of n images of this net, which is on the device and in eval mode."""
        check_fit(net, self.images)
        labels, _ = labels_for(net, self.images, self.n)
        seeds = range(self.seed, self.seed + self.n)
        shown = list(generate(net, sampler, labels, seeds, batch=self.batch, device=self.device))
        fakes = {title: moments(shown, one).gaussian("generated") for title, one in self.features.items()}
        return {title: squared_distance(self.references[title].gaussian, fake) for title, fake in fakes.items()}
