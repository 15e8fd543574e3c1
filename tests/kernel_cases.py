"""What the tests of the fused losses share: inputs worth trying, and the rule for how exact is exact enough.

The rule: with the same inputs, the fused error against float64 is at most twice plain PyTorch's own (`kernels.reference`
in that dtype), plus 1e-6 of the largest number; for the values and for every gradient.
"""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from potstill.kernels import Estimate, Losses
from potstill.kernels._lib import INTERPRET

F32, F16, F64 = torch.float32, torch.float16, torch.float64
#: Triton's interpreter rounds float32 to bfloat16 toward zero, so there float16 stands in.
BF16 = torch.float16 if INTERPRET else torch.bfloat16

#: CPU tensors take no op but under the interpreter, which test_kernels_interpreted.py runs these tests with.
of_ops = pytest.mark.skipif(not INTERPRET, reason="of an op, which CPU tensors take under TRITON_INTERPRET=1 alone")

#: What spoils a sample.
SPOILS = (float("nan"), float("inf")) if INTERPRET else (float("nan"), float("inf"), -float("inf"))


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype  # of raw outputs; x, x_t and targets are float32 or wider
    layout: str = "nchw"  # "nhwc"; "mixed": raw outputs NHWC, the rest NCHW
    guided: bool = False  # with classifier-free guidance
    own_x_t: bool = False  # the two estimates do not share x_t
    formed: bool = False  # clean images in place of estimates
    unaligned: bool = False  # images begin off the 16-byte grid

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch."), self.layout]
        words += [name for name in ("guided", "own_x_t", "formed", "unaligned") if getattr(self, name)]
        return "-".join(words)


CASES = [
    Case((4, 1, 8, 8), F32),  # the digits
    Case((2, 3, 8, 8), BF16, guided=True),
    Case((3, 3, 5, 7), F16, "nhwc", guided=True, own_x_t=True),  # nothing divides anything
    Case((2, 3, 32, 32), BF16, "nhwc"),
    Case((1, 3, 64, 64), F32, guided=True),  # a single sample: split over programs
    Case((2, 4, 64, 64), BF16, "mixed"),  # latents
    Case((3, 1025), F32, own_x_t=True),  # not an image; one more than a block
    Case((3, 1, 1, 3), F32, formed=True),
    Case((2, 3, 8, 8), F64, "nhwc", guided=True),
    Case((0, 3, 8, 8), F32),
    Case((2, 3, 16, 16), BF16, "nhwc", unaligned=True),  # all would divide, were it not for the address
    Case((3, 3, 5, 7), F32, own_x_t=True, unaligned=True),
]
#: Besides, what takes an interpreter minutes: more samples than the finishing program takes at a time; large and all even.
ON_GPU = [
    Case((2049, 3, 8, 8), BF16, "mixed"),
    Case((16, 3, 64, 64), F16, guided=True, own_x_t=True),
]
CPU = torch.device("cpu")


class Drawn:
    """Random inputs of one case. Tensors are drawn once by name, so that every evaluation sees the same numbers.

    They are drawn on the CPU and moved to the device, so that everywhere they are the same.
    """

    def __init__(self, case: Case, device: torch.device = CPU, seed: int = 0):
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}

    def image(self, name: str, *, raw: bool = False) -> Tensor:
        """[N, C, H, W]; raw: in the dtype of a network's output."""
        if name not in self.tensors:
            t = torch.randn(self.case.shape, generator=self.generator, dtype=F64)
            dtype = self.case.dtype if raw or self.case.dtype is F64 else F32
            nhwc = self.case.layout == "nhwc" or (self.case.layout == "mixed" and raw)
            t = t.to(dtype, memory_format=torch.channels_last if nhwc and t.ndim == 4 else torch.contiguous_format)
            t = t.to(self.device)
            self.tensors[name] = off_the_grid(t) if self.case.unaligned else t
        return self.tensors[name]

    def positive(self, name: str) -> Tensor:
        """[N] float32 in 0.2 to 1.2."""
        if name not in self.tensors:
            self.tensors[name] = (torch.rand(self.case.shape[0], generator=self.generator) + 0.2).to(self.device)
        return self.tensors[name]

    def estimate(self, name: str, x_t: str = "x_t") -> Estimate | Tensor:
        raw = self.image(name, raw=True)
        if self.case.formed:
            return raw
        uncond = self.image(f"{name}_uncond", raw=True) if self.case.guided else None
        x_t = f"{name}_x_t" if self.case.own_x_t else x_t
        c_skip, c_out = self.positive(f"{name}_c_skip"), self.positive(f"{name}_c_out")
        return Estimate(raw, self.image(x_t), c_skip, c_out, uncond, 2.5 if self.case.guided else 1.0)


