"""EDM's dataset zip, written: 00000/img00000000.png and so on, uncompressed, and dataset.json with the labels.

Also how any picture becomes a square of a given size. The zip appears under its name only when it is complete, and the
same pictures give the same bytes.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from PIL import Image

from potstill.engine.common.errors import UserError, writing
from potstill.engine.common.writing import check_free, whole

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
    """Takes images one after the other, each with its class or None. Made by `dataset_zip`."""

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        self.labels: list[tuple[str, int | None]] = []  # name and class of every image

    def add(self, png: bytes, label: int | None) -> None:
        number = len(self.labels)
        name = f"{number // 1000:05d}/img{number:08d}.png"
        self.write(name, png)
        self.labels.append((name, label))

    def write(self, name: str, data: bytes) -> None:
        entry = zipfile.ZipInfo(name)  # dated 1980: the same images give the same file
        entry.external_attr = 0o644 << 16  # or it would unpack to files that nobody may read
        self.archive.writestr(entry, data)


@contextmanager
def dataset_zip(path: Path, *, classes: list[str] | None = None, overwrite: bool = False) -> Iterator[DatasetZip]:
    """The zip is there when the block ends in peace; otherwise nothing is. UserError where it cannot be written."""
    if path.suffix.lower() != ".zip":
        raise UserError(f"wanted an output that ends in .zip, got {path}")
    check_free(path, overwrite)
    with writing(path), whole(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        yield (found := DatasetZip(archive))
        labels = found.labels if all(label is not None for _, label in found.labels) else None
        names = {"classes": classes} if labels and classes else {}
        found.write("dataset.json", json.dumps({"labels": labels} | names).encode())
