"""How many images this machine trains on in so many seconds, found by timing a few iterations."""

import copy
import json
import time
from pathlib import Path
from typing import Any

from potstill.engine.common.errors import UserError
from potstill.engine.config.tree import Config
from potstill.engine.jobs import build
from potstill.engine.jobs.folder import write_atomically
from potstill.engine.jobs.job import Job
from potstill.engine.jobs.machine import synchronize
from potstill.engine.jobs.pairs import timing_pairs
from potstill.engine.methods.base import Method
from potstill.engine.methods.teacher import Teacher
from potstill.engine.training.run import Run, TrainConfig


def with_length(cfg: Config, seconds: float, folder: Path) -> Config:
    """The settings with as many kimg as fit into `seconds` of training, all students together; remembered in `folder`."""
    cfg = copy.deepcopy(cfg)
    cfg.train.kimg = kimg_in(seconds, cfg, folder / "kimg.json", of_teacher=False) / cfg.students.count
    return cfg


def kimg_in(seconds: float, cfg: Config, stored: Path, *, of_teacher: bool) -> float:
    """Thousands of images that this machine trains on in `seconds`; remembered in the file `stored`."""
    if stored.exists():
        before = json.loads(stored.read_text(encoding="utf-8"))
        if before["seconds"] != seconds:
            raise UserError(f"{stored.parent} holds a run of {before['seconds']:g} seconds, got {seconds:g}: give another run_dir=")
        return before["kimg"]
    job = Job(cfg, on_paper=True)
    method = timed_teacher(job) if of_teacher else timed_student(job)
    stage = cfg.teacher.train if of_teacher else cfg.train
    kimg = seconds / seconds_per_image(method, stage, job, least=0.03 * seconds) / 1000
    write_atomically(stored, json.dumps({"kimg": kimg, "seconds": seconds}))
    return kimg


def timed_teacher(job: Job) -> Method:
    images = job.images
    assert images is not None
    net = build.build_net(job.cfg.net, images.resolution, images.channels, images.label_dim)
    return Teacher(job.cfg.teacher.loss, job.prepared(net))


def timed_student(job: Job) -> Method:
    teacher = job.teacher()
    method = job.cfg.method.build(teacher, teacher)
    method.pairs = timing_pairs(job.stream(job.cfg.train, None)) if job.cfg.method.needs().pairs else None
    return method


def seconds_per_image(method: Method, stage: TrainConfig, job: Job, least: float) -> float:
    """By whole periods of its turns, for at least `least` seconds, after two iterations that do not count."""
    timed = Run(method, stage, job.cfg.seed, job.device)
    for net in method.nets.values():
        net.to(job.device)
    stream, period = job.stream(stage, None), max(turn.every for turn in method.turns)
    seconds_taken(timed, stream, range(2))
    seconds, step, rounds = 0.0, 2, period * max(1, round(8 / period))
    while step == 2 or seconds < least:
        seconds += seconds_taken(timed, stream, range(step, step + rounds))
        step += rounds
    return seconds / (step - 2) / stage.batch


def seconds_taken(run: Run, stream: Any, steps: range) -> float:
    """How long these iterations take, the device's work included."""
    start = time.perf_counter()
    for step in steps:
        run.take(*stream.at(step))
    synchronize(run.device)
    return time.perf_counter() - start
