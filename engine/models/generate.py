"""Images from seeds: every image has its own generator, so it is the same image in whatever batch it is made.

Also which class each image gets: the data's own, all in turn, a list, or EDM's draw from each image's seed.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from potstill.engine.common.class_names import numbers_in
from potstill.engine.common.errors import UserError
from potstill.engine.common.progress import Bar
from potstill.engine.diffusion.sampling import Sampled, Sampler, SeedNoise
from potstill.engine.models.tensors import write_tensors

DATA, BALANCED, RANDOM, NONE, PROMPTS = "data", "balanced", "random", "none", "prompts"  # where what is told comes from


class Rows(Protocol):
    """Embedded prompts, of which image i gets the (i modulo their number)th."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> Any: ...

    def text(self, i: int) -> str: ...


Decode = Callable[[Tensor], Tensor]  # latents -> pictures, about in [-1, 1]


class Between(NamedTuple):
    """A point on the way from the noise of one seed (t = 0) to that of another (t = 1)."""

    start: int
    end: int
    t: float


class BetweenNoise:
    """The noise at such points: interpolated on the sphere, so that it keeps the length of normal noise."""

    def __init__(self, points: Sequence[Between], device: torch.device | str):
        self.ends = [SeedNoise([p.start for p in points]), SeedNoise([p.end for p in points])]
        self.t, self.device = torch.tensor([p.t for p in points], dtype=torch.float64), device

    def normal(self, *shape: int) -> Tensor:
        a, b = (end.normal(*shape).double() for end in self.ends)
        return slerp(a, b, self.t).float().to(self.device)


def noise_of(seeds: Sequence[int | Between], device: torch.device | str) -> SeedNoise | BetweenNoise:
    """The noise of whole seeds, or of points between them."""
    numbers = [seed for seed in seeds if not isinstance(seed, Between)]
    return SeedNoise(numbers, device) if numbers else BetweenNoise([seed for seed in seeds if isinstance(seed, Between)], device)


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation of a and b [n, …] at t [n]: a at 0, b at 1, at constant speed along the arc between."""
    norms = a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)
    angle = ((a * b).flatten(1).sum(1) / norms).clamp(-1, 1).acos()
    of_a, of_b = (torch.sin(s * angle) / torch.sin(angle) for s in (1 - t, t))
    rest = [1] * (a.ndim - 1)
    return of_a.view(-1, *rest) * a + of_b.view(-1, *rest) * b


def generate(
    net: Sampled,
    sampler: Sampler,
    labels: np.ndarray | Rows | None,
    seeds: Sequence[int | Between],
    *,
    batch: int = 256,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.uint8,
    decode: Decode | None = None,
) -> Iterator[Tensor]:
    """Images [n, C, H, W] on the device, n <= batch, one per seed in the order of the seeds; uint8, or of another dtype about in [-1, 1].

    seeds: also points between two seeds. labels: class of each image [len(seeds)], prompts, or None. decode: of a net whose samples
    are latents. `net` is on the device and in eval
    mode. Another batch size can change the order of additions in a convolution or matrix product, and with it the last float32
    bits of a pixel, rarely its 8-bit value by 1. UserError if the net's output is not finite.
    """
    if net.training:
        raise ValueError("generate wants net.eval(), got a net in training mode (its dropout would show)")
    if isinstance(labels, np.ndarray) and len(labels) != len(seeds):
        raise ValueError(f"wanted one label per seed, got {len(labels)} labels for {len(seeds)} seeds")
    for start in range(0, len(seeds), batch):
        chosen = seeds[start : start + batch]
        told: Any = None
        if isinstance(labels, np.ndarray):
            told = one_hot(labels[start : start + batch], net.label_dim).to(device)
        elif labels is not None:
            told = labels.rows([i % len(labels) for i in range(start, start + len(chosen))])
        with torch.no_grad():
            images = sampler(net, told, noise_of(chosen, device))
            images = images if decode is None else decode(images)
        if not bool(images.isfinite().all()):
            bad = int(images.isfinite().flatten(1).all(1).logical_not().nonzero()[0])
            raise UserError(f"the net's image for seed {chosen[bad]} is not finite: its weights or its noise levels are broken")
        yield to_uint8(images) if dtype == torch.uint8 else images.to(dtype)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to 0 … 255 with EDM's rounding: x·127.5 + 128, clipped and truncated."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def one_hot(labels: np.ndarray, label_dim: int) -> Tensor:
    """Classes [n] as rows of the identity, [n, label_dim] float32."""
    classes = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    return torch.zeros(len(classes), label_dim).scatter_(1, classes[:, None], 1.0)  # torch.eye is 40 GB for 100,000 classes


def write_pairs(
    path: Path, net: Sampled, sampler: Sampler, labels: np.ndarray | None, n: int, batch: int, device: torch.device | str
) -> None:
    """A safetensors file of n pairs: noise z (float32), what a deterministic sampler makes of it (y, uint8), labels."""
    shape = net.shape
    z = torch.cat([SeedNoise([seed]).normal(*shape) for seed in range(n)])
    batches = generate(net, sampler, labels, range(n), batch=batch, device=device)
    y = torch.cat([images.cpu() for images in Bar("making pairs", n, unit="pairs").over(batches)])
    tensors = {"z": z, "y": y} | ({} if labels is None else {"labels": torch.from_numpy(labels)})
    write_tensors(path, tensors, {})


def labels_for(
    net: Sampled, known: np.ndarray | None, n: int, how: str | None = None, *, seed: int = 0
) -> tuple[np.ndarray | None, str]:  # fmt: skip
    """The class of each of n images with the seeds from `seed` on, and where it comes from.

    known: the data's labels, if there are any. how: data (theirs in their order, thinned out or repeated evenly), balanced (all in turn), random (EDM's), or classes
    such as 3,5 in turn; None is data where there are labelled data, else balanced. UserError for what the net does not know.
    """
    if getattr(net, "text", False):
        raise UserError(
            "this net is told prompts, which are not known here: potstill export RUN --to diffusers makes a pipeline that takes them"
        )
    if not net.label_dim:
        if how not in (None, NONE):
            raise UserError(f"this net knows no classes, got --labels {how}")
        return None, NONE
    how = how or (BALANCED if known is None else DATA)
    if how == BALANCED:
        return np.arange(n) % net.label_dim, BALANCED
    if how == RANDOM:
        return classes_of_seeds(net, range(seed, seed + n)), RANDOM
    if how == DATA:
        if known is None:
            raise UserError("--labels data wants labelled data, and there are none: take balanced or random")
        return known[np.arange(n) * len(known) // n], DATA  # the first n would be one class of sorted data
    return np.resize(numbers_in(how, net.label_dim, None), n), how


def classes_of_seeds(net: Sampled, seeds: Sequence[int]) -> np.ndarray:
    """EDM's: a seed's generator gives the noise first and then the class, all equally likely."""
    shape, found = net.shape, []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        torch.randn(*shape, generator=generator)
        found.append(int(torch.randint(net.label_dim, (), generator=generator)))
    return np.array(found, np.int64)
