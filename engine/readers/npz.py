"""Arrays of an .npz or .npy, whose headers are looked at first: numpy makes room for what a header claims before it reads a byte of it."""

import io
import math
import tokenize
import zipfile
from typing import Any

import numpy as np
from numpy.lib import format as npy

HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}  # (3, 0) is for fields with odd names


def check_member(archive: zipfile.ZipFile, name: str) -> None:
    """ValueError unless the array `name` is a plain one that has as many bytes as its header says. KeyError where there is none."""
    entry = archive.getinfo(name if name in archive.namelist() else f"{name}.npy")
    with archive.open(entry) as file:
        _check_header(file, entry.file_size)


def array_in(data: bytes) -> np.ndarray:
    """The array in the bytes of an .npy, a copy. ValueError unless it is a plain one that has as many bytes as its header says."""
    file = io.BytesIO(data)
    shape, fortran, dtype = _check_header(file, len(data))
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C").copy()


def _check_header(file: Any, size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of the array in a file of so many bytes, which is read up to its numbers."""
    try:
        version = npy.read_magic(file)
        if version not in HEADERS:
            raise ValueError(f"an array of numpy's format {version}")
        shape, fortran, dtype = HEADERS[version](file)
    except tokenize.TokenError as error:
        raise ValueError(f"a header that is no description of an array ({error.args[0]})") from error
    claimed = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or file.tell() + claimed != size:
        raise ValueError(f"a header that claims {claimed:,} bytes of {np.dtype(dtype)}, the array has {size - file.tell():,}")
    return shape, fortran, dtype
