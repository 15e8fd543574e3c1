"""The checkpoints of one stage: what is written, when it may be, and what a stage goes on from."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from potstill.engine.common.errors import UserError
from potstill.engine.training.checkpoint import drop, load_newest, save_checkpoint
from potstill.engine.training.posthoc import PROFILES
from potstill.engine.training.run import Run
from potstill.engine.training.sharded import ShardedWriter
from potstill.engine.training.states import NotFinite, not_finite

NUMBERED = {
    "samples": ".png",
    "snapshots": ".safetensors",
    PROFILES: ".safetensors",
}  # files whose names begin with the number of images seen


class Saver:
    """Writes folder/checkpoints, whole files of finite numbers alone."""

    def __init__(self, run: Run, folder: Path):
        self.run, self.folder, self.checkpoints = run, folder, folder / "checkpoints"
        self.sharded = ShardedWriter(self.checkpoints, run.ranks, partial(drop, keep=run.cfg.keep)) if run.sharded else None
        self.place: Any = None  # device and inode of the folder that the run began in

    def load(self, say: Callable[[str], None]) -> bool:
        """Bring the run to its newest whole checkpoint, and files of a later time out of the way; False where there is none."""
        run, ranks = self.run, self.run.ranks
        state = load_newest(self.checkpoints, run.device, run.like if run.sharded else None, ranks=ranks, say=say)
        if state:
            run.load_state_dict(state)
        ranks.on_first(self._forget_later)
        ranks.wait()  # else the first could write a new checkpoint while the last looks for the newest
        return state is not None

    def _forget_later(self) -> None:
        """Pictures, snapshots and profiles of the stretch that comes again; they would stand beside its own where it takes another course."""
        for name, suffix in NUMBERED.items():
            for file in (self.folder / name).glob(f"[0-9]*{suffix}"):
                number = file.stem.partition("-")[0]  # a profile's std comes after it
                if number.isdecimal() and int(number) > self.run.images_seen:
                    file.unlink(missing_ok=True)

    def save(self) -> Path:
        """A checkpoint of now; all ranks call it. NotFinite where it would hold a number that is none."""
        run, ranks, state = self.run, self.run.ranks, self.checked()
        if ranks.first:
            self._still_there()
        if self.sharded:
            return self.sharded.save(run.step, state)
        if ranks.first:
            return save_checkpoint(self.checkpoints, run.step, state, run.cfg.keep)
        return self.checkpoints

    def checked(self) -> dict[str, Any]:
        """The state of the run as it is now; all ranks call it. NotFinite where it holds a number that is none."""
        state = self.run.state_dict()
        bad = not_finite(state)
        if not self.run.ranks.least(bad is None):
            raise NotFinite(bad or "a tensor of another rank", self.run.step)
        return state

    def finish(self) -> None:
        """Until the last checkpoint is on disk."""
        if self.sharded:
            self.sharded.finish()

    def _still_there(self) -> None:
        """UserError where the folder is another one than at the first checkpoint: a new one would be half a run."""
        status = self.folder.stat() if self.folder.is_dir() else None
        found = status and (status.st_dev, status.st_ino)
        if self.place is None:
            self.place = found
        elif found != self.place:
            raise UserError(
                f"{self.folder} was removed or replaced while the run worked in it: nothing more is written; repeat the command to start over"
            )
