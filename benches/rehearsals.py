"""What recipes cost on this GPU: python benches/rehearsals.py RESULTS [NAME …]. Each with rehearse=true, beside what is published.

A recipe is one process and one row of RESULTS/rehearsal.json, kept when it is measured; one that has a row is not repeated.
Hours are of this GPU for the recipe's own number of images; the hours for an A100 are a projection from the ratio of the two
chips' dense bf16 peaks, not a measurement, and say so.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rehearse
import rows

from potstill.engine.jobs.rehearsal import PEAKS

ROOT = Path(__file__).resolve().parent.parent

RUNS: dict[str, tuple[str, list[str], str]] = {  # recipe, overrides, published
    "cifar10_sim": ("cifar10_sim", [], "500 M images; no hours published"),
    "cifar10_sim bf16": ("cifar10_sim", ["precision=bf16"], "500 M images; no hours published"),
    "ffhq64_gdd_i": (
        "ffhq64_gdd_i",
        ["method.features=[teacher]", *(["method.width=8"] if rehearse.REHEARSING else [])],
        "48 A100-hours for 5 M images, with other features",
    ),
    "imagenet64_dmd2": ("imagenet64_dmd2", [], "371 A100-hours for 56 M images"),
    "ffhq64 sid": ("ffhq64", ["train.micro_batch=32"], "500 M images; no hours published"),
    "ffhq64 sim": ("ffhq64", ["method=sim", "train.micro_batch=32"], "no hours published"),
    "ffhq64 moment_matching": ("ffhq64", ["method=moment_matching", "train.micro_batch=32"], "no hours published"),
    "ffhq64 sfd": (
        "ffhq64",
        ["method=sfd", "train.kimg=200", "train.micro_batch=32"],
        "0.64 A100-hours, of CIFAR-10 (200,000 trajectories)",
    ),
}
FIRST = ("ffhq64_gdd_i", "imagenet64_dmd2", "cifar10_sim bf16", "cifar10_sim")
TINY = [
    "data.resolution=32",
    "net.model_channels=8",
    "net.num_blocks=1",
    "net.attn_resolutions=[]",
    "train.micro_batch=null",
    "train.batch=2",
]
LIMIT = 240  # seconds of one recipe; what a step may take is the plan's business


def main(results: Path, names: list[str]) -> None:
    if unknown := [name for name in names if name not in RUNS]:
        sys.exit(f"rehearsals wants some of {', '.join(RUNS)}, got {unknown[0]!r}")
    done = {row["case"] for row in rows.rows_in(rows.place_of(results, "rehearsal", "cuda")) if "failed" not in row}
    failed = False
    for name in [name for name in names or RUNS if name not in done]:
        recipe, overrides, published = RUNS[name]
        found = rehearsed(recipe, overrides)
        failed |= "failed" in found
        rows.keep(results, {"group": "rehearsal", "kind": "cuda", "case": name} | found | {"published": published})
        print(name, json.dumps(found), flush=True)
    sys.exit(int(failed))


def rehearsed(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """What rehearse=true says of a recipe, with the hours it projects; or why it failed."""
    command = [sys.executable, "-m", "potstill", "train", recipe, "rehearse=true", "teacher.checkpoint=null", *overrides]
    command += TINY if rehearse.REHEARSING else []
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, env=os.environ, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {LIMIT} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["it said nothing"])[-1]}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found | projected(found)


def projected(result: dict[str, Any]) -> dict[str, Any]:
    """Hours on an A100, by the ratio of peaks; nothing where the chip's peak is not known."""
    peak = next((p for chip, p in PEAKS.items() if chip in result.get("device", "")), None)
    if peak is None:
        return {}
    return {"a100_hours_projected_not_measured": round(result["projected_hours"] * peak / PEAKS["A100"], 2)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
