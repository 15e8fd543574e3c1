"""What happens when a number is no longer finite: the stage stops, or goes back to its last good checkpoint and round one batch.

`train.on_nonfinite=rollback` repeats the stretch, looking at every iteration. The first one that fails names its batch, which is left out
when the stretch is repeated once more: batches are numbered, and all that comes later moves up by one. So what a run does is still a
function of its seed, and a run that is killed meanwhile does the same again.
"""

from collections.abc import Callable

from potstill.engine.common.errors import UserError
from potstill.engine.training.run import Run
from potstill.engine.training.saver import Saver
from potstill.engine.training.states import NotFinite

MOST = 10  # rollbacks of a call: what fails more often is the training and not a batch


class Rollback:
    """watching: is every iteration looked at, since one of those to come has failed before?"""

    def __init__(self, run: Run, saver: Saver, say: Callable[[str], None]):
        self.run, self.saver, self.say = run, saver, say
        self.until, self.count = 0, 0

    @property
    def watching(self) -> bool:
        return self.run.step <= self.until

    def look(self) -> None:
        """NotFinite if the iteration just done has made something that is no number; it waits for the device."""
        if not self.run.meter.finite(self.run.ranks):
            raise NotFinite("a loss or gradient", self.run.step, self.run.batch_number(self.run.step - 1))

    def after(self, found: NotFinite) -> None:
        """Bring the run back to its last good checkpoint. UserError where it shall stop, or has been back too often."""
        run, newest = self.run, f"{self.saver.checkpoints} holds what was good"
        self.saver.finish()  # else what is being written appears, and drops others, while it is looked for
        if run.cfg.on_nonfinite == "stop":
            raise UserError(
                f"{found}; {newest}. train.on_nonfinite=rollback goes on from there without the batch that did it; where that does not help, "
                "the training diverges: a new run_dir= with a lower train.optim.<net>.lr, or a clip"
            )
        self.count += 1
        if self.count > MOST:
            raise UserError(
                f"{found}, after {MOST} rollbacks; {newest}. The training diverges: a new run_dir= with a lower train.optim.<net>.lr, or a clip"
            )
        left_out = run.left_out if found.batch is None else sorted([*run.left_out, found.batch])
        self.until = max(self.until, found.step)
        if not self.saver.load(self.say):
            raise UserError(
                f"{found}, and there is no checkpoint any more in {self.saver.checkpoints}: repeat the command to start this stage over"
            )
        run.left_out = left_out
        what = "every iteration is looked at until there" if found.batch is None else f"batch {found.batch} is left out from now on"
        self.say(f"{found}: back at iteration {run.step}; {what} ({self.count} of at most {MOST} rollbacks)")
