"""Arrays of an .npz, whose headers are looked at first: numpy makes room for what a header claims before it reads a byte of it."""

import math
import tokenize
import zipfile

import numpy as np
from numpy.lib import format as npy

HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}  # (3, 0) is for fields with odd names


def check_member(archive: zipfile.ZipFile, name: str) -> None:
    """ValueError unless the array `name` is a plain one that has as many bytes as its header says. KeyError where there is none."""
    entry = archive.getinfo(name if name in archive.namelist() else f"{name}.npy")
    with archive.open(entry) as file:
        try:
            version = npy.read_magic(file)
            if version not in HEADERS:
                raise ValueError(f"an array of numpy's format {version}")
            shape, _, dtype = HEADERS[version](file)
        except tokenize.TokenError as error:
            raise ValueError(f"a header that is no description of an array ({error.args[0]})") from error
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or file.tell() + size != entry.file_size:
            raise ValueError(f"a header that claims {size:,} bytes of {np.dtype(dtype)}, the array has {entry.file_size - file.tell():,}")
