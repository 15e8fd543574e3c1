"""What a comparison finds: the floor, the teacher and every method measured alike, curve by curve, and their pictures."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.formats.pictures import sheet, stacked
from potstill.engine.jobs import build
from potstill.engine.jobs.folder import write_atomically
from potstill.engine.jobs.job import Job
from potstill.engine.jobs.machine import device_title, versions
from potstill.engine.jobs.snapshots import opened, snapshots_in, snapshots_of
from potstill.engine.measure.report import write_report
from potstill.engine.measure.score import Judge
from potstill.engine.models.opening import STUDENT, open_models
from potstill.engine.models.weights import read_metadata
from potstill.engine.nets.denoiser import Denoiser

SHOWN = 30  # pictures of each method in samples.png


def floor_and_teacher(job: Job, teacher: Denoiser, judge: Judge, folder: Path) -> dict[str, Any]:
    """The start of a summary: real images, the teacher, no method yet, and where it was measured."""
    sampler = build.teacher_sampler(job.cfg, teacher)
    scores = judge.scores(teacher, sampler)
    meta = read_metadata(Path(job.cfg.teacher.checkpoint or folder / "teacher.safetensors"))
    images, seconds = round(1000 * meta.get("kimg", 0)), meta.get("seconds", 0.0)
    return {
        "floor": {"fd": first_score(judge.floors), "kind": judge.floor_kind, "scores": judge.floors},
        "teacher": {
            "fd": first_score(scores), "nfe": sampler.nfe, "scores": scores, "parameters": sum(p.numel() for p in teacher.parameters()),
            **effort(images, seconds, folder / "teacher-trained.json"),
            "curve": [point(judge, *opened(job, [file])) for file in snapshots_in(folder / "teacher")],
        },
        "methods": {},
        "device": device_title(job.device),
        "precision": str(job.dtype).removeprefix("torch."),
        "versions": versions(),
    }  # fmt: skip


def method_measured(job: Job, judge: Judge, teacher: Denoiser) -> dict[str, Any]:
    """The curve of one method, from the weights it started with to its last snapshot, and what it took."""
    curve = []
    if job.cfg.students.net is None:
        method = job.cfg.method.build(teacher, teacher)
        scores = judge.scores(job.prepared(method.nets["student"]).eval(), method.sampler)
        curve.append({"images": 0, "seconds": 0.0, "scores": scores})
    moments = [opened(job, files) for files in snapshots_of(job)]
    curve += [point(judge, *moment) for moment in moments]
    sampler, last, finished = moments[-1][1], curve[-1], json.loads((job.dir / "summary.json").read_text(encoding="utf-8"))
    return {
        "fd": first_score(last["scores"]), "nfe": sampler.nfe, "scores": last["scores"],
        **effort(finished["images_seen"]["student"], finished["seconds"]["student"], job.dir / "trained.json"),
        "curve": curve,
    }  # fmt: skip


def point(judge: Judge, net: Any, sampler: Sampler, took: dict[str, Any]) -> dict[str, Any]:
    """One point of a curve."""
    return took | {"scores": judge.scores(net, sampler)}


def effort(images: int, seconds: float, record: Path) -> dict[str, Any]:
    """What a run took. Peak memory is None where it was not measured: a teacher that was given, a shared CPU process."""
    peak = json.loads(record.read_text(encoding="utf-8"))["peak_memory_gib"] if record.exists() else None
    speed = round(images / seconds, 1) if seconds else None
    return {"seconds": seconds, "images": images, "images_per_second": speed, "peak_memory_gib": peak}


def first_score(scores: dict[str, float]) -> float:
    """The one in the first features, which curves and summaries of single runs show."""
    return next(iter(scores.values()))


def finish_run(job: Job, summary: dict[str, Any], name: str) -> None:
    """The method's own summary.json and report.html, with what was measured here."""
    path = job.dir / "summary.json"
    title = next(iter(summary["floor"]["scores"]))
    about = {"n": summary["n"], "features": title, "data": summary["data"]}
    found = {
        who: {k: one[k] for k in ("fd", "nfe", "scores")} | about
        for who, one in (("teacher", summary["teacher"]), ("student", summary["methods"][name]))
    }
    own = json.loads(path.read_text(encoding="utf-8")) | {"floor": summary["floor"], **found}
    write_atomically(path, json.dumps(own, indent=2) + "\n")
    write_report(job.dir)


def sheets(job: Job, teacher: Denoiser, summary: dict[str, Any], folder: Path) -> Image.Image:
    """Real images, the teacher's and every method's, all nets from the same noise, three to a row."""
    gallery = job.gallery
    pictures = {"real": gallery.real()[:SHOWN]}
    teachers = gallery.samples(teacher, build.teacher_sampler(job.cfg, teacher))
    pictures[f"teacher, NFE {summary['teacher']['nfe']}"] = teachers[:SHOWN]
    for name, one in summary["methods"].items():
        (model,) = open_models(folder / name, STUDENT)
        pictures[f"{name}, NFE {one['nfe']}"] = gallery.samples(job.prepared(model.net).eval(), model.sampler)[:SHOWN]
    captions = list(pictures)
    lines = [captions[i : i + 3] for i in range(0, len(captions), 3)]
    columns = gallery.columns(teacher)
    return stacked([sheet({caption: pictures[caption] for caption in line}, columns=columns) for line in lines])
