"""Images side by side: a grid, and a sheet of captioned grids."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.common.writing import whole

CELL = 48  # smallest side of a picture in a grid, in screen pixels
LINE = 2  # between the pictures of a grid
CAPTION = 14  # height of the captions' letters
GAP = 12


def grid(images: Tensor | np.ndarray, columns: int | None = None, *, scale: int | None = None) -> Image.Image:
    """uint8 images [N, C, H, W] (C = 1 or 3) row by row, a thin white line between them; by default about square.

    `scale` repeats every pixel that often; by default just enough for a picture to be at least 48 pixels wide.
    """
    pictures = _as_array(images)
    n, channels, height, width = pictures.shape
    columns = min(columns or default_columns(n), n)
    scale = scale or max(1, math.ceil(CELL / min(height, width)))
    large = pictures.transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)
    down, across = height * scale + LINE, width * scale + LINE
    canvas = np.full((math.ceil(n / columns) * down - LINE, columns * across - LINE, channels), 255, np.uint8)
    for i, picture in enumerate(large):
        top, left = i // columns * down, i % columns * across
        canvas[top : top + down - LINE, left : left + across - LINE] = picture
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def sheet(rows: Mapping[str, Tensor | np.ndarray], columns: int | None = None, *, scale: int | None = None) -> Image.Image:
    """One grid per caption, left to right: for example real | teacher | student. Every value is [N, C, H, W] uint8."""
    grids = {caption: grid(images, columns, scale=scale).convert("RGB") for caption, images in rows.items()}
    font = ImageFont.load_default(CAPTION)
    top = CAPTION + GAP
    widths = [max(g.width, math.ceil(font.getlength(caption))) for caption, g in grids.items()]
    size = (sum(widths) + GAP * (len(grids) + 1), top + max(g.height for g in grids.values()) + GAP)
    canvas = Image.new("RGB", size, "white")
    draw, left = ImageDraw.Draw(canvas), GAP
    for (caption, picture), width in zip(grids.items(), widths, strict=True):
        draw.text((left, GAP // 2), caption, fill="black", font=font)
        canvas.paste(picture, (left, top))
        left += width + GAP
    return canvas


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one under the other, on white."""
    canvas = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas


def default_columns(n: int) -> int:
    """The number of columns of an about square grid."""
    return math.ceil(math.sqrt(n))


def save_png(picture: Image.Image, path: Path) -> None:
    """Written beside and moved into place, so a picture is whole or absent."""
    with whole(path) as part:
        picture.save(part, format="PNG")


def _as_array(images: Tensor | np.ndarray) -> np.ndarray:
    array = images.cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or len(array) == 0:
        raise ValueError(f"a grid wants uint8 images [N, C, H, W] with N >= 1, got {array.dtype} {list(array.shape)}")
    if array.shape[1] not in (1, 3):
        raise UserError(f"a picture has 1 or 3 channels, got {array.shape[1]}: save these images as .npz")
    return array
