"""Hours for large jobs on many GPUs: what one GPU was measured to do, and a communication model that is all in this file.

    python -m benches.scripts.scaling measure OUT.json configs/fast32.yaml --batch 8,32,128 --resolution 32,64 --channels 32,64
    python -m benches.scripts.scaling project OUT.json [--measured FILE.json …] [--assume-tflops 150]

`measure` rehearses a recipe (random weights, synthetic images) at every batch, resolution and width: img/s, peak memory,
parameters. `project` wants such rows of the large recipes (measure … configs/ffhq64_gdd_i.yaml) and takes an assumed speed
where there are none. Its hours are projections and marked so.

Model. The recipe's global batch is shared by G GPUs. Per iteration and GPU

    t = compute(batch / G) + exposed,    exposed = max(0, communication - overlap · backward)

compute is the measured seconds per iteration, linear between measured batches; `backward` is BACKWARD of it, of which the
share OVERLAP hides communication. DDP: a ring all-reduce of every trained net's gradients, 2 (G-1)/G · bytes at the slowest
link. FSDP: two all-gathers of the weights (one if they are kept after the forward) and a reduce-scatter of the gradients,
(G-1)/G · bytes each. Within a node NVLink, across nodes one NIC a GPU; both at EFFICIENCY of their nominal rate. Data,
measuring and checkpoints cost nothing here; latents of 512-px images are computed before.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benches import ROOT
from benches.rows import write

GPUS = (1, 8, 64)
BACKWARD, OVERLAP = 2 / 3, 0.8  # assumptions: two thirds of a step are backward, four fifths of which communication hides behind
# Forwards of a net of the teacher's size per image that an iteration sees (docs/methods); GDD without its feature nets.
FORWARDS = {"dmd": 4.8, "dmd2": 6.5, "sim": 11.0, "sid": 11.0, "gdd": 4.0, "gdd_i": 3.1, "moment_matching": 5.0, "sfd": 18.0}
#: name, recipe, published or chosen millions of images (None: the recipe's own)
JOBS = [
    ("FFHQ-64, GDD-I", "ffhq64_gdd_i", None),
    ("ImageNet-64, GDD-I", "imagenet64_gdd_i", None),
    ("ImageNet-64, DMD2", "imagenet64_dmd2", None),
    ("512-px latents (64x64x4), GDD-I, the net and images of ImageNet-64", "imagenet64_gdd_i", None),
    ("512-px latents (64x64x4), DMD2, the net and images of ImageNet-64", "imagenet64_dmd2", None),
]


@dataclass(frozen=True)
class Cluster:
    """What connects the GPUs: bytes per second and GPU in one direction, nominal. An assumption, by default an H100/H200 pod."""

    node: int = 8  # GPUs
    inside: float = 450e9  # NVLink 4
    between: float = 50e9  # one 400 Gb/s NIC a GPU
    efficiency: float = 0.8
    latency: float = 10e-6  # seconds a hop

    def bandwidth(self, gpus: int) -> float:
        """Of the slowest link on a ring through all of them."""
        return self.efficiency * (self.inside if gpus <= self.node else self.between)


def all_reduce(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds for a ring all-reduce of `size` bytes: a reduce-scatter and an all-gather."""
    return 2 * scatter_or_gather(size, gpus, cluster)


