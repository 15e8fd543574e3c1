"""Where images go as they are made: a grid, a folder of PNGs, an .npz or EDM's dataset zip, never all held in memory.

Only a grid keeps them, as the picture that it is. Every file is written beside its place and moved there when it is whole.
"""

import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from potstill.engine.common.errors import UserError
from potstill.engine.common.places import check_writable
from potstill.engine.formats.images import DatasetZip, png
from potstill.engine.formats.pictures import default_columns, grid, save_png

MOST_COLUMNS = 40  # with more classes than this a grid is square
KINDS = (".png", ".npz", ".zip")


class Output(Protocol):
    def add(self, images: np.ndarray) -> None:
        """The next images, uint8 [n, C, H, W]."""
        ...

    def close(self, *, finished: bool) -> None:
        """Put the file in its place, or leave nothing behind."""
        ...


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
def open_output(out: Path, kind: str, labels: np.ndarray | None, seeds: Sequence[int], columns: int | None = None) -> Iterator[Output]:
    """For len(seeds) images; what is there is replaced. UserError where the place cannot be written after all."""
    output = None
    try:
        (out if kind == "folder" else out.parent).mkdir(parents=True, exist_ok=True)
        output = _opened(out, kind, labels, seeds, columns)
        yield output
        output.close(finished=True)
        output = None
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        if output:
            output.close(finished=False)


def _opened(out: Path, kind: str, labels: np.ndarray | None, seeds: Sequence[int], columns: int | None) -> Output:
    if kind == "png":
        return GridFile(out, columns or columns_for(labels, len(seeds)))
    if kind == "npz":
        return NpzFile(out, labels, seeds)
    return ZipFile(out, labels) if kind == "zip" else PngFolder(out, seeds)


class GridFile:
    def __init__(self, out: Path, columns: int):
        self.out, self.columns, self.images = out, columns, []

    def add(self, images: np.ndarray) -> None:
        self.images.append(images)

    def close(self, *, finished: bool) -> None:
        if finished:
            save_png(grid(np.concatenate(self.images), self.columns), self.out)


class PngFolder:
    """One <seed>.png per image; those made before a failure stay."""

    def __init__(self, out: Path, seeds: Sequence[int]):
        self.out, self.seeds, self.done = out, seeds, 0

    def add(self, images: np.ndarray) -> None:
        for image in images:
            save_png(grid(image[None], 1, scale=1), self.out / f"{self.seeds[self.done]:06d}.png")
            self.done += 1

    def close(self, *, finished: bool) -> None:
        pass


class NpzFile:
    """images [N, H, W, C] uint8, seeds [N] and, for a conditional net, labels [N]: what --data reads."""

    def __init__(self, out: Path, labels: np.ndarray | None, seeds: Sequence[int]):
        self.out, self.labels, self.seeds = out, labels, np.array(seeds)
        self.part = out.with_name(out.name + ".part")
        self.zip = zipfile.ZipFile(self.part, "w", zipfile.ZIP_DEFLATED)
        self.member = None

    def add(self, images: np.ndarray) -> None:
        if self.member is None:
            _, c, h, w = images.shape
            self.member = self.zip.open("images.npy", "w", force_zip64=True)
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.seeds), h, w, c)}
            np.lib.format.write_array_header_1_0(self.member, header)
        self.member.write(np.ascontiguousarray(images.transpose(0, 2, 3, 1)).data)

    def close(self, *, finished: bool) -> None:
        if self.member is not None:
            self.member.close()
        if finished:
            arrays = {"seeds": self.seeds} | ({} if self.labels is None else {"labels": self.labels})
            for name, array in arrays.items():
                with self.zip.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        self.zip.close()
        if finished:
            os.replace(self.part, self.out)
        self.part.unlink(missing_ok=True)


class ZipFile:
    """EDM's dataset zip, in the order of the seeds."""

    def __init__(self, out: Path, labels: np.ndarray | None):
        self.labels, self.done = labels, 0
        self.zip = DatasetZip(out, overwrite=True).__enter__()

    def add(self, images: np.ndarray) -> None:
        for image in images:
            picture = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
            self.zip.add(png(picture), None if self.labels is None else int(self.labels[self.done]))
            self.done += 1

    def close(self, *, finished: bool) -> None:
        if finished:
            self.zip.__exit__(None, None, None)
        else:
            self.zip.__exit__(UserError, None, None)


def columns_for(labels: np.ndarray | None, n: int) -> int:
    """One column per class where the classes come in turn, else about square."""
    if labels is not None:
        period = len(np.unique(labels))
        if 1 < period <= MOST_COLUMNS and np.array_equal(labels, np.resize(labels[:period], n)):
            return period
    return default_columns(n)
