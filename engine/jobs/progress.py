"""What a run says of itself in its folder while it works: where it stands (status.json), and report.html with what is there by then."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from potstill.engine.common.errors import UserError
from potstill.engine.common.signals import Interrupted
from potstill.engine.measure import report
from potstill.engine.measure.status import ENDED, FAILED, FILE, RUNNING, STOPPED, Status, read_status, write_status
from potstill.engine.training.run import Run


def tell(run_dir: Path, stage: str = "", run: Run | None = None) -> None:
    """The run is at work, by now on this: a training, with how far it has come, or what is said."""
    status = Status(RUNNING, stage=stage)
    if run is not None:
        status.kimg, status.of = run.kimg, run.total * run.cfg.batch / 1000
        status.left = run.seconds / max(run.step, 1) * (run.total - run.step)
    write_status(run_dir, status)
    report.write_report(run_dir)


def tell_end(run_dir: Path) -> None:
    """Everything is done; the report comes after it."""
    write_status(run_dir, Status(ENDED))


@contextmanager
def telling(run_dir: Path, several: bool = False) -> Iterator[None]:
    """Of the block within: that it has begun, and that it failed or was stopped. Nothing is said in a folder that was taken away meanwhile.

    several: ranks; when one dies, torchrun leaves the others too little time for a report.
    """
    tell(run_dir)
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        with contextlib.suppress(UserError):  # the first error is what counts
            if (run_dir / FILE).is_file():
                status = read_status(run_dir) or Status(RUNNING)  # of what it was at
                status.state, status.at, status.why = STOPPED if stopped else FAILED, 0.0, str(error) or type(error).__name__
                write_status(run_dir, status)
                if stopped or isinstance(error, UserError) or not several:
                    report.write_report(run_dir)
        raise
