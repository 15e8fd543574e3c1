"""cudnn.benchmark and weights that lie NHWC, each on and off: python benches/layouts.py RESULTS. FFHQ-64's net, B = 64, bf16.

cuDNN remembers its choice of an algorithm for the whole process, so each value of cudnn.benchmark has a process of its own,
within which the two layouts are interleaved. infer: no gradients. train: to the weights. Into RESULTS/layouts.json.
"""

import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_step
import harness
import rehearse
import rows
import torch

from potstill.engine.nets.shadow import give_shadows

ROUNDS = 1 if rehearse.REHEARSING else 15


def main(arguments: list[str]) -> None:
    results = Path(arguments[0])
    if len(arguments) > 1:
        return measure(results, benchmark=arguments[1] == "on")
    codes = [
        subprocess.run([sys.executable, __file__, str(results), value], env=os.environ, check=False).returncode for value in ("off", "on")
    ]
    sys.exit(max(codes))


def measure(results: Path, benchmark: bool) -> None:
    torch.backends.cudnn.benchmark = benchmark
    batch = bench_step.BATCHES[-1]
    for use in ("infer", "train"):
        calls = {layout: call_of(use, layout, batch) for layout in ("NCHW", "NHWC")}
        taken: dict[str, list[float]] = {layout: [] for layout in calls}
        for call in calls.values():
            for _ in range(3):
                call()
        for _ in range(ROUNDS):
            for layout, call in calls.items():
                taken[layout].append(harness.cuda_seconds(call))
        row = {
            "group": "layouts", "kind": "cuda", "case": f"{use} B={batch}, cudnn.benchmark {'on' if benchmark else 'off'}",
            **{f"ms, weights {layout}": 1e3 * median(some) for layout, some in taken.items()},
            "NCHW/NHWC": harness.ratio(taken["NCHW"], taken["NHWC"]),
        }  # fmt: skip
        rows.keep(results, row)
        print(row, flush=True)


def call_of(use: str, layout: str, batch: int) -> Any:
    """One forward, or forward and backward, of the net with its weights so."""
    device = harness.CUDA.device
    net = bench_step.ffhq64(device, torch.bfloat16)
    if layout == "NHWC":
        net.to(memory_format=torch.channels_last)
    give_shadows([net])
    x = torch.randn(batch, 3, bench_step.SIDE, bench_step.SIDE, device=device)
    sigma = torch.ones(batch, device=device)

    def call() -> None:
        with torch.set_grad_enabled(use == "train"):
            y = net(x, sigma)
        if use == "train":
            y.square().mean().backward()
            net.zero_grad(set_to_none=True)

    return call


if __name__ == "__main__":
    main(sys.argv[1:])
