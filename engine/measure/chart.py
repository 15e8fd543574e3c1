"""A small line chart of a metrics.jsonl: where its points and ticks are."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potstill.engine.common.kinds import is_number

Curve = list[tuple[float, float]]
Place = tuple[float, str]  # a pixel, and the text that stands there

WIDTH, HEIGHT = 360, 200
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
    start, end = min(points[0][0], 0.0), points[-1][0]

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
    if abs(value) >= 1e9:
        return f"{value:.3g}"
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
