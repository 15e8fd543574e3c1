"""What a GPU that is lent for minutes shall do, in the order of evidence per second: the steps of `make gpu`'s three plans.

evidence  twelve minutes: is it right, how fast are the kernels and the steps, where does the time go, what do recipes cost
quality   twelve minutes, on the user's images: a teacher, five methods, their table, curves and sample sheet
ladder    an hour and more: every change of a step by itself, time to quality, scaling
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benches import RESULTS, ROOT, rehearse
from benches.scripts.recipes import IN_EVIDENCE, RUNS
from benches.scripts.time_to_quality import SWITCHES

MINUTES = {"evidence": 12.0, "quality": 12.0, "ladder": 120.0}
METHODS = ("dmd", "sim", "gdd_i", "moment_matching", "sfd")
LARGE = ("ffhq64_gdd_i", "imagenet64_gdd_i", "imagenet64_dmd2")
SHAPES = ("cifar10", "ffhq64", "imagenet64")
#: Sized for a CPU and smaller still: what a comparison is rehearsed with.
TINY_COMPARISON = [
    "data=fast32_cpu", "teacher.loss.sampling_steps=2", "teacher.train.kimg=0.008", "teacher.train.batch=4", "train.batch=4", "eval.n=12",
    "eval.batch=12", "log.tensorboard=false", "precision=fp32", "net.model_channels=8", "net.channel_mult=[1,1]", "train.grid_kimg=1",
    "teacher.train.grid_kimg=1", "--no-apart",
]  # fmt: skip


class Step(NamedTuple):
    """One process of a plan. seconds: what it is expected to take. command: of Python; why_not: a reason to leave it out."""

    name: str
    seconds: float
    command: list[str]
    why_not: str = ""


def steps(plan: str, environment: Mapping[str, str], folder: Path, results: Path = RESULTS) -> list[Step]:
    """The steps of a plan that writes into `folder`. Expected seconds are those of the last real run, where there was one.

    Raises:
        ValueError: no such plan.
    """
    makers = {"evidence": evidence, "quality": quality, "ladder": ladder}
    if plan not in makers:
        raise ValueError(f"PLAN wants one of {', '.join(makers)}, got {plan!r}")
    known = measured_seconds(results)
    return [step._replace(seconds=known.get(step.name, step.seconds)) for step in makers[plan](environment, folder)]


def measured_seconds(results: Path) -> dict[str, float]:
    """What each step took on a GPU the last time it ended by itself, under the budget that it had then."""
    found: dict[str, float] = {}
    for path in sorted(results.glob("*/steps.json"), key=lambda path: path.parent.name[-10:]):
        for name, record in json.loads(path.read_text())["steps"].items():
            if record["code"] in (0, 1) and not record.get("rehearsal"):
                found[name] = record["seconds"]
    return found


def script(name: str, *arguments: object) -> list[str]:
    """What Python is called with for a script of this folder."""
    return ["-m", f"benches.scripts.{name}", *map(str, arguments)]


#: What every call of pytest has. -W: what libraries warn of while files are collected fails nothing either.
PYTEST = ["-m", "pytest", "--tb=short", "-W", "default", "-p", "no:cacheprovider", "-m", "gpu"]


def evidence(environment: Mapping[str, str], folder: Path) -> list[Step]:
    workers = str(2 if rehearse.REHEARSING else min(14, os.cpu_count() or 1))  # most of a test is Triton compiling
    tests, benches = [*PYTEST, "-v", "-n", workers], [*PYTEST, "-q", "--benchmark", f"--results={folder}"]
    # What has no test for a GPU is not imported either: it takes seconds a worker, and a package that is missing ends them all.
    marked = [
        path for path in sorted((ROOT / "tests").glob("test_*.py")) if re.search(r"mark\.gpu|on_gpu\(|everywhere\(", path.read_text())
    ]
    kernels = [str(path.relative_to(ROOT)) for path in marked if path.name.startswith("test_kernels_")]
    rest = [str(path.relative_to(ROOT)) for path in marked if not path.name.startswith("test_kernels_")]
    strong = "score_implicit and huber" if rehearse.REHEARSING else " or ".join(COMPILED_TOO)
    return [
        Step("tools and rates", 45, script("rates", folder)),
        Step("kernels are right", 90, [*tests, *kernels]),
        Step("graphs and ranks are right", 60, [*tests, *rest]),
        Step("kernels", 120, [*benches, "--resume", *(f"benches/bench_{name}.py" for name in ("losses", "norm_silu", "optim"))]),
        Step("profile", 50, script("profile_step", folder)),
        Step("steps", 105, [*benches, "--resume", "benches/bench_step.py", "-k", "sim or dmd2"]),
        Step("recipes", 100, script("recipes", folder, *IN_EVIDENCE)),
        Step("layouts", 55, script("layouts", folder)),
        Step("nsight", 40, script("nsight", folder)),
        Step("compiled", 55, [*benches, "--compiled", "benches/bench_losses.py", "benches/bench_norm_silu.py", "-k", strong]),
    ]  # fmt: skip


#: Rows that torch.compile is given as well: it is the strongest thing to compare with, and slow to build.
COMPILED_TOO = (
    "(score_implicit and huber and 2048x3)",
    "(score_match and 2048x3)",
    "(forward and 64x256x32x32-triton)",
    "(backward and 64x256x32x32-triton)",
)


def quality(environment: Mapping[str, str], folder: Path) -> list[Step]:
    """potstill compare once for the teacher and once a method; each call measures what it trained and adds it to the table."""
    data, recipe, work = environment.get("DATA"), recipe_of(environment), work_folder(environment, folder)
    why_not = "" if data else "wants DATA=FILE, images of the recipe's size"
    teacher, each = environment.get("TEACHER_SECONDS") or "300", environment.get("SECONDS") or "70"
    one = ["-m", "potstill", "compare", recipe, f"run_dir={work}", f"data.path={data}", "--features", features_of(environment)]
    one += ["--teacher-seconds", teacher, "--seconds", each, "--points", "1" if rehearse.REHEARSING else "3"]
    one += ["--teacher-points", "1", *TINY_COMPARISON] if rehearse.REHEARSING else ["--teacher-points", "2", "eval.n=5000"]
    # Beside the training a call starts, loads, times a few iterations and measures: ten seconds are a guess.
    found = [Step("teacher", float(teacher) + 10, [*one, "--methods", "teacher"], why_not)]
    return found + [Step(f"method {name}", float(each) + 10, [*one, "--methods", name], why_not) for name in METHODS]


def ladder(environment: Mapping[str, str], folder: Path) -> list[Step]:
    benches = [*PYTEST, "-q", "--benchmark", f"--results={folder}", "--resume"]
    found = [Step(f"ladder {shape}", 900, [*benches, "benches/bench_ladder.py", "-k", shape]) for shape in SHAPES]
    found += [
        Step("all steps", 400, [*benches, "benches/bench_step.py"]),
        Step("EDM2's operations", 150, [*benches, "--compiled", "benches/bench_edm2.py"]),  # a guess: most of it is compiling
        Step("skipping", 120, [*benches, "benches/bench_skipping.py"]),
        Step("all recipes", 300, script("recipes", folder, *RUNS)),
    ]
    return found + time_to_quality(environment, folder) + scaling(folder)


def time_to_quality(environment: Mapping[str, str], folder: Path) -> list[Step]:
    """Every switch on the teacher of the quality plan."""
    data, work = environment.get("DATA"), work_folder(environment, folder)
    teacher, seconds = work / "teacher.safetensors", environment.get("SWITCH_SECONDS") or "60"
    why_not = "" if data and teacher.exists() else "wants DATA=FILE and the teacher of PLAN=quality"
    one = script("time_to_quality", recipe_of(environment), "--teacher", teacher, "--features", features_of(environment))
    one += ["--seconds", seconds, "--work", f"{work}-switches", "--out", str(folder)]
    rest = ["--", f"data.path={data}", "eval.n=2000"]
    return [Step(f"time {switch.name}", 8 * float(seconds), [*one, "--only", switch.name, *rest], why_not) for switch in SWITCHES]


def scaling(folder: Path) -> list[Step]:
    """Rehearsals of a small recipe over batch, resolution and width, of the large ones over batch, and what follows."""
    measure = script("scaling", "measure")
    grid = ["--batch", "16,64,256", "--resolution", "32,64", "--channels", "64,128"]
    found = [Step("scaling fast32", 400, [*measure, f"{folder}/scaling-fast.json", "configs/fast32.yaml", *grid])]
    for stem in LARGE:
        features = ["method.features=[teacher]"] if "gdd" in stem else []
        found.append(
            Step(
                f"scaling {stem}", 300, [*measure, f"{folder}/scaling-{stem}.json", f"configs/{stem}.yaml", *features, "--batch", "4,16,64"]
            )
        )
    known = [f"{folder}/scaling-{stem}.json" for stem in LARGE]
    return [*found, Step("scaling projected", 30, script("scaling", "project", f"{folder}/scaling.json", "--measured", *known))]


def recipe_of(environment: Mapping[str, str]) -> str:
    return environment.get("RECIPE") or "configs/fast32.yaml"


def features_of(environment: Mapping[str, str]) -> str:
    return environment.get("FEATURES") or "pixels"


def work_folder(environment: Mapping[str, str], folder: Path) -> Path:
    """Where runs on the user's images lie, which are too large to be committed."""
    return ROOT / "runs" / f"{folder.name}-{Path(recipe_of(environment)).stem}"
