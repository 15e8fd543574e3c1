"""EDM2's operations against PyTorch's, at the shapes of its networks: forward, and with backward; bfloat16, NHWC, float32 weights.

eager: what one writes after the paper, operation by operation in the images' dtype, norms in float32. compiled: torch.compile of that.
Bytes of ours: what kernels/mp.py and kernels/mp_weights.py count.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benches import harness
from potstill.kernels import force_weight_norm_, mp_cat_silu, mp_silu, mp_sum, normalized_weight, pixel_norm, pixel_norm_silu

#: (images, channels, resolution): XS at the top, XXL at the top, and the lowest two levels of M.
SHAPES = harness.smallest([(64, 192, 64), (32, 448, 64), (64, 768, 16), (64, 1024, 8)], [(1, 8, 4)])
DTYPE = torch.bfloat16
CLIP, DROPOUT = 256.0, 0.1


class Inputs:
    """One copy of everything an operation could ask for."""

    def __init__(self, shape: tuple[int, int, int], place: harness.Place):
        n, c, resolution = shape
        images = [torch.randn(n, c, resolution, resolution, device=place.device, dtype=DTYPE) for _ in range(4)]
        self.x, self.y, self.g, self.h = (t.contiguous(memory_format=torch.channels_last) for t in images)
        self.a, self.b = (t[:, : c // 2].contiguous(memory_format=torch.channels_last) for t in images[:2])
        self.scale = torch.randn(n, c, device=place.device, dtype=DTYPE) + 1
        self.key = torch.ones(1, dtype=torch.int64, device=place.device)
        self.weight, self.gain = torch.randn(c, c, 3, 3, device=place.device), torch.ones((), device=place.device)
        self.of_weight = torch.randn(c, c, 3, 3, device=place.device).to(DTYPE)
        self.weights = [self.weight, torch.randn(c, c, 1, 1, device=place.device), torch.randn(c, 768, device=place.device)]


def eager_norm(x: Tensor, axes: tuple[int, ...] = (1,)) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=torch.float32)
    return x / torch.add(1e-4, norm, alpha=(norm.numel() / x.numel()) ** 0.5).to(x.dtype)


def eager_silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


def eager_norm_silu(x: Tensor) -> tuple[Tensor, Tensor]:
    n = eager_norm(x)
    return n, eager_silu(n)


def eager_scaled(x: Tensor, scale: Tensor) -> Tensor:
    return eager_silu(x * scale[:, :, None, None])


def eager_sum(x: Tensor, y: Tensor) -> Tensor:
    return (x.lerp(y, 0.3) / (0.7**2 + 0.3**2) ** 0.5).clip(-CLIP, CLIP)


def eager_cat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    scale = ((a.shape[1] + b.shape[1]) / 0.5) ** 0.5
    cat = torch.cat([scale * 0.5 / a.shape[1] ** 0.5 * a, scale * 0.5 / b.shape[1] ** 0.5 * b], 1)
    return cat, eager_silu(cat)


def eager_weight(weight: Tensor, gain: Tensor) -> Tensor:
    return (eager_norm(weight, (1, 2, 3)) * (gain / weight[0].numel() ** 0.5)).to(DTYPE)


class Bench(NamedTuple):
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    given: str  # what both are called with, and have gradients for
    cotangents: str  # of their outputs
    moved: tuple[float, float]  # by ours, forward and backward: images, or for weights bytes a number
    other: str = ""  # what ours is called with besides


BENCHES = {
    "pixel_norm_silu": Bench(pixel_norm_silu, eager_norm_silu, "x", "g h", (3, 4)),
    "pixel_norm": Bench(pixel_norm, eager_norm, "x", "g", (2, 3)),
    "mp_silu scale": Bench(mp_silu, eager_scaled, "x scale", "g", (2, 3)),
    "mp_silu scale dropout": Bench(
        lambda x, scale, key: mp_silu(x, scale, DROPOUT, key),
        lambda x, scale: F.dropout(eager_scaled(x, scale), DROPOUT),
        "x scale", "g", (2, 3), "key",
    ),
    "mp_sum clip": Bench(lambda x, y: mp_sum(x, y, 0.3, CLIP), eager_sum, "x y", "g", (3 + 1 / 16, 3 + 1 / 16)),
    "mp_cat_silu": Bench(lambda a, b: mp_cat_silu(a, b, 0.5), eager_cat, "a b", "g h", (3, 4)),
    "normalized_weight": Bench(lambda w, gain: normalized_weight(w, gain, DTYPE), eager_weight, "weight gain", "of_weight", (6, 10)),
}  # fmt: skip


def fields(i: Inputs, names: str) -> list[Tensor]:
    return [getattr(i, name) for name in names.split()]


def stepping(function: Callable[..., Any], given: str, bench: Bench, copies: list[Inputs], backward: bool) -> harness.Run:
    """The operation on copy k, with its gradients where asked for; returns what it computed."""

    def step(k: int) -> list[Tensor]:
        i = copies[k]
        with torch.set_grad_enabled(backward):
            out = function(*fields(i, given))
        out = out if isinstance(out, tuple) else (out,)
        made = [t.detach() for t in out]
        return made + list(torch.autograd.grad(out, fields(i, bench.given), fields(i, bench.cotangents))) if backward else made

    return step


def agree(ours: harness.Run, eager: harness.Run) -> None:
    """No time is reported of wrong numbers; eager's are rounded to 16 bits at every operation."""
    for a, b in zip(ours(0), eager(0), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2 * float(b.abs().max()))


