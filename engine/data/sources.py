"""Pictures of any size with labels, wherever they come from: files in a folder or zip, or arrays held in memory."""

import io
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from engine.data import hugging_face
from engine.data.files import METADATA, Files, open_files
from engine.data.labels import MAX_CLASSES, Labels, checked, from_folders, from_json
from engine.data.tars import Tars, shards_of
from engine.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")
PNG = b"\x89PNG\r\n\x1a\n"
SYNTHETIC = re.compile(r"synthetic:(\d+)x(\d+)(?:x(\d+))?(?:x(\d+))?")
MAX_SYNTHETIC_BYTES = 2**32
# What Pillow raises for data that is no image, beyond the documented OSError.
NO_IMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError)
NO_IMAGE += (NotImplementedError, struct.error, zlib.error)
NO_IMAGE += (Image.DecompressionBombError, Image.DecompressionBombWarning)
ORIENTATION = 0x0112  # EXIF tag; how to turn what the camera stored
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Header(NamedTuple):
    width: int
    height: int
    mode: str  # Pillow's: "L" is 8-bit grey, "RGB" 8-bit colour

    def __str__(self) -> str:
        return f"{self.width}x{self.height} {self.mode}"


class Source(Protocol):
    path: str  # as the user gave it
    labels: Labels | None

    def __len__(self) -> int: ...

    def title(self, i: int) -> str: ...

    def header(self, i: int) -> Header:
        """Without decoding the picture."""
        ...

    def picture(self, i: int, *, upright: bool = False) -> Image.Image:
        """Decoded; `upright` follows a camera's rotation mark. UserError, naming the file, where it is damaged."""
        ...


def open_source(path: str | Path, *, labelled: bool = True) -> Source:
    """Pictures of "digits", "synthetic:RxC[xCLASSES[xN]]", an .npz, a folder, a zip, webdataset's tars, "hf:NAME".

    UserError if there are none.
    """
    text = str(path)
    if text == "digits":
        return _digits(labelled)
    if text.startswith("synthetic:"):
        return _synthetic(text, labelled)
    if text.startswith(hugging_face.PREFIX):
        files, labels = hugging_face.encoded(text, labelled)
        source = FileSource(files, labelled=False)
        source.labels = labels
        return source
    if text.endswith(".tar") and shards_of(text):
        return FileSource(_not_empty(Tars(text)), labelled)
    place = Path(path).expanduser()
    if not os.path.exists(place):  # Path.exists raises where a folder above is closed to us
        raise UserError(
            f"no images at {text}, wanted an EDM dataset zip, a folder of images, an .npz file, .tar shards, hf:NAME, 'digits' or "
            "synthetic:RESOLUTIONxCHANNELS"
        )
    if place.suffix.lower() == ".npz":
        return _npz(place, labelled)
    return FileSource(open_files(place), labelled)


def is_there(path: str) -> bool:
    """Is there something at a source's name, as far as can be told without opening it?"""
    if path == "digits" or path.startswith(("synthetic:", hugging_face.PREFIX)):
        return True
    return bool(shards_of(path)) if path.endswith(".tar") else os.path.exists(Path(path).expanduser())


def _not_empty(tars: Tars) -> Tars:
    if not tars.names:
        raise UserError(f"no images in {tars.path}: wanted tars with KEY.png and, if any, KEY.cls")
    return tars


class FileSource:
    def __init__(self, files: Files, labelled: bool = True):
        self.files, self.path = files, str(files.path)
        self.labels = _file_labels(files) if labelled else None

    def __len__(self) -> int:
        return len(self.files.names)

    def title(self, i: int) -> str:
        return self.files.title(i)

    def header(self, i: int) -> Header:
        header = png_header(self.files.head(i, 32)) or self._pillow_header(i)
        _refuse_bomb(header, self.title(i))
        return header

    def _pillow_header(self, i: int) -> Header:
        try:
            picture = Image.open(io.BytesIO(self.files.head(i, 2**16)), formats=FORMATS)
        except NO_IMAGE:  # perhaps because the header is longer than that
            picture = _opened(self.files.read(i), self.title(i))
        return Header(*picture.size, picture.mode)

    def picture(self, i: int, *, upright: bool = False) -> Image.Image:
        return decode(self.files.read(i), self.title(i), upright=upright)


class ArraySource:
    """Pictures that are in memory already: pixels [N, C, H, W] uint8."""

    def __init__(self, path: str, pixels: np.ndarray, labels: Labels | None):
        self.path, self.pixels, self.labels = path, pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def title(self, i: int) -> str:
        return f"image {i} of {self.path}"

    def header(self, i: int) -> Header:
        _, c, h, w = self.pixels.shape
        return Header(w, h, "L" if c == 1 else "RGB")

    def picture(self, i: int, *, upright: bool = False) -> Image.Image:
        chw = self.pixels[i]
        return Image.fromarray(chw[0] if len(chw) == 1 else np.ascontiguousarray(chw.transpose(1, 2, 0)))


def png_header(head: bytes) -> Header | None:
    """Size and mode of an 8-bit grey or colour PNG from its first 26 bytes; None for all else: ask Pillow."""
    if len(head) < 26 or head[:8] != PNG or head[12:16] != b"IHDR":
        return None
    width, height, depth, colour = struct.unpack(">IIBB", head[16:26])
    mode = {(8, 0): "L", (8, 2): "RGB"}.get((depth, colour))
    return Header(width, height, mode) if mode and width and height else None


