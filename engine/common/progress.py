"""How far a piece of work is: a bar on a terminal, and elsewhere a line after a few seconds and then every ten."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

FIRST, EVERY = 4.0, 10.0  # seconds of silence, before the first line and after one
WIDTH = 80  # of a terminal that does not say how wide it is

T = TypeVar("T")


def first_rank() -> bool:
    """Is this the process that speaks for all?"""
    return os.environ.get("RANK", "0") == "0"


def tell(line: str) -> None:
    """A line on stderr, written at once: other threads write there too."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def tqdm_bar(**how: Any) -> Any:
    """A bar as wide as the terminal; some terminals say that they have no columns, and tqdm would draw nothing there."""
    try:
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # it is none
        known = True
    how |= {"dynamic_ncols": True} if known else {"ncols": WIDTH, "nrows": 24}
    return tqdm(**how)


class Pulse:
    """Calls `say` from a thread of its own, whenever nothing has been said for FIRST seconds at the beginning and EVERY later on."""

    def __init__(self, say: Callable[[], None]):
        self.say, self.pause, self.last, self.closed = say, FIRST, time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def spoken(self) -> None:
        """Something has been said."""
        self.pause, self.last = EVERY, time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self.last >= self.pause

    def close(self) -> None:
        self.closed.set()
        self.thread.join()

    def _beat(self) -> None:
        while not self.closed.wait(max(0.01, self.last + self.pause - time.monotonic())):
            if self.due:
                self.spoken()
                self.say()


class Bar:
    """Counts a piece of work: `with Bar("encoding", 1000, unit="images") as bar: … bar.update(8)`.

    total: None where it is not known. done: what was done before. title: None for no bar, where another one is there already.
    """

    def __init__(self, title: str | None, total: int | None, done: int = 0, *, unit: str = "it"):
        self.title, self.total, self.first, self.done, self.unit = title, total, done, done, unit
        self.began, self.pulse, self.bar = time.monotonic(), None, None

    def __str__(self) -> str:
        seconds, new = time.monotonic() - self.began, self.done - self.first
        of = f" of {self.total:,}" if self.total is not None else ""
        left = ""
        if new and self.total is not None and self.done < self.total:
            left = f", {tqdm.format_interval((self.total - self.done) * seconds / new)} left"
        return f"{self.title}: {self.done:,}{of} {self.unit}, {tqdm.format_interval(seconds)}{left}"

    def __enter__(self) -> "Bar":
        self.began = time.monotonic()
        if self.title is not None and first_rank():
            if sys.stderr.isatty():
                how = {"total": self.total, "initial": self.done, "desc": self.title, "unit": f" {self.unit}"}
                self.bar = tqdm_bar(**how, delay=1.0, leave=False)
            else:
                self.pulse = Pulse(lambda: tell(str(self)))
        return self

    def update(self, n: int = 1) -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.pulse is not None:
            self.pulse.close()

    def over(self, parts: Iterable[T], size: Callable[[T], int] = len) -> Iterator[T]:
        """The same parts, counted when they have been dealt with."""
        with self:
            for part in parts:
                count = size(part)
                yield part
                del part  # else it is held while the next one is made
                self.update(count)
