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
import math
from pathlib import Path
from typing import Any

from potstill.engine.common.cli import parser_of, run
from potstill.engine.common.errors import UserError
from potstill.engine.common.reading import read_json
from potstill.engine.common.signals import stoppable
from potstill.engine.config.library import family_of, find
from potstill.engine.config.schema import Config
from potstill.engine.config.tree import load
from potstill.engine.formats.pictures import save_png
from potstill.engine.jobs.build import is_text
from potstill.engine.jobs.comparison import SnapshotJob, finish_run, floor_and_teacher, method_measured, sheets, train_apart
from potstill.engine.jobs.folder import write_atomically, write_json
from potstill.engine.jobs.job import Job
from potstill.engine.jobs.lock import COMPARE, lock
from potstill.engine.jobs.rehearsal import kimg_in
from potstill.engine.measure.comparison import markdown, plain, plot_comparison
from potstill.engine.measure.networks import features_by_names
from potstill.engine.measure.score import Judge
from potstill.engine.models.origins import is_pipeline, local_path


def main(arguments: list[str]) -> None:
    flags = parser().parse_intermixed_args(arguments)
    check(flags)
    recipe = find(flags.recipe)
    recipes = siblings(recipe, flags.methods)
    cfg = load(recipe, [f"run_dir=runs/compare-{recipe.stem}", *flags.overrides])
    folder, given = cfg.run_dir, cfg.teacher.checkpoint
    assert folder
    if given and is_pipeline(local_path(given)):
        raise UserError(
            f"compare trains methods for nets of EDM, and the teacher {given} is a pipeline of diffusers: potstill train each recipe, and "
            "compare their summary.json"
        )
    if not given and is_text(cfg.net):
        raise UserError(
            f"compare trains methods for nets of EDM, and {recipe.stem} is told prompts: potstill train each recipe (potstill recipes), and "
            "compare their summary.json"
        )
    place = Path(folder).expanduser()
    with stoppable(load(recipe, flags.overrides).max_hours), lock(place / COMPARE):
        compare(recipe, recipes, flags, place)


def parser() -> argparse.ArgumentParser:
    p = parser_of("compare", __doc__)
    p.add_argument("recipe", help="the teacher's recipe: its name, such as digits, or a path to a .yaml")
    p.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings for all runs, such as data.path=FILE; run_dir=DIR"
    )
    p.add_argument("--methods", default="all", metavar="all|A,B|teacher", help="which ones; teacher: only that one (default all)")
    p.add_argument("--seconds", type=float, default=120.0, metavar="S", help="of training for each method (default 120)")
    p.add_argument("--teacher-seconds", type=float, metavar="S", help="of training for the teacher (default: as long as the recipe says)")
    p.add_argument("--points", type=int, default=4, metavar="N", help="how often within a run it is measured (default 4)")
    p.add_argument("--teacher-points", type=int, default=2, metavar="N", help="how often the teacher is (default 2)")
    p.add_argument("--features", metavar="NAME:FILE,…", help="TorchScript features to measure in, or pixels (default: eval.features)")
    p.add_argument("--real", type=int, metavar="N", help="measure against N of the real images (default: all)")
    p.add_argument(
        "--apart", action=argparse.BooleanOptionalAction, default=True,
        help="every run in a process of its own, so that its peak memory is its own (default)",
    )  # fmt: skip
    return p


def check(flags: argparse.Namespace) -> None:
    """UserError for a number that no comparison can use, and for a flag that is written as a setting."""
    written = {name: f"--{name.replace('_', '-')}" for name in vars(flags)}
    for name in ("seconds", "teacher_seconds"):
        if (value := getattr(flags, name)) is not None and not 0 < value < math.inf:
            raise UserError(f"{written[name]} wants a number above 0, got {value!r}")
    for name, least in (("points", 1), ("teacher_points", 1), ("real", 2)):
        if (value := getattr(flags, name)) is not None and value < least:
            raise UserError(f"{written[name]} wants at least {least}, got {value}")
    for name in (override.partition("=")[0] for override in flags.overrides):
        if name in written:
            raise UserError(f"{name}= is not a setting of a run: wanted {written[name]}, a flag of this command")


