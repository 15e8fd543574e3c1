"""The Fréchet distance between two sets of images: that of the Gaussians fitted to their features (1706.08500, Eq. 6).

    d² = |μ_r - μ_g|² + tr(Σ_r + Σ_g - 2 (Σ_r Σ_g)^½)

The arithmetic is torchmetrics': sums of features and of their products in float64, streaming over batches, covariances
with n - 1, and the trace of the root from the eigenvalues of Σ_r Σ_g, which stays real where a covariance is singular.
"""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from engine.errors import UserError
from engine.evaluation.features import Features


def frechet(real_batches: Iterable[Tensor], fake_batches: Iterable[Tensor], features: Features) -> float:
    """Distance between two streams of uint8 images [n, C, H, W], in the square of the features' unit.

    UserError for fewer than two images on either side. Rounding can make it negative: for a set against itself it is of
    the order of -1e-7 where the covariance is singular.
    """
    return distance(fitted(real_batches, features), fake_batches)


def fitted(real_batches: Iterable[Tensor], features: Features) -> FrechetInceptionDistance:
    """The real side, kept: `distance` can be asked any number of times against it."""
    batches = iter(real_batches)
    first = next(batches, None)
    if first is None:
        raise UserError("a Fréchet distance wants at least 2 real images, got 0")
    features.to(first.device).measure(first)
    # Only this process's images count: by default torchmetrics would wait for all ranks, and one rank evaluates.
    metric = FrechetInceptionDistance(features, reset_real_features=False, sync_on_compute=False).to(first.device)
    _fill(metric, chain([first], batches), real=True)
    return metric


def distance(metric: FrechetInceptionDistance, fake_batches: Iterable[Tensor]) -> float:
    """Distance of a stream of uint8 images [n, C, H, W] from the real side of `metric`."""
    metric.reset()
    _fill(metric, fake_batches, real=False)
    return metric.compute().item()


@torch.no_grad()
def _fill(metric: FrechetInceptionDistance, batches: Iterable[Tensor], *, real: bool) -> None:
    n = 0
    for batch in batches:
        metric.update(batch, real=real)
        n += len(batch)
    if n < 2:
        raise UserError(f"a Fréchet distance wants at least 2 {'real' if real else 'generated'} images, got {n}")
