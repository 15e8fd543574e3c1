"""Pictures that are arrays in memory: scikit-learn's digits, scenes of them with captions, noise for measuring, and what an .npz holds."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from potstill.engine.common.errors import UserError
from potstill.engine.data import scenes
from potstill.engine.data.fingerprint import fingerprint
from potstill.engine.data.labels import IGNORE, MAX_CLASSES, Labels, Reader, Say, checked, usual
from potstill.engine.data.pictures import NO_IMAGE, Header, one_line
from potstill.engine.readers.npz import check_member

SYNTHETIC = re.compile(r"synthetic:(\d+)x(\d+)(?:x(\d+))?(?:x(\d+))?")
MAX_SYNTHETIC_BYTES = 2**32
BOMB, BEST_PACKED = 2**30, 100  # an array of an .npz with more bytes than BOMB is packed to a hundredth at best


class ArraySource:
    """Pictures that are in memory already: pixels [N, C, H, W] uint8; `labels` are given afterwards."""

    labels: Labels | None = None

    def __init__(self, path: str, pixels: np.ndarray, captions: list[str] | None = None):
        self.path, self.pixels, self.captions = path, pixels, captions

    def __len__(self) -> int:
        return len(self.pixels)

    def title(self, i: int) -> str:
        return f"image {i} of {self.path}"

    def header(self, i: int) -> Header:
        _, c, h, w = self.pixels.shape
        return Header(w, h, "L" if c == 1 else "RGB")

    def array(self, i: int) -> np.ndarray:
        return self.pixels[i]

    def picture(self, i: int, *, upright: bool = False) -> Image.Image:
        chw = self.pixels[i]
        return Image.fromarray(chw[0] if len(chw) == 1 else np.ascontiguousarray(chw.transpose(1, 2, 0)))

    def fingerprint(self) -> dict[str, Any]:
        """As of a `FileSource`; names and sizes of files there are none."""
        labels = self.labels.of if self.labels else None
        found = fingerprint([str(i) for i in range(len(self))], None, labels, lambda i: self.pixels[i].tobytes())
        return found | {"first": str(self.header(0)), "label_dim": self.labels.dim if self.labels else 0}


def _digits() -> tuple[ArraySource, Reader]:
    """scikit-learn's 1,797 handwritten digits, 8x8; 0 … 16 becomes 0 … 255."""
    from sklearn.datasets import load_digits  # takes a second to import; other data do without

    values, digit = load_digits(return_X_y=True)
    pixels = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = Labels(digit.astype(np.int64), 10, [str(k) for k in range(10)])
    return ArraySource("digits", pixels), lambda say: labels


def _scenes() -> tuple[ArraySource, Reader]:
    """Pictures of one or two digits with captions, 8x16 (`engine.data.scenes`)."""
    drawn = scenes.drawn_scenes()
    return ArraySource(scenes.NAME, scenes.pictures_of(drawn), [scenes.caption_of(scene) for scene in drawn]), lambda say: None


#: Data sets by name, of what scikit-learn brings along.
EMBEDDED: dict[str, Callable[[], tuple[ArraySource, Reader]]] = {"digits": _digits, scenes.NAME: _scenes}


def synthetic(text: str) -> tuple[np.ndarray, Reader]:
    """Uniform noise [N, C, H, W]: for measuring speed and memory, not for looking at. Of 4 or more channels it stands in for latents."""
    match = SYNTHETIC.fullmatch(text)
    if not match:
        raise UserError(f"wanted synthetic:RESOLUTIONxCHANNELS[xCLASSES[xN]], such as synthetic:64x3x10, got {text}")
    resolution, channels, classes = (int(part or 0) for part in match.groups()[:3])
    n = int(match[4] or 1024)
    size = n * channels * resolution**2
    if channels in (0, 2) or not 0 < size <= MAX_SYNTHETIC_BYTES or classes > MAX_CLASSES:
        raise UserError(
            f"{text} has {size:,} bytes, wanted at most {MAX_SYNTHETIC_BYTES:,}, 1 or 3 channels (of latents 4 or more), at most {MAX_CLASSES} classes"
        )
    noise = np.random.Generator(np.random.Philox(0)).integers(0, 256, (n, channels, resolution, resolution), np.uint8)
    labels = Labels(np.arange(n) % classes, classes) if classes else None
    return noise, lambda say: labels


def npz(path: Path) -> tuple[ArraySource, Reader]:
    """`images` (or arr_0) [N, H, W], [N, H, W, C] or [N, C, H, W] uint8; `labels` (or arr_1, label, y …) [N] integers, optional."""
    keys, pixels = _arrays(path, lambda names: next((name for name in ("images", "arr_0") if name in names), None))
    if pixels is None:
        raise UserError(f"{path} holds {', '.join(keys) or 'nothing'}, wanted arrays 'images' and, if any, 'labels'")
    pixels = _channels_first(pixels, path)
    return ArraySource(str(path), pixels), lambda say: _npz_labels(path, len(pixels), say)


def _npz_labels(path: Path, n: int, say: Say) -> Labels | None:
    """The array that is called as labels usually are; of several the most usual."""
    keys, labels = _arrays(path, lambda names: next(iter(usual(names, "arr_1", "y")), None))
    if labels is None:
        if others := [key for key in keys if key not in ("images", "arr_0")]:
            say(f"{path} has no array 'labels'; passed over: {', '.join(others)}")
        return None
    name, *more = usual(keys, "arr_1", "y")
    if more:
        say(f"{path}: labels are those of array {name!r}; passed over: {', '.join(more)}")
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise UserError(f"{path} has labels {list(labels.shape)} {labels.dtype}, wanted [{n}] integers; {IGNORE}")
    return checked(labels, None, [f"image {i}" for i in range(n)], str(path))


def _arrays(path: Path, choose: Callable[[list[str]], str | None]) -> tuple[list[str], np.ndarray | None]:
    """The names of a file's arrays, and the array whose name is chosen."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            keys = list(file)
            if len(set(keys)) < len(keys):
                raise UserError(f"{path} holds an array twice ({', '.join(keys)}), wanted every array once: write it anew")
            name = choose(keys)
            if name is not None:
                _refuse_bomb(file.zip, name, path)
                check_member(file.zip, name)
            found = None if name is None else file[name]
            if not isinstance(found, np.ndarray | None):
                raise ValueError(f"{name!r} is no array")
            return keys, found
    except UserError:
        raise
    except (*NO_IMAGE, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no complete .npz of plain arrays ({one_line(error)}): write it with numpy.savez") from error


def _refuse_bomb(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    """UserError for a large array of next to nothing: no pictures can be packed so well."""
    for entry in archive.infolist():
        if entry.filename in (name, f"{name}.npy") and entry.file_size > max(BOMB, BEST_PACKED * entry.compress_size):
            raise UserError(
                f"{path} unpacks {entry.compress_size:,} bytes of {name!r} to {entry.file_size:,}, which pictures never do: "
                "write it with numpy.savez"
            )


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
        f"{path} has images {list(pixels.shape)} {pixels.dtype}, wanted [N, H, W, C] or [N, C, H, W] uint8 with 1 or 3 channels"
    )
