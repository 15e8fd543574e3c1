"""One training in a process of its own, so that its peak memory is its own."""

import json
import multiprocessing
import signal
import sys
from pathlib import Path

import torch

from potstill.engine.common.cli import run
from potstill.engine.config.tree import Config
from potstill.engine.jobs.folder import write_atomically
from potstill.engine.jobs.machine import peak_gib
from potstill.engine.jobs.snapshots import SnapshotJob
from potstill.engine.training.loop import Interrupted, signals


def train_apart(cfg: Config, record: Path, apart: bool, *, only_teacher: bool) -> None:
    """`train_here` in a process of its own, or in this one; ends this command where a signal ended it."""
    if not apart:
        return train_here(cfg, record, only_teacher, alone=False)
    process = multiprocessing.get_context("spawn").Process(target=child, args=(cfg, record, only_teacher))
    with signals() as caught:  # Ctrl-C reaches the child too, which saves before it ends
        process.start()
        while process.is_alive():
            process.join(0.2)
            if signal.SIGTERM in caught:
                process.terminate()
    if process.exitcode:
        sys.exit(process.exitcode if process.exitcode > 0 else 128 - process.exitcode)
    if caught:
        sys.exit(128 + caught[0])


def child(cfg: Config, record: Path, only_teacher: bool) -> None:
    """What the other process does; its exit code says how it ended."""
    try:
        run(lambda _: train_here(cfg, record, only_teacher, alone=True))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)


def train_here(cfg: Config, record: Path, only_teacher: bool, alone: bool) -> None:
    """Train, and note the peak memory in `record`: on a CPU it is the process's, so None where others ran in it before."""
    job = SnapshotJob(cfg)
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    if only_teacher:
        torch.manual_seed(cfg.seed)
        job.teacher()
    else:
        job.run()
    peak = peak_gib(job.device) if alone or job.device.type == "cuda" else None
    write_atomically(record, json.dumps({"peak_memory_gib": peak}))
