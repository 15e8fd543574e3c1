"""How far a net's images are from the data, and how far the data are from themselves at the same number of images.

Beside a number stands what it was measured with: a fingerprint of the real images, and the versions of the tools.
"""

import hashlib
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.common.packages import versions_of
from potstill.engine.common.progress import Bar
from potstill.engine.data.images import Images
from potstill.engine.diffusion.sampling import Sampled, Sampler
from potstill.engine.measure.distances import Gaussian, check_neighbours, gathered, kid, moments, precision_recall, share, squared_distance
from potstill.engine.measure.features import Features
from potstill.engine.measure.resized import LAW, resized
from potstill.engine.measure.scores import Score, Tally
from potstill.engine.models.generate import PROMPTS, Decode, Rows, generate, labels_for, to_uint8
from potstill.engine.training.ranks import ALONE, Ranks

Device = torch.device | str
FD, KID, PR = METRICS = ("fd", "kid", "pr")
PACKAGES = ("potstill", "torch", "torchmetrics", "numpy", "timm", "torch-fidelity", "transformers")


class Fingerprint:
    """The sha256 of all images' sha256s in their order, each of the bytes [C, H, W] uint8: the same for zip and folder."""

    def __init__(self):
        self.digests: list[bytes] = []

    def add(self, images: Sequence[np.ndarray]) -> None:
        self.digests += [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images]

    def of_all(self, ranks: Ranks, total: int, batch: int, device: torch.device) -> str:
        """In hexadecimal, of all processes' images."""
        mine = torch.tensor([list(d) for d in self.digests], dtype=torch.uint8, device=device).reshape(-1, 32)
        return hashlib.sha256(gathered(ranks, mine, total, batch).cpu().numpy().tobytes()).hexdigest()


@dataclass
class Reference:
    """What a score is measured against: all real images in some features, and the floor at n of them."""

    gaussian: Gaussian
    n: int
    floor: float | None  # None where there are no images to measure it with
    floor_kind: str
    data: str  # the name of the data or file
    images: int | None  # how many
    sha256: str  # the Fingerprint of the images, or that of the file
    seen: Tensor | None = None  # the real images' features [N, D], for the metrics that want more than a Gaussian
    scores: dict[str, Any] = field(default_factory=dict)  # of the images with their captions (`Tally.result`)


def reference(
    images: Images, features: Features, *, n: int, seed: int = 0, batch: int = 256, device: Device = "cpu",
    ranks: Ranks = ALONE, keep: bool = False, decode: Decode | None = None, resize: int | None = None,
    scores: Sequence[Score] = (), captions: Sequence[str] | None = None,
) -> Reference:  # fmt: skip
    """All real images in these features, and the floor: what images of the very distribution of the data would score.

    Where the data allow it, the floor is the distance between two disjoint draws of n images; otherwise that of n images,
    drawn with replacement, from all. `seed` chooses the draws; `keep` keeps the features of all; `decode` shows latents; `resize`: the
    size that all are measured at. With `captions`, one for each image, all get the `scores`.
    """
    rng, total, decode = np.random.default_rng(seed), len(images), decode if images.latent else None
    fingerprint, kept, tally = Fingerprint(), [] if keep else None, Tally(scores if captions else (), device)

    def fitted(
        indices: np.ndarray,
        kind: str = "real",
        fingerprint: Fingerprint | None = None,
        kept: list | None = None,
        tally: Tally | None = None,
    ):
        mine = indices[share(ranks, len(indices), batch)]
        read = pictures_of(images, mine, batch, device, decode, fingerprint)
        pictures = Bar(f"measuring {images.name}", len(mine), unit="images").over(resized(read, resize))
        if tally and captions:
            pictures = tally.over(pictures, [captions[int(i)] for i in mine])
        return moments(pictures, features, kept=kept, ranks=ranks).gaussian(kind)

    features.try_on(picture_shape(images.shape, decode, resize), device)  # a process without a share sees no other image
    whole = fitted(np.arange(total), fingerprint=fingerprint, kept=kept, tally=tally)
    if total >= 2 * n:
        order = rng.permutation(total)
        first, second = (fitted(np.sort(half)) for half in (order[:n], order[n : 2 * n]))
        floor, kind = squared_distance(first, second), f"two disjoint draws of {n} real images"
    else:
        drawn = np.sort(rng.integers(total, size=n))
        floor = squared_distance(whole, fitted(drawn))
        kind = f"{n} real images drawn with replacement against all {total}"
    seen = gathered(ranks, _rows(kept, features), total, batch) if kept is not None else None
    sha256 = fingerprint.of_all(ranks, total, batch, features.device)
    return Reference(whole, n, floor, kind, images.name, total, sha256, seen, tally.result(ranks))


