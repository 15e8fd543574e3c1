"""What potstill compare does with its runs: each trains in a process of its own, keeps snapshots, and is measured from them.

So a run's peak memory is its own, and the clock of its training holds nothing else. The floor, the teacher and every method
are measured alike, curve by curve, and shown side by side.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from potstill.engine.common.cli import run
from potstill.engine.common.reading import read_json
from potstill.engine.common.signals import collected, stoppable
from potstill.engine.config.schema import Config
from potstill.engine.formats.pictures import sheet, stacked
from potstill.engine.jobs import build
from potstill.engine.jobs.finish import Nets
from potstill.engine.jobs.folder import write_atomically, write_json
from potstill.engine.jobs.job import Job
from potstill.engine.jobs.machine import device_title, peak_gib, versions
from potstill.engine.measure.report import write_report
from potstill.engine.measure.score import Judge
from potstill.engine.models.opening import STUDENT, open_models, own_sampler
from potstill.engine.models.origins import metadata_of_origin
from potstill.engine.models.router import Router
from potstill.engine.models.weights import load_net, read_metadata
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.training.run import Run

AGAIN = "remove it and repeat the command, which makes it again"
SHOWN = 30  # about as many pictures of each method in samples.png


class SnapshotJob(Job):
    """A run that writes its product every train.eval_kimg, measures nothing itself, and tells nothing before it ends."""

    @property
    def tells(self) -> bool:
        return False

    def evaluate_within(self, run: Run, folder: Path) -> dict[str, float]:
        """Write the average of the weights as it is now; the file says after how many images and seconds."""
        self.save(run, folder / "snapshots" / f"{run.images_seen:010d}.safetensors")
        return {}

    def say_unused(self, teacher: Any) -> None:
        """Nothing: the teacher's file beside settings of its training is the comparison's doing, not the user's."""

    def measure(self, nets: Nets) -> dict[str, Any]:
        """Nothing: it is done for all methods at once, from the snapshots."""
        return {}


def curve(job: Job, judge: Judge, *folders: Path) -> list[dict[str, Any]]:
    """A point for every moment with snapshots in these folders, the earliest first; of several students each has its folder.

    images and seconds are what the net of that moment took (of several students: the sum), scores its distances.
    """
    points = []
    for files in zip(*(sorted((folder / "snapshots").glob("*.safetensors")) for folder in folders), strict=True):
        nets, metas = map(list, zip(*(load_net(file) for file in files), strict=True))
        net = Router(nets, job.partition) if job.partition and len(nets) > 1 else nets[0]
        sampler = own_sampler(metas[0], files[0])
        assert sampler is not None
        took = {"images": round(1000 * sum(m["kimg"] for m in metas)), "seconds": round(sum(m["seconds"] for m in metas), 1)}
        points.append(took | {"scores": judge.scores(job.prepared(net).eval(), sampler)})
    return points


def train_apart(cfg: Config, record: Path, apart: bool, *, only_teacher: bool) -> None:
    """`train_here` in a process of its own, or in this one; ends this command where a signal ended it."""
    if not apart:
        return train_here(cfg, record, only_teacher, alone=False)
    process = multiprocessing.get_context("spawn").Process(target=child, args=(cfg, record, only_teacher))
    with collected() as caught:  # Ctrl-C reaches the child too, which saves before it ends
        process.start()
        told = False
        while process.is_alive():
            process.join(0.2)
            if not told and set(caught) - {signal.SIGINT}:
                process.terminate()
                told = True  # once: a second one would not let it save
    if caught:
        sys.exit(128 + caught[0])
    if process.exitcode:
        sys.exit(process.exitcode if process.exitcode > 0 else 128 - process.exitcode)


def child(cfg: Config, record: Path, only_teacher: bool) -> None:
    """What the other process does; its exit code says how it ended. Where the comparison is killed it saves and ends, too."""
    threading.Thread(target=follow, daemon=True).start()
    with stoppable():
        run(lambda _: train_here(cfg, record, only_teacher, alone=True))


