"""One page about a run: numbers, pictures, curves, settings. A single file that opens offline and runs no script.

Here is what it says; report.html beside this file is how it looks.
"""

import base64
import json
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined

from potstill.engine.common.packages import versions_of
from potstill.engine.common.writing import whole
from potstill.engine.measure import curves
from potstill.engine.measure.curves import Chart, chart, is_number, read_curves, short

MOST_GRIDS = 8  # of the sample grids over time
PACKAGES = ("potstill", "torch", "triton", "numpy", "torchmetrics", "safetensors")
BOOKKEEPING = ("/nonfinite", "/grad_norm", "images_per_second")  # curves that are shown last


def write_report(run_dir: Path) -> Path:
    """Write report.html from what a run folder holds by now, and return its path. Parts that are missing say so."""
    run_dir = Path(run_dir)
    summary, teacher, path = _summary(run_dir / "summary.json"), run_dir / "teacher", run_dir / "report.html"
    levels = {who: fd for who in ("teacher", "floor") if is_number(fd := _of(summary, who, "fd"))}
    told = summary.get("versions")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = page.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).render(
        title=run_dir.resolve().name,
        lead=_lead(summary),
        tiles=list(_tiles(summary)),
        samples=_pictures([run_dir / "samples.png"]),
        student_charts=_charts(read_curves(run_dir / "metrics.jsonl"), levels),
        student_grids=_grids(run_dir / "samples"),
        teacher_charts=_charts(read_curves(teacher / "metrics.jsonl"), {}),
        teacher_grids=_grids(teacher / "samples"),
        files=[(file.name, _text(file)) for file in (run_dir / "config.yaml", run_dir / "summary.json")],
        versions=told if isinstance(told, Mapping) else versions(),
        width=curves.WIDTH, height=curves.HEIGHT, left=curves.LEFT, right=curves.RIGHT,
    )  # fmt: skip
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def _lead(summary: dict[str, Any]) -> str:
    """The result in a sentence."""
    student, nfe, teacher, teacher_nfe = (_of(summary, who, key) for who in ("student", "teacher") for key in ("fd", "nfe"))
    if not is_number(student) or not is_number(nfe):
        return "This run has not been scored yet."
    evaluations = f"{nfe:g} network evaluation{'' if nfe == 1 else 's'}"
    text = f"The student reaches {_of(summary, 'student', 'features') or 'FD'} {short(student)} with {evaluations} per image"
    return f"{text}, its teacher {short(teacher)} with {teacher_nfe:g}." if is_number(teacher) and is_number(teacher_nfe) else f"{text}."


def _tiles(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The headline numbers, and what they are."""
    for who in ("student", "teacher"):
        if is_number(fd := _of(summary, who, "fd")):
            nfe = _of(summary, who, "nfe")
            yield short(fd), f"{who}, {_of(summary, who, 'features') or 'FD'}" + (f" at NFE {nfe:g}" if is_number(nfe) else "")
    if is_number(fd := _of(summary, "floor", "fd")):
        yield short(fd), "floor: real against real at the same n"
    if is_number(images := summary.get("images_seen")):
        yield short(images), "images seen"
    seconds = summary.get("seconds")
    for name, value in seconds.items() if isinstance(seconds, Mapping) else ():
        if is_number(value):
            yield _duration(value), f"time: {name}"


def _charts(found: dict[str, curves.Curve], levels: dict[str, float]) -> list[tuple[str, Chart]]:
    """A chart per metric: distances first, book-keeping last; `levels` belong to the distances."""
    order = sorted(found, key=lambda name: (name.endswith(BOOKKEEPING), not name.startswith("fd@")))
    return [(name, chart(found[name], levels if name.startswith("fd@") else None)) for name in order]


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


def _summary(path: Path) -> dict[str, Any]:
    """summary.json as far as it can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _of(summary: Mapping[str, Any], group: str, key: str) -> Any:
    """summary[group][key], None where it is not there."""
    inner = summary.get(group)
    return inner.get(key) if isinstance(inner, Mapping) else None


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
