"""python -m engine.compare RECIPE.yaml [methods=all|a,b,…] [seconds=S] [key=value …]: one teacher, every method, one clock.

The teacher is the recipe's. Each method is a sibling recipe <name>_<method>.yaml, and gets the same `seconds` of training:
a few iterations are timed, and its length is set from them. Prints one table; writes runs/compare-<name>/summary.json,
samples.png (the same noise for all) and every method's own run folder.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch

from engine import build
from engine.cli import run
from engine.config import Config, load
from engine.errors import UserError
from engine.evaluation.pictures import save_png, sheet
from engine.folder import write_atomically
from engine.job import Job
from engine.rehearsal import peak_memory, synchronize
from engine.training.loop import Run


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m engine.compare", description=__doc__)
    parser.add_argument("recipe", type=Path, help="the teacher's recipe, such as configs/digits.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="methods=…, seconds=…, and settings for all runs")
    args = parser.parse_intermixed_args(arguments)
    ours, overrides = own_settings(args.settings)
    recipes = siblings(args.recipe, ours.get("methods", "all"))
    seconds = budget(ours.get("seconds", "120"))
    folder = Path(ours.get("run_dir", f"runs/compare-{args.recipe.stem}"))
    compare(args.recipe, recipes, seconds, folder, overrides)


def own_settings(settings: list[str]) -> tuple[dict[str, str], list[str]]:
    """This command's own key=values, and those for the runs."""
    pairs = [setting.partition("=") for setting in settings]
    ours = {key: value for key, _, value in pairs if key in ("methods", "seconds", "run_dir")}
    return ours, [setting for setting, (key, _, _) in zip(settings, pairs, strict=True) if key not in ours]


def budget(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"seconds wants a number above 0, got {text!r}")
    return seconds


def siblings(recipe: Path, wanted: str) -> dict[str, Path]:
    """The recipes to compare by method name: the recipe's own, and <its name>_<method>.yaml beside it."""
    if not recipe.is_file():
        raise UserError(f"no recipe at {recipe}")
    found = {load(recipe, []).method.name: recipe}
    for path in sorted(recipe.parent.glob(f"{recipe.stem}_*.yaml")):
        found[path.stem.removeprefix(f"{recipe.stem}_")] = path
    if wanted == "all":
        return found
    names = wanted.split(",")
    if unknown := [name for name in names if name not in found]:
        raise UserError(f"methods wants all, or some of {', '.join(found)}, got {unknown[0]!r}")
    return {name: found[name] for name in names}


def compare(recipe: Path, recipes: dict[str, Path], seconds: float, folder: Path, overrides: list[str]) -> None:
    teacher_job = Job(load(recipe, [*overrides, f"run_dir={folder}"]))
    teacher = teacher_job.teacher()
    checkpoint = teacher_job.cfg.teacher.checkpoint or f"{folder}/teacher.safetensors"
    summary: dict[str, Any] = {"seconds_each": seconds, "floor": None, "teacher": None, "methods": {}}
    sheets: dict[str, torch.Tensor] = {"teacher": teacher_job.samples(teacher, teacher_job.teacher_sampler())}
    for name, path in recipes.items():
        cfg = load(path, [*overrides, f"run_dir={folder}/{name}", f"teacher.checkpoint={checkpoint}"])
        job = Job(with_length(cfg, seconds, folder / name))
        began = time.perf_counter()
        result = job.run()
        assert result is not None
        summary["floor"], summary["teacher"] = result["floor"], result["teacher"]
        summary["methods"][name] = {
            "fd": result["student"]["fd"],
            "nfe": result["student"]["nfe"],
            "seconds": result["seconds"]["student"],
            "images": result["images_seen"]["student"],
            "peak_memory_gib": round(peak_memory(job.device) / 2**30, 3),
            "seconds_with_measuring": round(time.perf_counter() - began, 1),
        }
        sheets[f"{name}, NFE {result['student']['nfe']}"] = job.samples(job.student, job.sampler)
        write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    save_png(sheet(sheets, columns=teacher_job.columns(teacher)), folder / "samples.png")
    print_table(summary)


def with_length(cfg: Config, seconds: float, folder: Path) -> Config:
    """The settings with as many kimg as fit into `seconds` of training, by timing a few iterations; remembered in `folder`."""
    cfg, stored = copy.deepcopy(cfg), folder / "kimg.json"
    if stored.exists():
        cfg.train.kimg = json.loads(stored.read_text())["kimg"]
        return cfg
    job = Job(cfg, on_paper=True)
    teacher = job.teacher()
    method = build.build_method(cfg.method, teacher)
    if getattr(method, "pairs", 0) is None and cfg.method.regression:
        raise UserError("compare cannot time a method with a regression on pairs: set method.regression=0")
    timed = Run(method, cfg.train, cfg.seed, job.device)
    for net in method.nets.values():
        net.to(job.device)
    stream, period = job.stream(cfg.train, None), max(turn.every for turn in method.turns)
    rounds = period * max(1, round(8 / period))
    for step in range(2):
        timed.take(*stream.at(step))
    synchronize(job.device)
    start = time.perf_counter()
    for step in range(2, 2 + rounds):
        timed.take(*stream.at(step))
    synchronize(job.device)
    per_image = (time.perf_counter() - start) / rounds / cfg.train.batch
    cfg.train.kimg = seconds / per_image / 1000 / cfg.students.count
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(stored, json.dumps({"kimg": cfg.train.kimg, "seconds": seconds}))
    return cfg


def print_table(summary: dict[str, Any]) -> None:
    rows = [("floor", summary["floor"]["fd"], "", "", ""), ("teacher", summary["teacher"]["fd"], summary["teacher"]["nfe"], "", "")]
    rows += [(name, m["fd"], m["nfe"], f"{m['seconds']:.0f}", f"{m['images']:,}") for name, m in summary["methods"].items()]
    print(f"{'method':18}{'FD':>8}{'NFE':>6}{'seconds':>10}{'images':>12}")
    for name, fd, nfe, seconds, images in rows:
        print(f"{name:18}{fd:8.3f}{nfe:>6}{seconds:>10}{images:>12}")


if __name__ == "__main__":
    run(main)
