"""What a run says of itself: metrics.jsonl always, TensorBoard and W&B by choice, and one progress line on the terminal."""

# wandb is optional.
# pyright: reportMissingImports=false

import json
import math
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from potstill.engine.common.errors import UserError, reading, writing
from potstill.engine.common.progress import EVERY, Pulse, tell, tqdm_bar
from potstill.engine.common.writing import whole
from potstill.engine.methods.base import Logs
from potstill.engine.training.ranks import ALONE, Ranks


@dataclass
class LogConfig:
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True  # event files in <run>/tensorboard
    wandb: str | None = None  # project of Weights & Biases (the extra `wandb`); null: off


class Meter:
    """Means of device tensors between two log lines. Adding never waits for the device; reading does, once."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, logs: Logs) -> None:
        for name, value in logs.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Means over ranks since the last read (totals for counts of non-finite samples), then starts afresh."""
        values = dict(zip(self.sums, self._over(ranks).tolist(), strict=True))
        means = {n: v if is_count(n) else v / self.counts[n] for n, v in values.items()}
        self.sums, self.counts = {}, {}
        return means

    def glance(self) -> dict[str, float]:
        """Means of this rank alone so far, for eyes; it waits for the device, and changes nothing."""
        values = torch.stack([v.reshape(()) for v in self.sums.values()]).tolist() if self.sums else []
        return {n: v / self.counts[n] for n, v in zip(self.sums, values, strict=True)}

    def finite(self, ranks: Ranks = ALONE) -> bool:
        """Are all means finite so far? It waits for the device."""
        return bool(self._over(ranks).isfinite().all())

    def state_dict(self, ranks: Ranks = ALONE) -> dict[str, Any]:
        """The same on all ranks, and for any number of them."""
        return {"sums": dict(zip(self.sums, self._over(ranks), strict=True)), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks = ALONE) -> None:
        self.sums = {n: v / ranks.count if is_count(n) else v.clone() for n, v in state["sums"].items()}
        self.counts = dict(state["counts"])

    def _over(self, ranks: Ranks) -> Tensor:
        """The sums, averaged over ranks; counts added up."""
        if not self.sums:
            return torch.zeros(0)
        values = ranks.total(torch.stack([v.reshape(()) for v in self.sums.values()]))
        return torch.stack([v if is_count(n) else v / ranks.count for n, v in zip(self.sums, values, strict=True)])


def is_count(name: str) -> bool:
    """Is this metric a number of samples, to be added up, and not a mean?"""
    return name.endswith("/nonfinite")


class MetricsFile:
    """metrics.jsonl: one JSON object a line. A resumed run drops the lines its checkpoint had not seen, and what is no such line."""

    def __init__(self, path: Path, first_step: int):
        self.path = path
        with reading(path):
            before = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in before if line.endswith(b"\n") and _step_of(line) <= first_step]
        if kept != before or not path.exists():
            with whole(path) as part:
                part.write_bytes(b"".join(kept))

    def write(self, metrics: dict[str, Any]) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")


def _step_of(line: bytes) -> float:
    """The iteration of a line of metrics.jsonl; infinite for what is no line of it, such as one that a crash cut short."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


class TensorBoard:
    """The same numbers for TensorBoard, under <folder>/tensorboard."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only when it is wanted

        self.folder = folder / "tensorboard"
        with writing(self.folder):  # what was written of the stretch that comes now does not count
            self.writer = SummaryWriter(str(self.folder), purge_step=first_step + 1 if self.folder.exists() else None)

    def write(self, metrics: dict[str, Any]) -> None:
        with writing(self.folder):
            for name, value in metrics.items():
                if name != "step":
                    self.writer.add_scalar(name, value, metrics["step"])
            self.writer.flush()

    def close(self) -> None:
        with writing(self.folder):
            self.writer.close()


class WandB:
    """The same numbers for Weights & Biases: one run a stage, in the group of its run folder.

    Its id lies beside the checkpoints, so a stage that goes on from one goes on there, and one that starts over does not.
    Lines that W&B has from before a crash come again with the same step and the same numbers, and are dropped there.
    With WANDB_MODE=offline everything stays in <folder>/wandb, for `wandb sync`. Without a login W&B asks on a terminal
    and refuses elsewhere, which is a UserError.
    """

    def __init__(self, folder: Path, project: str, *, group: str, stage: str):
        try:
            import wandb
        except ImportError:
            raise UserError("log.wandb wants the wandb package: pip install 'potstill[wandb]'") from None
        id_file = folder / "checkpoints" / "wandb-id"
        if not id_file.exists():
            with whole(id_file) as part:
                part.write_text(secrets.token_hex(8), encoding="utf-8")
        try:
            self.run = wandb.init(
                project=project, dir=str(folder), id=id_file.read_text(encoding="utf-8"), resume="allow",
                name=f"{group} {stage}", group=group, job_type=stage,
            )  # fmt: skip
        except wandb.Error as error:
            raise UserError(
                f"W&B starts no run ({error}): wandb login, or WANDB_MODE=offline in the environment, or log.wandb=null"
            ) from error

    def write(self, metrics: dict[str, Any]) -> None:
        self.run.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])

    def close(self, error: type[BaseException] | None, *_: Any) -> None:
        """Else the next stage's `wandb.init` would return this one's run, and drop what has a lower step."""
        self.run.finish(exit_code=0 if error is None else 1)


