"""One teacher, every method, one clock: which method is the best after so many seconds of training here?

    potstill compare digits                                    every method, 120 seconds each
    potstill compare fast32 data.path=IMAGES.zip --methods dmd,sim --teacher-seconds 480 --seconds 180 --features A:a.pt

The teacher is the recipe's. Each method is a sibling recipe <name>_<method>.yaml, and gets the same seconds of training:
a few iterations are timed, and its length is set from them. Weights are kept at some points of every run and measured
after it, so measuring is not on the clock. Prints one table; writes into run_dir, runs/compare-<name> unless it is given,
summary.json, table.md, curves.png (quality against seconds and images), samples.png (the same noise for all) and every
method's own run folder. The same command again does what is missing; with other methods it adds them.
"""

import argparse
import copy
import dataclasses
import json
import math
import multiprocessing
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from potstill.engine.common.cli import parser_of, run
from potstill.engine.common.errors import UserError
from potstill.engine.config.library import family_of, find
from potstill.engine.config.tree import Config, load
from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.formats.pictures import save_png, sheet, stacked
from potstill.engine.jobs import build
from potstill.engine.jobs.folder import write_atomically
from potstill.engine.jobs.job import Job
from potstill.engine.jobs.rehearsal import peak_gib, synchronize
from potstill.engine.measure.judge import Judge
from potstill.engine.measure.named import features_by_names
from potstill.engine.measure.plots import plot_comparison
from potstill.engine.measure.report import write_report
from potstill.engine.methods.teacher import Teacher
from potstill.engine.models.opening import STUDENT, open_models, own_sampler
from potstill.engine.models.router import Router, student_folder
from potstill.engine.models.weights import load_net, read_metadata
from potstill.engine.training.loop import Interrupted, signals
from potstill.engine.training.run import Run, TrainConfig

SHOWN = 30  # pictures of each method in samples.png


@dataclasses.dataclass
class Plan:
    """What this command's flags say."""

    methods: str = "all"
    seconds: float = 120.0
    teacher_seconds: float | None = None  # None: as long as the recipe says
    points: int = 4
    teacher_points: int = 2
    features: str | None = None  # None: the recipe's eval.features
    real: int | None = None
    apart: bool = True

    def __post_init__(self):
        for name in ("seconds", "teacher_seconds"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UserError(f"{flag(name)} wants a number above 0, got {value!r}")
        for name, least in (("points", 1), ("teacher_points", 1), ("real", 2)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{flag(name)} wants at least {least}, got {value}")


def flag(name: str) -> str:
    """What a field of Plan is called on the command line."""
    return f"--{name.replace('_', '-')}"


class Watched(Job):
    """A run that keeps snapshots of its product (train.eval_kimg apart) instead of measuring itself."""

    def evaluate_within(self, run: Run, folder: Path) -> dict[str, float]:
        """Keep the average of the weights as it is now; the file says after how many images and seconds."""
        self.save(run, folder / "snapshots" / f"{run.images_seen:010d}.safetensors")
        return {}

    def tell_unused(self, teacher: Any) -> None:
        """Nothing: the teacher's file beside settings of its training is the comparison's doing, not the user's."""

    def measure(self, teacher: Any, student: Any) -> dict[str, Any]:
        """Nothing: it is done for all methods at once, from the snapshots."""
        return {}


def main(arguments: list[str]) -> None:
    args = parser().parse_intermixed_args(arguments)
    recipe, overrides, plan = find(args.recipe), args.overrides, Plan(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Plan)})
    for name in (override.partition("=")[0] for override in overrides):
        if name in vars(plan):
            raise UserError(f"{name}= is not a setting of a run: wanted {flag(name)}, a flag of this command")
    recipes = siblings(recipe, plan.methods)
    folder = load(recipe, [f"run_dir=runs/compare-{recipe.stem}", *overrides]).run_dir
    assert folder
    compare(recipe, recipes, plan, Path(folder), overrides)


