"""Are a student's images copies of its training images? Each one's nearest among them, by pixels averaged down to at most 16x16.

Beside it, what is usual: how far real images are from their own nearest. And how far each class is from its own real images.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from potstill.engine.data.images import Images
from potstill.engine.diffusion.sampling import Sampled, Sampler
from potstill.engine.measure.distances import moments, squared_distance
from potstill.engine.measure.features import Features, Pixels
from potstill.engine.measure.score import pictures_of
from potstill.engine.models.generate import generate, labels_for

LOOKED_AT = 8  # samples, and as many real images
MOST = 50_000  # training images that are searched, evenly taken from all
BATCH = 512
A_CLASS = 2  # images a feature that a class must have, real and generated: below one its covariance is singular
MOST_CLASSES = 40


class Nearest(NamedTuple):
    """Of each image that was asked for: which of all is nearest, and the root mean square of their differences, in grey levels of 255."""

    numbers: list[int]
    levels: list[float]


def nearest(asked: Tensor, images: Images, device: torch.device, but: Sequence[int | None] = ()) -> Nearest:
    """asked [m, C, H, W] uint8. but: images that do not count as their neighbours, as each is itself."""
    features = Pixels()
    places = np.arange(n := min(MOST, len(images))) * len(images) // n
    seen, best = features(asked.to(device)), torch.full((len(asked),), torch.inf, dtype=torch.float64)
    numbers, excluded = (
        torch.zeros(len(asked), dtype=torch.long),
        torch.tensor([-1 if i is None else i for i in but or [None] * len(asked)]),
    )
    for start, batch in zip(range(0, n, BATCH), pictures_of(images, places, BATCH, device), strict=True):
        here = torch.from_numpy(places[start : start + BATCH])
        far = torch.cdist(seen, features(batch), compute_mode="donot_use_mm_for_euclid_dist").cpu()
        found, which = far.masked_fill(here[None] == excluded[:, None], torch.inf).min(1)
        numbers, best = torch.where(found < best, here[which], numbers), torch.minimum(found, best)
    return Nearest(numbers.tolist(), (best / seen.shape[1] ** 0.5 * 127.5).tolist())


def looked_up(samples: Tensor, images: Images, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """The first samples over their nearest training images, [2m, C, H, W]; and for summary.json how near they are, and how near real images are."""
    real = np.arange(m := min(LOOKED_AT, len(images))) * len(images) // m
    pictures = torch.from_numpy(np.stack([images.read(int(i)) for i in real]))
    asked = samples[:LOOKED_AT].cpu()
    found = nearest(torch.cat([asked, pictures]), images, device, [*[None] * len(asked), *real.tolist()])
    theirs = torch.from_numpy(np.stack([images.read(i) for i in found.numbers[: len(asked)]]))
    student, usual = (sorted(round(level, 2) for level in part) for part in (found.levels[: len(asked)], found.levels[len(asked) :]))
    return torch.cat([asked, theirs]), {"student": student, "real": usual, "images": min(MOST, len(images))}


def by_class(
    net: Sampled, sampler: Sampler, images: Images, features: Features, n: int, *, seed: int, batch: int, device: torch.device
) -> dict[str, float]:
    """The distance of each class's generated images, those of the whole measurement, from its own real ones; {} where one has too few of them."""
    if images.labels is None or not net.label_dim:
        return {}
    labels, _ = labels_for(net, images.labels, n)
    assert labels is not None
    classes, counts = np.unique(images.labels, return_counts=True)
    features.try_on(images.shape, device)
    least = A_CLASS * features.num_features
    if not 1 < len(classes) <= MOST_CLASSES or min(counts.min(), *(int((labels == c).sum()) for c in classes)) < least:
        return {}
    found = {}
    for c in classes:
        seeds = np.flatnonzero(labels == c)
        made = generate(net, sampler, labels[seeds], (seed + seeds).tolist(), batch=batch, device=device)
        real = pictures_of(images, np.flatnonzero(images.labels == c), batch, device)
        fake, own = (moments(pictures, features).gaussian(kind) for pictures, kind in ((made, "generated"), (real, "real")))
        found[_title(images, int(c))] = squared_distance(own, fake)
    return found


def _title(images: Images, number: int) -> str:
    """A class's name, where it has one of its own that can be shown."""
    names = images.classes or []
    name = names[number] if number < len(names) else ""
    return name if name.isprintable() and 0 < len(name) <= 40 and names.count(name) == 1 else str(number)
