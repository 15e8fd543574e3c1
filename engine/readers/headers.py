"""The header of a safetensors file: checked for what cannot be before the file is believed, and what it says of each tensor."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from potstill.engine.common.errors import Damaged, UserError, reading, what_it_is

MOST_HEADER = 2**24  # bytes; the largest of ours, a net's of a thousand layers, has a tenth of one MiB
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names and torch's
FLOATS = tuple(DTYPES.values())
OURS = "a file written by potstill train or convert"


class Stored(NamedTuple):
    """A tensor as a file's header describes it."""

    dtype: str  # torch's name of a float, else the file's own
    shape: tuple[int, ...]


@contextmanager
def opened(path: Path, wanted: str = OURS) -> Iterator[Any]:
    """An open safetensors file, whose header is complete and without contradictions. UserError, Damaged for what is none.

    wanted: which file it should have been, for the sentence about one of another kind.
    """
    if not path.is_file():
        raise UserError(f"no weight file at {path}")
    try:
        with reading(path):
            with path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
            if MOST_HEADER < header < path.stat().st_size:
                raise SafetensorError(f"its header has {header:,} bytes, at most {MOST_HEADER:,} are read")
            with safe_open(path, "pt") as file:
                yield file
    except SafetensorError as error:
        what = what_it_is(path)
        again = "copy or download it again"
        other = f"wanted {wanted}; {what}"
        raise Damaged(
            f"{path} is not a complete safetensors file ({' '.join(str(error).split()):.200}): {again if what == 'it is a safetensors file' else other}"
        ) from error


def kinds_of(file: Any) -> dict[str, Stored]:
    """Dtypes and shapes of all tensors by name, from the header alone."""
    slices = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118 (safe_open is no dict)
    return {name: Stored(DTYPES.get(dtype := str(one.get_dtype()), dtype), tuple(one.get_shape())) for name, one in slices}
