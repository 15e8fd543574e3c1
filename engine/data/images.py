"""A set of images to learn from: square, all of one size and mode, 8 bits, with or without class labels; or latents of such a set.

    images = open_images("digits")                   # or a zip, a folder, an .npz, "synthetic:64x3x10"
    images.read(7)                                   # uint8 [C, H, W]
    images.labels                                    # int64 [N], None where there are none

A set that is small once decoded is decoded once (`pixels`); a larger one is read image by image. Pictures of mixed
sizes are refused with the command that makes them alike (`potstill convert`). Of latents "pixels" are floats [C, H, W], which a
net sees as they are; but of moments (`engine.data.latents`) it sees draws.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.data.arrays import EMBEDDED, ArraySource
from potstill.engine.data.captions import captions_of, read_prompts
from potstill.engine.data.labels import refuse_holes
from potstill.engine.data.latents import LatentHeader, LatentSource
from potstill.engine.data.pictures import Header
from potstill.engine.data.progress import in_order
from potstill.engine.data.sources import FileSource, Source, open_source
from potstill.engine.nets.edm2_latents import drawn

IN_MEMORY_BYTES = 2**30  # decoded; 64x64 RGB: 87,000 images


def open_images(
    path: str | Path, *, resolution: int | None = None, label_dim: int | None = None, labelled: bool = True, captions: str | None = None
) -> "Images":  # fmt: skip
    """The images of `path`: "digits", "scenes", an EDM zip or folder, a folder of images or latents, .npz, "synthetic:RxC[xCLASSES[xN]]".

    resolution: what they must have. label_dim: how many classes a net knows, where these images may show fewer.
    labelled=False ignores labels. captions: a file of them, or a text with {} for the class's name; None: those beside the images, where there are some. Headers of all files are looked at, pixels are not. Raises UserError.
    """
    source = open_source(path, labelled=labelled)
    header = _common_header(source, resolution)
    if resolution not in (None, header.width):
        what = f"{header}" if isinstance(header, LatentHeader) else f"{header} images"
        raise UserError(f"{source.path} holds {what}, wanted {resolution}x{resolution}: {_advice(source, resolution)}")
    if source.labels and not label_dim:
        refuse_holes(source.labels, source.path)
    labels, dim, classes = source.labels or (None, 0, None)
    if label_dim:
        if not 0 < dim <= label_dim:
            raise UserError(f"{source.path} has {dim or 'no'} classes, wanted labels for a net that knows {label_dim}")
        dim = label_dim
    return Images(source, header, np.arange(len(source)), labels=labels, label_dim=dim, classes=classes, captions_in=captions)


@dataclass(eq=False, repr=False)
class Images:
    """`index` [N]: which pictures of `source` these are. `labels` [N] int64 or None; `classes`: names, where known."""

    source: Source
    header: Header | LatentHeader
    index: np.ndarray
    labels: np.ndarray | None = None
    label_dim: int = 0
    classes: list[str] | None = None
    captions_in: str | None = None  # a file of captions, or a text with {} for the name of the class; None: those beside the images

    def __post_init__(self):
        self.name = _short(self.source.path)
        self.shape, self.dtype = self.header.shape, self.header.dtype  # of one of them, as a net sees it: (C, H, W); as it is stored: uint8
        self.stored = self.header.stored if isinstance(self.header, LatentHeader) else self.shape
        self.channels, self.resolution = self.shape[0], self.header.width
        self._pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __str__(self) -> str:
        classes = f"{self.label_dim} classes" if self.label_dim else "no labels"
        return f"{self.name}: {len(self):,} {'' if self.latent else 'images '}{self.header}, {classes}"

    def __getstate__(self) -> dict:
        state = {name: value for name, value in self.__dict__.items() if name != "captions"}
        return state | {"_pixels": None}  # a worker process reads files; it needs no copy of what is decoded

    @property
    def latent(self) -> bool:
        """Are these latents?"""
        return isinstance(self.source, LatentSource)

    @property
    def moments(self) -> bool:
        """Are these latents drawn anew every time?"""
        return isinstance(self.header, LatentHeader) and self.header.moments

    @cached_property
    def captions(self) -> list[str] | None:
        """One for each of them; None where they have none. Where the file has as many as there are classes, each is its class's.

        UserError for a file with another number.
        """
        source, file = self.source, None if self.captions_in is None else Path(self.captions_in).expanduser()
        if self.captions_in and "{}" in self.captions_in:
            return self._named(self.captions_in)
        if file is not None and self.label_dim not in (0, len(source)) and len(texts := read_prompts(file)) == self.label_dim:
            assert self.labels is not None
            return [texts[label] for label in self.labels]
        found = captions_of(source, file)
        return None if found is None else [found[i] for i in self.index]

    def _named(self, text: str) -> list[str]:
        """A text with the name of each one's class in the place of {}. UserError where classes have no names."""
        if self.labels is None or self.classes is None:
            raise UserError(
                f'data.captions="{text}" wants the names of classes, and {self.name} has {"none" if self.labels is not None else "no labels"}: class '
                'folders have names, and so has a dataset.json with "classes"'
            )
        return [text.replace("{}", self.classes[label]) for label in self.labels]

    @property
    def nbytes(self) -> int:
        """Size of all of them decoded."""
        return len(self) * math.prod(self.stored) * np.dtype(self.dtype).itemsize

    def seen(self, rows: Tensor, noise: Tensor | None = None) -> Tensor:
        """What a net sees of some […, C, H, W] as they were read: float32, images in [-1, 1], latents as they are. A copy.

        noise: standard normal, of the shape that a net sees, for moments; None: the middle of what can be drawn.
        """
        if self.moments:
            return drawn(rows, noise)
        return rows.to(torch.float32, copy=True) if self.latent else rows.float().div_(127.5).sub_(1)

    def read(self, i: int) -> np.ndarray:
        """Image i, uint8 [C, H, W]; of latents float16 or float32, as they are stored. UserError, naming the file, where it is damaged."""
        if self._pixels is not None:
            return self._pixels[i]
        at = int(self.index[i])
        if not isinstance(self.source, FileSource):
            return self.source.array(at)
        picture = self.source.picture(at)
        if Header(*picture.size, picture.mode) != self.header:
            raise UserError(f"{self.source.title(at)} is no longer {self.header} as when it was opened: start again")
        hwc = np.asarray(picture).reshape(self.resolution, self.resolution, self.channels)
        return hwc.transpose(2, 0, 1)

    def pixels(self, limit: int = IN_MEMORY_BYTES) -> np.ndarray | None:
        """All of them [N, C, H, W], decoded at the first call; None where that takes more than `limit` bytes."""
        if self._pixels is None and self.nbytes <= limit:
            self._pixels = self._decoded()
        return self._pixels

    def _decoded(self) -> np.ndarray:
        if isinstance(self.source, ArraySource):
            whole = len(self) == len(self.source)
            return self.source.pixels if whole else self.source.pixels[self.index]
        pixels = np.empty((len(self), *self.stored), self.dtype)
        for i, image in enumerate(in_order(self.read, len(self), f"decoding {self.name}")):
            pixels[i] = image
        return pixels

    def fingerprint(self) -> dict[str, Any]:
        """What tells these data from others at the same path, for JSON: that of all pictures of the source, and what a net sees of them."""
        return self.source.fingerprint() | {"resolution": self.resolution, "channels": self.channels, "label_dim": self.label_dim}

    def subset(self, classes: Sequence[int]) -> "Images":
        """Only the images of these classes. Labels and the width of one-hot rows stay as they are."""
        if self.labels is None:
            raise UserError(f"{self.name} has no labels, wanted its classes {list(classes)}")
        keep = np.flatnonzero(np.isin(self.labels, classes))
        if not len(keep):
            raise UserError(f"{self.name} has no images of classes {list(classes)}, wanted some of its {self.label_dim}")
        return self.part(keep)

    def thinned(self, most: int) -> "Images":
        """At most `most` of them, evenly taken from all."""
        n = min(most, len(self))
        part = self.part(np.arange(n) * len(self) // n)
        part.name = f"{n:,} of {self.name}"
        return part

    def part(self, keep: np.ndarray) -> "Images":
        """Only those of these numbers [n], in their order."""
        part = replace(self, index=self.index[keep], labels=None if self.labels is None else self.labels[keep])
        part._pixels = None if self._pixels is None else self._pixels[keep]
        return part


def data_variance(images: Images | None) -> float | None:
    """Mean over pixels of the variance of at most 512 images as a net sees them. None without images, and where they are all the same."""
    if images is None:
        return None
    some = images.thinned(512)
    total = squares = np.zeros((), np.int64)
    within = np.zeros(())  # what drawing from moments adds
    for i in range(len(some)):  # one after the other: all of them together may be gigabytes
        x: Any = some.read(i)
        if some.moments:
            middle = some.seen(row := torch.from_numpy(x))
            within = within + (some.seen(row, torch.ones_like(middle)) - middle).double().square().numpy()
            x = middle.numpy()
        x = x.astype(np.float64 if some.latent else np.int64)
        total, squares = total + x, squares + x * x
    mean, square = total / len(some), (squares + within) / len(some)
    return float((square - mean**2).clip(0).mean() / (1 if some.latent else 127.5**2)) or None


def _common_header(source: Source, resolution: int | None) -> Header | LatentHeader:
    """The header that all pictures share: square, grey or RGB; or that of latents."""
    if isinstance(source, LatentSource):
        return source.header(0)
    n = 1 if isinstance(source, ArraySource) else len(source)
    first = source.header(0)
    for i, header in enumerate(in_order(source.header, n, f"looking at {source.path}", chunk=256)):
        if header.mode not in ("L", "RGB"):
            raise UserError(
                f"{source.title(i)} is of mode {header.mode}, wanted 8-bit grey (L) or RGB: {_advice(source, resolution or header)}"
            )
        if header != first:
            raise UserError(
                f"wanted images that are all alike, got {source.title(0)} ({first}) and {source.title(i)} ({header}): "
                f"{_advice(source, resolution or first)}"
            )
    if first.width != first.height and source.path not in EMBEDDED:
        raise UserError(f"{source.title(0)} is {first}, wanted a square: {_advice(source, resolution or first)}")
    return first


def _advice(source: Source, size: int | Header) -> str:
    """The command that makes them alike, at the wanted resolution or else at the largest power of two that fits."""
    if isinstance(source, LatentSource):
        return "leave data.resolution out, or convert images of the right size"
    resolution = size if isinstance(size, int) else 2 ** (min(size.width, size.height).bit_length() - 1)
    out = f"{_short(source.path)}-{resolution}x{resolution}.zip"
    files = f"{shlex.quote(source.path)} {shlex.quote(out)}"
    return f"run potstill convert images {files} --resolution {resolution}"


def _short(path: str) -> str:
    """The last part of a path, without .zip and .npz; names such as "digits" as they are."""
    return (Path(path).name or Path(path).resolve().name).removesuffix(".zip").removesuffix(".npz")