def parser() -> argparse.ArgumentParser:
    p, default = parser_of("compare", __doc__), Plan()
    p.add_argument("recipe", help="the teacher's recipe: its name, such as digits, or a path to a .yaml")
    p.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings for all runs, such as data.path=FILE; run_dir=DIR"
    )
    p.add_argument("--methods", default=default.methods, metavar="all|A,B|teacher", help="which ones; teacher: only that one (default all)")
    p.add_argument("--seconds", type=float, default=default.seconds, metavar="S", help="of training for each method (default 120)")
    p.add_argument("--teacher-seconds", type=float, metavar="S", help="of training for the teacher (default: as long as the recipe says)")
    p.add_argument("--points", type=int, default=default.points, metavar="N", help="how often within a run it is measured (default 4)")
    p.add_argument("--teacher-points", type=int, default=default.teacher_points, metavar="N", help="how often the teacher is (default 2)")
    p.add_argument("--features", metavar="NAME:FILE,…", help="TorchScript features to measure in, or pixels (default: eval.features)")
    p.add_argument("--real", type=int, metavar="N", help="measure against N of the real images (default: all)")
    p.add_argument(
        "--apart", action=argparse.BooleanOptionalAction, default=default.apart,
        help="every run in a process of its own, so that its peak memory is its own (default)",
    )  # fmt: skip
    return p


def siblings(recipe: Path, wanted: str) -> dict[str, Path]:
    """The recipes to compare by method name: the recipe's own, and <its name>_<method> in its file or beside it."""
    found = {load(recipe, []).method.name: recipe}
    found |= {path.stem.removeprefix(f"{recipe.stem}_"): path for path in family_of(recipe)}
    if wanted == "all":
        return found
    names = [] if wanted == "teacher" else wanted.split(",")
    if unknown := [name for name in names if name not in found]:
        raise UserError(f"--methods wants all, teacher, or some of {', '.join(found)}, got {unknown[0]!r}")
    return {name: found[name] for name in names}


def compare(recipe: Path, recipes: dict[str, Path], plan: Plan, folder: Path, overrides: list[str]) -> None:
    features = features_by_names(plan.features or load(recipe, overrides).eval.features)
    job = train_teacher(load(recipe, [*overrides, f"run_dir={folder}"]), plan, folder)
    teacher = job.teacher()
    checkpoint = job.cfg.teacher.checkpoint or f"{folder}/teacher.safetensors"
    for name, path in recipes.items():
        cfg = load(path, [*overrides, f"run_dir={folder}/{name}", f"teacher.checkpoint={checkpoint}"])
        train_student(cfg, plan, folder / name)
    judge = judge_of(job, features, plan)
    summary = begun(job, judge, features, plan, folder, teacher)
    settings = [*overrides, f"teacher.checkpoint={checkpoint}"]
    for name, path in recipes.items():
        if name not in summary["methods"]:
            method_job = Watched(load(path, [*settings, f"run_dir={folder}/{name}"]), on_paper=True)
            summary["methods"][name] = measured(method_job, judge, teacher, folder / name)
            finish_run(method_job, summary, name, folder / name)
            write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(folder / "table.md", markdown(summary))
    if summary["methods"]:
        plot_comparison(summary, folder / "curves.png")
        save_png(sheets(job, teacher, summary, folder), folder / "samples.png")
    print_table(summary)


# training


def train_teacher(cfg: Config, plan: Plan, folder: Path) -> Watched:
    """The job of the teacher, which is trained by now unless the recipe gives one."""
    job = Watched(cfg)
    if cfg.teacher.checkpoint or (folder / "teacher.safetensors").exists():
        return job
    if plan.teacher_seconds:
        cfg.teacher.train.kimg = kimg_in(plan.teacher_seconds, cfg, folder / "teacher-kimg.json", of_teacher=True)
    cfg.teacher.train.eval_kimg = cfg.teacher.train.kimg / plan.teacher_points
    train_apart(cfg, folder / "teacher-trained.json", plan.apart, only_teacher=True)
    return job


