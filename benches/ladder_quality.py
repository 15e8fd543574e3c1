"""Does what makes a step faster cost quality? python benches/ladder_quality.py [--seeds 3] [--kimg 36]

The digits recipe, one teacher, each seed twice: in the published style (benches/bench_ladder.py's lowest rung: float32 NCHW,
PyTorch's norms and attention, losses as formulas, torch.optim.Adam) and as shipped. Same noise, same images, same length.
Writes the students' Fréchet distances and the seconds of their training, the two styles in turn.
Wants a quiet machine: 15 minutes on two cores with the defaults.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_ladder
import harness
from skipping_evidence import RECIPE, ROOT, say, trained

from potstill.engine.config.tree import load
from potstill.engine.jobs.job import Job

STYLES = ("published", "shipped")
PUBLISHED = ["precision=fp32", "train.shadows=false", "train.optimizer=torch"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--kimg", type=float, default=36, help="length of every distillation; the recipe's")
    p.add_argument("--teacher", type=Path, help="a digits teacher (default: train the recipe's)")
    p.add_argument("--out", type=Path, default=ROOT / "benches/results/cpu-digits/ladder_quality.json")
    args = p.parse_args()
    start = time.perf_counter()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        teacher = args.teacher or trained(Path(folder))
        for seed in range(args.seeds):
            one: dict[str, Any] = {"seed": seed}
            for style in STYLES if seed % 2 == 0 else reversed(STYLES):
                one[style] = student(Path(folder) / f"{style}-{seed}", style, teacher, seed, args.kimg)
            say(json.dumps(one))
            runs.append(one)
    found = {
        "machine": harness.machine(harness.CPU),
        "command": " ".join(["python", *sys.argv]),
        "kimg": args.kimg,
        "runs": runs,
        **{key: {style: summary([one[style][key] for one in runs]) for style in STYLES} for key in ("fd", "seconds")},
        "faster": mean(one["published"]["seconds"] / one["shipped"]["seconds"] for one in runs),
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    say(f"-> {args.out}")


def student(folder: Path, style: str, teacher: Path, seed: int, kimg: float) -> dict[str, float]:
    given = [f"run_dir={folder}", f"teacher.checkpoint={teacher}", f"seed={seed}", f"train.kimg={kimg}", "log.tensorboard=false"]
    given += ["train.grid_kimg=1000", "train.checkpoint_kimg=1000", "teacher.loss.sampling_steps=2"]
    if style == "published":
        with bench_ladder.applied(bench_ladder.Stack(), harness.CPU.device):
            result = Job(load(RECIPE, [*given, *PUBLISHED])).run()
    else:
        result = Job(load(RECIPE, given)).run()
    assert result is not None
    return {"fd": result["student"]["fd"], "seconds": result["seconds"]["student"]}


def summary(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}


if __name__ == "__main__":
    main()
