"""A process that is killed (SIGKILL) while it works. It is a fork, since a new one would import libraries for seconds."""

import os
import signal
from collections.abc import Callable

import pytest
import torch

from potstill.engine.data import shards
from potstill.engine.training.run import Run

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def killed(work: Callable[[], object], files: int) -> None:
    """Starts `work` in a fork of this process, which is killed when half of its shard number `files` is written."""
    save, written = shards.save_tensors, []

    def half_saved(tensors, path, metadata):
        written.append(path)
        save(tensors, path, metadata)
        if len(written) == files:
            path.write_bytes(path.read_bytes()[:200])
            os.kill(os.getpid(), signal.SIGKILL)

    in_fork(work, shards, "save_tensors", half_saved)


def killed_in(work: Callable[[], object], iteration: int) -> None:
    """The same, killed when its iteration number `iteration`, of all stages together, begins."""
    take, taken = Run.take, []

    def dying(self, *batch):
        taken.append(1)
        if len(taken) == iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, *batch)

    in_fork(work, Run, "take", dying)


def in_fork(work: Callable[[], object], owner: object, name: str, deadly: Callable) -> None:
    """`work` in a fork where this function is the deadly one."""
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # a fork has none of OpenMP's other threads
        setattr(owner, name, deadly)
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
