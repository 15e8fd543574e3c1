"""Whole iterations of every method, eager and with every turn a CUDA graph: the same run, the same numbers, other launches.

FFHQ-64's net (DDPM++, bf16), synthetic images that lie on the GPU, B = 8 and 64. Wanted: 1.2 times at 8, no loss at 64.
Wall time of `STEPS` iterations between synchronisations, after warm-up and captures; variants interleaved, medians of 5.
"""

import time
from statistics import median
from typing import Any

import harness
import pytest
import torch

from engine.build import build_method, build_net
from engine.config import METHOD_CONFIGS, NetConfig
from engine.data.images import open_images
from engine.data.sampler import Stream
from engine.training.run import Run, TrainConfig

STEPS, WARMUP = 10, 20  # both a multiple of every method's period here
SETTINGS: dict[str, dict[str, Any]] = {
    "dmd2": {"name": "dmd", "gan": True},
    "sim": {},
    "gdd": {"r1_every": 5},
    "moment_matching": {},
    "sfd": {},
}


def ffhq64(device: torch.device, dtype: torch.dtype) -> Any:
    """EDM's net for FFHQ and AFHQv2 at 64 pixels, random weights."""
    cfg = NetConfig(model_type="SongUNet", model_channels=128, channel_mult=[1, 2, 2, 2], dropout=0.05)
    net = build_net(cfg, 64, 3, 0).to(device)
    net.compute_dtype = dtype
    return net


def run_of(name: str, batch: int, graphs: str, device: torch.device) -> Run:
    settings = {"name": name} | SETTINGS[name]
    torch.manual_seed(0)
    method = build_method(METHOD_CONFIGS[settings["name"]](**settings), ffhq64(device, torch.bfloat16))
    for net in method.nets.values():
        net.to(device)
    return Run(method, TrainConfig(kimg=batch * 1e3, batch=batch, graphs=graphs), 0, device)


def seconds(run: Run, stream: Stream, steps: int) -> float:
    """Wall time of one iteration, the host's launches included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        run.take(*stream.at(run.step))
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [8, 64])
@pytest.mark.parametrize("name", SETTINGS)
def test_step(name: str, batch: int, record):
    device = harness.CUDA
    stream = Stream(open_images("synthetic:64x3"), batch=batch, device=device)
    runs = {kind: run_of(name, batch, kind, device) for kind in ("off", "auto")}
    for run in runs.values():
        seconds(run, stream, WARMUP)
    taken: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(5):
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
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
    }
    record(row, lambda _: runs["auto"].take(*stream.at(runs["auto"].step)))
    assert report["stay_eager"] == [], report
