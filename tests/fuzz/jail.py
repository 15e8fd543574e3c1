"""Readers get one wrong input after the other in a child process with bounds, and every input gets a verdict.

read      accepted, and what was read is that of the valid file, or a legitimate other
refused   UserError, in one sentence that a terminal can show
wrong     accepted, although it is damaged or absurd
failed    a traceback, a sentence of several lines, too long or too large, a program executed, a file written elsewhere
"""

import contextlib
import faulthandler
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import hypothesis
import torch
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

from potstill.engine.common.errors import UserError

from .mutations import MARKER, damaged

READ, REFUSED, WRONG, FAILED = "read", "refused", "wrong", "failed"
MOST_CPU, MOST_TIME = 2.0, 60.0  # seconds an input, of work and by the clock: another process may have the core
MOST_MEMORY = 2**30  # bytes beyond what the process has before it reads
LONGEST_SENTENCE = 1500
BATCH = 200  # inputs a child
RAN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn", "socket.connect", "ctypes.dlopen")
NO_MEMORY = re.compile("can't allocate memory|[Uu]nable to allocate|Cannot allocate memory|bad_alloc")

Verdict = tuple[str, str, str]  # which, of a fault its place or kind, and what was said
Structure = Callable[[bytes], st.SearchStrategy[bytes]]


@dataclass(frozen=True)
class Reader:
    """What is fuzzed.

    make: writes the valid files into an empty folder. read: what a command makes of the folder, anything that can be compared.
    files: those that are changed, with the structure that each has; None where only its bytes are. wrong: why contents that were
    accepted should not have been, None where they may be; it is given the contents, those of the valid files, and whether bytes
    were damaged (True) or a form was written anew (False).
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: dict[str, Structure | None]
    wrong: Callable[[Any, Any, bool], str | None]
    share: int = 500  # of 10,000 inputs
    both: float = 0.5  # share of the inputs that are damaged bytes, where a file has a structure too


class Input(NamedTuple):
    file: str
    kind: str
    data: bytes


@dataclass
class Tally:
    """Of a reader: verdicts, and the first example of every fault by its place."""

    reader: str
    counts: Counter = field(default_factory=Counter)
    faults: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, one: Input, verdict: str, place: str, said: str) -> None:
        self.counts[verdict] += 1
        if verdict in (WRONG, FAILED):
            example = {"said": said, "file": one.file, "kind": one.kind, "size": len(one.data), "data": one.data}
            found = self.faults.setdefault(f"{verdict}: {place}", {"n": 0, **example})
            found |= {"n": found["n"] + 1} | (example if len(one.data) < found["size"] else {})


def fuzz(reader: Reader, n: int, seed: int) -> Tally:
    """The verdicts of n inputs. The same n and seed make the same inputs."""
    tally = Tally(reader.name)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as base:
        folder = Path(base) / "in"
        folder.mkdir()
        torch.manual_seed(0)
        reader.make(folder)
        reader.read(folder)  # what is imported late is imported before the children are born
        valid = {file: (folder / file).read_bytes() for file in reader.files}
        for k, start in enumerate(range(0, n, BATCH)):
            batch = list(_inputs(reader, valid, min(BATCH, n - start), zlib.crc32(f"{reader.name} {seed} {k}".encode())))
            done = 0
            while done < len(batch):
                for verdict in _child(reader, folder, batch[done:], valid):
                    tally.add(batch[done], *verdict)
                    done += 1
    return tally


def _inputs(reader: Reader, valid: dict[str, bytes], n: int, seed: int) -> Iterator[Input]:
    """Damaged bytes first, then forms."""
    dice, files = random.Random(seed), list(valid)
    formed = [file for file, structure in reader.files.items() if structure]
    by_bytes = round(n * (reader.both if formed else 1))
    for k in range(by_bytes):
        file = files[k % len(files)]
        other = valid[dice.choice(files)]
        yield Input(file, *damaged(valid[file], other if other is not valid[file] else other[dice.randrange(len(other)) :], dice))
    for k, file in enumerate(formed):
        share = (n - by_bytes) * (k + 1) // len(formed) - (n - by_bytes) * k // len(formed)
        structure = reader.files[file]
        assert structure
        yield from (Input(file, "form", data) for data in drawn(structure(valid[file]), share, seed + k))


def drawn(strategy: st.SearchStrategy[bytes], n: int, seed: int) -> list[bytes]:
    """n examples; of a small strategy some come again."""
    found: list[bytes] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=n, database=None, phases=[hypothesis.Phase.generate], deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(strategy)
    def collect(one: bytes) -> None:
        found.append(one)

    if n:
        with patch.object(providers, "_get_local_constants", Constants):  # else every line of ours would change what is drawn
            collect()
    return (found * n)[:n]


def _child(reader: Reader, folder: Path, batch: list[Input], valid: dict[str, bytes]) -> Iterator[Verdict]:
    """The verdicts of the inputs until the child is through or an input ends it, which is a verdict too."""
    read, write = os.pipe()
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python warns of threads; the child starts its own, and takes no lock of others
        pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(read)
            _judge(reader, folder, batch, valid, os.fdopen(write, "w", buffering=1))
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    judged = 0
    with os.fdopen(read) as lines:
        for line in lines:
            judged += 1
            yield tuple(json.loads(line))
    _, status = os.waitpid(pid, 0)
    for file, data in valid.items():
        (folder / file).write_bytes(data)
    if judged < len(batch):
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        why = {signal.SIGPROF: f"more than {MOST_CPU:g} s of work", signal.SIGALRM: f"more than {MOST_TIME:g} s"}
        yield FAILED, why.get(number, f"the process ended ({signal.Signals(number).name if number else status})"), ""


def _judge(reader: Reader, folder: Path, batch: list[Input], valid: dict[str, bytes], verdicts: Any) -> None:
    """In the child: a line for every input."""
    torch.set_num_threads(1)
    faulthandler.disable()  # pytest's would tell of crashes, which are verdicts here
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # ends the process, whatever it is doing
    seen = _watched(folder)
    os.chdir(folder)
    right = reader.read(folder)
    for one in batch:
        (folder / one.file).write_bytes(one.data)
        seen.clear()
        signal.setitimer(signal.ITIMER_PROF, MOST_CPU)
        signal.setitimer(signal.ITIMER_REAL, MOST_TIME)
        verdict = _verdict(reader, folder, right, one)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if (folder.parent / MARKER).exists():
            (folder.parent / MARKER).unlink()
            verdict = FAILED, "a program in the file was executed", ""
        elif seen:
            verdict = FAILED, seen[0], ""
        (folder / one.file).write_bytes(valid[one.file])
        verdicts.write(json.dumps(verdict) + "\n")


def _verdict(reader: Reader, folder: Path, right: Any, one: Input) -> Verdict:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = reader.read(folder)
    except BaseException as error:
        said = str(error)
        if place := _out_of_memory(error):
            return FAILED, f"asks for more than {MOST_MEMORY / 2**30:g} GiB at {place}", said[:200]
        if not isinstance(error, UserError):
            return FAILED, f"{type(error).__name__} at {_where(error)}", said[:200]
        if "\n" in said or len(said) > LONGEST_SENTENCE:
            return FAILED, f"a sentence of several lines or of more than {LONGEST_SENTENCE} characters at {_where(error)}", said[:200]
        return REFUSED, "", ""
    why = reader.wrong(found, right, one.kind != "form")
    return (WRONG, why, "") if why else (READ, "", "")


def _out_of_memory(error: BaseException | None) -> str | None:
    """Where memory ran out, even if it was told otherwise; a MemoryError that the engine itself raises is its own bound."""
    while error is not None:
        last = traceback.extract_tb(error.__traceback__)[-1:] or [None]
        own = last[0] is not None and "/engine/" in last[0].filename
        if (isinstance(error, MemoryError) and not own) or (isinstance(error, RuntimeError | OSError) and NO_MEMORY.search(str(error))):
            return _where(error)
        error = error.__cause__ or error.__context__
    return None


def _where(error: BaseException) -> str:
    """The innermost line of ours, and the file that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/engine/" in f.filename or "/kernels/" in f.filename] or frames
    place = f"{ours[-1].filename.rpartition('/engine/')[2]}:{ours[-1].lineno}" if ours else "?"
    return place if not frames or frames[-1] is ours[-1] else f"{place} (in {Path(frames[-1].filename).name})"