def score(
    net: Sampled, sampler: Sampler, images: Images | None, features: Features, *,
    n: int, seed: int = 0, batch: int = 256, device: Device = "cpu", against: Reference | None = None,
    labels: str | None = None, metrics: Sequence[str] = (FD,), best_of: int = 1, ranks: Ranks = ALONE,
    progress: str | None = None, prompts: Rows | None = None, decode: Decode | None = None, resize: int | None = None,
    scores: Sequence[Score] = (),
) -> dict[str, Any]:  # fmt: skip
    """Fréchet distance ("fd") of n generated images from all real ones, and what is needed to read and repeat it.

    Seeds are seed … seed + n - 1. `labels`: see labels_for. `metrics`: kid and pr (precision and recall) want a reference
    that kept its features. best_of > 1 evaluates as often, every time with the next n seeds, and reports the smallest
    distance, marked as such. `prompts` are for nets that are told some, each in turn, and `scores` of their pictures; `decode` shows
    latents, and `resize` is the size that pictures are measured at. `against` saves computing the real side again; `progress` is the
    title of a bar.
    UserError where net and data do not fit.
    """
    if images is not None:
        check_fit(net, images, resize)
    if against is None:
        if images is None:
            raise ValueError("score wants images or a reference")
        keep = set(metrics) != {FD}
        against = reference(
            images, features, n=n, seed=seed, batch=batch, device=device, ranks=ranks, keep=keep, decode=decode, resize=resize
        )
    if against.n != n:
        raise ValueError(f"wanted a reference for n = {n}, got one whose floor is for {against.n}")
    if PR in metrics:
        check_neighbours(min(n, against.images or n))  # now, and not after n images have been generated
    start, mine = time.perf_counter(), share(ranks, n, batch)
    tries, labels_kind = [], "none"
    for first in range(seed, seed + best_of * n, n):
        if prompts is not None:
            own, labels_kind = Picked.of(prompts, first - seed + mine), PROMPTS
        else:
            classes, labels_kind = labels_for(net, None if images is None else images.labels, n, labels, seed=first)
            own = None if classes is None else classes[mine]
        batches = generate(net, sampler, own, (first + mine).tolist(), batch=batch, device=device, decode=decode)
        pictures = Bar(progress, len(mine), unit="images").over(resized(batches, resize))
        kept, tally = None if set(metrics) == {FD} else [], Tally(scores, device)
        if isinstance(own, Picked) and scores:
            pictures = tally.over(pictures, own.texts)
        features.try_on(picture_shape(net.shape, decode, resize), device)
        fake = moments(pictures, features, kept=kept, ranks=ranks).gaussian("generated")
        found: dict[str, Any] = {"fd": squared_distance(against.gaussian, fake)} | tally.result(ranks)
        if kept is not None:
            found |= _more(metrics, against, gathered(ranks, _rows(kept, features), n, batch), seed)
        tries.append(found | {"nfe": sampler.nfe, "n": n, "seeds": f"{first}-{first + n - 1}"})
    found = min(tries, key=lambda one: one["fd"])
    if best_of > 1:
        found |= {"best_of": best_of, "fd_all": [one["fd"] for one in tries], "seeds_all": f"{seed}-{seed + best_of * n - 1}"}
    found |= told_and_shown(labels_kind, prompts, resize) | {
        "solver": sampler.solver,
        "features": features.title,
        "features_sha256": features.sha256,
        "num_features": features.num_features,
        "data": against.data,
        "reference_images": against.images,
        "reference_sha256": against.sha256,
        "floor": against.floor,
        "floor_kind": against.floor_kind,
        "seconds": round(time.perf_counter() - start, 3),
        "processes": ranks.count,
        "tools": tools(),
    }
    fewest = min(n, against.images or n)
    if fewest <= features.num_features:
        found["warning"] = (
            f"{fewest} images give a singular covariance of {features.num_features} features: compare only with distances at the same n"
        )
    return found


