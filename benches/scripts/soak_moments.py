"""When a fault strikes in a child of the soak, and what it does there. The child's functions are wrapped; the product's code stays as it is."""

import errno
import gc
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benches.scripts.soak_runs import write_digits
from potstill.engine.jobs.lock import held
from potstill.engine.training import checkpoint
from potstill.engine.training.log import MetricsFile
from potstill.engine.training.run import Run

Moment = Callable[[Callable[[], None]], None]  # wraps what it takes, so that what it is given is done once, when the moment is there
Action = Callable[[Path], None]  # of a run folder


def around(owner: Any, name: str, when: Callable[..., bool], action: Callable[[], None], *, after: bool = False) -> None:
    """Let the first call of owner.name with when(*arguments) do the action before or after its work."""
    original, open_ = getattr(owner, name), [True]

    def once(*given: Any, **named: Any) -> None:
        if open_ and when(*given, **named):
            open_.clear()
            action()

    @wraps(original)
    def changed(*given: Any, **named: Any) -> Any:
        if not after:
            once(*given, **named)
        result = original(*given, **named)
        if after:
            once(*given, **named)
        return result

    setattr(owner, name, changed)


# moments


def iteration(number: int, stage: str = "student", *, after: bool = True) -> Moment:
    """When iteration `number` of the first stage that trains a "teacher" or "student" is done, or before it begins; -1: its last."""

    def install(action: Callable[[], None]) -> None:
        def when(run: Run, *_: Any) -> bool:
            return run.method.product == stage and run.step + (not after) == (number if number > 0 else run.total)

        around(Run, "take", when, action, after=after)

    return install


def named(end: str, *, after: bool) -> Moment:
    """When a file or folder whose path ends so gets its name: just before it, or just after."""
    return lambda action: around(os, "replace", lambda _, target: str(target).endswith(end), action, after=after)


def half_a_line(number: int) -> Moment:
    """When line `number` of metrics is half in its file."""

    def install(action: Callable[[], None]) -> None:
        lines: list[int] = []

        def when(file: MetricsFile, metrics: dict[str, Any]) -> bool:
            lines.append(metrics["step"])
            if len(lines) == number:
                with file.path.open("a") as half:
                    half.write(f'{{"step": {metrics["step"]}, "kim')
                return True
            return False

        around(MetricsFile, "write", when, action)

    return install


def half_a_checkpoint(number: int) -> Moment:
    """When checkpoint `number` of this call is half on disk."""

    def install(action: Callable[[], None]) -> None:
        saved: list[int] = []

        def when(state: dict[str, Any], file: Any, *_: Any, **__: Any) -> bool:
            saved.append(1)
            if len(saved) == number:
                file.write(b"PK\x03\x04" + bytes(10_000))
                file.flush()
                return True
            return False

        around(checkpoint.torch, "save", when, action)

    return install


def call_of(module: str, name: str, *, after: bool = False) -> Moment:
    """At the first call of a function, by the module and name that its caller knows it by; "module:Class" for a method."""

    def install(action: Callable[[], None]) -> None:
        path, _, kind = module.partition(":")
        owner = import_module(f"potstill.engine.{path}")
        around(getattr(owner, kind) if kind else owner, name, lambda *_, **__: True, action, after=after)

    return install


def at_once(action: Callable[[], None]) -> None:
    """Before the command begins."""
    action()


MEASURING = call_of("jobs.job:Job", "measure")
DRAWING = call_of("jobs.job:Job", "draw")
RESUMING = call_of("training.saver", "load_newest", after=True)
SCANNING = call_of("data.images", "_common_header")
SAVING = call_of("jobs.workplace", "save_net")
REPORTING = call_of("jobs.job", "write_report")


# actions


def dies(signum: int = signal.SIGKILL) -> Action:
    return lambda _: os.kill(os.getpid(), signum)


def twice(signum: int) -> Action:
    """A user who does not wait."""
    return together(dies(signum), dies(signum))


def control_c(_: Path) -> None:
    """As a terminal does it: to all processes of the group."""
    os.killpg(0, signal.SIGINT)


def worker_dies(_: Path) -> None:
    """The process that reads images is killed."""
    multiprocessing.active_children()[0].kill()


def jumps(seconds: float, *clocks: str) -> Action:
    """Clocks of the module `time` are ahead at once: one that was set, or all of a machine that was suspended."""

    def action(_: Path) -> None:
        for name in clocks:
            now = getattr(time, name)
            setattr(time, name, lambda now=now: now() + seconds)

    return action


def no_large_files(most: int) -> Action:
    """No file may have more bytes, as a quota or `ulimit -f` has it: the kernel refuses the rest (EFBIG)."""
    return lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def no_handles(_: Path) -> None:
    """No file can be opened (EMFILE)."""
    highest = max(map(int, os.listdir("/proc/self/fd"))) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, highest))
    with suppress(OSError):
        while True:
            os.dup(1)


def input_output_error(_: Path) -> None:
    """What a broken disk or a network's gives."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def fills(leave: int = 0) -> Action:
    """The disk gets full but for so many bytes."""

    def action(folder: Path) -> None:
        filler, block = folder.parent / "filler", bytes(4096)
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(block) == len(block):
                pass
        os.truncate(filler, max(0, filler.stat().st_size - leave))

    return action


def read_only(folder: Path) -> None:
    """The disk can only be read from now on, as after an error."""
    for file, (fd, _) in held.items():  # a file that is open to be written keeps a disk from being turned by hand
        again = os.open(file, os.O_RDONLY)
        os.dup2(again, fd)
        os.close(again)
    mount("remount,ro", folder.parent)


def mount(options: str, place: Path) -> None:
    """A disk of its own in memory, or another state of it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)


def unmount(place: Path) -> None:
    """Also where a process still has a file open there."""
    subprocess.run(["umount", "-l", str(place)], check=True)


def removes(folder: Path) -> None:
    shutil.rmtree(folder)


def another_data_set(folder: Path) -> None:
    """Under the same name."""
    write_digits(folder.parent / "inputs/digits.zip", shift=500)


def not_a_number(_: Path) -> None:
    """A weight of what is trained becomes NaN."""
    for run in gc.get_objects():
        if isinstance(run, Run):
            with torch.no_grad():
                next(p for p in run.method.nets[run.method.product].parameters() if p.requires_grad).fill_(math.nan)


def together(*actions: Action) -> Action:
    def action(folder: Path) -> None:
        for one in actions:
            one(folder)

    return action
