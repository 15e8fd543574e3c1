"""Which class each generated image gets: the data's own, all in turn, a list, or EDM's draw from each image's seed."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.sampling import Sampled

DATA, BALANCED, RANDOM, NONE = "data", "balanced", "random", "none"


class Labelled(Protocol):
    labels: np.ndarray | None

    def __len__(self) -> int: ...


def labels_for(net: Sampled, images: Labelled | None, n: int, how: str | None = None, *, seed: int = 0) -> tuple[np.ndarray | None, str]:
    """The class of each of n images with the seeds from `seed` on, and where it comes from.

    how: data (theirs in their order, thinned out or repeated evenly), balanced (all in turn), random (EDM's), or classes
    such as 3,5 in turn; None is data where there are labelled data, else balanced. UserError for what the net does not know.
    """
    if not net.label_dim:
        if how not in (None, NONE):
            raise UserError(f"this net knows no classes, got --labels {how}")
        return None, NONE
    known = images is not None and images.labels is not None
    how = how or (DATA if known else BALANCED)
    if how == BALANCED:
        return np.arange(n) % net.label_dim, BALANCED
    if how == RANDOM:
        return classes_of_seeds(net, range(seed, seed + n)), RANDOM
    if how == DATA:
        if images is None or images.labels is None:
            raise UserError("--labels data wants labelled data, and there are none: take balanced or random")
        return images.labels[np.arange(n) * len(images) // n], DATA  # the first n would be one class of sorted data
    return np.resize(parse_classes(how, net.label_dim), n), how


def classes_of_seeds(net: Sampled, seeds: Sequence[int]) -> np.ndarray:
    """EDM's: a seed's generator gives the noise first and then the class, all equally likely."""
    shape, found = (net.img_channels, net.img_resolution, net.img_resolution), []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        torch.randn(*shape, generator=generator)
        found.append(int(torch.randint(net.label_dim, (), generator=generator)))
    return np.array(found, np.int64)


def parse_classes(text: str, label_dim: int) -> list[int]:
    """`0,3,5` as classes of a net with so many of them."""
    parts = [part.strip() for part in text.split(",")]
    if bad := [p for p in parts if not p.isdecimal() or int(p) >= label_dim]:
        raise UserError(f"labels want to be among 0 … {label_dim - 1}, such as 0,1,2, or all; got {bad[0]!r}")
    return [int(part) for part in parts]