def cases():
    words = {False: "forward", True: "backward"}
    for shape, name, backward in itertools.product(SHAPES, BENCHES, words):
        case = f"{words[backward]}-{name}-{'x'.join(map(str, shape))}"
        yield pytest.param(name, shape, backward, harness.CUDA, id=case, marks=pytest.mark.gpu)


@pytest.mark.parametrize(("name", "shape", "backward", "place"), list(cases()))
def test_edm2(name, shape, backward, place, record, request):
    torch.manual_seed(0)
    bench, first = BENCHES[name], Inputs(shape, place)
    one = first.weight.numel() if "weight" in bench.given else first.x.nbytes
    moved = round(one * sum(bench.moved[: 1 + backward]))
    copies = [first, *(Inputs(shape, place) for _ in range(harness.copies_for(moved, place) - 1))]
    for i in copies:
        for t in fields(i, bench.given):
            t.requires_grad_()
    variants = {
        "ours": stepping(bench.ours, f"{bench.given} {bench.other}", bench, copies, backward),
        "eager": stepping(bench.eager, bench.given, bench, copies, backward),
        "copy": harness.copy_of(moved, place),
    }
    if "dropout" not in name:  # PyTorch draws another mask
        agree(variants["ours"], variants["eager"])
    if request.config.option.compiled:
        torch.compiler.reset()  # each row is a function of its own to Dynamo's limit of recompilations
        compiled = torch.compile(bench.eager, fullgraph=True, dynamic=False)
        variants["compiled"] = stepping(compiled, bench.given, bench, copies, backward)
    seconds = harness.seconds(variants, place, len(copies), budget=0.15)
    case = f"{name} {'fwd+bwd' if backward else 'forward'} {'x'.join(map(str, shape))}"
    record(harness.row("edm2", case, place, variants, seconds, moved), variants["ours"])


def forcing(function: Callable[[list[Tensor]], None], copies: list[Inputs]) -> harness.Run:
    def step(k: int) -> list[Tensor]:
        function(copies[k].weights)
        return copies[k].weights

    return step


@torch.no_grad()
def eager_force(weights: list[Tensor]) -> None:
    for w in weights:
        w.copy_(eager_norm(w, tuple(range(1, w.ndim))))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_force_weight_norm(shape, record):
    torch.manual_seed(0)
    first = Inputs(shape, harness.CUDA)
    moved = 8 * sum(w.numel() for w in first.weights)
    copies = [first, *(Inputs(shape, harness.CUDA) for _ in range(harness.copies_for(moved, harness.CUDA) - 1))]
    for i in copies:  # once, so that neither changes much for the other
        force_weight_norm_(i.weights)
    variants = {
        "ours": forcing(force_weight_norm_, copies),
        "eager": forcing(eager_force, copies),
        "copy": harness.copy_of(moved, harness.CUDA),
    }
    agree(variants["ours"], variants["eager"])
    seconds = harness.seconds(variants, harness.CUDA, len(copies), budget=0.15)
    case = f"force_weight_norm_ {len(first.weights)} weights of {shape[1]}"
    record(harness.row("edm2", case, harness.CUDA, variants, seconds, moved), variants["ours"])
