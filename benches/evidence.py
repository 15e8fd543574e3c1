"""What the FFHQ-64 recipes cost on this GPU: every method's recipe with rehearse=true, beside what is published.

One JSON file a method in the folder given, so that a call that ran out of time goes on where it stopped. Hours are of this
GPU for the recipe's own number of images; the hours for an A100 are a projection from the ratio of the two chips' dense
bf16 peaks (312 TFLOP/s for the A100), not a measurement, and say so.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from engine.rehearsal import PEAKS

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 540  # seconds of one call, under make gpu's
MICRO = 32
RUNS = {  # recipe, overrides, published
    "sid": ("ffhq64", [], "500 M images; no hours published"),
    "sim": ("ffhq64", ["method=sim"], "no hours published for FFHQ"),
    "dmd2": ("ffhq64", ["method=dmd2"], "371 A100-hours, of ImageNet-64 with another net (200,000 iterations of 280)"),
    "moment_matching": ("ffhq64", ["method=moment_matching"], "no hours published"),
    "sfd": ("ffhq64", ["method=sfd", "train.kimg=200"], "0.64 A100-hours, of CIFAR-10 (200,000 trajectories)"),
    "gdd_i": ("ffhq64_gdd_i", ["method.features=[teacher]", "train.kimg=5000"], "48 A100-hours for 5 M images, other features"),
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    start, late = time.monotonic(), []
    for name, (recipe, overrides, published) in RUNS.items():
        for graphs in ("auto", "off"):
            path = folder / f"{name}-graphs-{graphs}.json"
            if path.exists():
                continue
            left = LIMIT - (time.monotonic() - start)
            if left < 60:
                late.append(path.stem)
                continue
            result = rehearsed(recipe, [*overrides, f"train.graphs={graphs}", f"train.micro_batch={MICRO}"], left)
            if result is None:
                late.append(path.stem)
                continue
            path.write_text(json.dumps(result | projected(result) | {"published": published}, indent=1) + "\n")
    print(table(folder))
    if late:
        sys.exit(f"not yet: {', '.join(late)}; the same command goes on")


def rehearsed(recipe: str, overrides: list[str], limit: float) -> dict | None:
    """What rehearse=true prints; None if it took longer than `limit` seconds."""
    command = [sys.executable, "-m", "engine.train", f"configs/{recipe}.yaml", "rehearse=true", *overrides]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, env=os.environ)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def projected(result: dict) -> dict:
    """Hours on an A100, by the ratio of peaks; nothing where the chip's peak is not known."""
    peak = next((p for chip, p in PEAKS.items() if chip in result.get("device", "")), None)
    if peak is None:
        return {}
    return {"a100_hours_projected_not_measured": round(result["projected_hours"] * peak / PEAKS["A100"], 2)}


def table(folder: Path) -> str:
    head = "| run | img/s | MFU | GiB | hours here | A100-hours (projected) | published |\n|---|---|---|---|---|---|---|\n"
    rows = []
    for path in sorted(folder.glob("*-graphs-*.json")):
        r = json.loads(path.read_text())
        keys = ("images_per_second", "mfu", "peak_memory_gib", "projected_hours", "a100_hours_projected_not_measured", "published")
        rows.append(f"| {path.stem} | " + (r["error"] if "error" in r else " | ".join(str(r.get(k, "-")) for k in keys)) + " |")
    text = head + "\n".join(rows) + "\n"
    (folder / "README.md").write_text(text)
    return text


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("evidence wants a CUDA device; this machine has none")
    main(Path(sys.argv[1]))
