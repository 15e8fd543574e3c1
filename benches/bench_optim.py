"""AdamEMA against the loops it replaces, a whole optimiser step of a network: Adam, EMA and bfloat16 shadows.

eager:   nan_to_num of each gradient, torch.optim.Adam as it comes, a loop for the EMA and one for the shadows, as EDM and
         SiD write it.
formula: torch.optim.Adam(fused=True), torch._foreach_lerp_ and torch._foreach_copy_; nobody looks at the gradients.
Bytes of ours: Adam 28, EMA 8, shadow 2 and the look at the gradients 4 a parameter.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benches import harness, rehearse
from potstill.kernels import AdamEMA, cuda

BYTES = 28 + 8 + 2 + 4


def unet(widths: tuple[int, ...], blocks: int) -> list[tuple[int, ...]]:
    """Parameter shapes like a U-Net's: two 3x3 convolutions, two norms and an embedding layer a block."""
    shapes: list[tuple[int, ...]] = []
    for width in widths:
        block = [(width, width, 3, 3)] * 2 + [(width,)] * 6 + [(width, 4 * widths[0])]
        shapes += block * blocks
    return shapes


NETS = {"digits": unet((32, 64), 3), "small": unet((64, 128), 6)}
GPU_NETS = {"CIFAR": unet((128, 256, 256), 14), "ImageNet": unet((192, 384, 576, 768), 14)}
if rehearse.REHEARSING:
    GPU_NETS = {"tiny": unet((4, 8), 1)}


class Net:
    """One copy of the parameters, gradients, EMA and shadows of a network."""

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device):
        self.params: list[Tensor] = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
        for p in self.params:
            p.grad = torch.randn_like(p)
        self.ema = [p.detach().clone() for p in self.params]
        self.shadow = [p.detach().bfloat16() for p in self.params]


def ours(net: Net, backend: str) -> Callable[[], None]:
    optimizer = AdamEMA(net.params, lr=1e-4, ema=net.ema, ema_decay=0.999, shadow=net.shadow)

    def step() -> None:
        before = cuda.backend()
        cuda.set_backend(backend)
        optimizer.step()
        cuda.set_backend(before)

    return step


def eager(net: Net) -> Callable[[], None]:
    # In a rehearsal fused, since on a CPU it reads its counters as it comes, which no capture allows.
    adam = torch.optim.Adam(net.params, lr=1e-4, capturable=net.params[0].is_cuda, fused=rehearse.REHEARSING or None)

    @torch.no_grad()
    def step() -> None:
        for p in net.params:
            assert p.grad is not None
            torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        adam.step()
        for e, p in zip(net.ema, net.params, strict=True):
            e.copy_(p.detach().lerp(e, 0.999))
        for s, p in zip(net.shadow, net.params, strict=True):
            s.copy_(p)

    return step


def formula(net: Net) -> Callable[[], None]:
    adam = torch.optim.Adam(net.params, lr=1e-4, fused=True, capturable=net.params[0].is_cuda)

    @torch.no_grad()
    def step() -> None:
        adam.step()
        torch._foreach_lerp_(net.ema, net.params, 1e-3)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(net.shadow, net.params)  # pyright: ignore[reportPrivateImportUsage]

    return step


def agree(shapes: list[tuple[int, ...]], device: torch.device, backend: str) -> None:
    """No time is reported of wrong numbers."""
    nets = []
    for make in (lambda net: ours(net, backend), eager):
        torch.manual_seed(0)
        nets.append(Net(shapes, device))
        make(nets[-1])()
    for a, b in zip(nets[0].params + nets[0].ema, nets[1].params + nets[1].ema, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def cases():
    for name in NETS:
        yield pytest.param(name, harness.CPU, "auto", id=f"{name}-cpu")
    for name in GPU_NETS:
        for backend in ("triton", "cuda"):
            yield pytest.param(name, harness.CUDA, backend, id=f"{name}-{backend}", marks=pytest.mark.gpu)


@pytest.mark.parametrize(("name", "place", "backend"), list(cases()))
def test_adam_ema(name, place, backend, record):
    if backend == "cuda" and not cuda.built():
        pytest.skip("csrc/ was not built")
    shapes = (NETS | GPU_NETS)[name]
    agree(shapes[:9], place.device, backend)
    moved = BYTES * sum(torch.Size(shape).numel() for shape in shapes)
    makers = {"ours": lambda net: ours(net, backend), "eager": eager, "formula": formula}
    copies = harness.copies_for(moved, place)
    variants: dict[str, harness.Run] = {}
    for variant, make in makers.items():
        steps = [make(Net(shapes, place.device)) for _ in range(copies)]
        variants[variant] = lambda k, steps=steps: steps[k]()
    variants["copy"] = harness.copy_of(moved, place)
    seconds = harness.seconds(variants, place, copies, budget=0.5)
    case = f"AdamEMA {name}, {moved / BYTES / 1e6:.1f} M{'' if backend == 'auto' else f' [{backend}]'}"
    record(harness.row("optim", case, place, variants, seconds, moved), variants["ours"])
