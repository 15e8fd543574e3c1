"""The training loop: a batch, an iteration (`Run.take`), and now and then a log line, a hook or a checkpoint."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import record_function

from potstill.engine.common.signals import Interrupted, collected
from potstill.engine.training.compile import cache_in
from potstill.engine.training.health import Health
from potstill.engine.training.log import LogConfig, Progress, open_writers
from potstill.engine.training.memory import fitting_micro_batch
from potstill.engine.training.profile import STEP, WAITING, Profile
from potstill.engine.training.rollback import Rollback
from potstill.engine.training.run import Run
from potstill.engine.training.saver import Saver
from potstill.engine.training.states import NotFinite

BatchAt = Callable[[int], tuple[Any, ...]]  # iteration -> this rank's `Share`, or a tuple of its first parts


@dataclass
class Hook:
    """Something done every `kimg` thousand images and at the end; what it returns goes into the metrics."""

    kimg: float
    call: Callable[["Run"], dict[str, float]]


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
    """Run to the end, from the newest whole checkpoint in folder/checkpoints if there is one.

    `title` is what this stage is called, `group` what all stages of a run are, by default the folder's name.
    Raises Interrupted after saving on SIGINT, SIGTERM, SIGUSR1 or SIGALRM; UserError when a number is no longer finite, unless
    `train.on_nonfinite=rollback` finds a way round.
    """
    ranks = run.ranks
    saver = Saver(run, folder)
    with closing(Progress(title, run.total, run.step, quiet=not ranks.first)) as progress:
        if saver.load(progress.say):
            progress.back_to(run.step)
            progress.say(f"{title}: going on from iteration {run.step} of {run.total} ({saver.checkpoints})")
        elif run.cfg.on_nonfinite == "rollback":
            saver.save()  # something to go back to
        if run.step < run.total:
            prepare(run, batch_at, folder, profile, progress)
        rollback = Rollback(run, saver, progress.say)
        while run.step < run.total:
            opened = open_writers(log, folder, run.step, group=group or folder.name, stage=title) if ranks.first else nullcontext([])
            with opened as writers, collected() as caught, little_garbage():
                health = [Health(folder, run.total, progress.say)] if ranks.first else []
                try:
                    iterate(run, batch_at, saver, hooks, profile, progress, [*writers, progress, *health], caught, rollback)
                    saver.finish()
                except NotFinite as found:
                    rollback.after(found)
                    progress.back_to(run.step)
                stop = ranks.stop(caught[0] if caught else 0, last=True)
            if caught and not stop:  # while the answer was on its way: alone it counts at once, else in the next stage
                stop, ranks.late = (0, caught[0]) if ranks.several else (caught[0], 0)
            if stop:  # in the last iteration, or meanwhile
                raise Interrupted(stop, f"saved {saver.checkpoints}; the same command goes on from there")
        if run.graphs:
            progress.say(f"{title}: {run.graphs}")


def prepare(run: Run, batch_at: BatchAt, folder: Path, profile: Profile | None, progress: Progress) -> None:
    """What comes once, before the first iteration of this call."""
    if run.cfg.micro_batch == "auto":
        run.batches.size = fitting_micro_batch(run, batch_at(run.batch_number(run.step)), progress.say)
    if run.compiled:
        cache_in(folder)
        progress.compiling(run.compiled)
    if run.graphs:
        run.graphs.say = progress.say
    if profile:
        profile.start(run.device, run.total - run.step)


@contextmanager
def little_garbage() -> Iterator[None]:
    """What lives now, nets, data and libraries, is left out when Python looks for garbage: up to a tenth of a small net's step.

    A program that has left out things of its own is left alone.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def iterate(
    run: Run, batch_at: BatchAt, saver: Saver, hooks: Sequence[Hook], profile: Profile | None, progress: Progress,
    writers: Sequence[Any], caught: list[int], rollback: Rollback,
) -> None:  # fmt: skip
    """The iterations that are left, with their log lines, hooks and checkpoints. caught: the signals that have come."""
    cfg, ranks = run.cfg, run.ranks
    clock = Clock(run)
    while run.step < run.total:
        with record_function(WAITING):
            batch = batch_at(run.batch_number(run.step))
        with record_function(STEP):
            run.take(*batch)
        progress.advance()
        if profile:
            profile.step(progress.say)
        if rollback.watching:
            rollback.look()
        if run.step % cfg.log_iterations == 0 or run.step == run.total:
            metrics = run.meter.read(ranks)  # with a glance every few seconds the only wait for the device
            check_finite(metrics, run.step)
            write(run, metrics, writers, clock.lap())
        elif progress.due:
            progress.glance(run.kimg, run.meter.glance())
        for hook in hooks:
            if run.due(hook.kimg):
                with clock.stopped():
                    saver.checked()  # else pictures of broken weights are what a diverged run ends with
                    if metrics := hook.call(run):
                        write(run, metrics, writers)
        stop = ranks.stop(caught[0] if caught else ranks.late)
        if run.due(cfg.checkpoint_kimg or cfg.kimg / 10) or stop:
            clock.tick()
            path = saver.save()
            if stop:
                saver.finish()
                ranks.wait()
                raise Interrupted(stop, f"saved {path}; the same command goes on from there")


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


def check_finite(metrics: dict[str, float], step: int) -> None:
    """NotFinite, naming it, where a metric is not a number."""
    if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise NotFinite(bad[0], step)