def scored(
    net: Sampled, sampler: Sampler, scores: Sequence[Score], prompts: Rows, *,
    n: int, seed: int = 0, batch: int = 256, device: Device = "cpu", ranks: Ranks = ALONE, progress: str | None = None,
    decode: Decode | None = None, resize: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The scores alone, where there are no data to be compared with. Arguments as of `score`."""
    start, mine, tally = time.perf_counter(), share(ranks, n, batch), Tally(scores, device)
    own = Picked.of(prompts, mine)
    batches = generate(net, sampler, own, (seed + mine).tolist(), batch=batch, device=device, decode=decode)
    for _ in tally.over(Bar(progress, len(mine), unit="images").over(resized(batches, resize)), own.texts):
        pass
    found = tally.result(ranks) | {"nfe": sampler.nfe, "n": n, "seeds": f"{seed}-{seed + n - 1}"} | told_and_shown(PROMPTS, prompts, resize)
    return found | {
        "solver": sampler.solver, "seconds": round(time.perf_counter() - start, 3), "processes": ranks.count, "tools": tools()
    }  # fmt: skip


def told_and_shown(labels: str, prompts: Rows | None, resize: int | None) -> dict[str, Any]:
    """What the net was told, and the size its pictures were measured at, for JSON."""
    found: dict[str, Any] = {"labels": labels}
    if prompts is not None:
        texts = json.dumps([prompts.text(i) for i in range(len(prompts))])
        found["prompts"] = {"number": len(prompts), "sha256": hashlib.sha256(texts.encode()).hexdigest()}
    return found | ({"resize": {"size": resize, "law": LAW}} if resize else {})


class Picked(NamedTuple):
    """Some of the prompts, in this order."""

    prompts: Rows
    numbers: np.ndarray

    @classmethod
    def of(cls, prompts: Rows, indices: np.ndarray) -> "Picked":
        """Image i has the (i modulo their number)th."""
        return cls(prompts, indices % len(prompts))

    @property
    def texts(self) -> list[str]:
        return [self.prompts.text(i) for i in self.numbers]

    def text(self, i: int) -> str:
        return self.prompts.text(self.numbers[i])

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, indices: Sequence[int]) -> Any:
        return self.prompts.rows(self.numbers[list(indices)].tolist())


def picture_shape(shape: tuple[int, ...], decode: Decode | None, resize: int | None = None) -> tuple[int, ...]:
    """[C, H, W] of the picture that a sample of this shape is shown as, and measured as after `resize`."""
    if resize:
        return 3, resize, resize
    return shape if decode is None else tuple(decode(torch.zeros(1, *shape)).shape[1:])


def check_fit(net: Sampled, images: Images, resize: int | None = None) -> None:
    """UserError unless the net makes images of the data's size, or all are resized, and knows the data's classes."""
    wanted, got = images.shape, net.shape
    if wanted != got and not resize:
        raise UserError(
            f"the net makes {'x'.join(map(str, got))} images, {images.name} has {'x'.join(map(str, wanted))}: "
            "evaluate it on data of its own size (potstill convert images makes them)"
        )
    if net.label_dim and images.label_dim > net.label_dim:
        raise UserError(f"the net knows {net.label_dim} classes, {images.name} has {images.label_dim}")


def _more(metrics: Sequence[str], against: Reference, fake: Tensor, seed: int) -> dict[str, Any]:
    if against.seen is None:
        raise UserError("kid and pr compare images, and a reference file holds none: leave --reference out, and name --data")
    found = kid(against.seen, fake, seed=seed) if KID in metrics else {}
    return found | (precision_recall(against.seen, fake) if PR in metrics else {})


def _rows(kept: list[Tensor], features: Features) -> Tensor:
    """[n, D] float64 of this process, n = 0 without a share."""
    return torch.cat(kept) if kept else torch.zeros(0, features.num_features, dtype=torch.float64, device=features.device)


def pictures_of(
    images: Images, indices: np.ndarray, batch: int, device: Device, decode: Decode | None = None, fingerprint: Fingerprint | None = None
) -> Iterator[Tensor]:
    """Real images [<= batch, C, H, W] uint8 on the device."""
    for start in range(0, len(indices), batch):
        chosen = [images.read(int(i)) for i in indices[start : start + batch]]
        if fingerprint:
            fingerprint.add(chosen)
        yield shown(images, torch.from_numpy(np.stack(chosen)).to(device), decode)


def shown(images: Images, rows: Tensor, decode: Decode | None) -> Tensor:
    """Samples of a data set as they were read, [N, C, H, W], as pictures, uint8. Latents that nobody decodes count as pictures, as samples do."""
    return to_uint8(decode(images.seen(rows)) if decode else images.seen(rows)) if images.latent else rows


def tools() -> dict[str, str]:
    """Versions of what took part, as far as it is installed."""
    return {"python": platform.python_version()} | versions_of(*PACKAGES)


class Judge:
    """Fréchet distances in several features from the same real images, at the same n and seeds: a comparison's.

    A net's images are made once and shown to all features. Beside every distance stands its floor, real against real.
    """

    def __init__(self, images: Images, features: Sequence[Features], *, n: int, seed: int = 0, batch: int = 256, device: Device = "cpu"):
        """Reads all images once per features. UserError where features do not take them."""
        self.images, self.n, self.seed, self.batch, self.device = images, n, seed, batch, device
        settings = {"n": n, "seed": seed, "batch": batch, "device": device}
        self.features = {one.title: one for one in features}
        self.references = {one.title: reference(images, one.to(device), **settings) for one in features}

    @property
    def floors(self) -> dict[str, float]:
        """Real against real by title."""
        return {title: one.floor for title, one in self.references.items() if one.floor is not None}  # all: there are images

    @property
    def floor_kind(self) -> str:
        return next(iter(self.references.values())).floor_kind

    def scores(self, net: Any, sampler: Sampler) -> dict[str, float]:
        """Distances by title of n images of this net, which is on the device and in eval mode."""
        check_fit(net, self.images)
        labels, _ = labels_for(net, self.images.labels, self.n)
        seeds = range(self.seed, self.seed + self.n)
        batches = generate(net, sampler, labels, seeds, batch=self.batch, device=self.device)
        shown = list(Bar("measuring samples", self.n, unit="images").over(batches))
        fakes = {title: moments(shown, one).gaussian("generated") for title, one in self.features.items()}
        return {title: squared_distance(self.references[title].gaussian, fake) for title, fake in fakes.items()}
