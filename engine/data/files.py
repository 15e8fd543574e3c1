"""Image files in a folder or in a zip, or where it has none, arrays (EDM2's latents): their names in sorted order, and their bytes.

Nothing is ever unpacked to disk. Both classes can be read by threads, forked and pickled: a zip is read through `OpenFile`,
which shares no file position, and its directory is kept as a few numbers a file, so a worker process parses nothing.
"""

import os
import re
import stat
import struct
import threading
import weakref
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from potstill.engine.common.errors import UserError, reading, what_it_is

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
ARRAYS = ".npy"
METADATA = "dataset.json"
TABLE = re.compile(
    r"(.*/)?([^/]+\.cls|(labels?|class(es)?|targets?|annotations?|metadata|dataset)\.(jsonl?|[ct]sv|txt|parquet|np[yz]|mat|pkl))", re.I
)
MAX_FILE_BYTES = 2**29  # one file, unpacked; a "zip bomb" is far above it
MAX_METADATA = 2**26, 256  # bytes of dataset.json, and for every image more


NO_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, LookupError)  # the last two: odd names
NO_ZIP += (NotImplementedError, RuntimeError, OverflowError, MemoryError)  # how it is packed, and what it says of itself


class Beside(NamedTuple):
    """What lies beside the images and may hold labels."""

    metadata: bytes | None  # the text of dataset.json
    buried: str | None  # a dataset.json that is not at the top
    table: str | None  # another file that may hold labels, and is not read


def open_files(path: Path) -> "Folder | Zip":
    """The images of a folder or zip, or its arrays; UserError where there are none."""
    files = Folder(path) if path.is_dir() else Zip(path)
    if not files.names:
        raise UserError(f"no images in {path}: wanted files that end in {', '.join(SUFFIXES)}, or latents in {ARRAYS}")
    return files


def is_image(name: str) -> bool:
    """By its suffix; hidden files do not count."""
    return not is_hidden(name) and name.lower().endswith(SUFFIXES)


def chosen(names: Iterable[str]) -> list[str]:
    """The images among these names, or where there are none, the arrays; sorted as strings."""
    shown = sorted(name for name in names if not is_hidden(name))
    return [name for name in shown if is_image(name)] or [name for name in shown if name.lower().endswith(ARRAYS)]


def is_hidden(name: str) -> bool:
    """Also what macOS puts beside files."""
    return any(part == "__MACOSX" or (part.startswith(".") and part.strip(".")) for part in name.split("/"))


class Folder:
    """`names`: of the images only, or else of the arrays, relative, with forward slashes, sorted as strings."""

    def __init__(self, path: Path):
        self.path = path
        found = list(_walk(path))
        self.names = chosen(found)
        metadata = None
        if METADATA in found:
            with reading(path / METADATA):
                _check_metadata(os.stat(path / METADATA).st_size, self.names, path)
            metadata = _start(path / METADATA, MAX_FILE_BYTES)
        self.beside = Beside(metadata, *_overlooked(found))

    def head(self, i: int, size: int) -> bytes:
        """The first `size` bytes of file i, or fewer where it is shorter."""
        return _start(self.path / self.names[i], size)

    def read(self, i: int) -> bytes:
        return _start(self.path / self.names[i], MAX_FILE_BYTES)

    def sizes(self) -> np.ndarray:
        """int64 [N, k], what changes when a file does and is known without reading it: here its length, in bytes."""
        with reading(self.path):
            return np.array([os.stat(self.path / name).st_size for name in self.names], np.int64)[:, None]

    def title(self, i: int) -> str:
        """What a user would call file i."""
        return str(self.path / self.names[i])


