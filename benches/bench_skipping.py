"""A teacher that leaves out layers against the full one: a stratified batch by plan, and SFD's walk by plan and by cache.

The plan is made up (the middle blocks, nested, more of them at high noise), since a random net has nothing to probe: what
is timed is how much of the left-out blocks' time is really saved.
Real plans: benches/scripts/skipping_evidence.py.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from benches import harness
from potstill.engine.diffusion.sigmas import digit_reversal, karras_at
from potstill.engine.methods.sfd import SFD, SFDConfig
from potstill.engine.models.weights import weights_hash
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.skipping.apply import Skipping
from potstill.engine.skipping.blocks import blocks_of
from potstill.engine.skipping.plan import Plan


class Net(NamedTuple):
    name: str
    resolution: int
    batch: int
    kwargs: dict[str, Any]


SMALL = Net("ddpmpp-8", 8, 16, {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]})
CIFAR = Net("ddpmpp-32", 32, 64, {"model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]})
VARIANTS = ("batch by plan", "walk by plan", "walk cached 2", "walk cached 3")


def cases():
    for net in (SMALL, CIFAR):
        for variant in VARIANTS:
            gpu = net is CIFAR
            yield pytest.param(
                net, variant, harness.CUDA if gpu else harness.CPU, id=f"{net.name}-{variant.replace(' ', '-')}",
                marks=[pytest.mark.gpu] if gpu else [],
            )  # fmt: skip


def made_up(net) -> Plan:
    """A third of the blocks, from the middle outwards; the lower half of the noise levels leaves out half of those."""
    names = list(blocks_of(net.model))
    order = sorted(names, key=lambda name: abs(names.index(name) - len(names) / 2))
    third = len(names) // 3
    return Plan(
        weights_hash(net), net.img_resolution, np.geomspace(0.002, 80, 5).tolist(), order, [third // 2, third // 2, third, third], 0.02
    )


@pytest.mark.parametrize(("kind", "variant", "place"), list(cases()))
@torch.no_grad()
def test_skipping(kind, variant, place, record):
    device = place.device
    torch.manual_seed(0)
    net = from_kwargs("EDMPrecond", img_resolution=kind.resolution, img_channels=3, model_type="SongUNet", dropout=0.0, **kind.kwargs)
    net = net.eval().requires_grad_(False).to(device)
    net.compute_dtype = torch.bfloat16 if place.kind == "cuda" else torch.float32
    x = torch.randn(kind.batch, 3, kind.resolution, kind.resolution, device=device)
    if variant == "batch by plan":
        levels = lambda u: karras_at(0.8 * u)  # noqa: E731
        sigma = levels((torch.tensor(digit_reversal(kind.batch), device=device) + 0.5) / kind.batch).float()
        light = Skipping(net, made_up(net), levels)
        variants = {"ours": lambda k: light(x, sigma), "eager": lambda k: net(x, sigma)}
    else:
        light = Skipping(net, made_up(net)) if "plan" in variant else Skipping(net, None, cache=int(variant[-1]))
        sampler = SFD(SFDConfig(), net, net).teacher_sampler(4)
        variants = {"ours": lambda k: sampler.states(light, 80 * x, None)[-1], "eager": lambda k: sampler.states(net, 80 * x, None)[-1]}
    if place.kind == "cuda":
        variants["ours"](0)  # tables of the schedules are made once, outside of the graph
    taken = harness.seconds(variants, place, 1, budget=1.0)
    us = {k: 1e6 * harness.median(v) for k, v in taken.items()}
    row = {"group": "skipping", "kind": place.kind, "case": f"{kind.name}, {variant}", "ours us": us["ours"], "eager": us["eager"]}
    record(row | {"eager/ours": harness.ratio(taken["eager"], taken["ours"])}, variants["ours"])
