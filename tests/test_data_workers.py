"""Processes that read images: what happens when one of them is killed, or their parent is."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from patience import Patience, until

from potstill.engine.common.errors import UserError
from potstill.engine.data import sampler
from potstill.engine.data.images import open_images
from potstill.engine.data.sampler import Stream

ROOT = Path(__file__).parent.parent
OPTIONS = {"batch": 16, "seed": 1, "flips": True}


@pytest.fixture
def data(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(50) % 7)
    return open_images(tmp_path / "a.npz")


def kill_one(stream):
    worker = stream._reader.batches._workers[0]
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    return worker


def test_a_killed_process_is_started_anew_and_no_batch_is_lost(data, capsys):
    held, stream = Stream(open_images(data.source.path), **OPTIONS), Stream(data, memory=0, workers=2, **OPTIONS)
    handles = None
    for step in range(12):
        for a, b in zip(stream.at(step), held.at(step), strict=True):
            assert torch.equal(a, b)
        if step == 3:
            kill_one(stream)
            for _ in range(1000):  # where PyTorch's handler of SIGCHLD would raise, in whatever the run does there
                time.sleep(0)
        if step == 9:
            handles = len(os.listdir("/proc/self/fd"))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("a process that reads images was killed (out of memory?): they are started anew at step ")
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert not multiprocessing.active_children()
    assert len(os.listdir("/proc/self/fd")) <= handles


def test_a_second_one_killed_soon_after_ends_the_run_in_one_sentence(data, monkeypatch):
    stream = Stream(data, memory=0, workers=1, **OPTIONS)
    stream.at(0)
    kill_one(stream)
    stream.at(1)
    kill_one(stream)
    with pytest.raises(
        UserError, match=r"was killed twice \(out of memory\?\): lower data\.workers; the same command goes on from the newest"
    ):
        stream.at(2)
    assert not multiprocessing.active_children()
    monkeypatch.setattr(sampler, "SOON", 0)  # and one long after does not
    for step in (3, 4, 5):
        stream.at(step)
        kill_one(stream)
    stream.close()


class Breaks(torch.utils.data.Dataset):
    def __getitem__(self, step):
        raise RuntimeError("a mistake in reading")


def test_an_error_of_a_living_process_stays_what_it_is(data, capsys):
    stream = Stream(data, memory=0, workers=1, **OPTIONS)
    stream._reader.steps = Breaks()
    with pytest.raises(RuntimeError, match="a mistake in reading"):
        stream.at(0)
    stream.close()
    assert "killed" not in capsys.readouterr().err


def test_they_end_when_their_parent_is_killed(data):
    code = f"""
import os, signal, torch.utils.data._utils.worker as worker
worker.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds between two looks at the parent; else 5
from potstill.engine.data.images import open_images
from potstill.engine.data.sampler import Stream
stream = Stream(open_images({data.source.path!r}), batch=4, memory=0, workers=2)
stream.at(0)
print(*[one.pid for one in stream._reader.batches._workers], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    pids = [int(pid) for pid in done.stdout.readline().split()]
    assert len(pids) == 2 and done.wait() == -signal.SIGKILL
    done.stdout.close()
    until(lambda: not any(alive(pid) for pid in pids), Patience(pids))


def alive(pid):
    """And no zombie, which only waits for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