def off_the_grid(t: Tensor) -> Tensor:
    """The same numbers in memory that no 128-bit access can take: one element past where an allocation begins."""
    moved = t.new_empty(t.numel() + 1).as_strided(t.shape, t.stride(), 1).copy_(t)
    assert moved.data_ptr() % 16
    return moved


def evaluate(
    loss: Callable[[Drawn], Losses | tuple[Losses, Tensor]], drawn: Drawn, wrt: tuple[str, ...], *, exact: bool = False
) -> dict[str, Tensor]:
    """Values, gradients for a random cotangent, and what else the loss makes; exact: everything in float64."""
    loss(drawn)  # draws what it needs
    given = drawn.tensors
    present = [name for name in wrt if name in given]
    drawn.tensors = {name: t.detach().to(F64) if exact else t.detach() for name, t in given.items()}
    for name in present:
        drawn.tensors[name] = drawn.tensors[name].requires_grad_()
    out = loss(drawn)
    losses, made = (out, ()) if isinstance(out, Losses) else (out[0], out[1:])
    cotangent = torch.linspace(-1, 2, losses.value.shape[0], dtype=F64).to(losses.value)
    grads = torch.autograd.grad(losses.value, [drawn.tensors[name] for name in present], cotangent)
    drawn.tensors = given
    result = {"value": losses.value.detach(), "nonfinite": losses.nonfinite}
    result |= {f"gradient of {name}": g for name, g in zip(present, grads, strict=True)}
    return result | {f"made {i}": t for i, t in enumerate(made)}


def fused_as_exact_as_plain(
    fused: Callable[[Drawn], Losses], reference: Callable[[Drawn], Losses], case: Case, wrt: tuple[str, ...],
    place: torch.device = CPU,
) -> None:  # fmt: skip
    """The rule above, on fresh memory full of NaN."""
    drawn = Drawn(case, place)
    exact, plain = evaluate(reference, drawn, wrt, exact=True), evaluate(reference, drawn, wrt)
    with poisoned_memory():
        ours = evaluate(fused, drawn, wrt)
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        assert (ours[name].shape, ours[name].dtype) == (expected.shape, plain[name].dtype), name
        unwritten = (~ours[name].isfinite()).nonzero()
        assert len(unwritten) == 0, f"{name} holds memory nobody wrote, first at {unwritten[0].tolist()} of {list(expected.shape)}"
        assert_no_worse(ours[name], plain[name], expected, name)


def assert_no_worse(ours: Tensor, plain: Tensor, exact: Tensor, name: str) -> None:
    if exact.numel() == 0:
        return
    scale = exact.abs().max().item()
    error, allowed = ((t.to(F64) - exact).abs().max().item() for t in (ours, plain))
    assert error <= 2 * allowed + 1e-6 * scale, f"{name}: error {error:.2e}, plain PyTorch's {allowed:.2e} of {scale:.2e}"


