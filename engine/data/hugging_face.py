"""A Hugging Face data set as a source of pictures: hf:NAME[:CONFIG][@SPLIT], read by their library `datasets`.

NAME is one on the hub, or a folder here: of parquet files, of pictures, or written by `save_to_disk`. The first column of
images is taken, and for labels the first of class labels, else one that is called label (or cls, target …).
"""

# datasets is optional.
# pyright: reportMissingImports=false

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from potstill.engine.common.errors import UserError, reading
from potstill.engine.data.labels import Labels, Reader, Say, from_values, usual
from potstill.engine.data.pictures import NO_IMAGE, one_line

PREFIX = "hf:"


def encoded(text: str) -> tuple["Encoded", Reader]:
    """The files of the images that `text` names, and how to read their labels. UserError where that cannot be read."""
    if find_spec("datasets") is None:
        raise UserError(f"{text} wants the package datasets: pip install 'potstill[datasets]'")
    import datasets

    rows = _rows(text).with_format(None)  # plain Python values, whatever format the set was stored with
    columns = rows.features
    images = [name for name, kind in columns.items() if isinstance(kind, datasets.Image)]
    if not images or not len(rows):
        raise UserError(f"{text} has no images: its columns are {', '.join(columns) or 'none'}, {len(rows):,} rows")
    column = rows.select_columns([images[0]]).cast_column(images[0], datasets.Image(decode=False))
    others = {name: kind for name, kind in columns.items() if name not in images}
    return Encoded(text, column, images[0]), lambda say: _labels(rows, others, text, say)


def _labels(rows: Any, columns: dict[str, Any], text: str, say: Say) -> Labels | None:
    """The column of class labels: by its type, else by its name, whole numbers first."""
    import datasets

    typed = [name for name, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    whole = [name for name in columns if "int" in str(getattr(columns[name], "dtype", ""))]
    named = sorted(usual(columns, "y"), key=lambda name: name not in whole)
    if not typed and not named:
        if columns:
            say(f"{text} has no column of class labels; passed over: {', '.join(columns)}")
        return None
    name, *more = typed or named
    if more:
        say(f"{text}: labels are those of column {name!r}; passed over: {', '.join(more)}")
    classes = list(columns[name].names) if typed else None
    with _whole(f"column {name!r} of {text}"):
        values = list(rows[name][:])
    return from_values(values, classes, [f"image {i}" for i in range(len(values))], f"column {name!r} of {text}")


def _rows(text: str) -> Any:
    """One split of the data set."""
    import datasets.exceptions

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


@contextmanager
def _whole(title: str) -> Iterator[None]:
    """UserError for whatever the library stumbles over in a damaged table."""
    try:
        yield
    except (RuntimeError, *NO_IMAGE) as error:
        raise UserError(
            f"{title} cannot be read ({one_line(error)[:200]}): remove the library's copy of the data set, and get it again"
        ) from error


class Encoded:
    """One column, read as a `Folder` of engine.data.files is: PNG or JPEG files as they were stored."""

    def __init__(self, text: str, column: Any, name: str):
        self.path, self.column, self.name = Path(text), column, name
        self.names = [f"image {i}" for i in range(len(column))]

    def head(self, i: int, size: int) -> bytes:
        return self.read(i)[:size]

    def read(self, i: int) -> bytes:
        with _whole(self.title(i)):
            cell = self.column[i][self.name]
        if cell is None or (cell.get("bytes") is None and not cell.get("path")):
            raise UserError(f"{self.title(i)} is empty")
        with reading(cell.get("path")):
            return cell["bytes"] if cell.get("bytes") is not None else Path(cell["path"]).read_bytes()

    def sizes(self) -> None:
        """Not known without reading all."""

    def title(self, i: int) -> str:
        return f"image {i} of {self.path}"
