"""The ladder: a distillation step as the published trainers write it, then one change at a time, then all but one.

published: float32 NCHW without TF32, attention by einsum, PyTorch's GroupNorm and SiLU, losses as written in the paper's
           formulas, nan_to_num of every gradient, torch.optim.Adam as it comes, an EMA by a loop over parameters.
Rungs add to the one before; "all but X" takes X from the top. What is not in this tree, or not of this device, is printed and
left out. Nets alone: infer (no gradients), train (to the weights), input (to the image, weights fixed). A CPU counts ops and
bytes kept for backward, a GPU launches and peak memory; MFU is of the dense 16-bit peak of the device.
"""

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benches import harness
from potstill.engine.jobs import machine
from potstill.engine.jobs.rehearsal import mfu
from potstill.engine.methods.base import frozen, modules_of
from potstill.engine.methods.dmd import DMDConfig
from potstill.engine.methods.gdd import GDDConfig
from potstill.engine.methods.moment_matching import MomentMatchingConfig
from potstill.engine.methods.sfd import SFDConfig
from potstill.engine.methods.sida import SIDAConfig
from potstill.engine.methods.sim import SIMConfig
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.edm_denoiser import EDMDenoiser
from potstill.engine.nets.shadow import give_shadows, shadow_of
from potstill.engine.training.compile import compile_nets
from potstill.engine.training.optim import OptimConfig
from potstill.engine.training.run import Run, TrainConfig
from potstill.engine.training.state import EMA
from potstill.kernels import reference
from potstill.kernels.norm_silu import plain

try:
    from potstill.engine.nets import ops
except ImportError:
    ops = None
try:
    from potstill.engine.nets import edm2_layers
except ImportError:
    edm2_layers = None
try:
    from potstill.engine.training import graphs
except ImportError:
    graphs = None


# --- the published style ------------------------------------------------------------------------------------------------


def einsum_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as EDM's networks have it: weights [N, heads, L, L] formed, softmax in float32."""
    w = torch.einsum("nhqc,nhkc->nhqk", q.float(), (k / k.shape[-1] ** 0.5).float()).softmax(-1).to(q.dtype)
    return torch.einsum("nhqk,nhkc->nhqc", w, v)


