"""Several processes, each with its share of the images: who makes which batch, and how their sums and features meet.

Shares are whole batches, in turn, so that every image is computed in the batch that it has in a single process, and the
same sums are only added in another order.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shards:
    """Process `rank` of `world`; the default is alone, and waits for nobody."""

    rank: int = 0
    world: int = 1

    def mine(self, total: int, batch: int) -> np.ndarray:
        """Which of `total` items, made `batch` at a time, are this process's, in their order: [m] int64."""
        return self._of(self.rank, total, batch)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gathered(self, rows: Tensor, total: int, batch: int) -> Tensor:
        """All processes' rows [m, …] as [total, …], every one at its item's place."""
        if self.world == 1:
            return rows
        shares = [self._of(rank, total, batch) for rank in range(self.world)]
        padded = rows.new_zeros(max(map(len, shares)), *rows.shape[1:])
        padded[: len(rows)] = rows
        received = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(received, padded)
        whole = rows.new_empty(total, *rows.shape[1:])
        for share, theirs in zip(shares, received, strict=True):
            whole[torch.from_numpy(share).to(whole.device)] = theirs[: len(share)]
        return whole

    def _of(self, rank: int, total: int, batch: int) -> np.ndarray:
        items = np.arange(total)
        return items[items // batch % self.world == rank]


ALONE = Shards()


@contextmanager
def from_torchrun(device: torch.device) -> Iterator[tuple[Shards, torch.device]]:
    """The processes that torchrun started and this one's device; alone, with nothing set up, without torchrun."""
    world, rank, local = (int(os.environ.get(name, default)) for name, default in WORLD)
    if world == 1:
        yield ALONE, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Shards(rank, world), device
    finally:
        dist.destroy_process_group()


WORLD: Sequence[tuple[str, str]] = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
