"""One page about a run: numbers, pictures, curves, settings. A single file that opens offline and runs no script.

Here is what it says; report.html beside this file is how it looks.
"""

import base64
import json
import math
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined

from potstill.engine.common.errors import UserError
from potstill.engine.common.kinds import is_number
from potstill.engine.common.packages import versions_of
from potstill.engine.common.writing import whole
from potstill.engine.measure.summary import read_summary

MOST_GRIDS = 8  # of the sample grids over time
PACKAGES = ("potstill", "torch", "triton", "numpy", "torchmetrics", "safetensors")
BOOKKEEPING = ("/nonfinite", "images_per_second")  # curves that are shown last
HEALTH = ("/grad_norm", "/variance_ratio", "/variance", "/accuracy", "/logit_fake", "/logit_real")  # what alarms look at, with /gap@σ

Curve = list[tuple[float, float]]
Place = tuple[float, str]  # a pixel, and the text that stands there

WIDTH, HEIGHT = 360, 200
DATA = {"data": 1.0}  # the level in charts of ratios to the data
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26
POINTS = 240  # drawn per curve; longer ones are averaged in equal pieces
LOG_RANGE = 30.0  # a positive curve that spans more than this factor is drawn on a logarithmic scale
BESIDES = {"step", "kimg", "seconds"}  # of a metrics line: the axis, not curves


@dataclass
class Chart:
    """One curve in pixels. `levels` are horizontal lines with their names; `last` is the curve's last value."""

    points: list[tuple[float, float]]
    x_ticks: list[Place]
    y_ticks: list[Place]
    levels: list[Place]
    last: str


def write_report(run_dir: Path) -> Path:
    """Write report.html from what a run folder holds by now, and return its path. Parts that are missing say so."""
    run_dir = Path(run_dir)
    summary, teacher, path = _summary(run_dir), run_dir / "teacher", run_dir / "report.html"
    levels = {"fd@": {who: fd for who in ("teacher", "floor") if is_number(fd := summary.get(who, {}).get("fd"))}} | _levels_of_scores(
        summary
    )
    curves = read_curves(run_dir / "metrics.jsonl")
    health = {name: curve for name, curve in curves.items() if name.endswith(HEALTH) or "/gap@" in name}
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = page.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).render(
        title=run_dir.resolve().name,
        lead=_lead(summary),
        tiles=list(_tiles(summary)),
        samples=_pictures([run_dir / "samples.png"]),
        alarms=[alarm for stage in (run_dir, teacher, *sorted(run_dir.glob("student-*"))) for alarm in read_alarms(stage)],
        health_charts=_charts(health, {}),
        student_charts=_charts({name: curve for name, curve in curves.items() if name not in health}, levels),
        student_grids=_grids(run_dir / "samples"),
        teacher_charts=_charts(read_curves(teacher / "metrics.jsonl"), {}),
        teacher_grids=_grids(teacher / "samples"),
        files=[(file.name, _text(file)) for file in (run_dir / "config.yaml", run_dir / "summary.json")],
        versions=summary.get("versions") or versions(),
        width=WIDTH, height=HEIGHT, left=LEFT, right=RIGHT,
    )  # fmt: skip
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def _lead(summary: dict[str, Any]) -> str:
    """The result in a sentence."""
    student, nfe, teacher, teacher_nfe = (summary.get(who, {}).get(key) for who in ("student", "teacher") for key in ("fd", "nfe"))
    scores = summary.get("student", {}).get("scores")
    if not is_number(nfe) or not (is_number(student) or scores):
        return "This run has not been scored yet."
    evaluations = f"{nfe:g} network evaluation{'' if nfe == 1 else 's'}"
    if not is_number(student):
        return f"The student reaches {', '.join(f'{name} {short(mean)}' for name, mean in scores.items())} with {evaluations} per image."
    text = f"The student reaches {summary['student'].get('features') or 'FD'} {short(student)} with {evaluations} per image"
    return f"{text}, its teacher {short(teacher)} with {teacher_nfe:g}." if is_number(teacher) and is_number(teacher_nfe) else f"{text}."