@contextmanager
def open_writers(config: LogConfig, folder: Path, first_step: int, *, group: str, stage: str) -> Iterator[list[Any]]:
    """Everything that takes metrics of a stage from iteration `first_step` on; closed when it ends, however it does."""
    with ExitStack() as stack:
        opened: list[Any] = []
        if config.tensorboard:
            opened.append(board := TensorBoard(folder, first_step))
            stack.callback(board.close)
        if config.wandb:
            opened.append(wandb := WandB(folder, config.wandb, group=group, stage=stage))
            stack.push(wandb.close)
        yield [MetricsFile(folder / "metrics.jsonl", first_step), *opened]


LOOK = 0.8 * EVERY  # seconds after which losses are read again, before the line is due


class Progress:
    """A bar on a terminal, a line now and then elsewhere: kimg, img/s, time left, and the newest metrics.

    Off a terminal there is one in the first seconds and then one every ten at least, whatever the work is at.
    quiet: show nothing, on a rank that leaves it to another.
    """

    def __init__(self, title: str, total: int, done: int, *, line_every: float = 5.0, quiet: bool = False):
        self.title, self.total, self.line_every, self.last_line, self.quiet = title, total, line_every, 0.0, quiet
        self.step, self.per_step, self.losses, self.speed, self.looked = done, 0.0, {}, 0.0, 0.0
        self.first, self.began = done, time.monotonic()
        self.bar = tqdm_bar(total=total, initial=done, desc=title, unit="it") if not quiet and sys.stderr.isatty() else None
        self.pulse = Pulse(self._line if self.bar is None else lambda: None) if not quiet else None

    def advance(self) -> None:
        self.step += 1
        if self.bar is not None:
            self.bar.update()

    def back_to(self, step: int) -> None:
        """The iterations that are done, where they are not those that were shown."""
        self.step = self.first = step
        self.began = time.monotonic()
        if self.bar is not None:
            self.bar.initial = self.bar.n = step
            self.bar.refresh()

    @property
    def due(self) -> bool:
        """Is it time to show newer losses? At the first iteration, and then every few seconds."""
        return not self.quiet and (self.step == self.first + 1 or time.monotonic() - self.looked >= LOOK)

    def glance(self, kimg: float, metrics: dict[str, float]) -> None:
        """How it is between two lines of metrics: the means of this rank so far."""
        self._take(kimg, metrics)
        self._show()

    def write(self, metrics: dict[str, Any]) -> None:
        """The newest numbers; off a terminal at most every few seconds, and always the last."""
        self.step, self.speed = metrics["step"], metrics.get("images_per_second", 0.0)
        self._take(metrics["kimg"], metrics)
        if self.bar is not None or self.step == self.total or time.monotonic() - self.last_line >= self.line_every:
            self._show()

    def _take(self, kimg: float, metrics: dict[str, Any]) -> None:
        left_out = ("grad_norm", "nonfinite")
        self.losses = {k: f"{v:.4g}" for k, v in metrics.items() if "/" in k and "@" not in k and not k.endswith(left_out)}
        self.losses |= {k: f"{v:.4g}" for k, v in metrics.items() if k.startswith("fd@")}
        self.per_step, self.looked = kimg / self.step, time.monotonic()

    def _show(self) -> None:
        if self.pulse is not None:
            self.pulse.spoken()
        if self.bar is not None:
            self.bar.set_postfix(self.losses | ({"img/s": f"{self.speed:.0f}"} if self.speed else {}))
        elif not self.quiet:
            self._line()

    def _line(self) -> None:
        """Of the newest numbers, which may be some iterations old."""
        self.last_line = time.monotonic()
        parts = [f"{k} {v}" for k, v in self.losses.items()]
        if self.speed:
            parts.append(f"{self.speed:.0f} img/s")
        if (new := self.step - self.first) > 0 and self.step < self.total:
            seconds = (time.monotonic() - self.began) / new
            parts.append(f"{tqdm.format_interval((self.total - self.step) * seconds)} left")
        tell("  ".join([f"{self.title} {self.step}/{self.total}", f"{self.step * self.per_step:.1f} kimg", *parts]))

    def compiling(self, modules: int) -> None:
        """Why the first iterations take so long; on a terminal it stands in the bar until there are numbers."""
        if self.bar is not None:
            self.bar.set_postfix_str("compiling…")
        self.say(f"{self.title}: compiling {modules} modules; the first iterations take minutes")

    def say(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.pulse is not None:
            self.pulse.close()
        if self.bar is not None:
            self.bar.close()
