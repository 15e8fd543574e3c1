"""One page about a run: numbers, pictures, curves, settings. A single file that opens offline and runs no script."""

import base64
import json
import platform
import re
from collections.abc import Iterable, Mapping
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from potstill.engine.common.whole import whole
from potstill.engine.measure.curves import Curve, chart, read_curves, short

NOT_YET = '<p class="missing">not there yet</p>'
MOST_GRIDS = 8  # of the sample grids over time
PACKAGES = ("potstill", "torch", "triton", "numpy", "torchmetrics", "safetensors")
BOOKKEEPING = ("/nonfinite", "/grad_norm", "images_per_second")  # curves that are shown last

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f4; --card: #fff; --ink: #1c1c1a; --soft: #6b6b66; --line: #e3e3de; --accent: #2563b0 }
@media (prefers-color-scheme: dark) {
  :root { --page: #161615; --card: #1f1f1d; --ink: #ececea; --soft: #a0a09a; --line: #383835; --accent: #7fb2f0 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.7rem } h2 { margin: 2.5rem 0 .8rem; font-size: 1.15rem } h3 { margin: 0 0 .3rem; font-size: .85rem; font-weight: 600 }
p { margin: .3rem 0 } .lead, .missing, figcaption, .tile span { color: var(--soft) }
.tiles, .charts, .grids { display: grid; gap: .9rem }
.tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin-top: 1.2rem }
.charts { grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)) }
.grids { grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)) }
.tile, .card, details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem }
.tile b { display: block; white-space: nowrap; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums } .tile span { font-size: .8rem }
figure { margin: 0 } figcaption { margin-top: .3rem; font-size: .8rem }
img { display: block; max-width: 100%; height: auto; border-radius: 4px }
.chart { display: block; width: 100%; height: auto; color: var(--soft) }
.curve { stroke: var(--accent); stroke-linejoin: round } .dot { fill: var(--accent) }
details { margin-top: .6rem } summary { cursor: pointer; font-weight: 600 }
pre { overflow-x: auto; margin: .6rem 0 0; font: 13px/1.45 ui-monospace, monospace }
table { border-collapse: collapse } td { padding: .1rem 1.5rem .1rem 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
"""


def write_report(run_dir: Path) -> Path:
    """Write report.html from what a run folder holds by now, and return its path. Parts that are missing say so."""
    run_dir = Path(run_dir)
    summary = _summary(run_dir / "summary.json")
    page = _page(run_dir.resolve().name, "\n".join(_sections(run_dir, summary)))
    path = run_dir / "report.html"
    with whole(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def _sections(run_dir: Path, summary: dict[str, Any]) -> Iterable[str]:
    yield f"<h1>{escape(run_dir.resolve().name)}</h1>"
    yield f'<p class="lead">{escape(_lead(summary))}</p>'
    yield _tiles(summary)
    yield _section("Real, teacher, student", _image(run_dir / "samples.png"))
    levels = {who: fd for who in ("teacher", "floor") if (fd := _get(summary, who, "fd")) is not None}
    yield _section("Distillation", _charts(read_curves(run_dir / "metrics.jsonl"), levels))
    yield _section("Samples while the student learns", _grids(run_dir / "samples"))
    yield _section("The teacher's training", _charts(read_curves(run_dir / "teacher" / "metrics.jsonl"), {}))
    yield _section("Samples while the teacher learns", _grids(run_dir / "teacher" / "samples"))
    yield _section("Settings", _file(run_dir / "config.yaml") + _file(run_dir / "summary.json"))
    yield _section("Versions", _table(summary.get("versions") or versions()))


def _lead(summary: dict[str, Any]) -> str:
    """The result in a sentence."""
    student, teacher = (_get(summary, who, "fd") for who in ("student", "teacher"))
    nfe, teacher_nfe = (_get(summary, who, "nfe") for who in ("student", "teacher"))
    if student is None or nfe is None:
        return "This run has not been scored yet."
    text = f"The student reaches {_name(summary, 'student')} {short(student)} with {_count(nfe, 'network evaluation')} per image"
    if teacher is None or teacher_nfe is None:
        return text + "."
    return f"{text}, its teacher {short(teacher)} with {teacher_nfe:g}."


def _tiles(summary: dict[str, Any]) -> str:
    """The headline numbers."""
    if not summary:
        return NOT_YET
    tiles = []
    for who in ("student", "teacher"):
        if (fd := _get(summary, who, "fd")) is not None:
            nfe = _get(summary, who, "nfe")
            tiles.append((short(fd), f"{who}, {_name(summary, who)}" + (f" at NFE {nfe:g}" if nfe is not None else "")))
    if (fd := _get(summary, "floor", "fd")) is not None:
        tiles.append((short(fd), "floor: real against real at the same n"))
    if (images := _number(summary.get("images_seen"))) is not None:
        tiles.append((short(images), "images seen"))
    if isinstance(seconds := summary.get("seconds"), Mapping):
        tiles += [(_duration(s), f"time: {name}") for name, value in seconds.items() if (s := _number(value)) is not None]
    return '<div class="tiles">' + "".join(_tile(value, what) for value, what in tiles) + "</div>" if tiles else NOT_YET


def _tile(value: str, what: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>'


def _charts(curves: dict[str, Curve], levels: dict[str, float]) -> str:
    """A card per metric: distances first, book-keeping last; `levels` belong to the distances."""
    if not curves:
        return NOT_YET
    order = sorted(curves, key=lambda name: (name.endswith(BOOKKEEPING), not name.startswith("fd@")))
    cards = []
    for name in order:
        drawn = chart(curves[name], levels=levels if name.startswith("fd@") else None)
        last = f'<span class="missing"> {short(curves[name][-1][1])}</span>'
        cards.append(f'<div class="card"><h3>{escape(name)}{last}</h3>{drawn}</div>')
    return f'<div class="charts">{"".join(cards)}</div>'


def _grids(folder: Path) -> str:
    """Some of a folder's pictures, first and last among them, in the order of the numbers in their names."""
    found = sorted(folder.glob("*.png"), key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", p.stem)])
    if not found:
        return NOT_YET
    last, most = len(found) - 1, min(MOST_GRIDS, len(found))
    chosen = [found[round(i * last / max(most - 1, 1))] for i in range(most)]
    return f'<div class="grids">{"".join(_image(path, path.stem) for path in chosen)}</div>'


def _image(path: Path, caption: str = "") -> str:
    if not path.is_file():
        return NOT_YET
    data = base64.b64encode(path.read_bytes()).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    alt = escape(caption or path.stem, quote=True)
    return f'<figure class="card"><img alt="{alt}" src="data:image/png;base64,{data}">{below}</figure>'


def _file(path: Path) -> str:
    text = f"<pre>{escape(path.read_text(encoding='utf-8', errors='replace'))}</pre>" if path.is_file() else NOT_YET
    return f"<details><summary>{escape(path.name)}</summary>{text}</details>"


def _table(rows: Any) -> str:
    if not isinstance(rows, Mapping):
        return NOT_YET
    cells = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in rows.items())
    return f'<div class="card"><table>{cells}</table></div>'


def versions() -> dict[str, str]:
    """Of what a run depends on, and the devices it sees."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found | {"device": ", ".join(names) or f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"}


def _summary(path: Path) -> dict[str, Any]:
    """summary.json as far as it can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _get(summary: Mapping[str, Any], group: str, key: str) -> Any:
    """summary[group][key] if it is there; numbers must be finite."""
    inner = summary.get(group)
    value = inner.get(key) if isinstance(inner, Mapping) else None
    return value if isinstance(value, str) else _number(value)


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf") else None


def _name(summary: Mapping[str, Any], who: str) -> str:
    return str(_get(summary, who, "features") or "FD")


def _count(n: float, what: str) -> str:
    return f"{n:g} {what}" + ("" if n == 1 else "s")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.3g} min" if minutes < 120 else f"{minutes / 60:.3g} h"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · potstill</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
