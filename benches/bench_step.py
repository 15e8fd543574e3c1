"""Whole iterations of every method, eager and with every turn a CUDA graph: the same run, the same numbers, other launches.

FFHQ-64's net (DDPM++, bf16), synthetic images that lie on the GPU, B = 8 and 64. Wanted: 1.2 times at 8, no loss at 64.
Wall time of `STEPS` iterations between synchronisations, after warm-up and captures; variants interleaved, medians.
"""

import time
from statistics import median
from typing import Any

import pytest
import torch

from benches import harness, rehearse
from potstill.engine.config.schema import NetConfig
from potstill.engine.data.images import open_images
from potstill.engine.data.sampler import Stream
from potstill.engine.jobs.build import build_net
from potstill.engine.methods.table import METHODS
from potstill.engine.training.graphs import CUDA, Graphs
from potstill.engine.training.run import Run, TrainConfig

STEPS = 5 if rehearse.REHEARSING else 10  # a multiple of the period of the methods that are run
BATCHES = harness.smallest([8, 64], [2])
SIDE = 8 if rehearse.REHEARSING else 64
NET = {"model_channels": 128, "channel_mult": [1, 2, 2, 2]}
if rehearse.REHEARSING:
    NET = {"model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4]}
SETTINGS: dict[str, dict[str, Any]] = {
    "sim": {},
    "dmd2": {"name": "dmd", "gan": True},
    "gdd": {"r1_every": 5},
    "moment_matching": {},
    "sfd": {},
}


def ffhq64(device: torch.device, dtype: torch.dtype) -> Any:
    """EDM's net for FFHQ and AFHQv2 at 64 pixels, random weights."""
    cfg = NetConfig(model_type="SongUNet", dropout=0.05, **NET)
    net = build_net(cfg, SIDE, 3, 0).to(device)
    net.compute_dtype = dtype
    return net


def run_of(name: str, batch: int, graphs: str, device: torch.device) -> Run:
    settings = {"name": name} | SETTINGS[name]
    torch.manual_seed(0)
    net = ffhq64(device, torch.bfloat16)
    method = METHODS[settings["name"]](**settings).build(net, net)
    for net in method.nets.values():
        net.to(device)
    run = Run(method, TrainConfig(kimg=batch * 1e3, batch=batch, graphs=graphs), 0, device)
    if rehearse.REHEARSING and graphs == "auto":
        run.use(Graphs(CUDA(device)))
    return run


def images(batch: int, device: torch.device) -> Stream:
    return Stream(open_images(f"synthetic:{SIDE}x3"), batch=batch, device=device)


def seconds(run: Run, stream: Stream, steps: int) -> float:
    """Wall time of one iteration, the host's launches included."""
    harness.wait(harness.CUDA)
    start = time.perf_counter()
    for _ in range(steps):
        run.take(*stream.at(run.step))
    harness.wait(harness.CUDA)
    return (time.perf_counter() - start) / steps


@pytest.mark.gpu
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", SETTINGS)
def test_step(name: str, batch: int, record):
    device = harness.CUDA.device
    stream = images(batch, device)
    runs, peaks = {}, {}
    for kind in ("off", "auto"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runs[kind] = run_of(name, batch, kind, device)
        # every turn three times eagerly, then captured, and once more
        seconds(runs[kind], stream, 5 * max(turn.every for turn in runs[kind].method.turns))
        peaks[kind] = (torch.cuda.max_memory_allocated() - before) / 2**30
    taken: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(1 if rehearse.REHEARSING else 5 if batch < 64 else 3):
        for kind, run in runs.items():
            taken[kind].append(seconds(run, stream, STEPS))
    report = runs["auto"].graph_report()
    row = {
        "group": "step",
        "kind": "cuda",
        "case": f"{name} B={batch}",
        "ours us": 1e6 * median(taken["auto"]),
        "eager": 1e6 * median(taken["off"]),
        "eager/ours": harness.ratio(taken["off"], taken["auto"]),
        "img/s": batch / median(taken["auto"]),
        "captured": report["captured"],
        "replayed": report["replayed"],
        "stay_eager": report["stay_eager"],
        "peak GiB, eager": peaks["off"],
        "peak GiB, graphs": peaks["auto"],
    }
    record(row, lambda _: runs["auto"].take(*stream.at(runs["auto"].step)))
    assert report["stay_eager"] == [], report
