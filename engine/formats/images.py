"""EDM's dataset zip, written: 00000/img00000000.png and so on, uncompressed, and dataset.json with the labels.

Also how any picture becomes a square of a given size. The zip appears under its name only when it is complete, and the
same pictures give the same bytes.
"""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Literal, Self

from PIL import Image

from potstill.engine.common.errors import UserError

Fit = Literal["centre-crop", "stretch", "pad"]
Filter = Literal["box", "lanczos"]
RESAMPLING = {"box": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}
MODES = {1: "L", 3: "RGB"}
GREY = ("1", "L", "LA")
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def channels_of(mode: str) -> int:
    """1 for Pillow's grey modes, else 3."""
    return 1 if mode in GREY else 3


def plain(picture: Image.Image, channels: int, title: str) -> Image.Image:
    """8-bit grey (1) or RGB (3); what is transparent lies on white. UserError for more than 8 bits a channel."""
    if picture.mode in DEEP:
        raise UserError(f"{title} is of mode {picture.mode}, wanted 8 bits a channel: convert it first")
    if picture.mode == MODES[channels]:
        return picture
    try:
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert(MODES[channels])
    except ValueError as error:
        raise UserError(f"{title} is of mode {picture.mode}, which Pillow cannot convert ({error})") from error


def fitted(picture: Image.Image, resolution: int, fit: Fit, filter: Filter | None = None) -> Image.Image:
    """A square of `resolution`; untouched where it is one. filter: None takes box to shrink and lanczos to enlarge."""
    w, h = picture.size
    if fit == "pad":
        side = max(w, h)
        square = Image.new(picture.mode, (side, side))  # black
        square.paste(picture, ((side - w) // 2, (side - h) // 2))
        picture = square
    elif fit == "centre-crop":
        # Cut first: a filter on a `box` would look at pixels beyond the cut.
        side = min(w, h)
        left, top = (w - side) // 2, (h - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    if picture.size == (resolution, resolution):
        return picture
    chosen = filter or ("box" if min(picture.size) >= resolution else "lanczos")
    return picture.resize((resolution, resolution), RESAMPLING[chosen])


def png(picture: Image.Image) -> bytes:
    """An uncompressed PNG: larger, and much faster to read."""
    data = io.BytesIO()
    picture.save(data, "png", compress_level=0)
    return data.getvalue()


class DatasetZip:
    """Write images one after the other; on leaving the `with` block in peace the zip is there, otherwise nothing is."""

    def __init__(self, path: Path, *, classes: list[str] | None = None, overwrite: bool = False):
        if path.suffix.lower() != ".zip":
            raise UserError(f"wanted an output that ends in .zip, got {path}")
        if path.is_dir() or (path.exists() and not overwrite):
            raise UserError(f"{path} exists: choose another name" + ("" if path.is_dir() else " or add --force"))
        self.path, self.part = path, path.with_name(f"{path.name}.{os.getpid()}.part")
        self.classes, self.labels = classes, []

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._zip = zipfile.ZipFile(self.part, "w", zipfile.ZIP_STORED)
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def add(self, png: bytes, label: int | None) -> None:
        number = len(self.labels)
        name = f"{number // 1000:05d}/img{number:08d}.png"
        self._write(name, png)
        self.labels.append([name, label])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                labels = self.labels if all(label is not None for _, label in self.labels) else None
                names = {"classes": self.classes} if labels and self.classes else {}
                self._write("dataset.json", json.dumps({"labels": labels} | names).encode())
                self._zip.close()
                os.replace(self.part, self.path)
        except OSError as full:
            raise self._unwritable(full) from full
        finally:
            self._abandon()

    def _write(self, name: str, data: bytes) -> None:
        try:
            entry = zipfile.ZipInfo(name)  # dated 1980: the same images give the same file
            entry.external_attr = 0o644 << 16  # or it would unpack to files that nobody may read
            self._zip.writestr(entry, data)
        except OSError as error:
            raise self._unwritable(error) from error

    def _abandon(self) -> None:
        """Remove the unfinished file; there is none after a success."""
        if self._zip.fp is not None:
            self._zip.fp.close()
            self._zip.fp = None  # or ZipFile would write its directory when it is collected
        self.part.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.path}: {error.strerror}")
