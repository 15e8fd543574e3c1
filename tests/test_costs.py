"""Bytes moved, kernels launched and bytes kept for backward, counted on tensors without numbers (costs.py), against what they were."""

import random
from pathlib import Path

import pytest
import torch
import yaml
from costs import META, Counter, kept_by, on_a_gpu

from potstill.engine.methods.base import Batch, Draws, modules_of
from potstill.engine.methods.sim import SIMConfig
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.shadow import give_shadows
from potstill.engine.training.config import TrainConfig
from potstill.engine.training.run import Run

CONFIGS = Path(__file__).parents[1] / "configs/net"

#: Bytes outside convolutions and matrix products of a forward and backward of 64 images, at 3ebadb3, and the share of them allowed.
BYTES = {
    "ddpmpp_cifar10": (32, 10, 20_680_255_250, 0.60),
    "ddpmpp_64": (64, 0, 52_320_643_090, 0.60),
    "adm_64": (64, 1000, 77_140_025_618, 0.75),
}
#: Kernels of one step of SIM on FFHQ-64's net, at 3ebadb3, and the share of them allowed.
LAUNCHES, LAUNCHES_ALLOWED = 6_748, 0.70
#: Bytes kept for backward in SIM's turn of the student, 4 images on CIFAR-10's net, at 3ebadb3, and the share of them allowed.
KEPT, KEPT_ALLOWED = {"float32": 687_006_144, "bfloat16": 350_792_272}, 0.85


def net(name, resolution, classes=0, bfloat16=True):
    kwargs = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    with META:
        made = from_kwargs(kwargs.pop("precond"), img_resolution=resolution, img_channels=3, label_dim=classes, use_fp16=bfloat16, **kwargs)
    return made.train()


def moved(name, resolution, classes):
    """The Counter of a forward and backward of 64 bfloat16 images through a U-Net whose float32 weights are trained."""
    unet = net(name, resolution, classes).model
    x = torch.empty(64, 3, resolution, resolution, device=META, dtype=torch.bfloat16)
    noise, labels = torch.empty(64, device=META), torch.empty(64, classes, device=META) if classes else None
    x = x.contiguous(memory_format=torch.channels_last)
    with on_a_gpu(), Counter(unet) as counter:
        y = unet(x, noise, labels)
        y.backward(torch.empty_like(y))
    return counter


def step():
    """The Counter of SIM's second step."""
    teacher = net("ddpmpp_64", 64)
    with on_a_gpu() as adam:
        method = SIMConfig().build(teacher, teacher)
        run = Run(method, TrainConfig(kimg=1, batch=2, graphs="off", optimizer="adam_ema"), 0, META)
        run.batches.generators.append(torch.Generator())  # "meta" has none
        images = torch.empty(2, 3, 64, 64, device=META)
        run.take(images, None)
        adam.clear()
        with Counter() as counter:
            run.take(images, None)
    counter.launches += adam
    return counter


def kept(dtype):
    """kept_by of SIM's turn of the student."""
    teacher = net("ddpmpp_cifar10", 32, bfloat16=dtype == "bfloat16")
    with on_a_gpu():
        method = SIMConfig().build(teacher, teacher)
        give_shadows(modules_of(method))
        batch = Batch(torch.empty(4, device=META), None, Draws(torch.Generator(), 4, slice(0, 4), random.Random(0)))
        nets = {"student": method.student, "teacher": method.teacher, "fake": method.frozen_fake}
        method.student_loss(batch)  # moves constants to the device
        return kept_by(lambda: method.student_loss(batch), nets)


def table(counts):
    """Lines to read where a test fails: the largest first."""
    total = sum(counts.values())
    return "\n".join([f"{total:16,} in all", *(f"{n:16,} {100 * n / total:5.1f} % {name}" for name, n in counts.most_common())])


@pytest.mark.parametrize("name", BYTES)
def test_bytes_outside_convolutions(name):
    resolution, classes, before, allowed = BYTES[name]
    counter = moved(name, resolution, classes)
    assert counter.casts > 0  # reported beside the sum: a shadow saves them
    assert sum(counter.bytes.values()) <= allowed * before, table(counter.bytes)


def test_launches_of_a_step():
    counter = step()
    assert sum(counter.launches.values()) <= LAUNCHES_ALLOWED * LAUNCHES, table(counter.launches)


@pytest.mark.parametrize("dtype", KEPT)
def test_bytes_kept_for_backward(dtype):
    counts = kept(dtype)
    assert sum(counts.values()) <= KEPT_ALLOWED * KEPT[dtype], table(counts)


if __name__ == "__main__":  # python tests/test_costs.py: all tables
    for name, (resolution, classes, *_) in BYTES.items():
        counter = moved(name, resolution, classes)
        print(f"bytes, {name} (casts of weights {counter.casts:,})", table(counter.bytes), sep="\n")
    print("launches", table(step().launches), sep="\n")
    for dtype in KEPT:
        print(f"kept, {dtype}", table(kept(dtype)), sep="\n")
