"""Where a run stands, in status.json of its folder: running, ended, stopped (the same command goes on) or failed, and its sentence."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from potstill.engine.common.errors import UserError
from potstill.engine.common.kinds import Kind, check, is_text, number
from potstill.engine.common.reading import read_json
from potstill.engine.common.writing import whole

FILE = "status.json"
RUNNING, ENDED, STOPPED, FAILED = STATES = ("running", "ended", "stopped", "failed")
EVERY = 30  # seconds between two looks of a browser at the page of a running run
TEXT = Kind(is_text, "a text")
KINDS = {"state": Kind(lambda value: value in STATES, f"one of {', '.join(STATES)}"), "stage": TEXT, "why": TEXT} | dict.fromkeys(
    ("at", "kimg", "of", "left"), number(0, 1e15)
)


@dataclass
class Status:
    """at: when it was so, in seconds since 1970. stage: what is done; of a training `kimg` of the `of` thousand images, and seconds left."""

    state: str
    at: float = 0.0
    stage: str = ""
    kimg: float = 0.0
    of: float = 0.0
    left: float = 0.0
    why: str = ""

    @property
    def running(self) -> bool:
        return self.state == RUNNING

    @property
    def sentence(self) -> str:
        """The state in words."""
        when = time.strftime("%Y-%m-%d at %H:%M", time.localtime(min(self.at, 1e11)))
        far = f", {self.kimg:.3g} of {self.of:.3g} kimg" if self.of else ""
        if not self.running:
            where = f" ({self.stage}{far})" if self.stage and self.why else ""
            return f"{self.state.capitalize()} on {when}{where}" + (f": {self.why}" if self.why else "") + "."
        left = f", about {duration(float(f'{self.left:.2g}'))} left" if self.of and self.kimg else ""
        again = f"the page looks again every {EVERY} s, and a run that was killed cannot say so"
        return f"Running: {self.stage or 'getting ready'}{far}{left} (on {when}; {again})."


def write_status(run_dir: Path, status: Status) -> None:
    status.at = status.at or round(time.time(), 1)
    with whole(run_dir / FILE) as part:
        part.write_text(json.dumps(asdict(status)) + "\n", encoding="utf-8")


def read_status(run_dir: Path) -> Status | None:
    """None where there is none, as of a run of an earlier version, or none that can be read."""
    path = run_dir / FILE
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = read_json(path, dict, "")
        check(path, found, KINDS, "")
    except UserError:
        return None
    return Status(**{name: value for name, value in found.items() if name in KINDS}) if "state" in found else None


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
