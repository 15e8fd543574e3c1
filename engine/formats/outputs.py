"""Files that take images as they are made: a grid, a folder of PNGs, an .npz or EDM's dataset zip.

Only a grid holds all images in memory. Every file is written beside its place and moved there when it is whole.
"""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from potstill.engine.common.errors import UserError, writing
from potstill.engine.common.writing import check_writable, whole
from potstill.engine.formats.images import dataset_zip, png
from potstill.engine.formats.pictures import default_columns, grid, save_png

MOST_COLUMNS = 40  # with more classes than this a grid is square
KINDS = (".png", ".npz", ".zip")

Add = Callable[[np.ndarray], None]  # takes the next images, uint8 [n, C, H, W]


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
def open_output(out: Path, kind: str, labels: np.ndarray | None, seeds: Sequence[int], columns: int | None = None) -> Iterator[Add]:
    """What takes the next images, for len(seeds) of them; what is there is replaced. UserError where it cannot be written after all."""
    with writing(out):
        (out if kind == "folder" else out.parent).mkdir(parents=True, exist_ok=True)
        if kind == "png":
            opened = _grid_file(out, columns or columns_for(labels, len(seeds)))
        elif kind == "npz":
            opened = _npz_file(out, labels, seeds)
        else:
            opened = _edm_zip(out, labels) if kind == "zip" else _png_folder(out, seeds)
        with opened as add:
            yield add


@contextmanager
def _grid_file(out: Path, columns: int) -> Iterator[Add]:
    images: list[np.ndarray] = []
    yield images.append
    save_png(grid(np.concatenate(images), columns), out)


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
def _edm_zip(out: Path, labels: np.ndarray | None) -> Iterator[Add]:
    """EDM's dataset zip, in the order of the seeds."""
    waiting = None if labels is None else iter(labels)
    with dataset_zip(out, overwrite=True) as archive:

        def add(images: np.ndarray) -> None:
            for image in images:
                archive.add(png(grid(image[None], 1, scale=1)), None if waiting is None else int(next(waiting)))

        yield add


def columns_for(labels: np.ndarray | None, n: int) -> int:
    """One column per class where the classes come in turn, else about square."""
    if labels is not None:
        period = len(np.unique(labels))
        if 1 < period <= MOST_COLUMNS and np.array_equal(labels, np.resize(labels[:period], n)):
            return period
    return default_columns(n)
