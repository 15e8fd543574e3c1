"""Does a long run stay as small as it was? Memory, open files, threads and processes of 20,000 iterations, two workers reading images.

A sample every 500 iterations, from within the run; those of each stage's first quarter are warm-up and do not count.
"""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benches.scripts.soak_moments import around
from benches.scripts.soak_runs import Case, Command, copy_inputs, preload, write_digits

EVERY = 500
#: Iterations of each stage: a teacher's are the cheapest, a student's have all that distillation does.
STAGES = {"teacher": 18_000, "student": 2_000}
#: Then it is asked to stop, and judged by what there is.
MINUTES = float(os.environ.get("MINUTES") or 6)
#: Bytes an iteration. At a million iterations, which FFHQ's recipe has, a run would have 1 GiB more.
MOST_BYTES = 2**30 / 1e6
#: More handles at a sample than ever before: as many as there are batches on their way from two workers, two each.
IN_FLIGHT = 4
BATCH = 4
#: Samples of a stage, without which there is no verdict on it.
FEWEST = 4
SETTINGS = [
    "data.workers=2", "net.model_channels=4", "train.kimg={student}", "teacher.train.kimg={teacher}", f"train.batch={BATCH}",
    f"teacher.train.batch={BATCH}", "train.log_iterations=50", "teacher.train.log_iterations=50", "log.tensorboard=true",
    "train.grid_kimg=null", "teacher.train.grid_kimg=null", "train.checkpoint_kimg=null", "teacher.train.checkpoint_kimg=null",
]  # fmt: skip


def endurance(work: Path, out: Path) -> int:
    """Run, and write the samples with their verdict. Returns the exit code."""
    preload()
    shutil.rmtree(work, ignore_errors=True)
    write_digits(work / "inputs/digits.zip")
    began, case = time.monotonic(), Case("zip")
    copy_inputs(case, work, work / "run")
    lengths = {name: str(BATCH * iterations / 1000) for name, iterations in STAGES.items()}
    extra = [text.format(**lengths) if "{" in text else text for text in SETTINGS]
    samples = work / "samples.jsonl"
    command = Command(case, work, work / "run/run", lambda _: watch(samples), extra)
    command.ranks[0].join(60 * MINUTES)
    command.signal(signal.SIGTERM)
    ended = command.wait()
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    found = {name: judged([row for row in rows if row["stage"] == name]) for name in STAGES}
    whole = ended.codes == [0]
    flat = any(one["flat"] for one in found.values()) and all(one["flat"] for one in found.values() if one["samples"] >= FEWEST)
    result = {
        "sentence": told(found, len(rows) * EVERY),
        "flat": flat, "whole": whole, "iterations": len(rows) * EVERY, "seconds": round(time.monotonic() - began, 1), "stages": found,
        "bounds": {"bytes_per_iteration": round(MOST_BYTES, 1), "handles": IN_FLIGHT, "threads": 0, "processes": 0}, "samples": rows,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("flat", "whole", "iterations", "seconds", "stages")}, indent=1))
    if not whole:
        print(f"not all of it in {MINUTES:g} minutes: {ended.codes} {ended.last_line}")
    return int(not flat)


def told(found: dict[str, dict[str, Any]], iterations: int) -> str:
    """The result in a sentence for the README."""
    stages = [
        f"{name}: {one['rss_bytes_per_iteration']:,.1f} ± {one['rss_error']:,.1f} bytes an iteration, workers "
        f"{one['workers_bytes_per_iteration']:,.1f} ± {one['workers_error']:,.1f}; {one['more_handles']} handles, {one['more_threads']} threads, "
        f"{one['more_processes']} processes more in the second half"
        for name, one in found.items()
        if one["samples"] >= FEWEST
    ]
    return f"{iterations:,} iterations with two workers: {'. '.join(stages)}."


def watch(samples: Path) -> None:
    """In the child: a line of what this process has, every few iterations of each stage."""
    from potstill.engine.training.run import Run

    def due(run: Run, *_: Any) -> bool:
        if run.step % EVERY == 0:
            with samples.open("a") as file:
                file.write(json.dumps({"stage": run.method.product, "iteration": run.step} | measured()) + "\n")
        return False

    around(Run, "take", due, lambda: None, after=True)


def measured() -> dict[str, int]:
    """Of this process now. rss, most: bytes, now and at any time; workers: bytes of its children."""
    children = [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    return {
        "rss": memory("self", "VmRSS"), "most": memory("self", "VmHWM"), "workers": sum(memory(pid, "VmRSS") for pid in children),
        "handles": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task")), "processes": len(children),
    }  # fmt: skip


def memory(pid: int | str, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def judged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Growth after the warm-up, and whether there is any.

    Of memory the slope of a line through all samples, less two standard errors: what it grows by for certain. Of what is counted
    how far the second half's highest number is above the first half's.
    """
    rows = rows[len(rows) // 4 :]
    if len(rows) < FEWEST:
        return {"flat": False, "samples": len(rows)}
    found: dict[str, Any] = {"samples": len(rows)}
    for name in ("rss", "workers"):
        slope, error = line_through([row["iteration"] for row in rows], [row[name] for row in rows])
        found[f"{name}_bytes_per_iteration"], found[f"{name}_error"] = round(slope, 1), round(error, 1)
    half = len(rows) // 2
    for name in ("handles", "threads", "processes"):
        found[f"more_{name}"] = max(row[name] for row in rows[half:]) - max(row[name] for row in rows[:half])
    sure = max(found[f"{name}_bytes_per_iteration"] - 2 * found[f"{name}_error"] for name in ("rss", "workers"))
    few = found["more_handles"] <= IN_FLIGHT and found["more_threads"] <= 0 and found["more_processes"] <= 0
    return found | {"flat": bool(sure <= MOST_BYTES and few)}


def line_through(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """The slope of the line of least squares, and its standard error."""
    at, value = np.asarray(x, float) - np.mean(x), np.asarray(y, float) - np.mean(y)
    slope = float(at @ value / (at @ at))
    rest = value - slope * at
    return slope, math.sqrt(float(rest @ rest) / (len(at) - 2) / float(at @ at))