@contextmanager
def poisoned_memory():
    """torch.empty and its kin return NaN (integers: the largest) inside this context.

    PyTorch fills memory under deterministic algorithms alone, so only what is tested runs in here: the rest of a test shall
    run as it does in daily life.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def summed_like_one_by_one(loss: Callable[[Drawn], Losses], case: Case, wrt: str, place: torch.device = CPU) -> None:
    """.sum() sends an upstream gradient of stride 0; it must give what a row of ones gives."""
    drawn = Drawn(case, place)
    loss(drawn)
    t = drawn.tensors[wrt] = drawn.tensors[wrt].detach().requires_grad_()
    value = loss(drawn).value
    (by_sum,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
    (by_ones,) = torch.autograd.grad(value, t, torch.ones_like(value))
    torch.testing.assert_close(by_sum, by_ones, rtol=0, atol=0)
    assert by_sum.abs().sum() > 0


def compiles_in_one_graph(loss: Callable[[Drawn], Losses], case: Case, wrt: tuple[str, ...], place: torch.device = CPU) -> None:
    """The same value and gradients under torch.compile(fullgraph=True)."""
    drawn = Drawn(case, place)
    loss(drawn)
    inputs = [drawn.tensors[name].requires_grad_() for name in wrt]

    def mean():
        losses = loss(drawn)
        losses = losses if isinstance(losses, Losses) else losses[0]
        return losses.value.mean(), losses.nonfinite

    expected, _ = mean()
    with warnings.catch_warnings():  # Dynamo's own
        warnings.filterwarnings("ignore", ".*autograd functions are all static", DeprecationWarning)
        value, nonfinite = torch.compile(mean, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs))
    assert nonfinite.item() == 0


def flat(*args: object) -> list[object]:
    """Arguments as a registered op takes them: estimates field by field, images as [N, D]."""
    spread: list[object] = []
    for a in args:
        spread += list(a) if isinstance(a, Estimate) else [a]
    return [a.flatten(1) if isinstance(a, Tensor) and a.ndim > 1 else a for a in spread]


def check_ops(name: str, args: list[Any], needs: list[bool]) -> None:
    """torch.library.opcheck of a loss's two ops, of the forward one with gradients for the images that `needs` says."""
    op, backward = getattr(torch.ops.potstill, name).default, getattr(torch.ops.potstill, f"{name}_backward").default
    args = [Estimate(*flat(a)) if isinstance(a, Estimate) else flat(a)[0] for a in args]
    _, _, *saved = op(*flat(*args))
    torch.library.opcheck(backward, [saved, torch.ones(()).expand(3), *flat(*args), needs])
    images: list[Tensor | None] = []
    for a in args:
        images += a.images if isinstance(a, Estimate) else [a] if isinstance(a, Tensor) and a.ndim > 1 else []
    for t, needed in zip(images, needs, strict=True):
        if needed and t is not None:
            t.requires_grad_()
    torch.library.opcheck(op, [t for a in args for t in (a if isinstance(a, Estimate) else [a])])


def assert_left_out(
    loss: Callable[[Drawn], Losses], case: Case, wrt: tuple[str, ...], poison: str, number: float, place: torch.device = CPU
) -> None:
    """One number of sample 1 spoiled: value and gradients of that sample are 0, those of the others as before.

    On fresh memory full of NaN, which the zeros must not be.
    """
    drawn = Drawn(case, place)
    clean = evaluate(loss, drawn, wrt)
    spoiled = drawn.tensors[poison].clone()
    spoiled[(1,) + (0,) * (spoiled.ndim - 1)] = number
    drawn.tensors[poison] = spoiled
    with poisoned_memory():
        bad = evaluate(loss, drawn, wrt)
    for found, count in ((clean["nonfinite"], 0), (bad["nonfinite"], 1)):
        torch.testing.assert_close(found, torch.tensor(count, dtype=torch.int32, device=place))
    others = [i for i in range(case.shape[0]) if i != 1]
    for name in bad:
        if name == "value" or name.startswith("gradient"):
            zeros = torch.zeros_like(bad[name][1])
            torch.testing.assert_close(bad[name][1], zeros, rtol=0, atol=0, msg=lambda text, name=name: f"{name} of sample 1: {text}")
            torch.testing.assert_close(bad[name][others], clean[name][others], rtol=0, atol=0)


def made_of(op: Callable[..., Any], tensors: dict[str, Tensor], *, exact: bool = False) -> dict[str, Tensor]:
    """What an op makes of tensors given by its arguments' names, and the gradients of those that are floating; exact: in float64."""
    given = {name: t.detach().to(F64 if exact and t.is_floating_point() else t.dtype) for name, t in tensors.items()}
    leaves = {name: t.requires_grad_() for name, t in given.items() if t.is_floating_point()}
    out = op(**given)
    out = out if isinstance(out, tuple) else (out,)
    generator, dtype = torch.Generator().manual_seed(1), next(iter(tensors.values())).dtype
    cotangents = [torch.randn(t.shape, generator=generator, dtype=F64).to(dtype).to(t) for t in out]  # float64 sees them rounded, too
    grads = torch.autograd.grad(out, list(leaves.values()), cotangents)
    return {f"output {i}": t.detach() for i, t in enumerate(out)} | {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}


def op_as_exact_as_plain(op: Callable[..., Any], plain: Callable[..., Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rule above for an op that makes tensors, on fresh memory full of NaN; returns what it made."""
    exact, theirs = made_of(plain, tensors, exact=True), made_of(plain, tensors)
    with poisoned_memory():
        ours = made_of(op, tensors)
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        assert (ours[name].shape, ours[name].dtype) == (theirs[name].shape, theirs[name].dtype), name
        assert ours[name].isfinite().all(), f"{name} holds memory nobody wrote"
        assert_no_worse(ours[name], theirs[name], expected, name)
    return ours
