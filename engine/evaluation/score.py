"""How far a net's images are from the data, and how far the data are from themselves at the same number of images."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from engine.errors import UserError
from engine.evaluation.features import Features
from engine.evaluation.frechet import distance, fitted
from engine.evaluation.generate import generate
from engine.nets.denoiser import Denoiser
from engine.sampling import Sampler

Device = torch.device | str


class Images(Protocol):
    """The real images, as engine.data opens them."""

    name: str
    resolution: int
    channels: int
    label_dim: int  # 0: no labels
    labels: np.ndarray | None  # [N] int64

    def __len__(self) -> int: ...
    def read(self, i: int) -> np.ndarray: ...  # [C, H, W] uint8


@dataclass
class Reference:
    """What a score is measured against: all real images in some features, and the floor at n of them."""

    metric: FrechetInceptionDistance
    n: int
    floor: float
    floor_kind: str


def reference(
    images: Images, features: Features, *, n: int, seed: int = 0, batch: int = 256, device: Device = "cpu"
) -> Reference:
    """All real images in these features, and the floor: what images of the very distribution of the data would score.

    Where the data allow it, the floor is the distance between two disjoint draws of n images; otherwise that of n images,
    drawn with replacement, from all. `seed` chooses the draws.
    """
    rng, total = np.random.default_rng(seed), len(images)
    metric = fitted(_read(images, range(total), batch, device), features)
    if total >= 2 * n:
        order = rng.permutation(total)
        halves = (_read(images, np.sort(half), batch, device) for half in (order[:n], order[n : 2 * n]))
        floor, kind = distance(fitted(next(halves), features), next(halves)), f"two disjoint draws of {n} real images"
    else:
        drawn = np.sort(rng.integers(total, size=n))
        floor = distance(metric, _read(images, drawn, batch, device))
        kind = f"{n} real images drawn with replacement against all {total}"
    return Reference(metric, n, floor, kind)


def score(
    net: Denoiser,
    sampler: Sampler,
    images: Images,
    features: Features,
    *,
    n: int,
    seed: int = 0,
    batch: int = 256,
    device: Device = "cpu",
    against: Reference | None = None,
    progress: str | None = None,
) -> dict[str, Any]:
    """Fréchet distance ("fd") of n generated images from all real ones, and what is needed to read and repeat it.

    Seeds are seed … seed + n - 1. A conditional net gets the data's labels in their order, thinned out or repeated evenly
    to n of them, or, where the data have none, all classes in turn. `against` saves computing the real side again; `progress` is
    the title of a bar on stderr. UserError where net and data do not fit.
    """
    check_fit(net, images)
    against = against or reference(images, features, n=n, seed=seed, batch=batch, device=device)
    if against.n != n:
        raise ValueError(f"wanted a reference for n = {n}, got one whose floor is for {against.n}")
    labels, labels_kind = labels_for(net, images, n)
    start = time.perf_counter()
    batches = generate(net, sampler, labels, range(seed, seed + n), batch=batch, device=device)
    fd = distance(against.metric, _shown(batches, n, progress))
    seconds = time.perf_counter() - start
    found = {
        "fd": fd,
        "nfe": sampler.nfe,
        "n": n,
        "seeds": f"{seed}-{seed + n - 1}",
        "labels": labels_kind,
        "solver": sampler.solver,
        "features": features.title,
        "features_sha256": features.sha256,
        "num_features": features.num_features,
        "data": images.name,
        "reference_images": len(images),
        "floor": against.floor,
        "floor_kind": against.floor_kind,
        "seconds": round(seconds, 3),
    }
    if min(n, len(images)) <= features.num_features:
        found["warning"] = (
            f"{min(n, len(images))} images give a singular covariance of {features.num_features} features: "
            "compare only with distances at the same n"
        )
    return found


def check_fit(net: Denoiser, images: Images) -> None:
    """UserError unless the net makes images of the data's size, and knows the data's classes."""
    wanted, got = (images.channels, images.resolution), (net.img_channels, net.img_resolution)
    if wanted != got:
        raise UserError(
            f"the net makes {got[0]}x{got[1]}x{got[1]} images, {images.name} has {wanted[0]}x{wanted[1]}x{wanted[1]}: "
            "evaluate it on data of its own size (engine.convert images makes them)"
        )
    if net.label_dim and images.label_dim > net.label_dim:
        raise UserError(f"the net knows {net.label_dim} classes, {images.name} has {images.label_dim}")


def labels_for(net: Denoiser, images: Images, n: int) -> tuple[np.ndarray | None, str]:
    """The class of each of n images to be generated, and where it comes from: data, balanced or none."""
    if not net.label_dim:
        return None, "none"
    if images.labels is None:
        return np.arange(n) % net.label_dim, "balanced"
    return images.labels[np.arange(n) * len(images) // n], "data"  # the first n would be one class of sorted data


def _read(images: Images, indices: Sequence[int] | np.ndarray, batch: int, device: Device) -> Iterator[Tensor]:
    """Real images [<= batch, C, H, W] uint8 on the device."""
    for start in range(0, len(indices), batch):
        chosen = [images.read(int(i)) for i in indices[start : start + batch]]
        yield torch.from_numpy(np.stack(chosen)).to(device)


def _shown(batches: Iterator[Tensor], n: int, title: str | None) -> Iterator[Tensor]:
    """The same batches, with a bar on stderr if that is a terminal."""
    with tqdm(total=n, desc=title, unit="img", disable=None if title else True, leave=False) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
