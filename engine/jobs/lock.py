"""One process at a time in a run folder: a lock on a file in it, which the kernel frees when its owner ends, however it ends.

flock holds between the processes of a machine, and on NFS (Linux), Lustre (mounted with flock) and GPFS between machines. Where a
file system has no locks the run says so and goes on. Of several students, each has a lock of its own, so that they can be jobs side
by side; what they share (teacher, pairs) is made by one of them.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from potstill.engine.common.errors import UserError, writing
from potstill.engine.config.schema import Config
from potstill.engine.models.router import student_folder

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder are the user's own affair
    fcntl = None

LOCK, COMMON, COMPARE = ".lock", ".lock-common", ".lock-compare"
held: dict[Path, list[int]] = {}  # of this process: the lock's file descriptor, and how often it was asked for


def lock_run(cfg: Config) -> ExitStack:
    """Alone in the run folder, or with `student=K` with this student, until it is closed. UserError where another process is."""
    folder = Path(cfg.run_dir or "").expanduser()
    with ExitStack() as stack:
        stack.enter_context(lock(folder / LOCK, shared=cfg.student is not None))
        if cfg.student is not None:
            stack.enter_context(lock(student_folder(folder, cfg.student) / LOCK))
        return stack.pop_all()


@contextmanager
def lock(file: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock on this file, which is made where it is missing. UserError, naming the other's host and process, where it is taken.

    wait: until the other lets go, instead.
    """
    if fcntl is None:
        yield
        return
    file = file.absolute()
    if file not in held:
        held[file] = [_taken(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait), 0]
    held[file][1] += 1
    try:
        yield
    finally:
        if file in held:  # not in a forked child
            held[file][1] -= 1
            if not held[file][1]:
                fd, _ = held.pop(file)
                if not shared and _names(file.parent) == [file.name]:  # nothing has come of it; who waits for it sees that it is gone
                    with contextlib.suppress(OSError):
                        file.unlink()
                        file.parent.rmdir()
                os.close(fd)


def _taken(file: Path, kind: int, wait: bool) -> int:
    """The descriptor of a file that is locked and has its name."""
    assert fcntl
    while True:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
                if not wait:
                    os.close(fd)
                    raise UserError(f"{owner} works in {file.parent}: wait for it or stop it, or give another run_dir=") from error
                print(f"waiting for {owner}, which works on what all students in {file.parent} share", file=sys.stderr)
                fcntl.flock(fd, kind)
        except OSError as error:
            print(f"note: {file.parent} knows no locks ({error.strerror}): see that no other process works in it", file=sys.stderr)
            return fd
        if file.exists() and os.path.samestat(os.fstat(fd), file.stat()):
            with contextlib.suppress(OSError):  # on a full disk the lock holds without its owner's name
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return fd
        os.close(fd)  # who had it has just removed it


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _let_go() -> None:
    """In a forked child, such as a reader of images: its copies would hold the locks after the parent's death."""
    for fd, _ in held.values():
        os.close(fd)
    held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
