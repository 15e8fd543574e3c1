"""What a recipe would cost, before it runs: sizes on paper (--dry-run), or a few iterations for real (rehearse=true)."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from engine import build
from engine.config import Config, to_yaml
from engine.data.sampler import Stream
from engine.training.loop import Run


def dry_run(cfg: Config) -> None:
    """Print the settings and, as comments, sizes and what is missing."""
    print(to_yaml(cfg), end="")
    for line in build.missing(cfg):
        print(f"# missing {line}")
    if cfg.teacher.checkpoint and Path(cfg.teacher.checkpoint).is_file():
        net, source = build.load_teacher(Path(cfg.teacher.checkpoint), None), cfg.teacher.checkpoint
    else:
        resolution, channels, label_dim = (int(s) for s in f"{build.rehearsal_data(cfg)}x0".partition(":")[2].split("x")[:3])
        with torch.device("meta"):
            net, source = build.build_net(cfg.net, resolution, channels, label_dim), "to be trained"
    parameters = sum(p.numel() for p in net.parameters())
    print(f"# teacher: {parameters:,} parameters ({source})")
    with torch.device("meta"):
        method = build.build_method(cfg.method, net)
    trained = {name: sum(p.numel() for p in one.parameters() if p.requires_grad) for name, one in method.nets.items()}
    for note in method.notes:
        print(f"# {note}")
    print("# trained: " + ", ".join(f"{name} {n:,}" for name, n in trained.items()))
    # weights, gradients, two Adam moments in float32; the teacher's weights; the EMA
    print(f"# memory without activations: {(16 * sum(trained.values()) + 8 * parameters) / 2**30:.2f} GiB")
    print(f"# iterations: {round(cfg.train.kimg * 1000 / cfg.train.batch):,} of batch {cfg.train.batch}")


def rehearse(cfg: Config) -> None:
    """A few iterations of the recipe on random weights and synthetic images: what it costs on this machine."""
    device = build.device(cfg.device)
    dtype, _ = build.precision(cfg.precision, device)
    images = build.build_images(cfg)
    assert images is not None
    batch = cfg.train.micro_batch if isinstance(cfg.train.micro_batch, int) else cfg.train.batch
    if device.type == "cpu" and batch > 8:
        batch = 2  # enough to time; what fits and pays on a GPU would take minutes here
    net = build.build_net(cfg.net, images.resolution, images.channels, images.label_dim).to(device)
    net.compute_dtype = dtype
    method = build.build_method(cfg.method, net)
    for one in method.nets.values():
        one.to(device)
    period = max(turn.every for turn in method.turns if turn.every < 50)
    warmup, timed = (3, 10 * period) if device.type == "cuda" else (1, period)
    settings = dataclasses.replace(cfg.train, batch=batch, micro_batch=None, kimg=batch * (warmup + timed) / 1000)
    run, stream = Run(method, settings, cfg.seed, device), Stream(images, batch=batch, seed=cfg.seed, device=device)
    print(f"rehearsing {cfg.run_dir}: random weights, synthetic images, batch {batch}, {str(dtype).removeprefix('torch.')}", file=sys.stderr)
    for step in range(warmup):
        run.take(*stream.at(step))
    synchronize(device)
    start = time.perf_counter()
    for step in range(warmup, warmup + timed):
        run.take(*stream.at(step))
    synchronize(device)
    seconds = (time.perf_counter() - start) / timed
    hours = seconds / batch * cfg.train.kimg * 1000 / 3600
    print(
        json.dumps(
            {
                "images_per_second": round(batch / seconds, 2),
                "seconds_per_iteration": round(seconds, 4),
                "batch": batch,
                "peak_memory_gib": round(peak_memory(device) / 2**30, 3),
                "parameters": sum(p.numel() for p in net.parameters()),
                "projected_hours": round(hours, 2),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{torch.get_num_threads()}",
            }
        )
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
