"""Students of one, two and four evaluations by every method, on digits: quality, what training takes, and what an image takes.

    python -m benches.scripts.few_steps                     all of it into benches/results/cpu-few-steps, on two cores
    python -m benches.scripts.few_steps --only "dmd 1;dmd 2" --seeds 1 --set train.kimg=2 --out DIR
    python -m benches.scripts.few_steps --read              make nothing, and put together and show what is there

Every row and seed is a process of one thread, two at a time; a row that is there is not made again. All students of a seed learn from one
teacher, which the row "dmd 1" trains. The distance is that of the recipes (FD-pixels, n = 1,797). Milliseconds an image are of one thread, batch
256, the fastest of five, measured when nothing of ours is training. Beside them stand the rows of benches/results/cpu-captions at as many
evaluations.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benches import RESULTS, ROOT
from potstill.engine.jobs.folder import write_json
from potstill.engine.jobs.machine import device_title, versions
from potstill.engine.models.student import Student

EVALUATIONS = (1, 2, 4)
NAMES = {"dmd": {1: "digits", 2: "digits_two", 4: "digits_four"}} | {
    kind: {1: f"digits_{kind}", 2: f"digits_{kind}_two", 4: f"digits_{kind}_four"} for kind in ("sim", "gdd")
}
#: Row, a method and its evaluations -> recipe and settings. All of a seed learn from the teacher of the first.
ROWS: dict[str, list[str]] = {f"{kind} {n}": [recipe] for kind, recipes in NAMES.items() for n, recipe in recipes.items()}
ROWS |= {f"moment_matching {n}": ["digits_moment_matching", f"method.steps={n}"] for n in EVALUATIONS}
ROWS |= {f"sfd {n}": ["digits_sfd", f"method.num_steps=[{n + 2}]"] for n in EVALUATIONS}  # the first step is without the net
FIRST = "dmd 1"
BATCH, TRIES = 256, 5
CAPTIONS = RESULTS / "cpu-captions/all.json"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-few-steps")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-few-steps"), help="the runs themselves")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="some of the rows, with ; between them")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all of them; a table with other settings wants another --work"
    )
    parser.add_argument("--read", action="store_true", help="make nothing")
    args = parser.parse_args(arguments)
    rows = args.only.split(";") if args.only else list(ROWS)
    if unknown := [row for row in rows if row not in ROWS]:
        sys.exit(f"wanted some of {', '.join(ROWS)}, got {unknown[0]!r}")
    if not args.read:
        with ThreadPoolExecutor(2) as pool:
            for some in ([FIRST], [row for row in rows if row != FIRST]):  # the teachers first
                list(
                    pool.map(
                        lambda job: made(args.work, job[0], job[1], args.set), [(row, seed) for row in some for seed in range(args.seeds)]
                    )
                )
    torch.set_num_threads(1)
    found = [result(place(args.work, row, seed), row, seed) for row in rows for seed in range(args.seeds) if there(args.work, row, seed)]
    about = {"device": device_title(torch.device("cpu")), "threads": 1, "seeds": args.seeds, "settings": args.set, "versions": versions()}
    table = about | {"teachers": teachers(args.work, args.seeds), "means": means(found), "rows": found, "captions": captions()}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "few_steps.json", table)
    print(shown(table))


def place(work: Path, row: str, seed: int) -> Path:
    return work / str(seed) / row.replace(" ", "-")


def there(work: Path, row: str, seed: int) -> bool:
    return (place(work, row, seed) / "summary.json").exists()


def made(work: Path, row: str, seed: int, settings: list[str]) -> None:
    """Train and measure it in a process of its own, unless it is there."""
    if there(work, row, seed):
        return
    recipe, *own = ROWS[row]
    teacher = [] if row == FIRST else [f"teacher.checkpoint={place(work, FIRST, seed)}/teacher.safetensors"]
    command = [sys.executable, "-m", "potstill", "train", recipe, f"run_dir={place(work, row, seed)}", f"seed={seed}", *own, *teacher]
    command += ["log.tensorboard=false", *settings]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def result(folder: Path, row: str, seed: int) -> dict[str, Any]:
    """What a run says of itself, and the seconds that an image takes."""
    summary, (method, _, _) = json.loads((folder / "summary.json").read_text()), row.partition(" ")
    student = summary["student"]
    return {
        "method": method, "nfe": student["nfe"], "seed": seed, "fd": student["fd"], "n": student["n"],
        "seconds": summary["seconds"]["student"], "images": summary["images_seen"]["student"], "ms_per_image": ms_per_image(folder),
    }  # fmt: skip


def ms_per_image(folder: Path) -> float:
    student, taken = Student(folder), []
    for _ in range(TRIES):
        began = time.perf_counter()
        student(range(BATCH))
        taken.append(time.perf_counter() - began)
    return 1000 * min(taken) / BATCH


def teachers(work: Path, seeds: int) -> list[dict[str, Any]]:
    """Of each seed, and how far real images are from real ones."""
    summaries = [json.loads((place(work, FIRST, seed) / "summary.json").read_text()) for seed in range(seeds) if there(work, FIRST, seed)]
    return [{"fd": one["teacher"]["fd"], "nfe": one["teacher"]["nfe"], "floor": one["floor"]["fd"]} for one in summaries]


def means(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds of each method and number of evaluations."""
    table = []
    for method, nfe in dict.fromkeys((one["method"], one["nfe"]) for one in found):
        each = [one for one in found if (one["method"], one["nfe"]) == (method, nfe)]
        mean = {key: sum(one[key] for one in each) / len(each) for key in ("fd", "seconds", "images", "ms_per_image")}
        table.append({"method": method, "nfe": nfe, "seeds": len(each)} | mean)
    return table


def captions() -> list[dict[str, Any]]:
    """The rows of the table of captions at one, two and four evaluations, where that table is."""
    known = json.loads(CAPTIONS.read_text())["means"] if CAPTIONS.exists() else {}
    some = {name: one for name, one in known.items() if one["nfe"] in EVALUATIONS}
    return [{"row": name, "nfe": round(one["nfe"]), "fd": one["fd"], "seconds": one["seconds"]} for name, one in some.items()]


def shown(table: dict[str, Any]) -> str:
    """As text: a method a line, a number of evaluations a column; then captions."""
    methods = list(dict.fromkeys(one["method"] for one in table["means"]))
    lines = [f"{'FD-pixels (s of training, ms an image)':<40}" + "".join(f"{f'NFE {n}':>24}" for n in EVALUATIONS)]
    for method in methods:
        cells = {one["nfe"]: one for one in table["means"] if one["method"] == method}
        texts = [f"{c['fd']:.3f} ({c['seconds']:.0f}, {c['ms_per_image']:.2f})" if (c := cells.get(n)) else "" for n in EVALUATIONS]
        lines.append(f"{method:<40}" + "".join(f"{text:>24}" for text in texts))
    lines += [
        f"teacher of seed {i}: {one['fd']:.3f} at NFE {one['nfe']}; real images {one['floor']:.3f}"
        for i, one in enumerate(table["teachers"])
    ]
    return "\n".join(
        [*lines, *(f"captions, {one['row']}: {one['fd']:.2f} at NFE {one['nfe']} ({one['seconds']:.0f} s)" for one in table["captions"])]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
