"""Where the time of an iteration goes: a torch.profiler trace of a few, and a table made of it.

`profile/trace.json` opens in chrome://tracing or ui.perfetto.dev; `profile/table.txt` says which share of the time was
spent waiting for data, in communication and in which kinds of kernels (on a CPU: operators). The iterations come after a
warm-up that covers compilation and the capture of CUDA graphs; the run goes on afterwards as any.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

# Named stretches of host time in a trace: `record_function` costs nothing to speak of without one.
WAITING, STEP = "potstill: wait for data", "potstill: iteration"
# The first that fits. Names of CUDA kernels and of ATen operators.
KINDS = {
    "communication": r"nccl|c10d|gloo|all_?reduce|all_?gather|reduce_?scatter|broadcast_coalesced",
    "optimiser": r"adam|_update_kernel|_coefs_kernel|_check_kernel|lerp",
    "attention": r"attention|flash|fmha|softmax",
    "convolution": r"conv|implicit_gemm|wgrad|dgrad|fprop|xmma|winograd|cudnn",
    "matrix product": r"gemm|addmm|bmm|\bmm\b|matmul|linear|cutlass|\bmv\b",
    "normalisation": r"norm",
    "our losses and noise": r"potstill|_partials_kernel|_finish_kernel|_gradient_kernel|_noising_kernel|^triton",
    "random numbers": r"rand|normal_|philox|distribution|dropout|bernoulli",
    "copies": r"memcpy|memset|copy|fill|zero_|clone|contiguous|cat",
    "elementwise": r"elementwise|vectorized|add|mul|div|sub|silu|sigmoid|pow|sqrt|where|reduce|sum|mean|pool|upsample|pad",
}


class Profile:
    """Watches `active` iterations after `warmup` others, and writes folder/profile."""

    def __init__(self, folder: Path, *, warmup: int = 20, active: int = 10):
        self.folder, self.warmup, self.active, self.running = folder / "profile", warmup, active, None

    def start(self, device: torch.device, left: int) -> None:
        """`left`: iterations until the end of the run; a short one is watched from its first half on."""
        self.device, self.done = device, 0
        self.active = max(1, min(self.active, left // 2))
        self.warmup = max(0, min(self.warmup, left - self.active))
        if self.warmup == 0 and left:
            self._begin()

    def _begin(self) -> None:
        cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        self.running = profile(activities=[ProfilerActivity.CPU, *cuda])
        self._synchronize()
        self.running.start()

    def step(self, say: Callable[[str], None]) -> None:
        """After every iteration."""
        self.done += 1
        if self.done == self.warmup:
            self._begin()
        elif self.running and self.done == self.warmup + self.active:
            self._synchronize()
            self.running.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.running.export_chrome_trace(str(self.folder / "trace.json"))
            events = self.running.events()
            assert events is not None
            found = shares(events, self.device)
            (self.folder / "table.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (self.folder / "table.txt").write_text(table(found), encoding="utf-8")
            say(table(found) + f"profile: {self.folder}/table.txt, trace.json")
            self.running = None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def shares(events: Iterable[Any], device: torch.device) -> dict[str, Any]:
    """Seconds and shares of the time watched, from the events of a profiler.

    On a GPU `busy` is the time in which any kernel ran, and the kinds are of kernels; where data is late, the GPU idles.
    """
    events = list(events)
    spans = [e for e in events if e.name in (WAITING, STEP) and e.device_type == DeviceType.CPU]
    start, end = min(e.time_range.start for e in spans), max(e.time_range.end for e in spans)
    if device.type == "cuda":
        # PyTorch repeats named stretches of the host, such as optimisers' steps, among the kernels.
        kernels = [
            e
            for e in events
            if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False) and e.name not in (WAITING, STEP)
        ]
        rows = [(e.name, e.time_range.end - e.time_range.start) for e in kernels]
        end = max([end, *(e.time_range.end for e in kernels)])
        busy = covered((e.time_range.start, e.time_range.end) for e in kernels)
    else:
        rows = [(e.name, e.self_cpu_time_total) for e in events if e.name not in (WAITING, STEP)]
        busy = sum(e.time_range.end - e.time_range.start for e in spans if e.name == STEP)
    total, kinds, names = max(end - start, 1e-9), Counter(), Counter()
    for name, microseconds in rows:
        kinds[kind(name)] += microseconds
        names[name] += microseconds
    waiting = sum(e.time_range.end - e.time_range.start for e in spans if e.name == WAITING)
    iterations = sum(e.name == STEP for e in spans)
    return {
        "device": device.type,
        "iterations": iterations,
        "seconds_per_iteration": total / 1e6 / max(iterations, 1),
        "waiting_for_data": waiting / total,
        "communication": kinds["communication"] / total,
        "busy": busy / total,
        "kinds": {name: spent / total for name, spent in kinds.most_common()},
        "top": {name: spent / total for name, spent in names.most_common(15)},
    }


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def kind(name: str) -> str:
    """What sort of work a kernel or operator is, by its name."""
    return next((k for k, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def table(found: dict[str, Any]) -> str:
    """The shares as lines of text."""
    what = "kernels" if found["device"] == "cuda" else "operators"
    busy = "GPU busy" if found["device"] == "cuda" else "in iterations"
    lines = [f"{found['iterations']} iterations of {1000 * found['seconds_per_iteration']:.2f} ms; share of that time:"]
    head = {"host waits for data": found["waiting_for_data"], "communication": found["communication"], busy: found["busy"]}
    for title, rows in ((None, head), (f"{what} by kind", found["kinds"]), (f"longest {what}", found["top"])):
        lines += [f"{title}:"] if title else []
        lines += [f"  {100 * share:6.1f} %  {name[:90]}" for name, share in rows.items()]
    return "\n".join(lines) + "\n"
