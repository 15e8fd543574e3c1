"""Everything that a stage needs to go on as if it had never stopped, written whole or not at all.

One rank, and several with replicated nets, write one file, {step}.pt. Sharded nets are written by all ranks at once into a
folder, {step}.dcp (`engine.training.sharded`). Either can be read by any number of ranks, sharded or not. Nothing in them is executed,
and all that counts has a checksum: where the newest one is damaged the run says so, and goes on from the one before.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.engine.common.errors import Damaged, UserError, writing
from potstill.engine.common.writing import whole
from potstill.engine.training.ranks import ALONE, Ranks
from potstill.engine.training.sharded import load_sharded
from potstill.engine.training.states import Key, map_tensors, not_finite, read_state, write_state

Like = Callable[[Key, torch.Size], Tensor | None]  # the DTensor that a tensor shall be cut like; None: it stays whole

PARTS = {"step": int, "nets": dict, "optimizers": dict, "ema": dict, "method": dict, "meter": dict, "seconds": float, "best": float}
ASIDE = ".damaged"  # at the end of the name of a checkpoint that is not read again


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write folder/{step:08d}.pt atomically and drop all but the newest `keep`. UserError where the disk is full or the like."""
    path = folder / f"{step:08d}.pt"
    with whole(path) as part:
        write_state(part, {"step": step} | state)
    drop(folder, keep)
    return path


def drop(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in checkpoints(folder)[:-keep]:
        if old.is_dir():
            gone = old.with_suffix(".parts")
            os.replace(old, gone)  # so that it is never half a checkpoint
            shutil.rmtree(gone)
        else:
            old.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted([*folder.glob("[0-9]*.pt"), *folder.glob("[0-9]*.dcp")])


def load_newest(
    folder: Path, device: torch.device | str, like: Like | None = None, *, ranks: Ranks = ALONE, say: Callable[[str], None] | None = None
) -> dict[str, Any] | None:
    """The state of the newest checkpoint that is whole and finite, or None where there is none at all. All ranks must ask for it.

    like: what of it is wanted as this rank's shard (a DTensor). say: takes a line for each damaged one before it, which is then put
    aside; None: the folder is somebody else's, and a damaged newest one is an error. UserError where none is whole.
    """
    damaged: dict[Path, str] = {}
    for path in ranks.agree(checkpoints(folder)[::-1]):
        state, problem = None, ""
        try:
            state = load(path, device, like)
            problem = f"{path} holds numbers that are not finite ({name})" if (name := not_finite(state)) else ""
        except Damaged as error:
            problem = str(error)
        if ranks.least(not problem):
            for other, what in damaged.items():
                assert say
                say(f"checkpoint {what}; going on from the one before")
                ranks.on_first(lambda other=other: put_aside(other))
            return state
        damaged[path] = problem or f"{path} is damaged where another rank reads it"
        if say is None:
            break
    if damaged:
        what = "; checkpoint ".join(damaged.values())
        raise UserError(f"checkpoint {what}; there is none that is whole: restore one, or remove {folder} to start this stage over")
    return None


def put_aside(path: Path) -> None:
    """Under a name that is not looked for; what had that name before is gone."""
    aside = path.with_name(path.name + ASIDE)
    with writing(aside):
        if aside.is_dir():
            shutil.rmtree(aside)
        os.replace(path, aside)


def load(path: Path, device: torch.device | str, like: Like | None) -> dict[str, Any]:
    """The state in one checkpoint. Damaged where that is not all there."""
    if path.is_dir():
        state = load_sharded(path, device, like)
    else:
        state = map_tensors(read_state(path), lambda key, t: _shard(key, t.to(device), like))
    for name, kind in PARTS.items():
        if not isinstance(state.get(name), kind):
            raise Damaged(
                f"{path} is no checkpoint of a stage: wanted its {name!r}, a {kind.__name__}, got {type(state.get(name)).__name__}"
            )
    return state


def _shard(key: Key, t: Tensor, like: Like | None) -> Tensor:
    """This rank's shard instead of a whole tensor."""
    wanted: Any = like(key, t.shape) if like else None
    if wanted is None:
        return t
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank None: every rank has read the file, so it cuts its own part and sends nothing
    return distribute_tensor(t, wanted.device_mesh, wanted.placements, src_data_rank=None)


def load_fitting(load: Callable[[Any], Any], state: dict[str, Any], what: str) -> None:
    """load(state), told as a UserError when they do not fit."""
    try:
        load(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        first = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise UserError(
            f"the checkpoint's {what} does not fit this configuration ({first}): use another run_dir= or the old settings"
        ) from error
