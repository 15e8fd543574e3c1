"""One page about a run: numbers, pictures, curves, settings. A single file that opens offline and runs no script.

Here is what it says; report.html beside this file is how it looks. It is written while a run goes on as well, and then asks the browser to
look again now and then.
"""

import base64
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined

from potstill.engine.common.errors import UserError
from potstill.engine.common.kinds import is_dict, is_number, is_text
from potstill.engine.common.packages import versions_of
from potstill.engine.common.reading import read_json
from potstill.engine.common.writing import whole
from potstill.engine.formats.caveats import caveats
from potstill.engine.measure.chart import HEIGHT, LEFT, RIGHT, WIDTH, Chart, Curve, chart, read_alarms, read_curves, short
from potstill.engine.measure.status import EVERY, RUNNING, STOPPED, duration, read_status
from potstill.engine.measure.summary import read_summary
from potstill.engine.models.opening import settings

MOST_GRIDS = 8  # of the sample grids over time
NEIGHBOURS = "neighbours.png"
LEVELS = "levels.json"  # of the curve in a stage's folder: what real images and the teacher have, measured alike
PACKAGES = ("potstill", "torch", "triton", "numpy", "torchmetrics", "safetensors")
BOOKKEEPING = ("/nonfinite", "images_per_second")  # curves that are shown last
HEALTH = ("/grad_norm", "/variance_ratio", "/variance", "/accuracy", "/logit_fake", "/logit_real")  # what alarms look at, with /gap@σ
CHEAP = (
    "fd@{n}-8x8 is a cheap distance of {n} images in pixels of 8x8; teacher and floor are measured alike: read it within its chart alone"
)
DATA = {"data": 1.0}  # the level in charts of ratios to the data

Levels = dict[str, dict[str, float]]  # of a curve, by its name, or by "fd@" for all distances: lines, by what they are


