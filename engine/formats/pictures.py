"""Images side by side, a grid or a sheet of captioned grids; and files that take images as they are made: a grid, a folder of
PNGs, an .npz or EDM's dataset zip.

Only a grid holds all images in memory. Every file is written beside its place and moved there when it is whole.
"""

import math
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from potstill.engine.common.errors import UserError, writing
from potstill.engine.common.writing import check_writable, whole
from potstill.engine.formats.images import dataset_zip, png

CELL = 48  # smallest side of a picture in a grid, in screen pixels
LINE = 2  # between the pictures of a grid
CAPTION = 14  # height of the captions' letters
GAP = 12
TOLD, SMALL, MOST_LINES = 112, 10, 3  # of pictures with their captions: least width, height of letters, lines
FEW, MOST_TOLD = 10, 400  # columns that are never too many; pictures with their captions on one sheet
KINDS = (".png", ".npz", ".zip")

Add = Callable[[np.ndarray], None]  # takes the next images, uint8 [n, C, H, W]


def grid(
    images: Tensor | np.ndarray, columns: int | None = None, *, scale: int | None = None, heads: Sequence[str] = ()
) -> Image.Image:  # fmt: skip
    """uint8 images [N, C, H, W] (C = 1 or 3) row by row, a thin white line between them; by default about square.

    `scale` repeats every pixel that often; by default just enough for a picture to be at least 48 pixels wide. `heads` stand over the columns.
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
    picture = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    return _under(heads[:columns], picture, across) if heads else picture


def _under(heads: Sequence[str], picture: Image.Image, across: int) -> Image.Image:
    """A grid with words over its columns, in MOST_LINES lines at most; smaller where a word would be broken."""
    width = across - LINE
    words = [word[:width] for text in heads for word in text.split()]
    sizes = (SMALL, SMALL - 1, SMALL - 2)
    size = next((size for size in sizes if all(ImageFont.load_default(size).getlength(word) <= width for word in words)), SMALL)
    font = ImageFont.load_default(size)
    texts = [_wrapped(text, font, width) for text in heads]
    top = max(map(len, texts)) * (SMALL + LINE) + LINE
    canvas = Image.new(picture.mode, (picture.width, top + picture.height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, lines in enumerate(texts):
        at = i * across + (across - LINE) / 2, top - LINE - len(lines) * (SMALL + LINE)
        draw.multiline_text(at, "\n".join(lines), fill="black", font=font, spacing=LINE, align="center", anchor="ma")
    canvas.paste(picture, (0, top))
    return canvas


def captioned(images: Tensor | np.ndarray, captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """Images [N, C, H, W] uint8 row by row, each with its caption under it: in MOST_LINES lines, what is longer is cut."""
    pictures = _as_array(images)
    n, _, height, width = pictures.shape
    columns, scale = min(columns or default_columns(n), n), max(1, math.ceil(TOLD / width))
    font = ImageFont.load_default(SMALL)
    texts = [_wrapped(text, font, width * scale) for text in captions]
    lines = max(len(text) for text in texts)
    down, across = height * scale + lines * (SMALL + LINE) + GAP, width * scale + GAP
    canvas = Image.new("RGB", (columns * across - GAP, math.ceil(n / columns) * down - GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for i, text in enumerate(texts):
        left, top = i % columns * across, i // columns * down
        canvas.paste(grid(pictures[i : i + 1], scale=scale).convert("RGB"), (left, top))
        draw.multiline_text((left, top + height * scale + LINE), "\n".join(text), fill="black", font=font, spacing=LINE)
    return canvas


def _wrapped(text: str, font: Any, width: float) -> list[str]:
    """A caption in lines that are no wider, broken between words, and within those that have no room on a line."""
    fits: Callable[[str], bool] = lambda line: font.getlength(line) <= width  # noqa: E731
    some = text[: MOST_LINES * math.ceil(width)]  # no letter is narrower than a pixel
    lines, words = [""], "".join(letter if letter.isprintable() else " " for letter in some).split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if fits(longer) or not lines[-1] else [*lines, word]
        while len(lines[-1]) > 1 and not fits(lines[-1]):
            room = max(n for n in range(1, len(lines[-1])) if n == 1 or fits(lines[-1][:n]))
            lines = [*lines[:-1], lines[-1][:room], lines[-1][room:]]
    if len(lines) <= MOST_LINES:
        return lines
    last = lines[MOST_LINES - 1]
    while last and not fits(f"{last} …"):
        last = last[:-1].rstrip()
    return [*lines[: MOST_LINES - 1], f"{last} …"]


def sheet(
    rows: Mapping[str, Tensor | np.ndarray], columns: int | None = None, *, scale: int | None = None, heads: Sequence[str] = ()
) -> Image.Image:  # fmt: skip
    """One grid per caption, left to right: for example real | teacher | student. Every value is [N, C, H, W] uint8."""
    return side_by_side({caption: grid(images, columns, scale=scale, heads=heads) for caption, images in rows.items()})


@dataclass
class Layout:
    """How pictures of classes lie on a sheet: `columns` side by side, all pictures of a column of one class where these have `heads`; else
    `told` has the caption of every picture, where it is readable.
    """

    columns: int
    heads: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def draw(self, images: Tensor | np.ndarray) -> Image.Image:
        return captioned(images, self.told, self.columns) if self.told else grid(images, self.columns, heads=self.heads)


def layout(labels: np.ndarray | None, n: int, names: Sequence[str] | None = None) -> Layout:
    """Of n pictures, about square. Where few classes come in turn, each has columns of its own under its name, or else its number."""
    side = default_columns(n)
    if labels is None:
        return Layout(side)
    period = len(np.unique(labels))
    in_turn = np.array_equal(labels, np.resize(labels[:period], n))
    columns = columns_of(period, n)
    if period == 1 and names:
        return Layout(side, titles(labels[:1], names))
    if in_turn and period > 1 and columns <= max(2 * side, FEW):
        return Layout(columns, titles(np.resize(labels[:period], columns), names))
    return Layout(side, told=titles(labels, names) if names and n <= MOST_TOLD else [])


def columns_of(classes: int, n: int) -> int:
    """A multiple of the number of classes that come in turn, of which n pictures make an about square sheet."""
    return classes * max(1, round(math.sqrt(n) / classes))


def titles(classes: Sequence[int] | np.ndarray, names: Sequence[str] | None = None) -> list[str]:
    """How classes are called on a picture: by their names, where they have some in letters that are there; else by their numbers."""
    known = {k: _drawable(names[k]) for k in set(map(int, classes)) if k < len(names)} if names else {}
    return [known.get(k) or str(k) for k in map(int, classes)]


def _drawable(text: str) -> str:
    """The text in letters that the font of captions has, which are few, without accents that it lacks; "" where it lacks others."""
    font: Any = ImageFont.load_default(SMALL)
    none = bytes(font.getmask("\U0010fffd"))
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return next((one for one in (text, plain) if all(c.isascii() or bytes(font.getmask(c)) != none for c in one)), "")


def side_by_side(grids: Mapping[str, Image.Image]) -> Image.Image:
    """Pictures left to right, each under its caption."""
    font = ImageFont.load_default(CAPTION)
    top = CAPTION + GAP
    widths = [max(g.width, math.ceil(font.getlength(caption))) for caption, g in grids.items()]
    size = (sum(widths) + GAP * (len(grids) + 1), top + max(g.height for g in grids.values()) + GAP)
    canvas = Image.new("RGB", size, "white")
    draw, left = ImageDraw.Draw(canvas), GAP
    for (caption, picture), width in zip(grids.items(), widths, strict=True):
        draw.text((left, GAP // 2), caption, fill="black", font=font)
        canvas.paste(picture.convert("RGB"), (left, top))
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


# Files


def out_kind(out: Path) -> str:
    """png, npz, zip or folder; UserError for what cannot be written there."""
    suffix = "" if out.is_dir() else out.suffix.lower()
    if suffix not in ("", *KINDS):
        raise UserError(f"--out wants a name ending in .png, .npz or .zip, or a folder, got {out}")
    if not suffix and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: wanted a folder, or a name ending in .png, .npz or .zip")
    check_writable(out, folder=not suffix)
    return suffix.removeprefix(".") or "folder"


@contextmanager
def open_output(
    out: Path, kind: str, labels: np.ndarray | None, seeds: Sequence[int], columns: int | None = None, names: list[str] | None = None
) -> Iterator[Add]:  # fmt: skip
    """What takes the next images, for len(seeds) of them; what is there is replaced. UserError where it cannot be written after all."""
    with writing(out):
        (out if kind == "folder" else out.parent).mkdir(parents=True, exist_ok=True)
        if kind == "png":
            opened = _grid_file(out, Layout(columns) if columns else layout(labels, len(seeds), names))
        elif kind == "npz":
            opened = _npz_file(out, labels, seeds)
        else:
            opened = _edm_zip(out, labels, names) if kind == "zip" else _png_folder(out, seeds)
        with opened as add:
            yield add


@contextmanager
def _grid_file(out: Path, how: Layout) -> Iterator[Add]:
    images: list[np.ndarray] = []
    yield images.append
    save_png(how.draw(np.concatenate(images)), out)


@contextmanager
def _png_folder(out: Path, seeds: Sequence[int]) -> Iterator[Add]:
    """One <seed>.png per image; those made before a failure stay."""
    waiting = iter(seeds)

    def add(images: np.ndarray) -> None:
        for image in images:
            save_png(grid(image[None], 1, scale=1), out / f"{next(waiting):06d}.png")

    yield add


@contextmanager
def _npz_file(out: Path, labels: np.ndarray | None, seeds: Sequence[int]) -> Iterator[Add]:
    """images [N, H, W, C] uint8, seeds [N] and, for a conditional net, labels [N]: what --data reads."""
    with whole(out) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            shape: tuple[int, ...] = ()

            def add(images: np.ndarray) -> None:
                nonlocal shape
                if not shape:
                    shape = (len(seeds), *images.shape[2:], images.shape[1])
                    np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
                member.write(np.ascontiguousarray(images.transpose(0, 2, 3, 1)).data)

            yield add
        for name, array in ({"seeds": np.array(seeds)} | ({} if labels is None else {"labels": labels})).items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


@contextmanager
def _edm_zip(out: Path, labels: np.ndarray | None, names: list[str] | None) -> Iterator[Add]:
    """EDM's dataset zip, in the order of the seeds."""
    waiting = None if labels is None else iter(labels)
    all_named = names is not None and labels is not None and int(labels.max()) < len(names)
    with dataset_zip(out, classes=names if all_named else None, overwrite=True) as archive:

        def add(images: np.ndarray) -> None:
            for image in images:
                archive.add(png(grid(image[None], 1, scale=1)), None if waiting is None else int(next(waiting)))

        yield add
