"""A Hugging Face data set as a source of pictures: hf:NAME[:CONFIG][@SPLIT], read by their library `datasets`.

NAME is one on the hub, or a folder here: of parquet files, of pictures, or written by `save_to_disk`. The first column of
images is taken, and for labels the first of class labels.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.labels import Labels, checked
from engine.errors import UserError

PREFIX = "hf:"


def encoded(text: str, labelled: bool = True) -> tuple["Encoded", Labels | None]:
    """The files of the images that `text` names, and their labels if it has any. UserError where that cannot be read."""
    if find_spec("datasets") is None:
        raise UserError(f"{text} wants the package datasets: pip install 'potstill[datasets]'")
    import datasets

    rows = _rows(text)
    columns = rows.features
    images = [name for name, kind in columns.items() if isinstance(kind, datasets.Image)]
    if not images or not len(rows):
        raise UserError(f"{text} has no images: its columns are {', '.join(columns) or 'none'}, {len(rows):,} rows")
    named = [name for name, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    labels = None
    if labelled and named:
        of, classes = np.array(rows[named[0]][:], np.int64), list(columns[named[0]].names)
        labels = checked(of, classes, [f"image {i}" for i in range(len(of))], text)
    column = rows.select_columns([images[0]]).cast_column(images[0], datasets.Image(decode=False))
    return Encoded(text, column, images[0]), labels


def _rows(text: str) -> Any:
    """One split of the data set."""
    import datasets

    name, _, split = text.removeprefix(PREFIX).partition("@")
    name, _, config = name.partition(":")
    try:
        if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
            return found[split or "train"] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{text} cannot be read ({reason}): wanted {PREFIX}NAME[:CONFIG][@SPLIT]") from error


class Encoded:
    """`engine.data.files.Files` over one column: PNG or JPEG files as they were stored."""

    metadata = None

    def __init__(self, text: str, column: Any, name: str):
        self.path, self.column, self.name = Path(text), column, name
        self.names = [f"image {i}" for i in range(len(column))]

    def head(self, i: int, size: int) -> bytes:
        return self.read(i)[:size]

    def read(self, i: int) -> bytes:
        cell = self.column[i][self.name]
        if cell is None or (cell.get("bytes") is None and not cell.get("path")):
            raise UserError(f"{self.title(i)} is empty")
        try:
            return cell["bytes"] if cell.get("bytes") is not None else Path(cell["path"]).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {cell['path']}: {error.strerror}") from error

    def title(self, i: int) -> str:
        return f"image {i} of {self.path}"
