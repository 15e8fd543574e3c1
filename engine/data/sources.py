"""Pictures of any size with labels, wherever they come from: files in a folder or zip, arrays held in memory, or latents of pictures."""

import io
import os
from pathlib import Path
from typing import Any

from PIL import Image

from potstill.engine.common.errors import UserError
from potstill.engine.data import arrays, hugging_face
from potstill.engine.data.files import ARRAYS, METADATA, Folder, Zip, open_files
from potstill.engine.data.fingerprint import fingerprint
from potstill.engine.data.labels import IGNORE, Labels, Reader, Say, from_folders, from_json, has_class_folders
from potstill.engine.data.latents import ArrayLatents, LatentSource, NoiseLatents, is_latents, read_latents
from potstill.engine.data.pictures import (
    FORMATS,
    NO_IMAGE,
    Header,
    decode,
    has_several,
    opened,
    png_header,
    png_is_animated,
    refuse_animation,
    refuse_bomb,
)
from potstill.engine.data.progress import note
from potstill.engine.data.tars import Tars, read_tars, shards_of

HEAD = 1024  # bytes of a PNG: what stands before its pixels, as a rule


class FileSource:
    """Pictures that are files; `labels` are given afterwards."""

    labels: Labels | None = None

    def __init__(self, files: Folder | Zip | Tars | hugging_face.Encoded):
        self.files, self.path = files, str(files.path)  # as the user gave it

    def __len__(self) -> int:
        return len(self.files.names)

    def title(self, i: int) -> str:
        return self.files.title(i)

    def header(self, i: int) -> Header:
        """Without decoding the picture."""
        head = self.files.head(i, HEAD)
        if (animated := png_is_animated(head)) is None:
            animated = png_is_animated(self.files.read(i))
        refuse_animation(bool(animated), self.title(i))
        header = png_header(head) or self._pillow_header(i)
        refuse_bomb(header, self.title(i))
        return header

    def _pillow_header(self, i: int) -> Header:
        try:
            picture = Image.open(io.BytesIO(self.files.head(i, 2**16)), formats=FORMATS)
        except NO_IMAGE:  # perhaps because the header is longer than that
            picture = opened(self.files.read(i), self.title(i))
        refuse_animation(has_several(picture), self.title(i))
        return Header(*picture.size, picture.mode)

    def picture(self, i: int, *, upright: bool = False) -> Image.Image:
        """Decoded; `upright` follows a camera's rotation mark. UserError, naming the file, where it is damaged."""
        return decode(self.files.read(i), self.title(i), upright=upright)

    def fingerprint(self) -> dict[str, Any]:
        """What tells these pictures from others at the same path, for JSON; the path itself does not count. UserError for a damaged one."""
        labels = self.labels.of if self.labels else None
        found = fingerprint(self.files.names, self.files.sizes(), labels, self.files.read)
        return found | {"first": str(self.header(0)), "label_dim": self.labels.dim if self.labels else 0}


Source = FileSource | arrays.ArraySource | LatentSource


def open_source(path: str | Path, *, labelled: bool = True) -> Source:
    """Pictures of "digits", "scenes", "synthetic:RxC[xCLASSES[xN]]", an .npz, a folder, a zip, webdataset's tars, "hf:NAME"; or latents.

    labelled=False ignores labels, readable or not, and says so where there are none. UserError if there are no pictures, or
    labels that are no classes.
    """
    source, read_labels = _open(str(path))
    if labelled:
        source.labels = read_labels(note)
    elif not _has_labels(read_labels):
        note(f"{source.path} has no labels that could be ignored: unlabelled changes nothing")
    return source


def _open(text: str) -> tuple[Source, Reader]:
    """Pictures, and how to read their labels."""
    if text in arrays.EMBEDDED:
        return arrays.EMBEDDED[text]()
    if text.startswith("synthetic:"):
        noise, labels = arrays.synthetic(text)
        return arrays.ArraySource(text, noise) if noise.shape[1] in (1, 3) else NoiseLatents(text, noise), labels
    if text.startswith(hugging_face.PREFIX):
        column, labels = hugging_face.encoded(text)
        return FileSource(column), labels
    if text.endswith(".tar") and shards_of(text):
        tars, labels = read_tars(text)
        return FileSource(tars), labels
    place = Path(text).expanduser()
    if not os.path.exists(place):  # Path.exists raises where a folder above is closed to us
        raise UserError(
            f"no images at {text}, wanted an EDM dataset zip, a folder of images, an .npz file, .tar shards, hf:NAME, 'digits', "
            "'scenes' or synthetic:RESOLUTIONxCHANNELS"
        )
    if place.suffix.lower() == ".npz":
        return arrays.npz(place)
    if is_latents(place):
        return read_latents(place)
    files = open_files(place)
    return (ArrayLatents if files.names[0].lower().endswith(ARRAYS) else FileSource)(files), lambda say: file_labels(files, say)


def _has_labels(read_labels: Reader) -> bool:
    """Are there labels, even if they cannot be read?"""
    try:
        return read_labels(lambda text: None) is not None
    except UserError:
        return True


def is_there(path: str) -> bool:
    """Does a source of this name exist? It is not opened."""
    if path in arrays.EMBEDDED or path.startswith(("synthetic:", hugging_face.PREFIX)):
        return True
    return bool(shards_of(path)) if path.endswith(".tar") else os.path.exists(Path(path).expanduser())


def file_labels(files: Folder | Zip, say: Say) -> Labels | None:
    """From dataset.json; without one a folder's sub-folders are classes, and a zip has no labels, as in EDM."""
    path, names, beside = str(files.path), files.names, files.beside
    if beside.metadata is not None:
        return from_json(beside.metadata, names, f"{METADATA} in {path}", say)
    if beside.buried:
        raise UserError(f"{path} has {beside.buried}, wanted {METADATA} at the top: give the folder or zip that starts there; {IGNORE}")
    labels = from_folders(names, path, say) if isinstance(files, Folder) else None
    if isinstance(files, Zip) and has_class_folders(names):
        say(f"{path} has folders ({names[0]}) and no {METADATA}: no labels; unpacked, its folders are classes")
    if labels is None and beside.table:
        say(f"{path} has {beside.table}, which is not read: labels come from {METADATA} or sub-folders")
    return labels