def scatter_or_gather(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds for a ring reduce-scatter or all-gather of `size` bytes in all."""
    return (gpus - 1) / gpus * size / cluster.bandwidth(gpus) + (gpus - 1) * cluster.latency


def communication(parameters: float, gpus: int, cluster: Cluster, way: str) -> float:
    """Seconds an iteration that updates nets of so many parameters in all. Gradients float32, gathered weights bfloat16."""
    gradients, weights = 4 * parameters, 2 * parameters
    if way == "ddp":
        return all_reduce(gradients, gpus, cluster)
    gathers = {"fsdp": 2, "fsdp, weights kept": 1}[way]
    return gathers * scatter_or_gather(weights, gpus, cluster) + scatter_or_gather(gradients, gpus, cluster)


def compute(batch: float, measured: dict[float, float]) -> float:
    """Seconds per iteration at a batch per GPU, from measured ones {batch: seconds}: linear between them; below the smallest
    as long as that one (a GPU is not faster half empty); above the largest in proportion (micro-batches)."""
    known = sorted(measured)
    if batch <= known[0]:
        return measured[known[0]]
    if batch >= known[-1]:
        return measured[known[-1]] * batch / known[-1]
    low, high = max(b for b in known if b <= batch), min(b for b in known if b > batch)
    return measured[low] + (measured[high] - measured[low]) * (batch - low) / (high - low)


def hours(
    images: float, batch: int, gpus: int, measured: dict[float, float], parameters: float, cluster: Cluster, way: str = "ddp"
) -> float:
    busy = compute(batch / gpus, measured)
    exposed = max(0.0, communication(parameters, gpus, cluster, way) - OVERLAP * BACKWARD * busy) if gpus > 1 else 0.0
    return images / batch * (busy + exposed) / 3600


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure")
    one.add_argument("out", type=Path)
    one.add_argument("recipe", type=Path)
    one.add_argument("settings", nargs="*", metavar="key=value")
    one.add_argument("--batch", type=whole_numbers, default=[8, 32, 128])
    one.add_argument("--resolution", type=whole_numbers, default=[None])
    one.add_argument("--channels", type=whole_numbers, default=[None])
    one.set_defaults(do=measure)
    two = commands.add_parser("project")
    two.add_argument("out", type=Path)
    two.add_argument("--measured", type=Path, nargs="*", default=[], help="files that `measure` wrote, all on one kind of device")
    two.add_argument("--assume-tflops", type=float, default=150.0, help="sustained, where nothing was measured")
    two.set_defaults(do=project)
    args = parser.parse_args(arguments)
    args.do(args)


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def measure(args: argparse.Namespace) -> None:
    """Rehearse at every point of the grid; points that do not fit say so. Written after each."""
    rows: list[dict[str, Any]] = []
    for batch, resolution, channels in product(args.batch, args.resolution, args.channels):
        settings = [*args.settings, f"train.batch={batch}", "train.micro_batch=null"]
        settings += [f"data.resolution={resolution}"] if resolution else []
        settings += [f"net.model_channels={channels}"] if channels else []
        command = [sys.executable, "-m", "potstill", "train", str(args.recipe), "rehearse=true", "teacher.checkpoint=null", *settings]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        row = {"recipe": args.recipe.stem, "asked_batch": batch, "resolution": resolution, "channels": channels}
        last = (done.stdout.strip() or done.stderr.strip() or "nothing was said").splitlines()[-1]
        row |= json.loads(last) if done.returncode == 0 else {"failed": last}
        rows.append(row)
        print(json.dumps(row))
        write(args.out, {"rows": rows})


def project(args: argparse.Namespace) -> None:
    rows = [row for file in args.measured for row in json.loads(file.read_text())["rows"] if "failed" not in row]
    cluster, jobs = Cluster(), []
    for name, stem, millions in JOBS:
        job = job_of(stem)
        seconds = {row["batch"]: row["seconds_per_iteration"] for row in rows if row["recipe"] == stem}
        source = "measured speed" if seconds else f"assumed {args.assume_tflops:g} TFLOP/s a GPU"
        per_image = FORWARDS[job["method"]] * job["gflop"] / args.assume_tflops / 1e3
        seconds = seconds or {b: b * per_image for b in (1, job["batch"])}
        images = millions * 1e6 if millions else job["images"]
        for way in ("ddp", "fsdp"):
            found = [hours(images, job["batch"], gpus, seconds, job["parameters"], cluster, way) for gpus in GPUS]
            jobs.append(
                job
                | {
                    "name": f"{name}, {way.upper()}",
                    "source": source,
                    "million_images": images / 1e6,
                    "hours": [float(f"{h:.4g}") for h in found],
                }
            )
    devices = sorted({row["device"] for row in rows})
    text = {
        "projection": True, "device": ", ".join(devices) or "no measurement", "measured_by": "; ".join(sorted({j["source"] for j in jobs})),
        "assumptions": asdict(cluster) | {"backward": BACKWARD, "overlap": OVERLAP, "bytes_per_gradient": 4, "bytes_per_weight": 2},
        "gpus": GPUS, "projections": jobs, "measured": rows,
    }  # fmt: skip
    write(args.out, text)
    for job in jobs:
        print(
            f"projected, {job['source']}: {job['name']}: " + ", ".join(f"{g} GPUs {h:g} h" for g, h in zip(GPUS, job["hours"], strict=True))
        )


def job_of(stem: str) -> dict[str, Any]:
    """A recipe on paper: images, batch, method, parameters that a mean iteration updates, GFLOP of a forward per image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from potstill.engine.config.tree import load
    from potstill.engine.jobs import build

    cfg = load(ROOT / f"configs/{stem}.yaml", ["method.features=[teacher]"] if "gdd" in stem else [])
    resolution, classes = cfg.data.resolution or 64, 1000 if stem.startswith("imagenet") else 0
    with torch.device("meta"):
        net = build.build_net(cfg.net, resolution, 3, classes)
        method = cfg.method.build(net, net)
        labels = torch.zeros(1, classes) if classes else None
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 3, resolution, resolution), torch.ones(1), labels)
    name = cfg.method.name
    name = "gdd_i" if getattr(cfg.method, "freeze", 0) else "dmd2" if getattr(cfg.method, "gan", False) else name
    size = {net: sum(p.numel() for p in one.parameters() if p.requires_grad) for net, one in method.nets.items()}
    trained = sum(size[turn.trains] / turn.every for turn in method.turns)  # updated in a mean iteration
    return {
        "recipe": stem,
        "method": name,
        "batch": cfg.train.batch,
        "images": cfg.train.kimg * 1000,
        "parameters": trained,
        "gflop": counter.get_total_flops() / 1e9,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
