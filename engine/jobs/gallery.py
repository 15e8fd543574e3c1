"""The pictures of a run: samples from the same noise every time and real images, with classes in columns."""

import numpy as np
import torch

from potstill.engine.data.images import Images
from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.models.generate import generate
from potstill.engine.nets.denoiser import Denoiser


class Gallery:
    """What one data set's pictures show; `images` is None for a data-free run."""

    count = 60  # divides into rows of 10 classes

    def __init__(self, images: Images | None, device: torch.device):
        self.images, self.device = images, device

    def samples(self, net: Denoiser, sampler: Sampler) -> torch.Tensor:
        """Generated images [60, C, H, W], uint8."""
        labels = np.resize(self.classes(net.label_dim), self.count) if net.label_dim else None
        return torch.cat(list(generate(net, sampler, labels, range(self.count), device=self.device)))

    def real(self) -> torch.Tensor:
        """As many real images, uint8."""
        assert self.images is not None
        return torch.from_numpy(np.stack([self.images.read(int(i)) for i in self.real_places()]))

    def real_places(self) -> np.ndarray:
        """Where these lie in the data set; of a labelled one, classes in columns like the samples."""
        assert self.images is not None
        if self.images.labels is None:
            return np.linspace(0, len(self.images) - 1, self.count).astype(int)
        of_class = [np.flatnonzero(self.images.labels == c) for c in self.classes(self.images.label_dim)]
        columns = len(of_class)
        return np.array([of_class[i % columns][(i // columns) % len(of_class[i % columns])] for i in range(self.count)])

    def columns(self, net: Denoiser) -> int:
        """How many pictures stand side by side."""
        classes = len(self.classes(net.label_dim))
        return classes if net.label_dim and classes > 1 else 10

    def classes(self, label_dim: int) -> np.ndarray:
        """The classes in the columns: the first ten that have images; without labelled data, the first ten."""
        labels = None if self.images is None else self.images.labels
        return (np.arange(label_dim) if labels is None else np.unique(labels))[:10]
