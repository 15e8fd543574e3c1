"""Alarms of a run: what its log lines say when it goes wrong, in one sentence with advice. Nothing is stopped.

`Health` takes log lines as the other writers do, so it sees the numbers that were read anyway. Every rule looks at several lines
in a row; a kind of alarm rises again after REPEAT lines at the earliest. Alarms are printed, and kept in metrics.jsonl as lines
with `alarm`; a resumed run reads that file and goes on as if it had not stopped.

    variance       the student's images have become alike, or far too varied (variance_ratio; methods/vitals.py)
    gradient       a net's gradient norm is many times what it was
    discriminator  its logits are all but always right
    gap            fake net and teacher disagree ever more, at every noise level
    still          fake net and teacher are still the same
    nonfinite      many samples have no finite loss
    distance       the Fréchet distance within the run (train.eval_kimg) has risen, and not come back
"""

import json
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from potstill.engine.common.errors import writing

ROW = 3  # lines in a row that a rule wants
REPEAT = 20  # lines between two alarms of a kind
MEMORY = 200  # lines that are looked at

ALIKE, SUNK = 0.25, 0.5  # of the data's variance, and of what it was: a student may start as a mean image, and rises
NEVER_RISEN = 0.1  # of the data's variance, when the student has learnt for a fifth of the run
VARIED, SATURATED = 3.0, 1.5  # of the data's variance
GROWTH = 10.0  # of a gradient norm, beside all but the highest tenth of those before
EARLIER = 5  # lines that there must be of them
ALWAYS_RIGHT = 0.99  # accuracy of a discriminator
WIDENING, WIDE = 1.5, 0.5  # growth of a gap from three lines to the next three, and what it must have reached
STILL = 3e-4  # a gap so small, past a twentieth of the run; recipes that work have 0.01 and more
BAD_SHARE = 0.01  # of an interval's samples
RISEN, AGAIN = 1.3, 2  # of the least distance before, and for so many measurements in a row

Lines = Sequence[dict[str, Any]]


class Health:
    """Takes the lines of a stage of `total` iterations whose metrics.jsonl is in `folder`; `say` prints a sentence."""

    def __init__(self, folder: Path, total: int, say: Callable[[str], None]):
        self.file, self.total, self.say = folder / "metrics.jsonl", total, say
        self.lines: deque[dict[str, Any]] = deque(maxlen=MEMORY)
        self.distances: list[float] = []
        self.count = 0
        self.said: dict[str, int] = {}  # kind -> which line it last rose at
        for line in map(json.loads, self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []):
            if "alarm" in line:
                self.said[line["kind"]] = self.count
            elif not self._measured(line):
                self._remember(line)

    def write(self, metrics: dict[str, Any]) -> None:
        """Look at a new line: of distances by their rule, of the training by all others."""
        if self._measured(metrics):
            rules = {"distance": lambda lines, total: distance(self.distances)}
        elif self._remember(metrics):
            rules = RULES
        else:
            return
        for kind, rule in rules.items():
            if self.count - self.said.get(kind, -REPEAT) >= REPEAT and (sentence := rule(tuple(self.lines), self.total)):
                self.said[kind] = self.count
                self.say(f"alarm at iteration {metrics['step']}: {sentence}")
                alarm = {"step": metrics["step"], "kimg": metrics["kimg"], "kind": kind, "alarm": sentence}
                with writing(self.file), self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(alarm) + "\n")

    def _measured(self, line: dict[str, Any]) -> bool:
        """Is this a line of a distance?"""
        found = [value for name, value in line.items() if name.startswith("fd@")]
        self.distances += found
        return bool(found)

    def _remember(self, line: dict[str, Any]) -> bool:
        if not (of_training := any("/" in name and not name.startswith("score/") for name in line)):
            return False
        self.lines.append(line)
        self.count += 1
        return of_training


