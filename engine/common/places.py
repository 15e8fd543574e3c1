"""Whether something can be written where the user wants it, asked before hours of work and not after."""

import os
from pathlib import Path

from potstill.engine.common.errors import UserError


def check_writable(out: Path, *, folder: bool = False) -> None:
    """UserError unless a file (or a folder with files) `out` can come into being."""
    if not folder and out.is_dir():
        raise UserError(f"{out} is a folder: wanted the name of a file")
    nearest = out if folder else out.parent
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write {out}: no permission to write in {nearest}")