def follow() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def train_here(cfg: Config, record: Path, only_teacher: bool, alone: bool) -> None:
    """Train, and note the peak memory in `record`: on a CPU it is the process's, so None where others ran in it before."""
    job = SnapshotJob(cfg)
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    with job.lock:
        if only_teacher:
            job.teacher()
        else:
            job.run()
    peak = peak_gib(job.device) if alone or job.device.type == "cuda" else None
    write_atomically(record, json.dumps({"peak_memory_gib": peak}))


def floor_and_teacher(job: Job, teacher: Denoiser, judge: Judge, folder: Path) -> dict[str, Any]:
    """The start of a summary: real images, the teacher, no method yet, and where it was measured."""
    sampler = build.teacher_sampler(job.cfg, teacher)
    scores = judge.scores(teacher, sampler)
    meta = metadata_of_origin(job.given_teacher or folder / "teacher.safetensors")
    images, seconds = round(1000 * meta.get("kimg", 0)), meta.get("seconds", 0.0)
    return {
        "floor": {"fd": first_score(judge.floors), "kind": judge.floor_kind, "scores": judge.floors},
        "teacher": {
            "fd": first_score(scores), "nfe": sampler.nfe, "scores": scores, "parameters": sum(p.numel() for p in teacher.parameters()),
            **effort(images, seconds, folder / "teacher-trained.json"),
            "curve": curve(job, judge, folder / "teacher"),
        },
        "methods": {},
        "device": device_title(job.device),
        "precision": str(job.dtype).removeprefix("torch."),
        "versions": versions(),
    }  # fmt: skip


def method_measured(job: Job, judge: Judge, teacher: Denoiser) -> dict[str, Any]:
    """The curve of one method, from the weights it started with to its last snapshot, and what it took."""
    points, files = [], [job.student_file(k) for k in range(job.cfg.students.count)]
    if job.cfg.students.net is None:
        method = job.cfg.method.build(teacher, teacher)
        scores = judge.scores(job.prepared(method.nets["student"]).eval(), method.sampler)
        points.append({"images": 0, "seconds": 0.0, "scores": scores})
    points += curve(job, judge, *(file.parent for file in files))
    sampler, scores = own_sampler(read_metadata(files[0]), files[0]), points[-1]["scores"]
    assert sampler is not None
    finished = read_json(job.dir / "summary.json", dict, AGAIN)
    return {
        "fd": first_score(scores), "nfe": sampler.nfe, "scores": scores,
        **effort(finished["images_seen"]["student"], finished["seconds"]["student"], job.dir / "trained.json"),
        "curve": points,
    }  # fmt: skip


def effort(images: int, seconds: float, record: Path) -> dict[str, Any]:
    """What a run took. Peak memory is None where it was not measured: a teacher that was given, a shared CPU process."""
    peak = read_json(record, dict, AGAIN).get("peak_memory_gib") if record.exists() else None
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
    own = read_json(path, dict, AGAIN) | {"floor": summary["floor"], **found}
    write_json(path, own)
    write_report(job.dir)


def sheets(job: Job, teacher: Denoiser, summary: dict[str, Any], folder: Path) -> Image.Image:
    """Real images, the teacher's and every method's, all nets from the same noise, three to a row."""
    gallery, columns = job.gallery, job.gallery.columns(teacher)
    shown = max(1, round(SHOWN / columns)) * columns
    pictures = {"real": gallery.real()[:shown]}
    teachers = gallery.samples(teacher, build.teacher_sampler(job.cfg, teacher))
    pictures[f"teacher, NFE {summary['teacher']['nfe']}"] = teachers[:shown]
    for name, one in summary["methods"].items():
        (model,) = open_models(folder / name, STUDENT)
        pictures[f"{name}, NFE {one['nfe']}"] = gallery.samples(job.prepared(model.net).eval(), model.sampler)[:shown]
    captions = list(pictures)
    lines = [captions[i : i + 3] for i in range(0, len(captions), 3)]
    heads = gallery.heads(teacher.label_dim)
    return stacked([sheet({caption: pictures[caption] for caption in line}, columns, heads=heads) for line in lines])