def siblings(recipe: Path, wanted: str) -> dict[str, Path]:
    """The recipes to compare by method name: the recipe's own, and <its name>_<method> in its file or beside it."""
    found = {load(recipe, []).method.name: recipe}
    found |= {path.stem.removeprefix(f"{recipe.stem}_"): path for path in family_of(recipe)}
    if wanted == "all":  # but what goes on from a run of another recipe, which a comparison does not make
        return {name: path for name, path in found.items() if not load(path, []).students.start}
    names = [] if wanted == "teacher" else wanted.split(",")
    if unknown := [name for name in names if name not in found]:
        raise UserError(f"--methods wants all, teacher, or some of {', '.join(found)}, got {unknown[0]!r}")
    return {name: found[name] for name in names}


def compare(recipe: Path, recipes: dict[str, Path], flags: argparse.Namespace, folder: Path) -> None:
    """Train what is not trained yet, measure what is not measured yet, then write and print the comparison."""
    overrides = flags.overrides
    features = features_by_names(flags.features or load(recipe, overrides).eval.features)
    job = train_teacher(load(recipe, [*overrides, f"run_dir={folder}"]), flags, folder)
    teacher = job.teacher()
    settings = [*overrides, f"teacher.checkpoint={job.cfg.teacher.checkpoint or f'{folder}/teacher.safetensors'}"]
    configs = {name: load(path, [*settings, f"run_dir={folder}/{name}"]) for name, path in recipes.items()}
    for name, cfg in configs.items():
        cfg.train.kimg = kimg_in(flags.seconds, cfg, folder / name / "kimg.json", of_teacher=False, job_of=SnapshotJob) / cfg.students.count
        cfg.train.eval_kimg = cfg.train.kimg / flags.points
        if not (record := folder / name / "trained.json").exists():
            train_apart(cfg, record, flags.apart, only_teacher=False)
    judge = judge_of(job, features, flags)
    path, asked = folder / "summary.json", what_was_asked(judge, features, flags, folder)
    before = read_json(path, dict, "remove it, and all is measured again") if path.exists() else {}
    summary = before if before | asked == before else asked | floor_and_teacher(job, teacher, judge, folder)
    for name, cfg in configs.items():
        if name not in summary["methods"]:
            trained = SnapshotJob(cfg, on_paper=True)
            summary["methods"][name] = method_measured(trained, judge, teacher)
            finish_run(trained, summary, name)
            write_json(path, summary)
    write_json(path, summary)
    write_atomically(folder / "table.md", markdown(summary))
    if summary["methods"]:
        plot_comparison(summary, folder / "curves.png")
        save_png(sheets(job, teacher, summary, folder), folder / "samples.png")
    print(plain(summary))


def train_teacher(cfg: Config, flags: argparse.Namespace, folder: Path) -> Job:
    """The job of the teacher, which is trained by now unless the recipe gives one."""
    job = SnapshotJob(cfg)
    job.lock.close()  # it is the process that trains who takes the folder
    if cfg.teacher.checkpoint or (folder / "teacher.safetensors").exists():
        return job
    if flags.teacher_seconds:
        cfg.teacher.train.kimg = kimg_in(flags.teacher_seconds, cfg, folder / "teacher-kimg.json", of_teacher=True, job_of=SnapshotJob)
    cfg.teacher.train.eval_kimg = cfg.teacher.train.kimg / flags.teacher_points
    train_apart(cfg, folder / "teacher-trained.json", flags.apart, only_teacher=True)
    return job


def judge_of(job: Job, features: list[Any], flags: argparse.Namespace) -> Judge:
    """What measures all nets alike, against the recipe's images or some of them."""
    if job.images is None:
        raise UserError("compare measures against real images: set data.path")
    images = job.images if flags.real is None else job.images.thinned(flags.real)
    wanted = job.cfg.eval
    n = wanted.n or min(len(images), 50_000)
    return Judge(images, features, n=n, seed=wanted.seed, batch=wanted.batch, device=job.device)


def what_was_asked(judge: Judge, features: list[Any], flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The head of the summary; an earlier call that was asked the same goes on."""
    return {
        "recipe": folder.name, "data": judge.images.name, "reference_images": len(judge.images), "n": judge.n, "seed": judge.seed,
        "seconds_each": flags.seconds, "points": flags.points,
        "features": {one.title: {"sha256": one.sha256, "num_features": one.num_features} for one in features},
    }  # fmt: skip


if __name__ == "__main__":
    run(main)
