"""Latents: what a VAE made of pictures, once, as a data set: a folder of safetensors shards (`potstill convert latents`), or EDM2's zip.

A shard holds "latents" [n, C, H, W] (of videos [n, C, T, H, W]) in 16 or 32 bit, shifted and scaled as the denoiser wants them, and
"labels" [n] where there are classes. A folder of somebody else's safetensors files with these names is read as well.

EDM2's zip, or a folder, holds an .npy [8, H, W] for each picture, mean and standard deviation of Stable Diffusion's latents ("moments"),
of which a net sees a new draw every time (`engine.nets.edm2_latents`). An .npy [C, H, W] of another number of channels is a latent.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from potstill.engine.common.class_names import NAMES
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.kinds import shown
from potstill.engine.data.files import Folder, Zip
from potstill.engine.data.fingerprint import fingerprint
from potstill.engine.data.labels import Labels, Reader, checked
from potstill.engine.data.shards import MANIFEST, Manifest, Shards, read_manifest
from potstill.engine.nets.edm2_latents import drawn
from potstill.engine.readers.headers import Stored, kinds_of, opened
from potstill.engine.readers.npz import array_in

LATENTS, LABELS = "latents", "labels"
MOMENTS = 8  # channels
FLOATS = {"float16": np.float16, "float32": np.float32}
USUAL_STD = 0.25, 2.0  # a denoiser is trained on latents of about unit variance; EDM2's have a deviation of 0.5
LOOKED_AT = 256  # latents whose standard deviation is taken
ADVICE = "remove it and run the potstill convert latents that made the folder again, which makes what is missing"


class LatentHeader(NamedTuple):
    """What all latents of a set share."""

    stored: tuple[int, ...]  # as they lie in the files
    dtype: type
    moments: bool = False  # are these means and deviations, that latents are drawn from?

    mode = "latents"  # in the place of Pillow's

    @property
    def shape(self) -> tuple[int, ...]:
        """As a net sees them."""
        return (self.stored[0] // 2, *self.stored[1:]) if self.moments else self.stored

    @property
    def width(self) -> int:
        return self.stored[-1]

    @property
    def height(self) -> int:
        return self.stored[-2]

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} latents"


class LatentSource:
    """Latents in the place of pictures; `labels` are given afterwards."""

    labels: Labels | None = None

    def __init__(self, path: Path, shards: Shards, manifest: Manifest | None):
        self.path, self.shards, self.manifest = str(path), shards, manifest
        first = self._latents(0)
        if first.dim() not in (3, 4) or str(first.dtype).removeprefix("torch.") not in FLOATS:
            raise UserError(f"{path} has latents {list(first.shape)} {first.dtype}, wanted [C, H, W] in float16 or float32")
        self._header = LatentHeader(tuple(first.shape), FLOATS[str(first.dtype).removeprefix("torch.")])
        some = np.linspace(0, len(self) - 1, min(LOOKED_AT, len(self))).astype(int)
        check_std(torch.from_numpy(np.stack([self.array(i) for i in some])), self.path)

    def __len__(self) -> int:
        return len(self.shards)

    def title(self, i: int) -> str:
        return f"latent {i} of {self.path}"

    def header(self, i: int) -> LatentHeader:
        return self._header

    def array(self, i: int) -> np.ndarray:
        """Latent i [C, H, W]. Damaged where its file is."""
        latent = self._latents(i).numpy()
        if (latent.shape, latent.dtype) != self._header[:2]:
            raise UserError(f"{self.title(i)} is {list(latent.shape)} {latent.dtype}, wanted {self._header} {self._header.dtype.__name__}")
        return finite(latent, self.title(i))

    def _latents(self, i: int) -> Tensor:
        return self.shards.row(int(i))[LATENTS]

    def picture(self, i: int, *, upright: bool = False) -> NoReturn:
        raise UserError(f"{self.path} holds latents, wanted pictures: give the set that they were made from")

    def fingerprint(self) -> dict[str, Any]:
        """As of a `FileSource`."""
        labels = self.labels.of if self.labels else None
        found = fingerprint([str(i) for i in range(len(self))], None, labels, lambda i: self.array(i).tobytes())
        made_of = self.manifest.about if self.manifest else {}
        return found | {"first": str(self._header), "label_dim": self.labels.dim if self.labels else 0, "made_of": made_of}

    @cached_property
    def vae(self) -> str | None:
        """The hash of the VAE that made them, where that is known."""
        return self.manifest.about.get("vae") if self.manifest else None


class NoiseLatents(LatentSource):
    """Noise [N, C, H, W] uint8 in the place of latents that are not there: uniform, with EDM2's deviation of 0.5."""

    def __init__(self, path: str, noise: np.ndarray):
        self.path, self.noise, self.manifest = path, noise, None
        self._header = LatentHeader(noise.shape[1:], np.float32)

    def __len__(self) -> int:
        return len(self.noise)

    def array(self, i: int) -> np.ndarray:
        return ((self.noise[i] / 127.5 - 1) * (0.5 * 3**0.5)).astype(np.float32)