def decode(data: bytes, title: str, *, upright: bool = False) -> Image.Image:
    """A picture from the bytes of its file."""
    if data[:8] == PNG:
        _check_png(data, title)
    picture = _opened(data, title)
    try:
        picture.load()
    except NO_IMAGE as error:
        raise _damaged(title, error) from error
    return _turned(picture) if upright else picture


def _turned(picture: Image.Image) -> Image.Image:
    """As the camera was held; as it is where the mark cannot be read, which says nothing about the pixels."""
    try:
        turn = TURNS.get(picture.getexif().get(ORIENTATION, 1))
    except NO_IMAGE:
        return picture
    return picture if turn is None else picture.transpose(turn)


def _opened(data: bytes, title: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except NO_IMAGE as error:
        raise _damaged(title, error) from error
    _refuse_bomb(Header(*picture.size, picture.mode), title)
    return picture


def _damaged(title: str, error: BaseException | str) -> UserError:
    reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else _line(error)
    return UserError(
        f"{title} is damaged ({reason}): replace it, or leave it out (python -m engine.convert images … --skip-corrupt)"
    )


def _line(error: BaseException | str) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _check_png(data: bytes, title: str) -> None:
    """Pillow does not look at the checksums of pixel data; a few flipped bits would go unnoticed."""
    at = len(PNG)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if data[end : end + 4] != struct.pack(">I", zlib.crc32(memoryview(data)[at + 4 : end])):
            break
        if data[at + 4 : at + 8] == b"IEND":
            return
        at = end + 4
    raise _damaged(title, "truncated" if at + 12 > len(data) or end + 4 > len(data) else "a checksum differs")


def _refuse_bomb(header: Header, title: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and header.width * header.height > limit:
        raise UserError(f"{title} claims {header.width}x{header.height} pixels, wanted at most {limit:,} in all")


def _file_labels(files: Files) -> Labels | None:
    if files.metadata is not None:
        return from_json(files.metadata, files.names, f"{METADATA} in {files.path}")
    # A zip without dataset.json has no labels, as in EDM: its folders are mere buckets of a thousand files.
    return from_folders(files.names, str(files.path)) if files.path.is_dir() else None


def _digits(labelled: bool) -> ArraySource:
    """scikit-learn's 1,797 handwritten digits, 8x8; 0 … 16 becomes 0 … 255."""
    from sklearn.datasets import load_digits  # takes a second to import; other data do without

    values, digit = load_digits(return_X_y=True)
    pixels = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = Labels(digit.astype(np.int64), 10, [str(k) for k in range(10)])
    return ArraySource("digits", pixels, labels if labelled else None)


def _synthetic(text: str, labelled: bool) -> ArraySource:
    """Uniform noise: for measuring speed and memory, not for looking at."""
    match = SYNTHETIC.fullmatch(text)
    if not match:
        raise UserError(f"wanted synthetic:RESOLUTIONxCHANNELS[xCLASSES[xN]], such as synthetic:64x3x10, got {text}")
    resolution, channels, classes = (int(part or 0) for part in match.groups()[:3])
    n = int(match[4] or 1024)
    size = n * channels * resolution**2
    if channels not in (1, 3) or not 0 < size <= MAX_SYNTHETIC_BYTES or classes > MAX_CLASSES:
        raise UserError(
            f"{text} has {size:,} bytes, wanted at most {MAX_SYNTHETIC_BYTES:,}, 1 or 3 channels, at most "
            f"{MAX_CLASSES} classes"
        )
    noise = np.random.Generator(np.random.Philox(0)).integers(0, 256, (n, channels, resolution, resolution), np.uint8)
    labels = Labels(np.arange(n) % classes, classes) if classes and labelled else None
    return ArraySource(text, noise, labels)


def _npz(path: Path, labelled: bool) -> ArraySource:
    """`images` (or arr_0) [N, H, W], [N, H, W, C] or [N, C, H, W] uint8; `labels` (or arr_1) [N] integers, optional."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            pixels = next((file[key] for key in ("images", "arr_0") if key in file), None)
            labels = next((file[key] for key in ("labels", "arr_1") if key in file), None)
            keys = list(file)
    except (*NO_IMAGE, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is no complete .npz of plain arrays ({_line(error)}): write it with numpy.savez"
        ) from error
    if pixels is None:
        raise UserError(f"{path} holds {', '.join(keys) or 'nothing'}, wanted arrays 'images' and, if any, 'labels'")
    pixels = _channels_first(pixels, path)
    if labels is None or not labelled:
        return ArraySource(str(path), pixels, None)
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu":
        raise UserError(f"{path} has labels {list(labels.shape)} {labels.dtype}, wanted [{len(pixels)}] integers")
    names = [f"image {i}" for i in range(len(labels))]
    return ArraySource(str(path), pixels, checked(labels, None, names, str(path)))


def _channels_first(pixels: np.ndarray, path: Path) -> np.ndarray:
    """[N, C, H, W] from any of the three layouts; the one that fits is taken, channels-last where both would."""
    if pixels.dtype == np.uint8 and pixels.size:
        if pixels.ndim == 3:
            return pixels[:, None]
        if pixels.ndim == 4 and pixels.shape[3] in (1, 3):
            return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        if pixels.ndim == 4 and pixels.shape[1] in (1, 3):
            return pixels
    raise UserError(
        f"{path} has images {list(pixels.shape)} {pixels.dtype}, wanted [N, H, W, C] or [N, C, H, W] uint8 "
        "with 1 or 3 channels"
    )
