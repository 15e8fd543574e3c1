"""A process that is killed (SIGKILL) while it writes a shard. It is a fork, since a new one would import libraries for seconds."""

import os
import signal
from collections.abc import Callable

import pytest
import torch

from potstill.engine.data import shards

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def killed(work: Callable[[], object], files: int) -> None:
    """Starts `work` in a fork of this process, which is killed when half of its file number `files` is written."""
    save, written = shards.save_tensors, []

    def half_saved(tensors, path, metadata):
        written.append(path)
        save(tensors, path, metadata)
        if len(written) == files:
            path.write_bytes(path.read_bytes()[:200])
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # a fork has none of OpenMP's other threads
        shards.save_tensors = half_saved
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
