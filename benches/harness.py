"""How a bench times things: variants interleaved round by round, medians, and ratios taken within a round.

On a GPU a variant is a CUDA graph over several copies of its inputs, more bytes than the L2 cache holds, so launches
cost what they cost in a captured step and nothing is read hot; on a CPU it is one call on one thread.
"""

import math
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benches import rehearse
from potstill.kernels._triton import INSTALLED, triton


class Place(NamedTuple):
    """Where a bench runs: "cpu" or "cuda", and the device of its tensors (in a rehearsal a CPU is both)."""

    kind: str
    device: torch.device


CPU, CUDA = Place("cpu", torch.device("cpu")), Place("cuda", rehearse.GPU)
#: More than the L2 cache of an H200 (50 MB) several times over.
COLD_BYTES = 0 if rehearse.REHEARSING else 256 << 20

Run = Callable[[int], Any]  # runs the variant on copy number k of its inputs


def smallest(shapes: Sequence[Any], rehearsed: Sequence[Any]) -> Sequence[Any]:
    """The shapes of a bench on a GPU, or in a rehearsal those that take no time."""
    return rehearsed if rehearse.REHEARSING else shapes


def seconds(variants: dict[str, Run], place: Place, copies: int, *, budget: float) -> dict[str, list[float]]:
    """Seconds per call of each variant, one number a round; `budget` is what a variant may take altogether."""
    on_gpu = place.kind == "cuda"
    # A rehearsal's graphs are a mode of PyTorch's dispatch, under which nothing compiles.
    graphed = {name: on_gpu and not (rehearse.REHEARSING and name == "compiled") for name in variants}
    calls = {name: _captured(run, copies) if graphed[name] else _over_copies(run, copies) for name, run in variants.items()}
    clock = cuda_seconds if on_gpu else _cpu_seconds
    once = {name: min(clock(call) for _ in range(1 if rehearse.REHEARSING else 3)) for name, call in calls.items()}
    rounds = 1 if rehearse.REHEARSING else max(15, min(400, int(budget / max(once.values()))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call))
    per_call = copies if on_gpu else 1
    return {name: [s / per_call for s in all_of_it] for name, all_of_it in times.items()}


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over rounds of over/under: both were taken within milliseconds of each other."""
    return median(o / u for o, u in zip(over, under, strict=True))


def _over_copies(run: Run, copies: int) -> Callable[[], None]:
    turn = [0]

    def call() -> None:
        run(turn[0] % copies)
        turn[0] += 1

    for _ in range(3):
        call()
    return call


def _captured(run: Run, copies: int) -> Callable[[], None]:
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


def cuda_seconds(call: Callable[[], Any]) -> float:
    """Seconds of the device between two events around the call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copies_for(moved: int, place: Place) -> int:
    """How many copies of inputs of `moved` bytes make the cache cold."""
    return min(64, max(1, math.ceil(COLD_BYTES / max(moved, 1)))) if place.kind == "cuda" else 1


def copy_of(moved: int, place: Place) -> Run:
    """A plain copy that reads and writes as many bytes."""
    floats = max(moved // 8, 1)
    pairs = [[torch.ones(floats, device=place.device) for _ in range(2)] for _ in range(copies_for(moved, place))]
    return lambda k: pairs[k % len(pairs)][0].copy_(pairs[k % len(pairs)][1])


def launches(run: Run, place: Place) -> int:
    """GPU: kernels launched by one call. CPU: calls of PyTorch ops that call no other."""
    from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
    from torch.profiler import ProfilerActivity, profile

    on_gpu = place.device.type == "cuda"
    run(0)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        run(0)
        wait(place)
    events = seen.events()
    assert events is not None
    if on_gpu:
        return sum(e.device_type == DeviceType.CUDA and not e.is_user_annotation for e in events)
    return sum(e.name.startswith("aten::") and not e.cpu_children for e in events)


def row(group: str, case: str, place: Place, variants: dict[str, Run], seconds: dict[str, list[float]], moved: int) -> dict[str, Any]:
    """What is recorded of the variants "ours", "eager", "copy" and others: microseconds, ratios of them, launches of one call.

    seconds: what `seconds` measured of each; moved: bytes that ours reads and writes.
    """
    us = {name: 1e6 * median(rounds) for name, rounds in seconds.items()}
    found = {"group": group, "kind": place.kind, "case": case, "ours us": us.pop("ours"), **us}
    found |= {f"{name}/ours": ratio(seconds[name], seconds["ours"]) for name in ("eager", "formula") if name in seconds}
    found |= {"bytes": moved, "GB/s": moved / found["ours us"] / 1e3, "of copy": ratio(seconds["copy"], seconds["ours"])}
    ours, eager = (launches(variants[name], place) for name in ("ours", "eager"))
    return found | {"launches": f"{ours} / {eager}", "launches ours": ours, "launches eager": eager}


def wait(place: Place) -> None:
    """Until the device has done what it was given."""
    if place.kind == "cuda":
        torch.cuda.synchronize()


@cache
def machine(place: Place) -> dict[str, Any]:
    """What a number is worthless without."""
    known = {
        "device": torch.cuda.get_device_name() if place.kind == "cuda" else _processor(),
        "torch": torch.__version__,
        "triton": triton.__version__ if INSTALLED else None,
        "python": platform.python_version(),
        "commit": _output_of("git", "rev-parse", "--short", "HEAD") or "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    if place.kind == "cuda":
        driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        return known | {"cuda": torch.version.cuda, "driver": driver or "unknown"}
    return known | {"threads": torch.get_num_threads()}


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    names = [line for line in file.read_text().splitlines() if line.startswith("model name")] if file.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _output_of(program: str, *arguments: str) -> str:
    """What a program prints, or nothing where it is missing or fails."""
    if shutil.which(program) is None:
        return ""
    done = subprocess.run([program, *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
