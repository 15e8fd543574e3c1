"""Two more ways to compare features [N, D] of real and generated images: the kernel distance, and precision and recall.

KID (1801.01401) is torchmetrics': the squared maximum mean discrepancy of (x·y/D + 1)³, unbiased, a mean over 100 subsets of
1000. Precision and recall (1904.06991): the share of generated images within the k-th neighbour's distance of a real one,
and the other way round.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from potstill.engine.common.errors import UserError

SUBSETS, SUBSET = 100, 1000
NEIGHBOURS = 3


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


def precision_recall(real: Tensor, fake: Tensor, *, k: int = NEIGHBOURS, block: int = 2048) -> dict[str, Any]:
    """Shares in [0, 1]; `block` rows of the table of distances are in memory at a time."""
    check_neighbours(min(len(real), len(fake)), k)
    return {"precision": _covered(real, fake, k, block), "recall": _covered(fake, real, k, block), "neighbours": k}


def check_neighbours(n: int, k: int = NEIGHBOURS) -> None:
    """UserError where the smaller of two sets of images, n of them, has no k-th neighbours."""
    if n <= k:
        raise UserError(f"precision and recall want more than {k} images on either side, got {n}")


def _covered(centres: Tensor, points: Tensor, k: int, block: int) -> float:
    """Share of the points that lie in the ball of a centre, which reaches to its k-th neighbour among the centres."""
    radii = torch.cat([torch.cdist(rows, centres).kthvalue(k + 1).values for rows in centres.split(block)])  # 1st: itself
    inside = [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(block)]
    return float(torch.cat(inside).double().mean())