class PublishedAdam(torch.optim.Adam):
    """The gradients' non-finite numbers replaced one parameter at a time, then Adam as it comes."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        super().step(closure)


class LoopEMA(EMA):
    """The average, one parameter at a time."""

    def __init__(self, net: nn.Module, source: nn.Module):
        self.net, self.source = net, source

    @torch.no_grad()
    def update(self, decay: float, **_: Any) -> None:
        for e, p in zip(self.net.parameters(), self.source.parameters(), strict=True):
            e.copy_(p.detach().lerp(e, decay))
        for e, b in zip(self.net.buffers(), self.source.buffers(), strict=True):
            e.copy_(b)


# --- rungs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """Which of our changes are on."""

    tf32: bool = False
    bf16: bool = False
    sdpa: bool = False
    norm: bool = False  # fused GroupNorm+SiLU, and with it NHWC; of EDM2's nets their operations of one pass
    fixed: bool = False  # convolutions that do not train keep nothing
    losses: bool = False
    optimizer: bool = False  # shadow weights, fused Adam and EMA
    compile: bool = False
    graphs: bool = False


def available(place: harness.Place, compiled: bool) -> tuple[list[str], list[str]]:
    """The rungs of this tree on this device in order, and why others are not among them."""
    on_gpu, there = place.device.type == "cuda", dict.fromkeys(Stack.__dataclass_fields__, True)
    why = []
    absent = {
        "tf32": not on_gpu and "a CPU has no TF32",
        "norm": ops is None and "engine.nets.ops is not in this tree",
        "fixed": (ops is None or not hasattr(ops, "_keeps_nothing")) and "engine.nets.ops._keeps_nothing is not in this tree",
        "compile": not (on_gpu or compiled) and "minutes of C++ on a CPU: --compiled",
        "graphs": "not a switch of TrainConfig in this tree" if not _graph_switch() else not on_gpu and "a CPU has no CUDA graphs",
    }
    for name, reason in absent.items():
        if reason:
            there[name] = False
            why.append(f"{name}: {reason}")
    return [name for name, is_there in there.items() if is_there], why


def _graph_switch() -> bool:
    return graphs is not None and "graphs" in TrainConfig.__dataclass_fields__


@contextlib.contextmanager
def applied(stack: Stack, device: torch.device) -> Iterator[None]:
    """What is off, replaced by the published style, while a step runs."""
    with contextlib.ExitStack() as patches:

        def patch(where: Any, name: str, value: Any) -> None:
            patches.enter_context(mock.patch.object(where, name, value))

        if not stack.sdpa:
            patch(torch.nn.functional, "scaled_dot_product_attention", einsum_attention)
            if hasattr(ops, "attention"):  # which is not SDPA on a CPU
                patch(ops, "attention", einsum_attention)
        if edm2_layers is not None and not stack.norm:
            patch(edm2_layers, "mp", lambda: reference)
        if ops is not None and not stack.norm:
            patch(ops, "norm_silu", plain)
            patch(ops, "memory_format", lambda device: torch.contiguous_format)
        if ops is not None and hasattr(ops, "_keeps_nothing") and not stack.fixed:
            patch(ops, "_keeps_nothing", lambda x, fixed: False)
        if not stack.losses:
            for module in ("dmd", "gdd", "moment_matching", "sfd", "sim", "sida"):
                where = importlib.import_module(f"potstill.engine.methods.{module}")
                for name in LOSSES:
                    if hasattr(where, name):
                        patch(where, name, getattr(reference, name))
        if device.type == "cuda":
            machine.set_tf32(stack.tf32, device)
        yield


LOSSES = ("score_match", "score_implicit", "denoise", "moments", "trajectory", "add_noise")
LOSSES += ("generator_adversarial", "discriminator_adversarial")


# --- what is timed ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A network and a batch."""

    name: str
    resolution: int
    channels: int
    batch: int
    label_dim: int
    kwargs: dict[str, Any]
    precond: str = "EDMPrecond"

    def net(self, device: torch.device) -> EDMDenoiser:
        torch.manual_seed(0)
        size = {"img_resolution": self.resolution, "img_channels": self.channels, "label_dim": self.label_dim}
        made = from_kwargs(self.precond, **size, **self.kwargs)
        with torch.no_grad():
            for p in made.parameters():  # EDM's last layers start at nearly 0: gradients would be denormal, and slow
                if p.ndim == 4 and p.std() < 1e-3:
                    p.normal_(0, 0.02)
        return made.to(device)


def song(**kwargs: Any) -> dict[str, Any]:
    return {"model_type": "SongUNet", "dropout": 0.0} | kwargs


# On a CPU the recipes' own: the digits' net and batch, and 64 to 128 channels at 32 px in data=fast32_cpu's batch.
DIGITS = Shape("digits", 8, 1, 64, 10, song(model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4]))
SMALL = Shape("cifar-small", 32, 3, 16, 0, song(model_channels=64, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[16]))
CIFAR = Shape("cifar10", 32, 3, 64, 0, song(model_channels=128, channel_mult=[2, 2, 2], attn_resolutions=[16]))
FFHQ = Shape("ffhq64", 64, 3, 64, 0, song(model_channels=128, channel_mult=[1, 2, 2, 2], attn_resolutions=[16]))
ADM = Shape("imagenet64", 64, 3, 64, 1000, {"model_type": "DhariwalUNet", "dropout": 0.0})
# EDM2's: on a CPU the digits' own, on a GPU the XS for latents of ImageNet at 512 pixels in a quarter of its micro-batch.
DIGITS2 = Shape(
    "digits-edm2", 8, 1, 64, 10, {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 32},
    "EDM2Precond",
)  # fmt: skip
EDM2 = Shape("edm2-img512-xs", 64, 4, 16, 1000, {"model_channels": 128}, "EDM2Precond")

