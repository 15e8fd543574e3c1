"""Files that are written: whole or not at all, for whom the umask says, and only where a user may write."""

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from potstill.engine.common.errors import UserError, writing


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which replaces it when the block ends and the disk has all of it. Missing folders are made.

    If the block fails, `path` stays as it was. UserError where the system refuses (a full disk, no permission).
    """
    part = path.with_name(path.name + ".part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)  # what a killed process has left, with permissions of its own
            yield part
            flush(part)
            os.replace(part, path)
            flush(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the block has failed already, and said why
            part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the disk has the file, or the names in the folder: a machine that loses power does not lose it."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and writes their names at once
    fd = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(fd)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # file systems that do not know it of folders
            raise
    finally:
        os.close(fd)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the permissions that any new file has here; safetensors' own lets nobody but its owner read it."""
    path.unlink(missing_ok=True)
    path.touch()
    permissions = path.stat().st_mode & 0o777
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{error}") from error
    path.chmod(permissions)


def check_writable(out: Path, *, folder: bool = False) -> None:
    """UserError unless a file (or a folder with files) `out` can come into being; asked before hours of work and not after."""
    if not folder and out.is_dir():
        raise UserError(f"{out} is a folder: wanted the name of a file")
    nearest = out if folder else out.parent
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write {out}: no permission to write in {nearest}")


def check_free(out: Path, overwrite: bool) -> None:
    """UserError where there is a file `out` that nobody wants to lose (--force does not mind it), or a folder."""
    if out.is_dir() or (out.exists() and not overwrite):
        raise UserError(f"{out} exists: choose another name" + ("" if out.is_dir() else " or add --force"))
