"""Errors that a user can fix: the commands print them as one sentence and exit with code 2."""

import errno
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path


class UserError(ValueError):
    """Says what was wanted, what came, and what to do."""


class Damaged(UserError):
    """A file is not what it was written as: cut off, a checksum differs, its parts contradict each other. What a run has made it makes again."""


#: What to do about what a system says.
ADVICE = {
    errno.ENOSPC: "make room, or choose another place",
    errno.EDQUOT: "make room within your quota, or choose another place",
    errno.EFBIG: "the system or `ulimit -f` wants smaller files here: choose another place",
    errno.EROFS: "choose another place",
    errno.EACCES: "choose another place, or get permission",
    errno.EPERM: "choose another place, or get permission",
    errno.EIO: "the disk or the network file system fails: choose another place",
    errno.EMFILE: "raise `ulimit -n`",
}


def told(error: OSError) -> str:
    """What the system says, and what to do about it where that is known."""
    advice = ADVICE.get(error.errno or 0)
    return f"{error.strerror or error}" + (f"; {advice}" if advice else "")


def harmless(text: str) -> str:
    r"""The text with \x1b for an escape and the like: what a sentence quotes of a file shall not command the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def _doing(verb: str, path: object) -> Iterator[None]:
    """UserError for what the system has against it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {verb} {path}: {told(error)}") from error


reading, writing = partial(_doing, "read"), partial(_doing, "write")  # with reading(path): … turns an OSError into a UserError


def what_it_is(path: Path) -> str:
    """What a file is, by its first bytes, and what to do about it: the end of a sentence that says which file was wanted."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if not start.strip(b"\0"):
        return "it is empty or all zeros, as a broken download leaves it: copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, which only names the file: `git lfs pull` gets the file itself"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page, such as an error message or a login: remove it and download the file itself"
    return f"it is {_zipped(path) if start.startswith(ZIP) else _kind(start)}"


ZIP = b"PK\x03\x04"
TORCH_MAGIC = b"\x80\x02\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # of torch.save's older format


def _kind(start: bytes) -> str:
    if start.startswith(TORCH_MAGIC):
        return "a file of torch.save"
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a pickle"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return "a safetensors file"
    names = {b"\x93NUMPY": "a numpy array", b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"\x1f\x8b": "a gzip archive"}
    return next((name for magic, name in names.items() if start.startswith(magic)), f"of no known kind and starts with {start[:16]!r}")


def _zipped(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, IndexError):  # the last two: how it is packed, and an odd name
        return "a zip archive that is damaged or cut off: copy or download it again"
    ends = {name.rpartition("/")[2] for name in names}
    if "data.pkl" in ends:
        return "a TorchScript file" if "constants.pkl" in ends else "a file of torch.save"
    if any(name.endswith(".npy") for name in ends):
        return f"an .npz of {', '.join(sorted(name.removesuffix('.npy') for name in ends))[:60]!r}"
    pictures = sum(name.lower().endswith((".png", ".jpg", ".jpeg", ".webp")) for name in ends)
    return "a zip of pictures" if pictures else "a zip archive"