class ArrayLatents(LatentSource):
    """Latents or moments in .npy files."""

    def __init__(self, files: Folder | Zip):
        self.files, self.path, self.manifest = files, str(files.path), None
        first = self._array(0)
        if first.ndim != 3 or first.dtype not in FLOATS.values() or not first.size:
            raise UserError(f"{self.title(0)} is {list(first.shape)} {first.dtype}, wanted [C, H, W] in float16 or float32")
        self._header = LatentHeader(first.shape, first.dtype.type, len(first) == MOMENTS)
        sizes = files.sizes()[:, 0]
        if len(others := np.flatnonzero(sizes != sizes[0])):
            i = int(others[0])
            raise UserError(
                f"{self.title(i)} has {sizes[i]:,} bytes, and {self.title(0)} {sizes[0]:,}: wanted latents of one size and type"
            )
        some = np.linspace(0, len(self) - 1, min(LOOKED_AT, len(self))).astype(int)
        looked_at = torch.from_numpy(np.stack([self.array(i) for i in some]))
        if self._header.moments and not bool((looked_at[:, MOMENTS // 2 :] >= 0).all()):
            raise UserError(f"{self.path} has arrays of {MOMENTS} channels that are no means and deviations, some of which are below 0")
        check_std(drawn(looked_at, None) if self._header.moments else looked_at, self.path)

    def __len__(self) -> int:
        return len(self.files.names)

    def title(self, i: int) -> str:
        return self.files.title(i)

    def array(self, i: int) -> np.ndarray:
        """Array i as it is stored. UserError where its file is damaged."""
        found = self._array(i)
        if (found.shape, found.dtype) != self._header[:2]:
            raise UserError(
                f"{self.title(i)} is {list(found.shape)} {found.dtype}, wanted {list(self._header.stored)} {self._header.dtype.__name__} as "
                f"{self.title(0)} is"
            )
        return finite(found, self.title(i))

    def _array(self, i: int) -> np.ndarray:
        data = self.files.read(i)
        try:
            found = array_in(data)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:  # of a header, which is Python's syntax
            raise UserError(f"{self.title(i)} is no complete .npy of plain numbers ({' '.join(str(error).split()):.100})") from error
        return found.astype(found.dtype.newbyteorder("="))

    def fingerprint(self) -> dict[str, Any]:
        labels = self.labels.of if self.labels else None
        found = fingerprint(self.files.names, self.files.sizes(), labels, self.files.read)
        return found | {"first": str(self._header), "label_dim": self.labels.dim if self.labels else 0}


def is_latents(path: Path) -> bool:
    """A folder of latents, ours or somebody else's?"""
    if (path / MANIFEST).is_file():
        return True
    first = min(path.glob("*.safetensors"), default=None) if path.is_dir() else None
    return first is not None and LATENTS in _tensors(first)


def read_latents(path: Path) -> tuple[LatentSource, Reader]:
    """The latents of a folder, and how to read their labels. UserError for a damaged or unfinished one, and see `check_std`."""
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path, LATENTS, ADVICE)
        source = LatentSource(path, Shards.in_folder(path, manifest, ADVICE), manifest)
    else:
        files = sorted(path.glob("*.safetensors"))
        source = LatentSource(path, Shards(files, [_rows(file) for file in files], None, "copy it again"), None)
    return source, lambda say: _labels(source)


def _tensors(file: Path) -> dict[str, Stored]:
    with opened(file) as tensors:
        return kinds_of(tensors)


def _rows(file: Path) -> int:
    found = _tensors(file)
    if LATENTS not in found or not found[LATENTS].shape:
        raise UserError(f"{file} holds {', '.join(found) or 'nothing'}, wanted a tensor '{LATENTS}' [N, C, H, W]")
    return found[LATENTS].shape[0]


def _labels(source: LatentSource) -> Labels | None:
    labels = source.shards.column(LABELS)
    if labels is None:
        return None
    if labels.shape != (len(source),) or labels.is_floating_point():
        raise UserError(f"{source.path} has labels {list(labels.shape)} {labels.dtype}, wanted [{len(source)}] integers")
    classes = source.manifest.about.get("classes") if source.manifest else None
    if classes is not None and not NAMES.fits(classes):
        raise Damaged(f"{source.path} has classes = {shown(classes)} in its {MANIFEST}, wanted {NAMES.wanted}: {ADVICE}")
    return checked(labels.numpy(), classes, [source.title(i) for i in range(len(source))], source.path)


def finite(latent: np.ndarray, title: str) -> np.ndarray:
    """The same. UserError where a number of it is NaN or infinite."""
    if not np.isfinite(latent).all():
        raise UserError(f"{title} holds numbers that are not finite: encode its picture again, or leave it out")
    return latent


def check_std(latents: Tensor, where: str) -> None:
    """UserError for latents whose standard deviation a denoiser will not have seen."""
    std = float(latents.float().std(correction=0))
    low, high = USUAL_STD
    if not low <= std <= high:
        raise UserError(
            f"the latents of {where} have a standard deviation of {std:.3g}, wanted {low:g} to {high:g}: was the VAE's scaling applied? "
            "(potstill convert latents does it)"
        )
