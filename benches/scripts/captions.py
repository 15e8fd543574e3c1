"""Text to image trained here, over several seeds: a teacher, a student by every method, and what guidance does to both.

    python -m benches.scripts.captions                      all of it into benches/results/cpu-captions, on two cores
    python -m benches.scripts.captions --only teacher,dmd --seeds 1 --out DIR
    python -m benches.scripts.captions --table sim          SIM, guided: which of its choices lets it run away from the data

Every row and seed is a process of one thread, two at a time; a row that is measured is not made again. FD-pixels is the squared Fréchet
distance of all 128 pixels to 12,000 pictures, at n = 2,000. Accuracy is the share of pictures in which the judge sees what the caption says,
for the captions of the set, and for pairs of digits that no picture of it shows.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benches import RESULTS
from potstill.engine.config.tree import load
from potstill.engine.jobs import build
from potstill.engine.jobs.folder import write_json
from potstill.engine.jobs.job import Job
from potstill.engine.jobs.machine import device_title, versions
from potstill.engine.measure.scenes import judge
from potstill.engine.models.router import MANIFEST, load_router, write_manifest
from potstill.engine.training.health import Health

TEACHER = "teacher"
#: Row -> recipe and settings. All learn from the same teacher.
STUDENTS: dict[str, list[str]] = {
    "sim": ["captions_sim"],
    "dmd": ["captions"],
    "dmd2": ["captions_dmd2"],
    "gdd": ["captions_gdd"],
    "half the blocks": ["captions_small"],
    "msd, 2 students": ["captions_msd"],
    "msd, 4 students": ["captions_msd", "students.count=4", "students.partition=quadrants"],
    "four steps": ["captions_four"],
    "four steps, dmd2": ["captions_four", "method.gan=true"],
    "sfd": ["captions_sfd"],
    "moment matching": ["captions_moment_matching"],
    "sfd, guided": ["captions_sfd", "method.guidance=2"],
    "dmd, guided": ["captions", "method.guidance=2"],
}
SHORT, GUIDED = ["captions_sim"], ["method.guidance=2"]
#: Guided SIM: each beside the first by what its name says.
OF_SIM: dict[str, list[str]] = {
    "none": [*SHORT, "train.kimg=6"],
    "2, of the teacher": [*SHORT, *GUIDED, "train.kimg=6"],
    "2, of the teacher, four updates of the fake net": [*SHORT, *GUIDED, "method.fake_per_student=4", "train.kimg=24"],
    "2, of teacher and fake net": [*SHORT, *GUIDED, "method.fake_guidance=2", "train.kimg=6"],
    "2, of the teacher, Karras' levels": [*SHORT, *GUIDED, "method.levels=karras", "train.kimg=6"],
}
TABLES = {"all": STUDENTS, "sim": OF_SIM}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-captions")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-captions"), help="the runs themselves")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="some of the rows, with ; between them")
    parser.add_argument("--table", choices=TABLES, default="all")
    parser.add_argument("--read", action="store_true", help="make nothing, and put together what is there")
    parser.add_argument("--one", nargs=2, metavar=("ROW", "SEED"), help="make this row alone, in this process")
    args = parser.parse_args(arguments)
    rows = args.only.split(";") if args.only else list(TABLES[args.table])
    if args.one:
        return one(args.work, args.table, args.one[0], int(args.one[1]))
    with ThreadPoolExecutor(2) as pool:
        for row in () if args.read else ([TEACHER], [row for row in rows if row != TEACHER]):
            list(pool.map(lambda job: apart(args.work, args.table, *job), [(name, seed) for name in row for seed in range(args.seeds)]))
    made = {name: [seed for seed in range(args.seeds) if there(args.work, args.table, name, seed)] for name in [TEACHER, *rows]}
    found = {name: [read(args.work, args.table, name, seed) for seed in seeds] for name, seeds in made.items() if seeds}
    about = {
        "device": device_title(torch.device("cpu")),
        "threads": 1,
        "n": load("captions", []).eval.n,
        "seeds": args.seeds,
        "versions": versions(),
    }
    about |= {"judge": judge().own_accuracy}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"{args.table}.json", about | {"means": {name: means(each) for name, each in found.items()}, "rows": found})


def means(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the seeds, of every number."""
    numbers = {key for key, value in each[0].items() if isinstance(value, int | float)}
    inner = {key: means([one[key] for one in each]) for key, value in each[0].items() if isinstance(value, dict)}
    last = [v for one in each for v in one.get("variance", []) if v is not None]
    return (
        {key: sum(one[key] for one in each) / len(each) for key in sorted(numbers)}
        | inner
        | ({"variance": sum(last) / len(last)} if last else {})
    )