def values(lines: Lines, name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def names(lines: Lines, *endings: str) -> list[str]:
    """The metrics of the newest line that end so."""
    return [name for name in lines[-1] if name.endswith(endings)]


def variance(lines: Lines, total: int) -> str | None:
    """Alike: below ALIKE for ROW lines and sunk, or never risen. Without data all is measured by the most it has held so long."""
    for name in names(lines, "/variance_ratio", "/variance"):
        seen = values(lines, name)
        if len(seen) < ROW:
            continue
        held = max(min(seen[i : i + ROW]) for i in range(len(seen) - ROW + 1))
        known = name.endswith("_ratio")
        of, whose = (1.0, "the data's") if known else (held or 1.0, "what it was")
        least, most = max(seen[-ROW:]) / of, min(seen[-ROW:]) / of
        waited = next(line["step"] for line in lines if name in line) if name not in lines[0] else 0  # SiDA's student begins later
        if (least < ALIKE and least < SUNK * held / of) or (least < NEVER_RISEN and lines[-1]["step"] - waited > total / 5):
            return (
                f"the variance of the student's images is {least:.2g} of {whose}: they are alike (mode collapse), which rarely mends itself; "
                "go on from an earlier checkpoint with a lower train.optim.student.lr, or with more turns or a higher rate for its opponent"
            )
        if known and most > VARIED:
            return (
                f"the variance of the student's images is {most:.2g} times {whose}: they leave the range of images; "
                "lower train.optim.student.lr or set its clip"
            )
        if known and most > SATURATED:
            return (
                f"the variance of the student's images is {most:.2g} times {whose}: they have more contrast than any image of the data, as of "
                "a student that is guided further than sampling would; lower method.guidance, or distil the guided sampler itself (method=sfd)"
            )
    return None


def gradient(lines: Lines, total: int) -> str | None:
    """The least of the newest ROW against all but the highest tenth of those before."""
    for name in names(lines, "/grad_norm"):
        seen = values(lines, name)
        before = sorted(seen[:-ROW])
        if len(before) < EARLIER:
            continue
        usual, now = before[int(0.9 * (len(before) - 1))], min(seen[-ROW:])
        if now > GROWTH * usual > 0:
            net = name.partition("/")[0]
            return (
                f"{name} is {now:.3g}, {now / usual:.0f} times what it was: the training of {net} diverges; "
                f"lower train.optim.{net}.lr, or set train.optim.{net}.clip to about {usual:.2g}"
            )
    return None


def discriminator(lines: Lines, total: int) -> str | None:
    """Always right for 2 ROW lines, past a fifth of the run: at its start it is easily right."""
    for name in names(lines, "/accuracy"):
        seen = values(lines, name)[-2 * ROW :]
        if len(seen) == 2 * ROW and min(seen) > ALWAYS_RIGHT and lines[-1]["step"] > total / 5:
            net = name.partition("/")[0]
            return (
                f"{name} has been above {ALWAYS_RIGHT} for {2 * ROW} lines: the discriminator has won, and the student learns little from "
                f"it; lower train.optim.{net}.lr, raise method.r1_gamma if there is one, or let it judge noisier images"
            )
    return None


def gap(lines: Lines, total: int) -> str | None:
    """In every part: the mean of ROW lines is WIDENING times that of the ROW before, twice in a row, and wide by now."""
    found = [values(lines, name)[-3 * ROW :] for name in lines[-1] if "/gap@" in name]
    for seen in found:
        means = [sum(seen[i : i + ROW]) / ROW for i in range(0, len(seen), ROW)]
        if len(means) < 3 or means[2] < WIDE or any(b < WIDENING * a for a, b in zip(means, means[1:], strict=False)):
            return None
    if not found:
        return None
    return (
        "fake net and teacher disagree ever more at every noise level: the student runs away from a fake net that lags behind; "
        "raise train.optim.fake.lr or method.fake_per_student if there is one, or lower train.optim.student.lr"
    )


def still(lines: Lines, total: int) -> str | None:
    """Every part's gap below STILL for 2 ROW lines."""
    found = [values(lines, name)[-2 * ROW :] for name in lines[-1] if "/gap@" in name]
    if not found or lines[-1]["step"] <= total / 20 or any(len(seen) < 2 * ROW or max(seen) >= STILL for seen in found):
        return None
    return (
        f"fake net and teacher differ by less than {STILL:g} at every noise level: the fake net does not learn the student's images, "
        "so the student has nothing to go by; raise train.optim.fake.lr"
    )


def nonfinite(lines: Lines, total: int) -> str | None:
    """The share of the images since the line before."""
    images = 1000 * (lines[-1]["kimg"] - (lines[-2]["kimg"] if len(lines) > 1 else 0))
    for name in names(lines, "/nonfinite"):
        if (count := lines[-1][name]) > BAD_SHARE * images:
            net = name.partition("/")[0]
            return (
                f"{count:.0f} of {images:.0f} samples had no finite loss in {net}'s turn and were left out: numbers overflow; "
                f"lower train.optim.{net}.lr, or try precision=fp32"
            )
    return None


def distance(seen: Sequence[float]) -> str | None:
    """The newest AGAIN against the least before them."""
    before, now = seen[:-AGAIN], seen[-AGAIN:]
    if not before or min(now) < RISEN * min(before):
        return None
    return (
        f"the distance to the data is {now[-1]:.3g} and was {min(before):.3g}: the student moves away from the data, as one does that is guided "
        "more than its fake net can follow; go on from an earlier checkpoint with method.guidance nearer to 1, the same "
        "method.fake_guidance, more method.fake_per_student or a lower train.optim.student.lr"
    )


RULES: dict[str, Callable[[Lines, int], str | None]] = {
    "variance": variance, "gradient": gradient, "discriminator": discriminator, "gap": gap, "still": still, "nonfinite": nonfinite
}  # fmt: skip