def train_student(cfg: Config, plan: Plan, folder: Path) -> None:
    """Train one method for its seconds, unless that was done before."""
    cfg = with_length(cfg, plan.seconds, folder)
    cfg.train.eval_kimg = cfg.train.kimg / plan.points
    if not (folder / "trained.json").exists():
        train_apart(cfg, folder / "trained.json", plan.apart, only_teacher=False)


def train_apart(cfg: Config, record: Path, apart: bool, *, only_teacher: bool) -> None:
    """`train_here` in a process of its own, or in this one; ends this command where a signal ended it."""
    if not apart:
        return train_here(cfg, record, only_teacher, alone=False)
    process = multiprocessing.get_context("spawn").Process(target=child, args=(cfg, record, only_teacher))
    with signals() as caught:  # Ctrl-C reaches the child too, which saves before it ends
        process.start()
        while process.is_alive():
            process.join(0.2)
            if signal.SIGTERM in caught:
                process.terminate()
    if process.exitcode:
        sys.exit(process.exitcode if process.exitcode > 0 else 128 - process.exitcode)
    if caught:
        sys.exit(128 + caught[0])


def child(cfg: Config, record: Path, only_teacher: bool) -> None:
    try:
        run(lambda _: train_here(cfg, record, only_teacher, alone=True))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)


def train_here(cfg: Config, record: Path, only_teacher: bool, alone: bool) -> None:
    """Train, and note the peak memory: on a CPU it is the process's, so None where others ran in it before."""
    job = Watched(cfg)
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    if only_teacher:
        torch.manual_seed(cfg.seed)
        job.teacher()
    else:
        job.run()
    known = alone or job.device.type == "cuda"
    peak = peak_gib(job.device) if known else None
    write_atomically(record, json.dumps({"peak_memory_gib": peak}))


def with_length(cfg: Config, seconds: float, folder: Path) -> Config:
    """The settings with as many kimg as fit into `seconds` of training, by timing a few iterations; remembered in `folder`."""
    cfg = copy.deepcopy(cfg)
    cfg.train.kimg = kimg_in(seconds, cfg, folder / "kimg.json", of_teacher=False) / cfg.students.count
    return cfg


def kimg_in(seconds: float, cfg: Config, stored: Path, *, of_teacher: bool) -> float:
    """Thousands of images that this machine trains on in `seconds`; remembered in the file `stored`."""
    if stored.exists():
        before = json.loads(stored.read_text(encoding="utf-8"))
        if before["seconds"] != seconds:
            raise UserError(f"{stored.parent} holds a run of {before['seconds']:g} seconds, got {seconds:g}: give another run_dir=")
        return before["kimg"]
    job = Job(cfg, on_paper=True)
    stage = cfg.teacher.train if of_teacher else cfg.train
    images = job.images
    if of_teacher:
        assert images is not None
        net = build.build_net(cfg.net, images.resolution, images.channels, images.label_dim)
        method: Any = Teacher(cfg.teacher.loss, job.prepared(net))
    else:
        method = build.build_method(cfg.method, job.teacher())
        if getattr(method, "pairs", 0) is None and cfg.method.regression:
            raise UserError("compare cannot time a method with a regression on pairs: set method.regression=0")
    kimg = seconds / seconds_per_image(method, stage, job, least=0.03 * seconds) / 1000
    write_atomically(stored, json.dumps({"kimg": kimg, "seconds": seconds}))
    return kimg


def seconds_per_image(method: Any, stage: TrainConfig, job: Job, least: float) -> float:
    """By whole periods of its turns, for at least `least` seconds, after two iterations that do not count."""
    timed = Run(method, stage, job.cfg.seed, job.device)
    for net in method.nets.values():
        net.to(job.device)
    stream, period = job.stream(stage, None), max(turn.every for turn in method.turns)
    for step in range(2):
        timed.take(*stream.at(step))
    synchronize(job.device)
    start, step, rounds = time.perf_counter(), 2, period * max(1, round(8 / period))
    while step == 2 or time.perf_counter() - start < least:
        for _ in range(rounds):
            timed.take(*stream.at(step))
            step += 1
        synchronize(job.device)
    return (time.perf_counter() - start) / (step - 2) / stage.batch