def place(work: Path, table: str, row: str, seed: int) -> Path:
    folder = work / str(seed)
    return folder / TEACHER if row == TEACHER else folder / table / "".join(c if c.isalnum() else "-" for c in row)


def there(work: Path, table: str, row: str, seed: int) -> bool:
    return (place(work, table, row, seed) / "measured.json").exists()


def read(work: Path, table: str, row: str, seed: int) -> dict[str, Any]:
    folder = place(work, table, row, seed)
    found = json.loads((folder / "measured.json").read_text())
    return found | ({"alarms": alarms_of(folder)} if table == "sim" and row != TEACHER else {})


def alarms_of(folder: Path) -> list[str]:
    """The kinds of alarms that the lines of a run raise, by the rules as they are now."""
    entries = [entry for entry in map(json.loads, lines(folder)) if "alarm" not in entry]
    with TemporaryDirectory() as empty:
        health = Health(Path(empty), entries[-1]["step"], lambda text: None)
        for entry in entries:
            health.write(entry)
        said = (Path(empty) / health.file.name).read_text().splitlines() if health.file.exists() else []
    return [json.loads(line)["kind"] for line in said]


def apart(work: Path, table: str, row: str, seed: int) -> None:
    """A row of one seed in a process of its own, unless it is there."""
    if there(work, table, row, seed):
        return
    command = [sys.executable, "-m", "benches.scripts.captions", "--work", str(work), "--table", table, "--one", row, str(seed)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(row, seed, json.dumps(read(work, table, row, seed)))


def one(work: Path, table: str, row: str, seed: int) -> None:
    """Train and measure it."""
    folder, teachers = place(work, table, row, seed), work / str(seed) / TEACHER
    recipe, *settings = ["captions"] if row == TEACHER else TABLES[table][row]
    given = [] if row == TEACHER else [f"teacher.checkpoint={teachers}/pipeline", f"text.cache={teachers}/text"]
    kimg = load(recipe, settings).train.kimg
    job = Job(
        load(recipe, [*settings, *given, f"run_dir={folder}", f"seed={seed}", f"train.eval_kimg={kimg / 4:g}", "log.tensorboard=false"])
    )
    with job.lock:
        job.open_told()
        teacher = job.teacher()
        if row == TEACHER:
            return write_json(folder / "measured.json", of_teacher(job, teacher))
        start = job.matched_start(teacher)
        for k in range(job.cfg.students.count):
            student, sampler = job.distil(teacher, start, k)
        if job.partition:
            write_manifest(job.dir, job.partition)
            student = job.given_null(job.prepared(load_router(job.dir / MANIFEST)[0]))
        found = measured(job, student, sampler)
        stages = [job.student_file(k).parent for k in range(job.cfg.students.count)]
        if job.cfg.students.net is not None:
            stages.append(job.dir / "tsm")
        seconds = [json.loads(lines(stage)[-1])["seconds"] for stage in stages]
        curve = [entry for entry in map(json.loads, lines(job.student_file(0).parent)) if f"fd@{job.cfg.eval.n}" in entry]
        found |= {"seconds": sum(seconds), "curve": [(entry["kimg"], entry[f"fd@{job.cfg.eval.n}"]) for entry in curve]}
        found["variance"] = [entry.get("student/variance_ratio") for entry in map(json.loads, lines(job.student_file(0).parent))][-3:]
        write_json(folder / "measured.json", found)


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def measured(job: Job, net: Any, sampler: Any) -> dict[str, Any]:
    """Of one net: distance, accuracies, evaluations."""
    assert job.distance is not None
    near, apart = job.distance.of(net, sampler), job.distance.of_held_out(net, sampler)
    return {
        "fd": near["fd"], "accuracy": near["scores"]["scenes/accuracy"], "held_out": apart["scores"]["scenes/accuracy"], "nfe": near["nfe"]
    }  # fmt: skip


def of_teacher(job: Job, teacher: Any) -> dict[str, Any]:
    """The teacher with and without guidance, in one step as the students begin, and real pictures."""
    assert job.distance is not None
    walk = build.teacher_sampler(job.cfg, teacher)
    begins = job.cfg.method.build(teacher, teacher).sampler
    floor = {"fd": job.distance.reference.floor, "accuracy": judge().own_accuracy}
    seconds = json.loads(lines(job.dir / "teacher")[-1])["seconds"]
    guided = measured(job, teacher, replace(walk, guidance=2.0))
    return measured(job, teacher, walk) | {
        "seconds": seconds, "guided": guided, "undistilled": measured(job, teacher, begins), "real": floor
    }  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