def _tiles(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The headline numbers, and what they are."""
    for who in ("student", "teacher"):
        if is_number(fd := summary.get(who, {}).get("fd")):
            nfe = summary.get(who, {}).get("nfe")
            yield short(fd), f"{who}, {summary[who].get('features') or 'FD'}" + (f" at NFE {nfe:g}" if is_number(nfe) else "")
    if is_number(fd := summary.get("floor", {}).get("fd")):
        yield short(fd), "floor: real against real at the same n"
    for who, what in (("student", "student"), ("teacher", "teacher"), ("real", "real pictures with their captions")):
        for figure, mean in summary.get(who, {}).get("scores", {}).items():
            yield short(mean), f"{what}, {figure}"
    if is_number(images := summary.get("images_seen")):
        yield short(images), "images seen"
    for name, value in summary.get("seconds", {}).items():
        if is_number(value):
            yield _duration(value), f"time: {name}"


def _levels_of_scores(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By the names of the curves, those of the teacher and of real pictures."""
    found: dict[str, dict[str, float]] = {}
    for who in ("teacher", "real"):
        for figure, mean in summary.get(who, {}).get("scores", {}).items():
            found.setdefault(f"score/{figure}", {})[who] = mean
    return found


def _charts(found: dict[str, Curve], levels: dict[str, dict[str, float]]) -> list[tuple[str, Chart]]:
    """A chart per metric: distances and scores first, book-keeping last; `levels`: of distances by "fd@", of others by their names."""
    order = sorted(found, key=lambda name: (name.endswith(BOOKKEEPING), not name.startswith("fd@"), not name.startswith("score/")))
    lines = {name: levels.get("fd@" if name.startswith("fd@") else name) for name in order}
    return [(name, chart(found[name], DATA if name.endswith("_ratio") else lines[name])) for name in order]


def _grids(folder: Path) -> list[tuple[str, str]]:
    """Some of a folder's pictures, first and last among them, in the order of the numbers in their names."""
    found = sorted(folder.glob("*.png"), key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", p.stem)])
    last, most = len(found) - 1, min(MOST_GRIDS, len(found))
    return _pictures([found[round(i * last / max(most - 1, 1))] for i in range(most)])


def _pictures(paths: list[Path]) -> list[tuple[str, str]]:
    """Their names and, as base64, their bytes; those that are there."""
    return [(path.stem, base64.b64encode(path.read_bytes()).decode()) for path in paths if path.is_file()]


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def versions() -> dict[str, str]:
    """Of what a run depends on, and the devices it sees."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    device = ", ".join(names) or f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return {"python": platform.python_version()} | versions_of(*PACKAGES) | {"device": device}


def _summary(run_dir: Path) -> dict[str, Any]:
    """summary.json; {} where it cannot be read, so that the page, which shows its text, still comes into being."""
    try:
        found = read_summary(run_dir) or {}
    except UserError:
        return {}
    return {name: value for name, value in found.items() if value is not None}


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


# A small line chart: where its points and ticks are.


def read_curves(metrics: Path) -> dict[str, Curve]:
    """Every number of a metrics.jsonl against thousands of images: name -> [(kimg, value)]; {} where there is no file.

    A last line cut short by a crash, lines of something else and values that are not finite are left out.
    """
    curves: dict[str, Curve] = {}
    for x, entry in _entries(metrics):
        for name, y in entry.items():
            if name not in BESIDES and is_number(y):
                curves.setdefault(name, []).append((x, y))
    return curves


def read_alarms(stage: Path) -> list[tuple[str, str]]:
    """When alarms rose in a stage's folder, and their sentences (training/health.py)."""
    found = _entries(stage / "metrics.jsonl")
    return [(f"{stage.name}, {short(x)} kimg", entry["alarm"]) for x, entry in found if isinstance(entry.get("alarm"), str)]


def _entries(metrics: Path) -> Iterator[tuple[float, dict[str, Any]]]:
    """What can be read of a metrics.jsonl: thousands of images, and the line."""
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        x = entry.get("kimg", entry.get("step")) if isinstance(entry, dict) else None
        if is_number(x):
            yield x, entry


def chart(curve: Curve, levels: Mapping[str, float] | None = None) -> Chart:
    """Where a curve and horizontal lines at `levels` lie; logarithmic where they are positive and far apart."""
    levels = levels or {}
    points = _thinned(sorted(curve))
    values = [y for _, y in curve] + list(levels.values())
    log = min(values) > 0 and max(values) > LOG_RANGE * min(values)
    scale = math.log10 if log else float
    low, high = scale(min(values)), scale(max(values))
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    low, high = low - margin, high + margin
    start, end = points[0][0], points[-1][0]

    def across(x: float) -> float:
        return LEFT + (WIDTH - RIGHT - LEFT) * (x - start) / (end - start or 1)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (scale(y) - low) / (high - low)

    return Chart(
        points=[(across(x), up(y)) for x, y in points],
        x_ticks=[(across(x), short(x)) for x in _ticks(start, end, 5)],
        y_ticks=[(up(y), short(y)) for y in (_log_ticks(low, high) if log else _ticks(low, high, 4))],
        levels=[(up(y), f"{name} {short(y)}") for name, y in levels.items()],
        last=short(curve[-1][1]),
    )


def short(value: float) -> str:
    """A number for an axis or a headline: at most four digits, k and M for thousands and millions."""
    for unit, name in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _thinned(points: Curve) -> Curve:
    """Means over equal pieces, so that nothing is dropped; the last point stays."""
    if len(points) <= POINTS:
        return points
    return [(x, y) for x, y in (piece.mean(0).tolist() for piece in np.array_split(points, POINTS)[:-1])] + points[-1:]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers within [low, high]."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * about >= high - low)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten with exponents within [low, high], at most five; of less than three decades their double and fivefold, too."""
    decades = [10.0**e for e in range(math.floor(low), math.floor(high) + 1)]
    if len(decades) > 3:
        return decades[1 :: math.ceil((len(decades) - 1) / 5)]
    return [m * decade for decade in decades for m in (1, 2, 5) if low <= math.log10(m * decade) <= high]
