"""What asks a process to end: Ctrl-C, SIGTERM and SIGUSR1 of a scheduler, SIGALRM when its time is over.

Within `stoppable` such a signal raises Interrupted wherever the process is; within `collected`, the training loop, it is put on a list,
and the loop ends when it has saved. A second one of the same kind kills as usual.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGALRM") if name in signal.Signals.__members__]
MOST_HOURS = 10_000.0  # more is no limit, and more than a system's timer takes


class Interrupted(BaseException):
    """A signal came; what can be saved is saved. No Exception: nobody who handles errors shall take it for one."""

    def __init__(self, signum: int, what: str = "stopped; what is done is kept, and the same command goes on from there"):
        super().__init__(f"{name_of(signum)}: {what}")
        self.signum = signum


def name_of(signum: int) -> str:
    return "max_hours are over" if signum == getattr(signal, "SIGALRM", None) else signal.Signals(signum).name


@contextmanager
def _handled(handle: Callable[[int], None], *, second: Any = None) -> Iterator[None]:
    """second: who handles another signal of the same kind; None: who would have without this."""
    previous = {signum: signal.getsignal(signum) for signum in SIGNALS}

    def once(signum: int, frame: Any) -> None:
        signal.signal(signum, previous[signal.Signals(signum)] if second is None else second)
        handle(signum)

    for signum in SIGNALS:
        signal.signal(signum, once)
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _raise(signum: int) -> None:
    raise Interrupted(signum)


@contextmanager
def stoppable(hours: float | None = None) -> Iterator[None]:
    """Within it a signal raises Interrupted, and so does the end of so many hours."""
    with _handled(_raise, second=signal.SIG_DFL):
        timed = hours is not None and hasattr(signal, "setitimer")
        if timed:
            signal.setitimer(signal.ITIMER_REAL, min(hours or 0.0, MOST_HOURS) * 3600)
        try:
            yield
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def collected() -> Iterator[list[int]]:
    """Within it signals wait in this list. Who is within looks at it, and raises Interrupted when all is saved."""
    caught: list[int] = []
    with _handled(caught.append):
        yield caught