# measuring


def judge_of(job: Job, features: list[Any], plan: Plan) -> Judge:
    if job.images is None:
        raise UserError("compare measures against real images: set data.path")
    images = job.images if plan.real is None else job.images.thinned(plan.real)
    wanted = job.cfg.eval
    n = wanted.n or min(len(images), 50_000)
    return Judge(images, features, n=n, seed=wanted.seed, batch=wanted.batch, device=job.device)


def begun(job: Watched, judge: Judge, features: list[Any], plan: Plan, folder: Path, teacher: Any) -> dict[str, Any]:
    """The summary so far: what was measured before with these settings, else floor and teacher."""
    path = folder / "summary.json"
    settings = {
        "recipe": folder.name, "data": judge.images.name, "reference_images": len(judge.images), "n": judge.n, "seed": judge.seed,
        "seconds_each": plan.seconds, "points": plan.points,
        "features": {one.title: {"sha256": one.sha256, "num_features": one.num_features} for one in features},
    }  # fmt: skip
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if all(before.get(key) == value for key, value in settings.items()):
            return before
    sampler = job.teacher_sampler(teacher)
    scores = judge.scores(teacher, sampler)
    meta = read_metadata(Path(job.cfg.teacher.checkpoint or folder / "teacher.safetensors"))
    images, seconds = round(1000 * meta.get("kimg", 0)), meta.get("seconds", 0.0)
    return settings | {
        "floor": {"fd": first(judge.floors), "kind": judge.floor_kind, "scores": judge.floors},
        "teacher": {
            "fd": first(scores), "nfe": sampler.nfe, "scores": scores, "parameters": sum(p.numel() for p in teacher.parameters()),
            **effort(images, seconds, folder / "teacher-trained.json"),
            "curve": [judged(judge, *snapshot(job, [file])) for file in snapshots(folder / "teacher")],
        },
        "methods": {},
        "device": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else f"cpu x{torch.get_num_threads()}",
        "precision": str(job.dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }  # fmt: skip


def measured(job: Watched, judge: Judge, teacher: Any, folder: Path) -> dict[str, Any]:
    """The curve of one method, from the weights it started with to its last snapshot, and what it took."""
    curve = []
    if job.cfg.students.net is None:
        method = build.build_method(job.cfg.method, teacher)
        scores = judge.scores(job.prepared(method.nets["student"]).eval(), method.sampler)
        curve.append({"images": 0, "seconds": 0.0, "scores": scores})
    points = [snapshot(job, files) for files in snapshots_of(job, folder)]
    curve += [judged(judge, *point) for point in points]
    sampler, last, finished = points[-1][1], curve[-1], json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        "fd": first(last["scores"]), "nfe": sampler.nfe, "scores": last["scores"],
        **effort(finished["images_seen"]["student"], finished["seconds"]["student"], folder / "trained.json"),
        "curve": curve,
    }  # fmt: skip


def snapshots(folder: Path) -> list[Path]:
    return sorted((folder / "snapshots").glob("*.safetensors"))


def snapshots_of(job: Watched, folder: Path) -> list[list[Path]]:
    """The files of every moment: one, or one for each of several students that have seen as many images."""
    if not job.partition:
        return [[file] for file in snapshots(folder)]
    of_each = [snapshots(student_folder(folder, k)) for k in range(job.cfg.students.count)]
    return [list(files) for files in zip(*of_each, strict=True)]