METHODS: dict[str, Callable[[], Any]] = {
    "sim": SIMConfig,
    "sid": lambda: SIMConfig(distance="l2", alpha=1.2),
    "sida": lambda: SIDAConfig(student_after=0.0, gan_after=0.0),
    "dmd": lambda: DMDConfig(fake_per_student=1),
    "dmd2": lambda: DMDConfig(fake_per_student=1, gan=True),
    "moment_matching": MomentMatchingConfig,
    "instant": lambda: MomentMatchingConfig(variant="instant", measure_every=10_000),
    "gdd": GDDConfig,
    "gdd_i": lambda: GDDConfig(freeze=1),
    "sfd": SFDConfig,
}


@dataclass
class Step:
    """Something to time, and the nets it is made of."""

    call: Callable[[], None]
    nets: list[nn.Module]

    def weights(self) -> set[int]:
        """Addresses of what is there whether or not autograd keeps it: parameters, buffers, shadows."""
        own = [t for net in self.nets for t in (*net.parameters(), *net.buffers())]
        own += [s for s in map(shadow_of, own) if s is not None]
        return {t.untyped_storage().data_ptr() for t in own}


def step_of(method: str, shape: Shape, stack: Stack, device: torch.device) -> Step:
    """One iteration of a method, every turn of it (two iterations where turns alternate)."""
    net = shape.net(device)
    net.compute_dtype = torch.bfloat16 if stack.bf16 else torch.float32
    made = METHODS[method]().build(net, net)
    for one in made.nets.values():
        one.to(device)
    options: dict[str, Any] = {"graphs": "auto" if stack.graphs else "off"} if _graph_switch() else {}
    cfg = TrainConfig(
        kimg=1000, batch=shape.batch, optim={"student": OptimConfig(lr=1e-6)}, compile="net" if stack.compile else "off",
        shadows=stack.optimizer, optimizer="auto" if stack.optimizer else "torch", **options,
    )  # fmt: skip
    run = Run(made, cfg, 0, device)
    if not stack.optimizer:
        for name, one in run.trained.items():
            trained = [p for p in made.nets[name].parameters() if p.requires_grad]
            one.optimizer = PublishedAdam(trained, lr=1e-6)
        run.ema = LoopEMA(run.ema.net, made.nets[made.product])
    images = torch.randn(shape.batch, shape.channels, shape.resolution, shape.resolution, device=device).clamp(-1, 1)
    classes = torch.arange(shape.batch, device=device) % max(shape.label_dim, 1)
    labels = torch.eye(shape.label_dim, device=device)[classes] if shape.label_dim else None
    period = max(turn.every for turn in made.turns if turn.every < 16)

    def step() -> None:
        with applied(stack, device):
            for _ in range(period):
                run.take(images, labels)

    return Step(step, modules_of(made))


def net_of(use: str, shape: Shape, stack: Stack, device: torch.device) -> Step:
    """The network alone: infer, train or input."""
    net = shape.net(device)
    net.compute_dtype = torch.bfloat16 if stack.bf16 else torch.float32
    net = net.train() if use == "train" else frozen(net)
    if stack.optimizer:
        give_shadows([net])
    if stack.compile:
        compile_nets([net], "net", device)
    x = torch.randn(shape.batch, shape.channels, shape.resolution, shape.resolution, device=device)
    sigma = torch.full((shape.batch,), 1.0, device=device)
    x.requires_grad_(use == "input")

    def step() -> None:
        with applied(stack, device), torch.set_grad_enabled(use != "infer"):
            y = net(x, sigma)
            if use != "infer":
                y.square().sum().backward()
                x.grad = None
                net.zero_grad(set_to_none=True)

    return Step(step, [net])


# --- measuring ----------------------------------------------------------------------------------------------------------


def interleaved(steps: dict[str, Callable[[], None]], place: harness.Place, budget: float) -> dict[str, list[float]]:
    """Seconds of each, round by round; about `budget` seconds altogether, at least three rounds."""

    def clock(step: Callable[[], None]) -> float:
        harness.wait(place)
        start = time.perf_counter()
        step()
        harness.wait(place)
        return time.perf_counter() - start

    for step in steps.values():  # warm-up: compilation, caches, optimiser states
        for _ in range(3 if place.kind == "cuda" else 1):
            step()
    once = sum(clock(step) for step in steps.values())
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(max(3, min(30, int(budget / once)))):
        for name, step in steps.items():
            taken[name].append(clock(step))
    return taken


