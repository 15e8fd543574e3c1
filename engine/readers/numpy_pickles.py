"""Numpy's scalars and arrays of plain numbers in pickles: what such a pickle calls, without calling numpy's own."""

import mmap
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potstill.engine.common.errors import UserError, reading
from potstill.engine.readers.pickles import Budget, Buildable, Name, Unreadable, checked, read_pickle, shown

MOST_DIMENSIONS = 8
NUMPY_TYPE = re.compile(r"b1|[iu][1248]|f[248]")


@dataclass(eq=False)
class NumpyType(Buildable):
    """A numpy dtype of plain numbers; its byte order comes as its state."""

    code: str
    order: str = "="

    def build(self, state: Any) -> None:
        self.order = checked(checked(state, tuple, "the state of a numpy dtype")[1], str, "a byte order")
        if self.order not in ("<", ">", "=", "|"):
            raise Unreadable(f"has a numpy dtype with byte order {shown(self.order)}")

    def array(self, data: Any) -> np.ndarray:
        """[N], a copy."""
        if not isinstance(data, bytes | memoryview):  # of numpy's objects, each pickled on its own
            raise Unreadable(f"has a {type(data).__name__} as the numbers of a numpy array")
        return np.frombuffer(data, np.dtype(self.order + self.code)).copy()


@dataclass(eq=False)
class NumpyArray(Buildable):
    """A numpy array of plain numbers, None until its state has come."""

    value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        shape, dtype, fortran, data = checked(state, tuple, "the state of a numpy array")[-4:]
        sizes = [checked(size, int, "a size of a numpy array") for size in checked(shape, tuple, "a numpy shape")]
        if len(sizes) > MOST_DIMENSIONS or any(size < 0 for size in sizes):
            raise Unreadable(f"has a numpy array of sizes {sizes}")
        order = "F" if checked(fortran, bool, "numpy's Fortran order") else "C"
        self.value = checked(dtype, NumpyType, "a numpy dtype").array(data).reshape(sizes, order=order)


def _numpy_type(code: Any, *align_and_copy: Any) -> NumpyType:
    code = checked(code, str, "a numpy dtype").lstrip("<=>|")
    if not NUMPY_TYPE.fullmatch(code):
        raise Unreadable(f"has a numpy array of type {shown(code)}, wanted plain numbers")
    return NumpyType(code)


def _numpy_scalar(dtype: Any, data: Any) -> bool | int | float:
    return checked(dtype, NumpyType, "a numpy dtype").array(data).reshape(()).item()


def _numpy_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> NumpyArray:
    array = NumpyArray()
    array.build((shape, dtype, order == "F", data))
    return array


def _latin1(text: Any, encoding: Any) -> memoryview:
    """How protocol 2 writes byte strings."""
    if encoding != "latin1":
        raise Unreadable(f"wants text in the encoding {shown(encoding)}: refused")
    return memoryview(checked(text, str, "a byte string").encode("latin1"))


NUMPY_CALLS: dict[str, Callable[..., Any]] = {"numpy.dtype": _numpy_type, "_codecs.encode": _latin1}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    NUMPY_CALLS[f"{_core}.multiarray.scalar"] = _numpy_scalar
    NUMPY_CALLS[f"{_core}.multiarray._reconstruct"] = lambda *kind: NumpyArray()
    NUMPY_CALLS[f"{_core}.numeric._frombuffer"] = _numpy_buffer
NUMPY_NAMES = {title: Name(title, call) for title, call in NUMPY_CALLS.items()} | {"numpy.ndarray": Name("numpy.ndarray")}


def open_mapped(path: Path) -> memoryview:
    """The bytes of a file, read as they are looked at. Raises UserError."""
    with reading(path), path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b"")


def read_arrays(path: Path) -> Any:
    """What a pickle of dictionaries, lists, numbers and numpy arrays holds. UserError for any other; nothing is executed."""

    def named(title: str) -> Name:
        if title not in NUMPY_NAMES:
            raise Unreadable(f"asks for {title}, which no numbers need: refused, and nothing in the file was executed")
        return NUMPY_NAMES[title]

    data = open_mapped(path)
    try:
        content, end = read_pickle(data, 0, named, Budget(len(data)))
        if end != len(data):
            raise Unreadable(f"has {len(data) - end:,} bytes after the end of its pickle")
        return _plain(content)
    except Unreadable as error:
        raise UserError(f"{path} {error}; wanted a pickle of numpy arrays and numbers") from error


def _plain(value: Any) -> Any:
    """Arrays in dictionaries of dictionaries as numpy's own; anything deeper stays as it was read."""
    if type(value) is dict:
        return {name: {k: _array(v) for k, v in one.items()} if type(one) is dict else _array(one) for name, one in value.items()}
    return _array(value)


def _array(value: Any) -> Any:
    return value.value if isinstance(value, NumpyArray) else value
