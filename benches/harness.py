"""How a bench times things: variants interleaved round by round, medians, and ratios taken within a round.

On a GPU a variant is a CUDA graph over several copies of its inputs, more bytes than the L2 cache holds, so launches
cost what they cost in a captured step and nothing is read hot; on a CPU it is one call on one thread.
"""

import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
#: More than the L2 cache of an H200 (50 MB) several times over.
COLD_BYTES = 256 << 20

Run = Callable[[int], Any]  # runs the variant on copy number k of its inputs


def seconds(variants: dict[str, Run], device: torch.device, copies: int, *, budget: float) -> dict[str, list[float]]:
    """Seconds per call of each variant, one number a round; `budget` is what a variant may take altogether."""
    calls = {
        name: _graphed(run, copies) if device.type == "cuda" else _rotating(run, copies)
        for name, run in variants.items()
    }
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    once = {name: min(clock(call) for _ in range(3)) for name, call in calls.items()}
    rounds = max(15, min(400, int(budget / max(once.values()))))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(clock(call))
    per_call = copies if device.type == "cuda" else 1
    return {name: [s / per_call for s in all_of_it] for name, all_of_it in taken.items()}


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over rounds of over/under: both were taken within milliseconds of each other."""
    return median(o / u for o, u in zip(over, under, strict=True))


def _rotating(run: Run, copies: int) -> Callable[[], None]:
    turn = [0]

    def call() -> None:
        run(turn[0] % copies)
        turn[0] += 1

    for _ in range(3):
        call()
    return call


def _graphed(run: Run, copies: int) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for k in range(copies):
            run(k)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for k in range(copies):
            run(k)
    return graph.replay


def _cpu_seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copies_for(moved: int, device: torch.device) -> int:
    """How many copies of inputs of `moved` bytes make the cache cold."""
    return min(64, max(1, math.ceil(COLD_BYTES / max(moved, 1)))) if device.type == "cuda" else 1


def copy_of(moved: int, device: torch.device) -> Run:
    """A plain copy that reads and writes as many bytes."""
    pairs = [
        [torch.ones(max(moved // 8, 1), device=device) for _ in range(2)] for _ in range(copies_for(moved, device))
    ]
    return lambda k: pairs[k % len(pairs)][0].copy_(pairs[k % len(pairs)][1])


def launches(run: Run, device: torch.device) -> int:
    """GPU: kernels launched by one call. CPU: calls of PyTorch ops that call no other."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    run(0)
    with profile(activities=[activity]) as seen:
        run(0)
    if device.type == "cuda":
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in seen.events())
    return sum(e.name.startswith("aten::") and not e.cpu_children for e in seen.events())


def machine(device: torch.device) -> dict[str, Any]:
    """What a number is worthless without."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    known = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "none",
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    if device.type == "cuda":
        return known | {"cuda": torch.version.cuda, "driver": _driver()}
    return known | {"threads": torch.get_num_threads()}


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().partition("\n")[0]


def save(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """One JSON file a group and device: the machine, then the rows."""
    written = []
    for key in sorted({(row["group"], row["kind"]) for row in rows}):
        some = [row for row in rows if (row["group"], row["kind"]) == key]
        about = machine(CUDA if key[1] == "cuda" else CPU)
        name = f"{key[0]}-{'-'.join(about['device'].lower().split())}-{about['date'][:10]}.json"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name.replace("(", "").replace(")", "").replace("@", "at")
        path.write_text(json.dumps({"machine": about, "rows": some}, indent=1) + "\n")
        written.append(path)
    return written