class Zip:
    """As a folder."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with reading(path), zipfile.ZipFile(path) as archive:
                found = [entry for entry in archive.infolist() if not entry.is_dir()]
                entries = {entry.filename: entry for entry in found}
                if len(entries) < len(found):
                    name = Counter(entry.filename for entry in found).most_common(1)[0][0]
                    raise UserError(f"{path} holds {name} twice, wanted every file once: write the zip anew, without the other")
                if METADATA in entries:
                    _check_metadata(entries[METADATA].file_size, entries, path)
                self.beside = Beside(archive.read(METADATA) if METADATA in entries else None, *_overlooked(entries))
        except UserError:
            raise
        except NO_ZIP as error:
            raise UserError(
                f"{path} is not a complete zip ({error}): wanted the whole zip, or a folder of images; {what_it_is(path)}"
            ) from error
        self.names = chosen(entries)
        images = [entries[name] for name in self.names]
        self._entries = np.array(
            [(e.header_offset, e.compress_size, e.file_size, e.CRC, e.compress_type, e.flag_bits) for e in images],
            np.int64,
        ).reshape(-1, 6)
        self._bytes = OpenFile(path)

    def head(self, i: int, size: int) -> bytes:
        _, packed, _, _, method, _ = self._entries[i].tolist()
        if method == zipfile.ZIP_STORED:
            return self._packed(i, min(size, packed))
        # Deflate's tables stand before the data: a kilobyte is room enough for them.
        return self._inflated(i, self._packed(i, min(size + 1024, packed)), size)

    def read(self, i: int) -> bytes:
        _, packed, size, crc, method, _ = self._entries[i].tolist()
        if size > MAX_FILE_BYTES:
            raise UserError(f"{self.title(i)} unpacks to {size:,} bytes, wanted at most {MAX_FILE_BYTES:,}")
        data = self._packed(i, packed)
        if method != zipfile.ZIP_STORED:
            data = self._inflated(i, data, size + 1)
        if len(data) != size or zlib.crc32(data) != crc:
            raise UserError(f"{self.title(i)} is damaged (its checksum differs): copy or download the zip again")
        return data

    def sizes(self) -> np.ndarray:
        """Lengths unpacked, and checksums."""
        return self._entries[:, 2:4]

    def title(self, i: int) -> str:
        return f"{self.path}: {self.names[i]}"

    def _packed(self, i: int, size: int) -> bytes:
        """The first `size` bytes of file i as they lie in the zip."""
        offset, _, _, _, method, flags = self._entries[i].tolist()
        if flags & 1 or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{self.title(i)} is encrypted or oddly packed, wanted a stored or deflated file")
        local = self._bytes.read(30, offset) if offset >= 0 else b""
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise UserError(f"{self.title(i)} is not where the zip's directory says: copy or download the zip again")
        name, extra = struct.unpack("<HH", local[26:])
        return self._bytes.read(size, offset + 30 + name + extra)

    def _inflated(self, i: int, data: bytes, limit: int) -> bytes:
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, limit)
        except zlib.error as error:
            raise UserError(f"{self.title(i)} is damaged ({error}): copy or download the zip again") from error


class OpenFile:
    """The bytes of a file; a process that it is pickled to opens the file again."""

    def __init__(self, path: Path):
        self.path, self.fd = path, os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # Windows would make line ends of some
        self.length = os.fstat(self.fd).st_size
        weakref.finalize(self, os.close, self.fd)

    def __reduce__(self):
        return OpenFile, (self.path,)

    def read(self, size: int, offset: int) -> bytes:
        """At most `size` bytes from `offset` on, whoever else is reading. No more memory is taken than the file has bytes there."""
        return read_at(self.fd, max(0, min(size, self.length - offset)), offset)


_reading = threading.Lock()


def _seek_and_read(fd: int, size: int, offset: int) -> bytes:
    """`os.pread` for Windows, which never forks: a position is shared by threads alone."""
    with _reading:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, size)


read_at = getattr(os, "pread", _seek_and_read)


def _start(path: Path, size: int) -> bytes:
    """The first `size` bytes of a file; UserError for what is none, such as a pipe, from which nothing may ever come."""
    with reading(path), open(path, "rb", buffering=0, opener=_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{path} is no file but a pipe or a device: remove it")
        return file.read(size)


def _at_once(path: str, flags: int) -> int:
    """Opened without waiting for whoever might write into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_metadata(size: int, names: Iterable[str], path: Path) -> None:
    """UserError for a dataset.json that is far longer than what it could say of these images."""
    least, each = MAX_METADATA
    most = min(least + each * len(chosen(names)), MAX_FILE_BYTES)
    if size > most:
        raise UserError(
            f"{METADATA} in {path} has {size:,} bytes, wanted at most {most:,} for so many images: leave it out, or write it anew"
        )


def _walk(root: Path) -> Iterator[str]:
    """Relative names of all files below root. Linked folders are followed, each once: class folders often are links."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse_unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        yield from (name if inside == "." else f"{inside}/{name}" for name in files)


def _refuse_unreadable(error: OSError) -> None:
    """Left to itself, os.walk passes over a folder that it may not read, and the set would be smaller than it seems."""
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _overlooked(names: Iterable[str]) -> tuple[str | None, str | None]:
    """The first dataset.json that is not at the top, and the first other file that may hold labels."""
    buried = next((name for name in names if name.endswith("/" + METADATA)), None)
    return buried, next((name for name in names if TABLE.fullmatch(name) and not name.endswith(METADATA)), None)
