"""Everything a run needs to go on as if it had never stopped, in one file that is written whole or not at all."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from engine.errors import UserError


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write folder/{step:08d}.pt atomically and drop all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step:08d}.pt"
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save({"step": step} | state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted(folder.glob("[0-9]*.pt"))


def load_newest(folder: Path, device: torch.device | str) -> dict[str, Any] | None:
    """The newest checkpoint's state, or None if there is none. Tensors only: nothing in the file is executed."""
    found = checkpoints(folder)
    if not found:
        return None
    try:
        return torch.load(found[-1], map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        others = f", or it alone to go on from {found[-2].name}" if len(found) > 1 else ""
        raise UserError(
            f"checkpoint {found[-1]} cannot be read ({str(error).splitlines()[0]}): remove {folder} to start over{others}"
        ) from error


def restore(target: Any, state: dict[str, Any], what: str) -> None:
    """target.load_state_dict(state), told as a UserError when they do not fit."""
    try:
        target.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        first = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise UserError(
            f"the checkpoint's {what} does not fit this configuration ({first}): use another run_dir= or the old settings"
        ) from error
