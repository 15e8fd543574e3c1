"""How long a test waits for processes: while they work, however slowly on a busy machine, and no longer.

What tells work from waiting is processor time, which a process gets less of where others want it, and a hanging one not at all.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
IDLE = 0.02  # of one core, all processes together: heartbeats and polls take less
GONE = (FileNotFoundError, ProcessLookupError)


class Patience:
    """With processes and all that they start: lost when they stood still for `quiet` seconds, or took `most` of processor time."""

    def __init__(self, pids: Sequence[int], *, quiet: float = 60.0, most: float = 900.0):
        self.pids, self.quiet, self.most = pids, quiet, most
        self.since, self.seen = time.monotonic(), 0.0

    def lost(self) -> str:
        """Why there is no sense in waiting on; "" while there is."""
        now, done = time.monotonic(), sum(processor_seconds(pid) for first in self.pids for pid in family(first))
        if abs(done - self.seen) > IDLE * self.quiet:  # less than before where one has ended
            self.since, self.seen = now, done
        if done > self.most:
            return f"not done after {self.most:.0f} s of processor time"
        return f"stood still for {self.quiet:.0f} s" if now - self.since > self.quiet else ""


def family(pid: int) -> Iterator[int]:
    """A process, if it is still there, and its descendants."""
    yield pid
    files = []
    with suppress(*GONE):  # it may end while its threads are listed
        files = list(Path(f"/proc/{pid}/task").glob("*/children"))
    for file in files:
        with suppress(*GONE):
            for child in file.read_text().split():
                yield from family(int(child))


def processor_seconds(pid: int) -> float:
    """User's and system's, of all its threads; 0 when it has ended."""
    with suppress(*GONE):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def until(condition: Callable[[], object], patience: Patience, told: Callable[[], object] = str) -> None:
    """Wait for the condition; AssertionError with what `told` says when patience is lost."""
    while not condition():
        lost = patience.lost()
        assert not lost, f"{lost}: {told()}"
        time.sleep(0.02)


def outlasted(wait: Callable[..., T], patience: Patience) -> T:
    """What `wait(timeout=…)` of a subprocess returns in the end: its wait or communicate."""
    while True:
        try:
            return wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            lost = patience.lost()
            assert not lost, lost
