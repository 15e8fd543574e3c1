"""The numbers of a metrics file as small line charts: SVG that takes its colour from the text around it."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TypeGuard

Curve = list[tuple[float, float]]

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26
POINTS = 240  # drawn per curve; longer ones are averaged in equal pieces
LOG_RANGE = 30.0  # a positive curve that spans more than this factor is drawn on a logarithmic scale
BESIDES = {"step", "kimg", "seconds"}  # of a metrics line: the axis, not curves


def read_curves(metrics: Path) -> dict[str, Curve]:
    """Every number of a metrics.jsonl against thousands of images: name -> [(kimg, value)]; {} where there is no file.

    A last line cut short by a crash, lines of something else and values that are not finite are left out.
    """
    curves: dict[str, Curve] = {}
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        x = entry.get("kimg", entry.get("step")) if isinstance(entry, dict) else None
        if not _number(x):
            continue
        for name, y in entry.items():
            if name not in BESIDES and _number(y):
                curves.setdefault(name, []).append((x, y))
    return curves


def chart(curve: Curve, *, levels: Mapping[str, float] | None = None, label: str = "kimg") -> str:
    """One curve as an SVG of the class "chart"; `levels` are dashed horizontal lines with their names."""
    levels = {name: y for name, y in (levels or {}).items() if _number(y)}
    points = _thinned(sorted(curve), POINTS)
    values = [y for _, y in curve] + list(levels.values())
    log = min(values) > 0 and max(values) > LOG_RANGE * min(values)
    x_low, x_high = points[0][0], points[-1][0]
    y_low, y_high = _padded(min(values), max(values), log)
    across = _scale(x_low, x_high if x_high > x_low else x_low + 1, LEFT, WIDTH - RIGHT, False)
    up = _scale(y_low, y_high, HEIGHT - BOTTOM, TOP, log)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" fill="currentColor" font-size="11">']
    for y in _log_ticks(y_low, y_high) if log else _ticks(y_low, y_high, 4):
        parts.append(_line(up(y), 'class="rule" stroke-opacity="0.15"'))
        parts.append(f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in _ticks(x_low, x_high, 5):
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{short(x)}</text>')
    parts.append(f'<text x="4" y="{HEIGHT - 8}">{escape(label)}</text>')
    for name, y in levels.items():
        parts.append(_line(up(y), 'class="level" stroke-opacity="0.6" stroke-dasharray="5 4"'))
        parts.append(f'<text x="{LEFT + 4}" y="{up(y) - 4:.1f}">{escape(name)} {short(y)}</text>')
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
    parts.append(f'<polyline class="curve" fill="none" stroke="currentColor" stroke-width="2" points="{path}"/>')
    if len(points) <= 30:
        parts += [
            f'<circle class="dot" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"><title>{short(x)} {escape(label)}: {y:.5g}</title></circle>'
            for x, y in points
        ]
    return "".join([*parts, "</svg>"])


def _line(y: float, look: str) -> str:
    """A horizontal line across the chart."""
    return f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" {look}/>'


def short(value: float) -> str:
    """A number for an axis or a headline: at most four digits, k and M for thousands and millions."""
    for unit, name in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _thinned(points: Curve, most: int) -> Curve:
    """Means over equal pieces, so that nothing is dropped; the last point stays."""
    if len(points) <= most:
        return points
    pieces = [points[len(points) * i // most : len(points) * (i + 1) // most] for i in range(most)]
    return [(_mean([x for x, _ in p]), _mean([y for _, y in p])) for p in pieces[:-1]] + [points[-1]]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """A range around [low, high] that the curve does not touch the edges of."""
    if log:
        margin = (high / low) ** 0.06
        return low / margin, high * margin
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def _scale(low: float, high: float, start: float, end: float, log: bool):
    """The map from [low, high] to pixels [start, end]."""
    if log:
        return lambda v: start + (end - start) * math.log(v / low) / math.log(high / low)
    return lambda v: start + (end - start) * (v - low) / (high - low)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers within [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], at most five; with 2 and 5 times them where they are few."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    if last - first <= 1:
        ticks = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
    else:
        ticks = [10.0**e for e in range(first, last + 1, math.ceil((last - first + 1) / 5))]
    return [y for y in ticks if low <= y <= high]
