"""cudnn.benchmark and weights that lie NHWC, each on and off: python -m benches.scripts.layouts RESULTS. FFHQ-64's net, B = 64, bf16.

cuDNN remembers its choice of an algorithm for the whole process, so each value of cudnn.benchmark has a process of its own,
within which the two layouts are interleaved. infer: no gradients. train: to the weights. Into RESULTS/layouts.json.
"""

import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benches import ROOT, bench_step, harness, rehearse, rows
from potstill.engine.nets.shadow import give_shadows

ROUNDS = 1 if rehearse.REHEARSING else 15


def main(arguments: list[str]) -> None:
    results = Path(arguments[0])
    if len(arguments) > 1:
        return measure(results, benchmark=arguments[1] == "on")
    command = [sys.executable, "-m", "benches.scripts.layouts", str(results.absolute())]
    sys.exit(max(subprocess.run([*command, value], cwd=ROOT, check=False).returncode for value in ("off", "on")))


def measure(results: Path, benchmark: bool) -> None:
    torch.backends.cudnn.benchmark = benchmark
    batch = bench_step.BATCHES[-1]
    for use in ("infer", "train"):
        calls = {layout: call_of(use, layout, batch) for layout in ("NCHW", "NHWC")}
        seconds: dict[str, list[float]] = {layout: [] for layout in calls}
        for call in calls.values():
            for _ in range(3):
                call()
        for _ in range(ROUNDS):
            for layout, call in calls.items():
                seconds[layout].append(harness.cuda_seconds(call))
        row = {
            "group": "layouts", "kind": "cuda", "case": f"{use} B={batch}, cudnn.benchmark {'on' if benchmark else 'off'}",
            **{f"ms, weights {layout}": 1e3 * median(some) for layout, some in seconds.items()},
            "NCHW/NHWC": harness.ratio(seconds["NCHW"], seconds["NHWC"]),
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
