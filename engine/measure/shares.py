"""Every process's share of the images: whole batches in turn, so that an image is computed in the batch that it has in one process."""

import numpy as np
import torch
from torch import Tensor

from potstill.engine.training.ranks import Ranks


def share(ranks: Ranks, total: int, batch: int) -> np.ndarray:
    """Which of `total` items, made `batch` at a time, are this process's, in their order: [m] int64."""
    items = np.arange(total)
    return items[items // batch % ranks.count == ranks.rank]


def gathered(ranks: Ranks, rows: Tensor, total: int, batch: int) -> Tensor:
    """The rows [m, …] of all processes' shares as [total, …], each at its item's place."""
    whole = rows.new_zeros(total, *rows.shape[1:])
    whole[torch.from_numpy(share(ranks, total, batch)).to(rows.device)] = rows
    return ranks.total(whole)
