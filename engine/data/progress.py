"""Work on every image of a set: done by threads, handed back in order, with a progress bar after the first second; notes."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from tqdm import tqdm

from potstill.engine.common.errors import harmless

T = TypeVar("T")


def cores() -> int:
    """CPU cores for this process: its share where torchrun has started several on the machine."""
    all_of_them = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, all_of_them // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def in_order(work: Callable[[int], T], n: int, what: str | None, *, chunk: int = 32, threads: int | None = None) -> Iterator[T]:
    """work(0), work(1), … work(n - 1). Threads take `chunk` of them at a time; the first error ends it and is raised.

    what: for the progress bar; None: there is another one already.

    Pillow and zlib let go of the interpreter lock while they decode, resize and read, so threads are enough here.
    """
    threads = threads or min(cores(), 16)
    starts = iter(range(0, n, chunk))

    def run(start: int) -> list[T]:
        return [work(i) for i in range(start, min(start + chunk, n))]

    bar = tqdm(  # on stderr, from one process only; rewritten often on a terminal and every ten seconds in a log file
        total=n, desc=what, unit=" images", delay=1.0, mininterval=0.1 if sys.stderr.isatty() else 10.0,
        disable=what is None or os.environ.get("RANK", "0") != "0",
    )  # fmt: skip
    with ThreadPoolExecutor(threads) as pool, bar:
        waiting = deque(pool.submit(run, start) for start in islice(starts, 2 * threads))
        try:
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(run, start) for start in islice(starts, 1))
                yield from done
                bar.update(len(done))
        finally:
            for task in waiting:
                task.cancel()


def note(text: str) -> None:
    """A line on stderr, from one process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {harmless(text)}", file=sys.stderr)
