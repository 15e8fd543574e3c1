"""norm_silu against PyTorch's group_norm and silu, in the shapes of the recipes' networks: forward, and with backward.

eager: F.group_norm, scale and shift where there are, F.silu, on the same channels-last tensors.
Bytes of ours: image read and written forward; image and gradient read, gradient written backward. What it reads twice
where a slab does not fit is not counted: that is what the share of the copy's speed is missing.
"""

import itertools
from typing import NamedTuple

import pytest
import torch

from benches import harness
from potstill.kernels import cuda, norm_silu
from potstill.kernels.norm_silu import plain


class Shape(NamedTuple):
    n: int
    c: int
    resolution: int
    modulated: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        words = f"{self.n}x{self.c}x{self.resolution}x{self.resolution}{' scale+shift' if self.modulated else ''}"
        return words if self.dtype is torch.bfloat16 else f"{words} {str(self.dtype).removeprefix('torch.')}"


CPU_SHAPES = [Shape(64, 32, 8), Shape(16, 128, 16), Shape(16, 64, 32), Shape(8, 192, 16, True)]
CPU_SHAPES += [Shape(16, 128, 16, dtype=torch.float32)]
GPU_SHAPES = [Shape(64, 128, 64), Shape(64, 256, 32), Shape(64, 256, 16), Shape(64, 512, 8)]  # DDPM++
GPU_SHAPES += [Shape(64, c, r, True) for c, r in [(192, 64), (384, 32), (960, 32), (1344, 16), (1536, 8)]]  # ADM
GPU_SHAPES = harness.smallest(GPU_SHAPES, [Shape(1, 32, 4, True)])


class Inputs:
    """One copy of the tensors of a norm."""

    def __init__(self, shape: Shape, place: harness.Place):
        like = {"device": place.device, "dtype": shape.dtype}
        images = [torch.randn(shape.n, shape.c, shape.resolution, shape.resolution, **like) for _ in range(2)]
        self.x, self.g = (t.contiguous(memory_format=torch.channels_last) for t in images)
        self.weight, self.bias = (torch.randn(shape.c, **like).requires_grad_() for _ in range(2))
        names = ("scale", "shift") if shape.modulated else ()
        self.extras = {name: torch.randn(shape.n, shape.c, **like).requires_grad_() for name in names}
        self.groups = min(32, shape.c // 4)
        self.x.requires_grad_()


def stepping(function, copies: list[Inputs], backward: bool, backend: str = "auto") -> harness.Run:
    """The norm of copy k, with its gradients where asked for; returns what it computed."""

    def step(k: int):
        i = copies[k]
        before = cuda.backend()
        cuda.set_backend(backend)
        with torch.set_grad_enabled(backward):
            y = function(i.x, i.weight, i.bias, i.groups, 1e-5, **i.extras)
        made = [y.detach()]
        if backward:
            made += torch.autograd.grad(y, [i.x, i.weight, i.bias, *i.extras.values()], i.g)
        cuda.set_backend(before)
        return made

    return step


def agree(ours: harness.Run, eager: harness.Run) -> None:
    """No time is reported of wrong numbers."""
    for a, b in zip(ours(0), eager(0), strict=True):
        rtol = 1e-3 if b.dtype is torch.float32 else 3e-2
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


def cases():
    words = {False: "forward", True: "backward"}
    for backward, shape in itertools.product(words, CPU_SHAPES):
        yield pytest.param(shape, backward, harness.CPU, "auto", id=f"{words[backward]}-{shape}-cpu")
    for shape, backward, backend in itertools.product(GPU_SHAPES, words, ("triton", "cuda")):
        case = f"{words[backward]}-{shape}-{backend}"
        yield pytest.param(shape, backward, harness.CUDA, backend, id=case, marks=pytest.mark.gpu)


@pytest.mark.parametrize(("shape", "backward", "place", "backend"), list(cases()))
def test_norm_silu(shape, backward, place, backend, record, request):
    if backend == "cuda" and not cuda.built():
        pytest.skip("csrc/ was not built")
    torch.manual_seed(0)
    first = Inputs(shape, place)
    moved = (5 if backward else 2) * first.x.nbytes
    copies = [first, *(Inputs(shape, place) for _ in range(harness.copies_for(moved, place) - 1))]
    variants = {
        "ours": stepping(norm_silu, copies, backward, backend),
        "eager": stepping(plain, copies, backward),
        "copy": harness.copy_of(moved, place),
    }
    agree(variants["ours"], variants["eager"])
    if request.config.option.compiled:
        torch.compiler.reset()  # each row is a function of its own to Dynamo's limit of recompilations
        compiled = torch.compile(plain, fullgraph=True, dynamic=False)
        variants["compiled"] = stepping(compiled, copies, backward)
    seconds = harness.seconds(variants, place, len(copies), budget=0.3)
    case = f"norm_silu {'fwd+bwd' if backward else 'forward'} {shape}{'' if backend == 'auto' else f' [{backend}]'}"
    record(harness.row("norm_silu", case, place, variants, seconds, moved), variants["ours"])
