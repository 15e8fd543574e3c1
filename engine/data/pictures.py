"""One picture: its size and mode from the first bytes of its file, its pixels from all of them."""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from potstill.engine.common.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")
PNG = b"\x89PNG\r\n\x1a\n"
# What Pillow raises for data that is no image, beyond the documented OSError.
NO_IMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError)
NO_IMAGE += (NotImplementedError, struct.error, zlib.error)  # of its readers for TIFF and PNG
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pixels, (C, H, W): "L" is one channel, "RGB" are three."""
        return len(self.mode), self.height, self.width

    @property
    def dtype(self) -> type:
        """Of the pixels."""
        return np.uint8


def png_header(head: bytes) -> Header | None:
    """Size and mode of an 8-bit grey or colour PNG from its first 26 bytes; None for all else: ask Pillow."""
    if len(head) < 26 or head[:8] != PNG or head[12:16] != b"IHDR":
        return None
    width, height, depth, colour = struct.unpack(">IIBB", head[16:26])
    mode = {(8, 0): "L", (8, 2): "RGB"}.get((depth, colour))
    return Header(width, height, mode) if mode and width and height else None


def has_several(picture: Image.Image) -> bool:
    """Frames or pages. An MPO is a camera's JPEG with previews or depth behind it: its first picture is the photo."""
    return picture.format != "MPO" and getattr(picture, "is_animated", False)


def png_is_animated(head: bytes) -> bool | None:
    """An APNG says before its pixels how many frames it has. None where these first bytes of a PNG do not reach so far."""
    at = len(PNG) if head.startswith(PNG) else len(head)
    while at + 12 <= len(head):
        length, kind, frames = struct.unpack_from(">I4sI", head, at)
        if kind in (b"acTL", b"IDAT"):
            return kind == b"acTL" and frames > 1
        at += 12 + length
    return None if head.startswith(PNG) else False


def refuse_animation(is_one: bool, title: str) -> None:
    """UserError for a file with several pictures, of which nobody can know which one is meant."""
    if is_one:
        raise UserError(
            f"{title} is an animation or has several pages, wanted one picture a file: save the one that is meant, or leave it out "
            "(potstill convert images … --skip-corrupt)"
        )


def decode(data: bytes, title: str, *, upright: bool = False) -> Image.Image:
    """A picture from the bytes of its file."""
    if data[:8] == PNG:
        _check_png(data, title)
    picture = opened(data, title)
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


def opened(data: bytes, title: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except NO_IMAGE as error:
        raise _damaged(title, error) from error
    refuse_animation(has_several(picture), title)
    refuse_bomb(Header(*picture.size, picture.mode), title)
    return picture


def _damaged(title: str, error: BaseException | str) -> UserError:
    reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
    return UserError(f"{title} is damaged ({reason}): replace it, or leave it out (potstill convert images … --skip-corrupt)")


def one_line(error: BaseException | str) -> str:
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


def refuse_bomb(header: Header, title: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and header.width * header.height > limit:
        raise UserError(f"{title} claims {header.width}x{header.height} pixels, wanted at most {limit:,} in all")
