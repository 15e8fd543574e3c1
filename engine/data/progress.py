"""Work on every image of a set: done by threads, handed back in order, and said how far it is; notes."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from potstill.engine.common.errors import harmless
from potstill.engine.common.progress import Bar, first_rank

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

    with ThreadPoolExecutor(threads) as pool, Bar(what, n, unit="images") as bar:
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
    if first_rank():
        print(f"note: {harmless(text)}", file=sys.stderr)
