"""The training loop: a batch, an iteration (`Run.take`), and now and then a log line, a hook or a checkpoint."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from potstill.engine.common.errors import UserError
from potstill.engine.training.checkpoint import ShardedWriter, load_newest, save_checkpoint
from potstill.engine.training.compile import cache_in
from potstill.engine.training.health import Health
from potstill.engine.training.log import LogConfig, Progress, open_writers
from potstill.engine.training.memory import fitting_micro_batch
from potstill.engine.training.profile import STEP, WAITING, Profile
from potstill.engine.training.run import Run

BatchAt = Callable[[int], tuple[torch.Tensor, torch.Tensor | None]]  # iteration -> this rank's images [n, C, H, W] and labels or None


@dataclass
class Hook:
    """Something done every `kimg` thousand images and at the end; what it returns goes into the metrics."""

    kimg: float
    call: Callable[["Run"], dict[str, float]]


class Interrupted(Exception):
    """SIGINT or SIGTERM came; a checkpoint was written."""

    def __init__(self, signum: int, checkpoint: Path):
        super().__init__(f"{signal.Signals(signum).name}: saved {checkpoint}; the same command goes on from there")
        self.signum = signum


def train(
    run: Run,
    batch_at: BatchAt,
    folder: Path,
    *,
    title: str,
    log: LogConfig,
    hooks: Sequence[Hook] = (),
    profile: Profile | None = None,
    group: str | None = None,
) -> None:
    """Run to the end, from the newest checkpoint in folder/checkpoints if there is one.

    `title` is what this stage is called, `group` what all stages of a run are, by default the folder's name.
    Raises Interrupted after saving on SIGINT or SIGTERM; UserError when a loss is no longer finite.
    """
    ranks, checkpoints = run.ranks, folder / "checkpoints"
    if state := load_newest(checkpoints, run.device, run.like if run.sharded else None):
        run.load_state_dict(state)
    ranks.wait()  # else the first could write a new checkpoint while the last looks for the newest
    with closing(Progress(title, run.total, run.step, quiet=not ranks.first)) as progress:
        if state:
            progress.say(f"{title}: going on from iteration {run.step} of {run.total} ({checkpoints})")
        if run.step < run.total:
            opened = open_writers(log, folder, run.step, group=group or folder.name, stage=title) if ranks.first else nullcontext([])
            with opened as writers, signals() as caught:
                watching = [Health(folder, run.total, progress.say)] if ranks.first else []
                iterate(run, batch_at, folder, hooks, profile, progress, [*writers, progress, *watching], caught)
            if run.graphs:
                progress.say(f"{title}: {run.graphs}")


def iterate(
    run: Run, batch_at: BatchAt, folder: Path, hooks: Sequence[Hook], profile: Profile | None, progress: Progress,
    writers: Sequence[Any], caught: list[int],
) -> None:  # fmt: skip
    """The iterations that are left, with their log lines, hooks and checkpoints. caught: the signals that have come."""
    cfg, ranks, checkpoints = run.cfg, run.ranks, folder / "checkpoints"
    if cfg.micro_batch == "auto":
        run.batches.size = fitting_micro_batch(run, batch_at(run.step), progress.say)
    if run.compiled:
        cache_in(folder)
        progress.compiling(run.compiled)
    if run.graphs:
        run.graphs.say = progress.say
    if profile:
        profile.start(run.device, run.total - run.step)
    sharded = ShardedWriter(checkpoints, ranks, cfg.keep)
    clock = Clock(run)
    while run.step < run.total:
        with record_function(WAITING):
            batch = batch_at(run.step)
        with record_function(STEP):
            run.take(*batch)
        progress.advance()
        if profile:
            profile.step(progress.say)
        if run.step % cfg.log_iterations == 0 or run.step == run.total:
            metrics = run.meter.read(ranks)  # the only wait for the device
            check_finite(metrics, run.step, checkpoints)
            write(run, metrics, writers, clock.lap())
        for hook in hooks:
            if run.due(hook.kimg):
                with clock.stopped():
                    if metrics := hook.call(run):
                        write(run, metrics, writers)
        stop = ranks.stop(caught[0] if caught else 0)
        if run.due(cfg.checkpoint_kimg or cfg.kimg / 10) or stop:
            clock.tick()
            path, state = checkpoints, run.state_dict()
            if run.sharded:
                path = sharded.save(run.step, state)
            elif ranks.first:
                path = save_checkpoint(checkpoints, run.step, state, cfg.keep)
            if stop:
                sharded.finish()
                ranks.wait()
                raise Interrupted(stop, path)
    sharded.finish()


class Clock:
    """Adds up a run's training time; what hooks do does not count."""

    def __init__(self, run: Run):
        self.run, self.now = run, time.perf_counter()
        self.lap_seconds, self.lap_step = run.seconds, run.step

    def tick(self) -> None:
        now = time.perf_counter()
        self.run.seconds, self.now = self.run.seconds + now - self.now, now

    def lap(self) -> float:
        """Seconds per iteration since the last lap."""
        self.tick()
        per_step = (self.run.seconds - self.lap_seconds) / max(self.run.step - self.lap_step, 1)
        self.lap_seconds, self.lap_step = self.run.seconds, self.run.step
        return per_step

    @contextmanager
    def stopped(self):
        self.tick()
        yield
        self.now = time.perf_counter()


def write(run: Run, metrics: dict[str, float], writers: Sequence[Any], seconds_per_step: float = 0.0) -> None:
    """Hand a line of metrics to all writers. seconds_per_step: 0 where it was not measured."""
    line: dict[str, Any] = {"step": run.step, "kimg": run.kimg, "seconds": round(run.seconds, 3)}
    if seconds_per_step:
        line["images_per_second"] = round(run.cfg.batch / seconds_per_step, 1)
    for writer in writers:
        writer.write(line | metrics)


def check_finite(metrics: dict[str, float], step: int, checkpoints: Path) -> None:
    """Stop at the first log line with a loss that is not a number, naming it."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"{bad[0]} is not finite at iteration {step}: lower train.optim.<net>.lr or set a clip; checkpoints from before are in {checkpoints}"
        )


@contextmanager
def signals():
    """Collects SIGINT and SIGTERM in a list instead of dying; a second one of the same kind kills as usual."""
    caught: list[int] = []
    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def handle(signum: int, frame: Any) -> None:
        caught.append(signum)
        signal.signal(signum, previous[signal.Signals(signum)])

    for signum in previous:
        signal.signal(signum, handle)
    try:
        yield caught
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
