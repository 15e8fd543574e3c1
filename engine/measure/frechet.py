"""The Fréchet distance between two sets of images: that of the Gaussians fitted to their features (1706.08500, Eq. 6).

    d² = |μ_r - μ_g|² + tr(Σ_r + Σ_g - 2 (Σ_r Σ_g)^½)

Features and their products are summed in float64, batch by batch and over processes; covariances have n - 1. The trace of
the root is the sum of the singular values of Σ_r^½ Σ_g^½, which stays real and accurate where a covariance is singular.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.measure.features import Features
from potstill.engine.training.ranks import ALONE, Ranks


class Gaussian(NamedTuple):
    """Mean [D] and covariance [D, D], float64 on the CPU."""

    mu: Tensor
    sigma: Tensor


class Moments:
    """Sums over features [n, D], from which the Gaussian follows."""

    def __init__(self, d: int, device: torch.device | str = "cpu"):
        self.n = 0
        self.sum = torch.zeros(d, dtype=torch.float64, device=device)
        self.products = torch.zeros(d, d, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        features = features.double()
        self.n += len(features)
        self.sum += features.sum(0)
        self.products.addmm_(features.T, features)

    def merge(self, ranks: Ranks) -> None:
        """Make them the sums over all processes."""
        n = self.sum.new_tensor(self.n)
        for tensor in (n, self.sum, self.products):
            ranks.total(tensor)
        self.n = int(n)

    def gaussian(self, kind: str) -> Gaussian:
        """`kind` is what the error calls the images."""
        if self.n < 2:
            raise UserError(f"a Fréchet distance wants at least 2 {kind} images, got {self.n}")
        mu = self.sum / self.n
        sigma = (self.products - self.n * torch.outer(mu, mu)) / (self.n - 1)
        return Gaussian(mu.cpu(), sigma.cpu())


def squared_distance(a: Gaussian, b: Gaussian) -> float:
    """d², in the square of the features' unit; rounding can make it negative by about 1e-12 of the traces."""
    root = torch.linalg.svdvals(_root(a.sigma) @ _root(b.sigma)).sum()
    return float((a.mu - b.mu).square().sum() + a.sigma.trace() + b.sigma.trace() - 2 * root)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root. Eigenvalues within rounding of zero are zero: their roots would be eight digits larger."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    values = torch.where(values > noise, values, 0.0)
    return (vectors * values.sqrt()) @ vectors.T


def frechet(real_batches: Iterable[Tensor], fake_batches: Iterable[Tensor], features: Features) -> float:
    """Distance between two streams of uint8 images [n, C, H, W]. UserError for fewer than two on either side."""
    return squared_distance(moments(real_batches, features).gaussian("real"), moments(fake_batches, features).gaussian("generated"))


@torch.no_grad()
def moments(batches: Iterable[Tensor], features: Features, *, kept: list[Tensor] | None = None, ranks: Ranks = ALONE) -> Moments:
    """The sums over a stream of uint8 images, all processes' together; `kept` collects this one's features, [n, D] each.

    A process that may be left without images has measured the features before.
    """
    found = None
    for batch in batches:
        if found is None:
            features.to(batch.device).measure(batch)
            found = Moments(features.num_features, batch.device)
        seen = features(batch)
        found.add(seen)
        if kept is not None:
            kept.append(seen)
    found = found or Moments(features.num_features, features.device)
    found.merge(ranks)
    return found


# Several processes: each makes whole batches in turn, so that an image is computed in the batch that it has in one process.


def share(ranks: Ranks, total: int, batch: int) -> np.ndarray:
    """Which of `total` items, made `batch` at a time, are this process's, in their order: [m] int64."""
    items = np.arange(total)
    return items[items // batch % ranks.count == ranks.rank]


def gathered(ranks: Ranks, rows: Tensor, total: int, batch: int) -> Tensor:
    """The rows [m, …] of all processes' shares as [total, …], each at its item's place."""
    whole = rows.new_zeros(total, *rows.shape[1:])
    whole[torch.from_numpy(share(ranks, total, batch)).to(rows.device)] = rows
    return ranks.total(whole)