def _watched(folder: Path) -> list[str]:
    """A list that gets a word for every program that is run and every file that is written outside of the folder."""
    seen: list[str] = []
    inside = (str(folder), os.devnull, "/dev/null", "/proc/self")

    def hook(event: str, arguments: tuple) -> None:
        if event in RAN:
            seen.append(f"ran {event}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike) and _writes(*arguments[1:]):
            with contextlib.suppress(ValueError, TypeError):
                path = os.path.realpath(os.fsdecode(arguments[0]))
                if not path.startswith(inside):
                    seen.append(f"wrote {os.path.relpath(path, folder) if path.startswith(str(folder.parent)) else path}")

    sys.addaudithook(hook)
    return seen


def _writes(mode: str | None, flags: int | None) -> bool:
    return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def table(tallies: list[Tally]) -> str:
    """In columns, a reader a line."""
    rows = [("reader", "inputs", READ, REFUSED, WRONG, FAILED)]
    rows += [(t.reader, *map(str, (t.counts.total(), *(t.counts[v] for v in (READ, REFUSED, WRONG, FAILED))))) for t in tallies]
    sums = [sum(t.counts[v] for t in tallies) for v in (READ, REFUSED, WRONG, FAILED)]
    rows.append(("all", str(sum(sums)), *map(str, sums)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    )


def clock() -> float:
    """Seconds of work of this process and its children."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