def write_report(run_dir: Path) -> Path:
    """Write report.html from what a run folder holds by now, and return its path. Parts that are to come say so."""
    run_dir = Path(run_dir)
    summary, told, status, path = _summary(run_dir), _settings(run_dir), read_status(run_dir), run_dir / "report.html"
    stages = [run_dir, *sorted(run_dir.glob("student-*"))]
    to_come = status.state in (RUNNING, STOPPED) if status else not summary
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = page.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).render(
        title=run_dir.resolve().name,
        status=status, refresh=EVERY if status and status.running else None,
        lead=_lead(summary),
        facts=list(_facts(summary, told)),
        tiles=list(_tiles(summary)),
        caveats=caveats(summary),
        samples=_pictures([run_dir / "samples.png"]),
        neighbours=_pictures([run_dir / NEIGHBOURS]) if summary.get("student", {}).get("neighbours") else [],
        near=_near(summary),
        classes=list(_classes(summary)),
        alarms=[alarm for stage in (run_dir / "teacher", *stages) for alarm in read_alarms(stage)],
        students=[stage for where in stages if (stage := _stage(where, summary, run_dir)) or where == run_dir],
        teacher=None if _part(told, "teacher").get("checkpoint") else _stage(run_dir / "teacher", {}, run_dir),
        trained_here=not _part(told, "teacher").get("checkpoint"),
        files=[(file.name, text) for file in (run_dir / "config.yaml", run_dir / "summary.json") if (text := _text(file)) is not None],
        versions=summary.get("versions") or versions(),
        to_come=to_come, width=WIDTH, height=HEIGHT, left=LEFT, right=RIGHT,
    )  # fmt: skip
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def _stage(folder: Path, summary: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """The curves and grids of one training; {} where nothing is there."""
    curves = read_curves(folder / "metrics.jsonl")
    curves = {name: curve for name, curve in curves.items() if not (name.endswith("/nonfinite") and not any(y for _, y in curve))}
    health = {name: curve for name, curve in curves.items() if name.endswith(HEALTH) or "/gap@" in name}
    others = {name: curve for name, curve in curves.items() if name not in health}
    levels = _levels(summary) | _levels_of_curve(folder)
    grids = _grids(folder / "samples")
    if not curves and not grids:
        return {}
    name = "" if folder in (run_dir, run_dir / "teacher") else f", {folder.name}"
    note = next((CHEAP.format(n=found[1]) for found in map(re.compile(r"fd@(\d+)-8x8").fullmatch, others) if found), "")
    return {"name": name, "note": note, "charts": _charts(others, levels), "health": _charts(health, {}), "grids": grids}


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


def _facts(summary: dict[str, Any], told: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What ran: by its settings, and, once it is there, by its summary."""
    student, teacher, train = (_part(told, name) for name in ("student", "teacher", "train"))
    student, seen = summary.get("student", {}), summary.get("images_seen")
    method = summary.get("method") or _part(told, "method").get("name")
    data = student.get("data") or _part(told, "data").get("path")
    images, batch, kimg, seed = (
        student.get("reference_images"),
        train.get("batch"),
        train.get("kimg"),
        summary.get("seed", told.get("seed")),
    )
    if is_text(method):
        yield "method", method
    if told or data:
        yield "data", f"{data}" + (f", {images:,} images" if is_number(images) else "") if data else "none: the method is data-free"
    if told:
        length = _part(teacher, "train").get("kimg")
        here = f"trained here, {length:,g} kimg" if is_number(length) else "trained here"
        yield "teacher", str(teacher["checkpoint"]) if teacher.get("checkpoint") else here
    if is_dict(seen) and is_number(seen.get("student")):
        kimg = seen["student"] / 1000
    if is_number(kimg) and is_number(batch) and batch >= 1:
        yield "student", f"{kimg:,g} kimg, {round(1000 * kimg / batch):,} iterations of {batch:,g} images"
    found = [f"{who} {nfe:g}" for who in ("student", "teacher") if is_number(nfe := summary.get(who, {}).get("nfe"))]
    if found:
        yield "evaluations an image", ", ".join(found)
    if is_number(seed):
        yield "seed", f"{seed:g}"
    if device := summary.get("device"):
        yield "device", f"{device}, {summary['precision']}" if summary.get("precision") else device


def _near(summary: dict[str, Any]) -> str:
    """How near training images are to the student's, and to one another."""
    if not (found := summary.get("student", {}).get("neighbours")):
        return ""
    student, real = (f"{median(found[who]):.3g} (the nearest {min(found[who]):.3g})" for who in ("student", "real"))
    return (
        f"Below each of the student's images is the one of {found['images']:,} training images that is nearest in pixels. The median of these "
        f"differences is {student} of 255 levels, root mean square; of as many real images and their nearest others it is {real}. Images that "
        "are much nearer than real ones are copies; blurred ones are a little nearer."
    )


def _classes(summary: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Each class's distance, and its share of the largest, for bars."""
    found = summary.get("student", {}).get("classes") or {}
    most = max(found.values(), default=0)
    for name, fd in found.items():
        yield name, short(fd), round(100 * max(fd, 0) / most, 1) if most > 0 else 0


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
            yield duration(value), f"time: {name.replace('_', ' ')}"


def _levels(summary: dict[str, Any]) -> Levels:
    """Those of the teacher, the floor and real pictures at the run's end."""
    found: Levels = {"fd@": {who: fd for who in ("teacher", "floor") if is_number(fd := summary.get(who, {}).get("fd"))}}
    for who in ("teacher", "real"):
        for figure, mean in summary.get(who, {}).get("scores", {}).items():
            found.setdefault(f"score/{figure}", {})[who] = mean
    return found


def _levels_of_curve(folder: Path) -> Levels:
    try:
        found = read_json(folder / LEVELS, dict, "") if (folder / LEVELS).is_file() else {}
    except UserError:
        return {}
    return {name: {who: fd for who, fd in lines.items() if is_number(fd)} for name, lines in found.items() if is_dict(lines)}


def _charts(found: dict[str, Curve], levels: Levels) -> list[tuple[str, Chart]]:
    """A chart per metric: distances and scores first, book-keeping last."""
    order = sorted(found, key=lambda name: (name.endswith(BOOKKEEPING), not name.startswith("fd@"), not name.startswith("score/")))
    lines = {name: levels.get(name, levels.get("fd@") if name.startswith("fd@") else None) for name in order}
    return [(name, chart(found[name], DATA if name.endswith("_ratio") else lines[name])) for name in order]


def _grids(folder: Path) -> list[tuple[str, str]]:
    """Some of a folder's pictures, first and last among them, in the order of the numbers in their names: images seen."""
    found = sorted(folder.glob("*.png"), key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", p.stem)])
    last, most = len(found) - 1, min(MOST_GRIDS, len(found))
    return _pictures([found[round(i * last / max(most - 1, 1))] for i in range(most)])


def _pictures(paths: list[Path]) -> list[tuple[str, str]]:
    """What they show and, as base64, their bytes; those that are there."""
    return [(_caption(path.stem), base64.b64encode(path.read_bytes()).decode()) for path in paths if path.is_file()]


def _caption(stem: str) -> str:
    return f"{float(f'{int(stem) / 1000:.3g}'):,g} kimg" if stem.isascii() and stem.isdecimal() and len(stem) < 20 else stem


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


def _settings(run_dir: Path) -> dict[str, Any]:
    """config.yaml, the same way."""
    try:
        return settings(run_dir)
    except UserError:
        return {}


def _part(told: dict[str, Any], name: str) -> dict[str, Any]:
    return part if is_dict(part := told.get(name)) else {}