def kept_bytes(step: Step) -> int:
    """Bytes of distinct memory that autograd keeps for backward in one call, all turns together; weights are left out."""
    weights, seen = step.weights(), []

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            seen.append(t)  # held, so that no address is given out twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        step.call()
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in seen}.values())


def flops(step: Step) -> float:
    with FlopCounterMode(display=False) as counter:
        step.call()
    return counter.get_total_flops()


def ladder(make: Callable[[Stack], Step], shape: Shape, place: harness.Place, compiled: bool, budget: float):
    """Rows of one ladder, bottom first, then leave-one-out; and what was left out, why."""
    names, why = available(place, compiled)
    stack, stacks = Stack(), {"published": Stack()}
    for name in names:
        stack = replace(stack, **{name: True})
        stacks[f"+ {name}"] = stack
    stacks |= {f"all but {name}": replace(stack, **{name: False}) for name in names[:-1]}
    steps = {name: make(one) for name, one in stacks.items()}
    taken = interleaved({name: step.call for name, step in steps.items()}, place, budget)
    work, top, below = flops(steps["published"]), list(taken)[len(names)], "published"
    rows = []
    for name, step in steps.items():
        seconds, leaving = median(taken[name]), name.startswith("all but")
        row = {
            "rung": name,
            "ms": 1e3 * seconds,
            "img/s": shape.batch / seconds,
            "of published": harness.ratio(taken["published"], taken[name]),
            "of the one below": harness.ratio(taken[below], taken[name]) if not leaving else None,
            "of all": harness.ratio(taken[top], taken[name]) if leaving else None,
            "launches" if place.kind == "cuda" else "ops": harness.launches(lambda k, step=step: step.call(), place),
            "MFU": mfu(work / seconds, place.device),
        }
        if place.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step.call()
            row["peak MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        else:
            row["kept MB"] = kept_bytes(step) / 1e6
        rows.append(row)
        below = name if not leaving else below
    return rows, why


def cases() -> Iterator[Any]:
    for use in ("infer", "train", "input"):
        yield pytest.param(f"net {use}", DIGITS, harness.CPU, id=f"net-{use}-digits-cpu")
        yield pytest.param(f"net {use}", SMALL, harness.CPU, id=f"net-{use}-cifar-small-cpu")
        for shape in (CIFAR, FFHQ, ADM):
            yield pytest.param(f"net {use}", shape, harness.CUDA, id=f"net-{use}-{shape.name}-cuda", marks=pytest.mark.gpu)
    for use in ("infer", "train", "input"):
        yield pytest.param(f"net {use}", DIGITS2, harness.CPU, id=f"net-{use}-{DIGITS2.name}-cpu")
        yield pytest.param(f"net {use}", EDM2, harness.CUDA, id=f"net-{use}-{EDM2.name}-cuda", marks=pytest.mark.gpu)
    yield pytest.param("sida", DIGITS2, harness.CPU, id=f"sida-{DIGITS2.name}-cpu")
    yield pytest.param("sida", EDM2, harness.CUDA, id=f"sida-{EDM2.name}-cuda", marks=pytest.mark.gpu)
    for method in METHODS:
        yield pytest.param(method, DIGITS, harness.CPU, id=f"{method}-digits-cpu")
    yield pytest.param("sim", SMALL, harness.CPU, id="sim-cifar-small-cpu")
    for shape in (CIFAR, FFHQ, ADM):
        for method in METHODS:
            if method != "instant" or shape is CIFAR:  # two more sets of the teacher's weights and a Jacobian
                half = replace(shape, batch=shape.batch // (2 if shape is ADM else 1))
                yield pytest.param(method, half, harness.CUDA, id=f"{method}-{shape.name}-cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize(("what", "shape", "place"), list(cases()))
def test_ladder(what, shape, place, record_ladder, request):
    kind, _, use = what.partition(" ")
    maker = functools.partial(net_of, use) if kind == "net" else functools.partial(step_of, what)
    options = request.config.option
    rows, why = ladder(lambda stack: maker(shape, stack, place.device), shape, place, options.compiled, options.ladder_seconds)
    assert all(row["ms"] > 0 for row in rows)
    record_ladder(f"{what} {shape.name}, batch {shape.batch}", rows, why, place.kind)