def snapshot(job: Watched, files: list[Path]) -> tuple[Any, Sampler, dict[str, Any]]:
    """The net of one moment, how it is sampled, and the images and seconds it took (of several students: the sum)."""
    loaded = [load_net(file) for file in files]
    nets, metas = [net for net, _ in loaded], [meta for _, meta in loaded]
    net = Router(nets, job.partition) if job.partition and len(nets) > 1 else nets[0]
    sampler = own_sampler(metas[0], files[0])
    assert sampler is not None
    took = {"images": round(1000 * sum(m["kimg"] for m in metas)), "seconds": round(sum(m["seconds"] for m in metas), 1)}
    return job.prepared(net).eval(), sampler, took


def judged(judge: Judge, net: Any, sampler: Sampler, took: dict[str, Any]) -> dict[str, Any]:
    return took | {"scores": judge.scores(net, sampler)}


def effort(images: int, seconds: float, record: Path) -> dict[str, Any]:
    """What a run took. Peak memory is None where it was not measured: a teacher that was given, a shared CPU process."""
    peak = json.loads(record.read_text(encoding="utf-8"))["peak_memory_gib"] if record.exists() else None
    speed = round(images / seconds, 1) if seconds else None
    return {"seconds": seconds, "images": images, "images_per_second": speed, "peak_memory_gib": peak}


def first(scores: dict[str, float]) -> float:
    return next(iter(scores.values()))


# telling


def finish_run(job: Watched, summary: dict[str, Any], name: str, folder: Path) -> None:
    """The method's own summary.json and report.html, with what was measured here."""
    path = folder / "summary.json"
    title = next(iter(summary["floor"]["scores"]))
    about = {"n": summary["n"], "features": title, "data": summary["data"]}
    found = {
        who: {k: one[k] for k in ("fd", "nfe", "scores")} | about
        for who, one in (("teacher", summary["teacher"]), ("student", summary["methods"][name]))
    }
    own = json.loads(path.read_text(encoding="utf-8")) | {"floor": summary["floor"], **found}
    write_atomically(path, json.dumps(own, indent=2) + "\n")
    write_report(folder)


def sheets(job: Watched, teacher: Any, summary: dict[str, Any], folder: Path) -> Image.Image:
    """Real images, the teacher's and every method's, all nets from the same noise, three to a row."""
    assert job.images is not None
    columns = job.columns(teacher)
    shown = [int(i) for i in job.shown_images()[:SHOWN]]
    pictures = {"real": torch.from_numpy(np.stack([job.images.read(i) for i in shown]))}
    pictures[f"teacher, NFE {summary['teacher']['nfe']}"] = job.samples(teacher, job.teacher_sampler(teacher))[:SHOWN]
    for name, one in summary["methods"].items():
        (model,) = open_models(folder / name, STUDENT)
        pictures[f"{name}, NFE {one['nfe']}"] = job.samples(job.prepared(model.net).eval(), model.sampler)[:SHOWN]
    captions = list(pictures)
    lines = [captions[i : i + 3] for i in range(0, len(captions), 3)]
    return stacked([sheet({caption: pictures[caption] for caption in line}, columns=columns) for line in lines])


def rows(summary: dict[str, Any]) -> list[list[str]]:
    """The table as text, the head first."""
    titles = list(summary["floor"]["scores"])
    found = [["method", "NFE", *titles, "seconds", "images", "img/s", "peak GiB"]]
    found.append(["floor", "", *(short(summary["floor"]["scores"][t]) for t in titles), "", "", "", ""])
    for name, one in [("teacher", summary["teacher"]), *summary["methods"].items()]:
        speed, peak = one["images_per_second"], one["peak_memory_gib"]
        found.append([
            name, str(one["nfe"]), *(short(one["scores"][t]) for t in titles), f"{one['seconds']:.0f}", f"{one['images']:,}",
            "" if speed is None else f"{speed:.0f}", "" if peak is None else f"{peak:.2f}",
        ])  # fmt: skip
    return found


def short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def markdown(summary: dict[str, Any]) -> str:
    head, *body = rows(summary)
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def print_table(summary: dict[str, Any]) -> None:
    table = rows(summary)
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))))


if __name__ == "__main__":
    run(main)
