"""How far two sets of images are from each other in their features: the Fréchet distance between the Gaussians fitted to them
(1706.08500, Eq. 6), the kernel distance, and precision and recall.

    d² = |μ_r - μ_g|² + tr(Σ_r + Σ_g - 2 (Σ_r Σ_g)^½)

Features and their products are summed in float64, batch by batch and over processes; covariances have n - 1. The trace of
the root is the sum of the singular values of Σ_r^½ Σ_g^½, which stays real and accurate where a covariance is singular.

KID (1801.01401) is torchmetrics': the squared maximum mean discrepancy of (x·y/D + 1)³, unbiased, a mean over 100 subsets of
1000. Precision and recall (1904.06991): the share of generated images within the k-th neighbour's distance of a real one,
and the other way round.
"""

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from potstill.engine.common.errors import UserError
from potstill.engine.measure.features import Features
from potstill.engine.training.ranks import ALONE, Ranks

SUBSETS, SUBSET = 100, 1000
NEIGHBOURS = 3


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


def kid(real: Tensor, fake: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """Mean and standard deviation over the subsets; smaller ones where there are fewer images. `seed` chooses them."""
    from torchmetrics.image.kid import KernelInceptionDistance  # half of a run's start, and only this wants it

    size = min(SUBSET, len(real), len(fake))
    if size < 2:
        raise UserError(f"a kernel distance wants at least 2 images on either side, got {size}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features: they are kept already
        metric = KernelInceptionDistance(nn.Identity(), subsets=SUBSETS, subset_size=size, sync_on_compute=False)
    metric = metric.set_dtype(real.dtype).to(real.device)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mean, std = metric.compute()
    return {"kid": float(mean), "kid_std": float(std), "kid_subsets": SUBSETS, "kid_subset_size": size}


def precision_recall(real: Tensor, fake: Tensor, *, block: int = 2048) -> dict[str, Any]:
    """Shares in [0, 1]; `block` rows of the table of distances are in memory at a time."""
    check_neighbours(min(len(real), len(fake)))
    return {"precision": _covered(real, fake, block), "recall": _covered(fake, real, block), "neighbours": NEIGHBOURS}


def check_neighbours(n: int) -> None:
    """UserError where the smaller of two sets of images, n of them, has no k-th neighbours."""
    if n <= NEIGHBOURS:
        raise UserError(f"precision and recall want more than {NEIGHBOURS} images on either side, got {n}")


def _covered(centres: Tensor, points: Tensor, block: int) -> float:
    """Share of the points that lie in the ball of a centre, which reaches to its k-th neighbour among the centres."""
    radii = torch.cat([torch.cdist(rows, centres).kthvalue(NEIGHBOURS + 1).values for rows in centres.split(block)])  # 1st: itself
    inside = [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(block)]
    return float(torch.cat(inside).double().mean())


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
