"""What Nsight Compute says of four kernels: python -m benches.scripts.nsight RESULTS. Wants ncu; without it there is nothing to run.

SIM's loss forward and backward at 600 MB, norm_silu forward and backward of an FFHQ-64 block, and AdamEMA's pass over CIFAR-10's
net: time, share of the memory's and of the arithmetic's peak, occupancy, registers. Clocks are left alone. Into RESULTS/nsight.json.
"""

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benches import ROOT, bench_losses, bench_norm_silu, bench_optim, harness, rehearse, rows

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes.sum": "bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of memory peak",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% of arithmetic peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% occupancy",
    "launch__registers_per_thread": "registers",
}
UNITS = {"ns": 1.0, "us": 1e3, "usecond": 1e3, "nsecond": 1.0, "ms": 1e6, "msecond": 1e6, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def main(arguments: list[str]) -> None:
    if arguments[0] == "--watched":
        return run_watched()
    results = Path(arguments[0])
    command = [sys.executable, "-m", "benches.scripts.nsight", "--watched"]
    if rehearse.REHEARSING:
        return print(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    if shutil.which("ncu") is None:
        sys.exit("nsight wants ncu (Nsight Compute) on PATH, got none")
    ncu = [
        "ncu",
        "--profile-from-start",
        "off",
        "--clock-control",
        "none",
        "--print-units",
        "base",
        "--csv",
        "--metrics",
        ",".join(METRICS),
    ]
    done = subprocess.run([*ncu, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"ncu failed: {(done.stdout + done.stderr).strip()[-2000:]}")
    found = list(kernels_in(done.stdout.splitlines()))
    for row in found:
        rows.keep(results, {"group": "nsight", "kind": "cuda"} | row)
        print(row, flush=True)
    if not found:
        sys.exit(f"no kernel of ours in what ncu said: {done.stdout[-2000:]}")


def run_watched() -> None:
    """The four, each once after a warm-up; ncu sees what runs between start and stop."""
    calls = list(work())
    for _, call in calls:
        call()
    harness.wait(harness.CUDA)
    profiler = torch.cuda.profiler if harness.CUDA.device.type == "cuda" else None
    for name, call in calls:
        if profiler:
            profiler.start()
        call()
        harness.wait(harness.CUDA)
        if profiler:
            profiler.stop()
        print(name)


def work() -> Iterable[tuple[str, Callable[[], Any]]]:
    place = harness.CUDA
    inputs = bench_losses.Inputs(harness.smallest([(2048, 3, 64, 64)], bench_losses.GPU_SHAPES)[0], place)
    name = "score_implicit huber (SIM)"
    bench = bench_losses.BENCHES[name]
    for wanted in bench.wrt.split():
        for t in bench_losses.tensors(inputs, wanted):
            t.requires_grad_()
    loss = bench_losses.stepping(bench.ours, bench, [inputs], guard=False)
    yield name, lambda: loss(0)
    shape = harness.smallest([bench_norm_silu.Shape(64, 256, 32)], bench_norm_silu.GPU_SHAPES)[0]
    norm = bench_norm_silu.stepping(bench_norm_silu.norm_silu, [bench_norm_silu.Inputs(shape, place)], backward=True)
    yield f"norm_silu {shape}", lambda: norm(0)
    net = bench_optim.Net(next(iter(bench_optim.GPU_NETS.values())), place.device)
    yield "AdamEMA", bench_optim.ours(net, "auto")


def kernels_in(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    """One row a launch of a kernel of ours, from ncu's CSV: a line a launch and metric, after lines of other kinds."""
    table = csv.DictReader(line for line in lines if line.startswith('"'))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in table:
        if ours(line["Kernel Name"]):
            row = found.setdefault((line["ID"], line["Kernel Name"]), {})
            value = float(line["Metric Value"].replace(",", ""))
            row[METRICS[line["Metric Name"]]] = value * UNITS.get(line["Metric Unit"], 1.0)
    for (number, name), row in found.items():
        yield {"case": f"{name} ({number})"} | row


def ours(kernel: str) -> bool:
    """Triton kernels keep their names, `_partials_kernel`; csrc's are in the namespace potstill."""
    return (kernel.partition("(")[0].strip().endswith("_kernel") and "at::" not in kernel) or "potstill" in kernel


if __name__ == "__main__":
    main(sys.argv[1:])
