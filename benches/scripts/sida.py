"""SiDA and SiD²A beside what they are made of, for equal seconds of training from the same teacher, over several seeds.

    python -m benches.scripts.sida                                  all of it into benches/results/cpu-sida, on two cores
    python -m benches.scripts.sida --seconds 20 --seeds 1 --only sid,sida --out DIR --work DIR
    python -m benches.scripts.sida --read                           make nothing, and put together what is there
    python -m benches.scripts.sida --recipe fast32 data=fast32_cpu data.path=FILE.zip eval.features=NET.pt

Every row and seed is a process of one thread, two at a time; a row that is measured is not made again. A few iterations are timed and
the length is set from them, as in `potstill compare`. SiD²A has SiD's and its own half of the seconds. FD is the squared Fréchet distance
by the recipe's features to the data, at its `eval.n`. Of a recipe other than digits its pages _sim and, for DMD2, its own are taken.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benches import RESULTS
from potstill.engine.config.schema import Config
from potstill.engine.config.tree import load
from potstill.engine.jobs import build
from potstill.engine.jobs.folder import write_json
from potstill.engine.jobs.job import Job
from potstill.engine.jobs.machine import device_title, versions
from potstill.engine.jobs.rehearsal import kimg_in

TEACHER, FIRST = "teacher", "sid"  # FIRST: whose student SiD²A goes on from
#: Row -> the recipe's page and settings, for digits; all learn from the same teacher.
DIGITS: dict[str, list[str]] = {
    "sim": ["digits_sim"],
    "sid": ["digits_sid"],
    "sida": ["digits_sida"],
    "sid2a": ["digits_sida"],
    "dmd2": ["digits", "method.gan=true"],
}
OURS = ["method.student_after=0.25", "method.gan_after=0.5", "train.optim.fake.clip_value=1"]  # of SiDA on another recipe


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for all runs, such as data.path=FILE.zip")
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-sida")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-sida"), help="the runs themselves")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training, for every row")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="some of the rows, with commas between them")
    parser.add_argument("--read", action="store_true", help="make nothing, and put together what is there")
    parser.add_argument("--one", nargs=2, metavar=("ROW", "SEED"), help="make this row alone, in this process")
    args = parser.parse_args(arguments)
    if args.one:
        return one(args, args.one[0], int(args.one[1]))
    rows = args.only.split(",") if args.only else list(DIGITS)
    with ThreadPoolExecutor(2) as pool:
        for names in () if args.read else ([TEACHER], rows):
            list(pool.map(lambda job: apart(args, arguments, *job), [(name, seed) for seed in range(args.seeds) for name in names]))
    found = {row: [read(place(args, row, seed)) for seed in range(args.seeds)] for row in [TEACHER, *rows]}
    about = {"recipe": args.recipe, "device": device_title(torch.device("cpu")), "threads": 1, "seconds_each": args.seconds}
    judged = load(args.recipe, args.settings).eval
    about |= {"features": Path(judged.features).stem, "n": judged.n, "seeds": args.seeds, "versions": versions()}
    means = {row: {key: sum(one[key] for one in each) / len(each) for key in each[0] if key != "curve"} for row, each in found.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"{args.recipe}.json", about | {"means": means, "rows": found})
    print(json.dumps(means, indent=1))


def place(args: argparse.Namespace, row: str, seed: int) -> Path:
    return args.work / args.recipe / str(seed) / row


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "measured.json").read_text())


def apart(args: argparse.Namespace, arguments: list[str], row: str, seed: int) -> None:
    """A row of one seed in a process of its own, unless it is there."""
    if (place(args, row, seed) / "measured.json").exists():
        return
    command = [sys.executable, "-m", "benches.scripts.sida", *arguments, "--one", row, str(seed)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = read(place(args, row, seed))
    print(row, seed, f"FD {found['fd']:.3f}, {found['seconds']:.0f} s", flush=True)


def one(args: argparse.Namespace, row: str, seed: int) -> None:
    """Train and measure it."""
    folder, teacher = place(args, row, seed), place(args, TEACHER, seed) / "teacher.safetensors"
    if row == TEACHER:
        cfg = settings(args, [args.recipe], folder, seed)
        return write_json(folder / "measured.json", of_teacher(Job(cfg)))
    found, given, parts = {}, [f"teacher.checkpoint={teacher}"], 1
    if row == "sid2a":
        first, parts = folder / FIRST, 2
        found = made(settings(args, [*page(args, FIRST), *given], first, seed), args.seconds / parts)
        given.append(f"students.start={first}")
    last = made(settings(args, [*page(args, row), *given], folder, seed), args.seconds / parts)
    sums = {key: found.get(key, 0) + last[key] for key in ("seconds", "kimg")}
    write_json(folder / "measured.json", last | sums)


def page(args: argparse.Namespace, row: str) -> list[str]:
    """The recipe of a row and its settings."""
    if args.recipe == "digits":
        return DIGITS[row]
    of_sim, own = f"{args.recipe}_sim", {"sim": [], "sid": ["method=sid"]}
    return [args.recipe, "method.gan=true"] if row == "dmd2" else [of_sim, *own.get(row, ["method=sida", *OURS])]


def settings(args: argparse.Namespace, chosen: list[str], folder: Path, seed: int) -> Config:
    """A recipe with its settings, then those of all runs."""
    recipe, *own = chosen
    return load(recipe, [*own, *args.settings, f"run_dir={folder}", f"seed={seed}", "device=cpu", "log.tensorboard=false"])


def made(cfg: Config, seconds: float) -> dict[str, Any]:
    """A student trained for so many seconds: its distance, and what it took."""
    assert cfg.run_dir is not None
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    cfg.train.kimg = kimg_in(seconds, cfg, folder / "kimg.json", of_teacher=False)
    cfg.train.eval_kimg = cfg.train.kimg / 4
    job = Job(cfg)
    with job.lock:
        teacher = job.teacher()
        student, sampler = job.distil(teacher, job.matched_start(teacher), 0)
        assert job.distance is not None
        found = job.distance.of(student, sampler)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["kimg"], line[name]) for line in lines for name in line if name.startswith("fd@")]
    return {"fd": found["fd"], "nfe": found["nfe"], "seconds": lines[-1]["seconds"], "kimg": cfg.train.kimg, "curve": curve}


def of_teacher(job: Job) -> dict[str, Any]:
    """The teacher, sampled as it is when it is a student's."""
    with job.lock:
        net = job.teacher()
        assert job.distance is not None
        found = job.distance.of(net, build.teacher_sampler(job.cfg, net))
    seconds = json.loads((job.dir / "teacher/metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    return {"fd": found["fd"], "nfe": found["nfe"], "seconds": seconds, "kimg": job.cfg.teacher.train.kimg}


if __name__ == "__main__":
    main(sys.argv[1:])
