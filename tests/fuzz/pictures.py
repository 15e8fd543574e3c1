"""Readers of images: folders and zips with dataset.json, arrays, shards, and every kind of picture."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from potstill.engine.convert import main as convert
from potstill.engine.data.images import open_images

from .forms import npy_of, png_of, tar_of, zip_of
from .jail import Reader
from .mutations import json_of

N, SIZE, CLASSES = 6, 8, 3
LOSSLESS = ("png",)  # with checksums, so that a wrong pixel is known; the others have none
MOST_CLASSES = 1000  # of a handful of images: a one-hot row that is wider was not meant


class Pictures(NamedTuple):
    """What was read: images as (shape, bytes), their labels, how many classes."""

    pixels: list[tuple[tuple[int, ...], bytes]]
    labels: list[int] | None
    classes: int


def _pixels(k: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 256, (SIZE, SIZE, channels), np.uint8)


def _encoded(k: int, kind: str, **how: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(_pixels(k)).save(out, kind, **how)
    return out.getvalue()


def _dataset_json() -> str:
    return json.dumps({"labels": [[f"0/img{k}.png", k % CLASSES] for k in range(N)], "classes": ["a", "b", "c"]})


def _read(name: str) -> Callable[[Path], Pictures]:
    def read(folder: Path) -> Pictures:
        images = open_images(folder / name if name else folder)
        decoded = [images.read(i) for i in range(len(images))]
        labels = None if images.labels is None else [int(label) for label in images.labels]
        return Pictures([(one.shape, one.tobytes()) for one in decoded], labels, images.label_dim)

    return read


def _absurd(found: Pictures) -> str | None:
    if found.classes > MOST_CLASSES:
        return "a million classes of six images"
    if found.labels is not None and (len(found.labels) != len(found.pixels) or not all(0 <= k < found.classes for k in found.labels)):
        return "labels that are no classes"
    return None


def _checked(found: Pictures, right: Pictures, damaged: bool) -> str | None:
    """Of a form with checksums: every image that is read, and its label, is one of the valid ones, and none comes twice."""
    if why := _absurd(found):
        return why
    if damaged and not {one[1] for one in found.pixels} <= {one[1] for one in right.pixels}:
        return "damaged pixels"
    if len({one[1] for one in found.pixels}) < len(found.pixels):
        return "an image that comes twice"
    if damaged and found.labels and right.labels:
        known = dict(zip((one[1] for one in right.pixels), right.labels, strict=True))
        if any(known[one[1]] != label for one, label in zip(found.pixels, found.labels, strict=True)):
            return "damaged labels"
    return None


def _unchecked(found: Pictures, right: Pictures, damaged: bool) -> str | None:
    return _absurd(found)


# What is read


def _zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for k in range(N):
            archive.writestr(f"0/img{k}.png", _encoded(k, "png"))
        archive.writestr("dataset.json", _dataset_json())


def _moments_zip(folder: Path) -> None:
    """EDM2's: an .npy of means and deviations for each picture."""
    draw = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        for k in range(N):
            out = io.BytesIO()
            np.save(out, np.concatenate([draw.normal(0, 4, (4, SIZE, SIZE)), draw.uniform(0.2, 0.6, (4, SIZE, SIZE))]).astype(np.float32))
            archive.writestr(f"0/img{k}.npy", out.getvalue())
        archive.writestr("dataset.json", _dataset_json().replace(".png", ".npy"))


def _folder(folder: Path) -> None:
    (folder / "0").mkdir()
    for k in range(N):
        (folder / f"0/img{k}.png").write_bytes(_encoded(k, "png"))
    (folder / "dataset.json").write_text(_dataset_json())


def _npz(folder: Path) -> None:
    np.savez(folder / "set.npz", images=np.stack([_pixels(k) for k in range(N)]), labels=np.arange(N) % CLASSES)


def _tar(folder: Path) -> None:
    with tarfile.open(folder / "set.tar", "w") as archive:
        for k in range(N):
            for kind, data in (
                ("png", _encoded(k, "png")),
                ("cls", str(k % CLASSES).encode()),
                ("json", json.dumps({"label": k % CLASSES}).encode()),
            ):
                entry = tarfile.TarInfo(f"{k:04d}.{kind}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


def _columns(folder: Path) -> None:
    """Shards whose labels are in KEY.json."""
    with tarfile.open(folder / "set.tar", "w") as archive:
        for k in range(2):
            for kind, data in (("png", _encoded(k, "png")), ("json", json.dumps({"label": k, "more": [1.5, None]}).encode())):
                entry = tarfile.TarInfo(f"{k:04d}.{kind}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


def _one(kind: str, **how: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / f"x.{kind}").write_bytes(_encoded(0, {"jpg": "jpeg", "tif": "tiff"}.get(kind, kind), **how)) and None


def _zip_converted(folder: Path) -> bytes:
    """`potstill convert images`: the zip that comes out, read again."""
    out = folder.parent / "in" / "made.zip"
    convert(["images", str(folder / "set.zip"), str(out), "--resolution", "4", "--force"])
    found = _read("made.zip")(folder)
    out.unlink()
    return json.dumps([found.labels, found.classes, len(found.pixels), found.pixels[0][0]]).encode()


def _false_conversion(found: bytes, right: bytes, damaged: bool) -> str | None:
    classes, n = json.loads(found)[1:3]
    return "more images than there are" if n > N else "a million classes of six images" if classes > MOST_CLASSES else None


def _inside(name: str, content: bytes) -> st.SearchStrategy[bytes] | None:
    return (
        json_of(content)
        if name == "dataset.json"
        else png_of(content)
        if name.endswith(".png")
        else npy_of(name, content)
        if name.endswith(".npy")
        else None
    )


TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
PICTURES = {
    "png": ({}, png_of), "jpg": ({"exif": TURNED}, None), "webp": ({"lossless": True}, None), "bmp": ({}, None),
    "tif": ({"compression": "tiff_deflate"}, None), "ppm": ({}, None),
}  # fmt: skip
READERS = [
    Reader("zip of images", _zip, _read("set.zip"), {"set.zip": zip_of(_inside)}, _checked, 1400),
    Reader("zip, converted", _zip, _zip_converted, {"set.zip": zip_of(_inside)}, _false_conversion, 300),
    Reader("zip of moments", _moments_zip, _read("set.zip"), {"set.zip": zip_of(_inside)}, _checked, 500),
    Reader("folder of images", _folder, _read(""), {"dataset.json": json_of, "0/img3.png": png_of}, _unchecked, 900),
    Reader(".npz of images", _npz, _read("set.npz"), {"set.npz": zip_of(_inside)}, _unchecked, 800),
    Reader(".tar of images", _tar, _read("set.tar"), {"set.tar": tar_of}, _unchecked, 800),
    Reader(".tar with .json", _columns, _read("set.tar"), {"set.tar": None}, _unchecked, 400),
    *(Reader(f"a .{kind}", _one(kind, **how), _read(""), {f"x.{kind}": form}, _unchecked, 250) for kind, (how, form) in PICTURES.items()),
]
