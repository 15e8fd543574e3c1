"""Cuts a batch into micro-batches and gives each its random numbers, which are a function of (seed, iteration) alone.

So the step counter is the whole state of data and noise, and a run that was killed repeats itself from its last checkpoint.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.engine.methods.base import Batch, Draws, Method
from potstill.engine.training.capture import default_generator
from potstill.engine.training.config import TrainConfig
from potstill.engine.training.parallel import largest_part
from potstill.engine.training.ranks import Ranks


class Batches:
    """This rank's share of every batch.

    classes: those that the draws of labels choose from; None: all. size: images of a micro-batch; None: the whole share.
    together: batch statistics are over all ranks' samples, and not over each micro-batch's.
    """

    def __init__(self, method: Method, cfg: TrainConfig, seed: int, device: torch.device, classes: Sequence[int] | None, ranks: Ranks):
        self.method, self.seed, self.device, self.ranks = method, seed, device, ranks
        self.share = cfg.batch // ranks.count
        self.size = largest_part(self.share, cfg.micro_batch) if isinstance(cfg.micro_batch, int) else None
        self.together = self.size is None and not (cfg.micro_batch == "auto" and device.type == "cuda")
        self.classes = None if classes is None else torch.tensor(classes, device=device)
        self.generators: list[torch.Generator] = []  # one a micro-batch, the same in every iteration, since graphs hold them

    @property
    def window(self) -> slice:
        """This rank's images of the batch: every ranks-th where batch statistics are over all ranks, so that any aligned part
        of the batch is shared evenly; else consecutive ones, so that a micro-batch is the same whichever rank has it."""
        return self._samples(0, self.share, self.share)

    def _samples(self, start: int, stop: int, share: int) -> slice:
        """Where this rank's images start … stop - 1 are in the batch of all ranks."""
        ranks, rank = self.ranks.count, self.ranks.rank
        if ranks == 1:
            return slice(start, stop)
        return slice(start * ranks + rank, stop * ranks, ranks) if self.together else slice(rank * share + start, rank * share + stop)

    def cut(self, images: Tensor, labels: Tensor | None, step: int) -> list[Batch]:
        """The micro-batches of iteration `step`, from this rank's images [n, C, H, W] and labels [n, label_dim]."""
        size = self.size or len(images)
        return [self.part(images, labels, step, start, size) for start in range(0, len(images), size)]

    def part(self, images: Tensor, labels: Tensor | None, step: int, start: int, size: int) -> Batch:
        """The micro-batch of `size` images from number `start` on."""
        window, share = slice(start, start + size), len(images)
        if (number := start // size) == len(self.generators):
            self.generators.append(torch.Generator(self.device))
        generator = self.generators[number].manual_seed(seed_of(self.seed, step, 0))
        host = random.Random(seed_of(self.seed, step, 2))
        samples = self._samples(start, min(start + size, share), share)
        draws = Draws(generator, share * self.ranks.count, samples, host, self.classes, self.method.stratified)
        return Batch(images[window], labels[window] if labels is not None else None, draws)

    def seed_dropout(self, step: int) -> None:
        """Dropout of iteration `step` draws other masks on every rank."""
        seed_dropout(self.device, seed_of(self.seed, step, 1 + 16 * self.ranks.rank))


def seed_dropout(device: torch.device, seed: int) -> None:
    """torch.manual_seed for the host and the one device in use; for all devices it costs milliseconds."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        default_generator(device).manual_seed(seed)


def seed_of(seed: int, step: int, stream: int) -> int:
    """A 63-bit seed from (seed, step, stream) by SplitMix64, so that neighbouring steps share nothing."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + stream * 0x8CB92BA72F3D8DD7) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return (z ^ (z >> 31)) >> 1
