"""Turns as graphs: what a replay reads and writes, checked on CPU with a tape in CUDA's place, and on a GPU for real.

The tape knows what a CUDA graph knows: which operations ran on which memory. A replay runs no Python of ours, so whatever
Python would have to decide anew (a rate, a seed, a number of steps) and does not come in through memory shows as another number.
"""

import random
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.build import build_method
from engine.config import METHOD_CONFIGS
from engine.errors import UserError
from engine.methods.base import Draws, Method, Turn
from engine.methods.msd import TSM, TSMConfig
from engine.methods.teacher import EDMLoss, Teacher
from engine.nets.edm import from_kwargs
from engine.training.graphs import Graphs, Unfit, build_graphs, first_line, joined, seed_dropout, split
from engine.training.loop import Run, TrainConfig
from engine.training.optim import OptimConfig, rates_as_tensors

CPU = torch.device("cpu")
SETTINGS = {
    "dmd": {"fake_per_student": 2},
    "dmd2": {"name": "dmd", "fake_per_student": 3, "gan": True},
    "sim": {"dropout": 0.1},
    "sid": {"name": "sim", "distance": "l2", "alpha": 1.2},
    "gdd": {"r1_every": 3, "r1_gamma": 0.1, "width": 8},
    "moment_matching": {"steps": 2},
    "instant": {"name": "moment_matching", "variant": "instant", "steps": 2, "measure_every": 3, "measure_batch": 4},
    "sfd": {"num_steps": [4], "K": 2},
    "sfd_v": {"name": "sfd", "num_steps": [4, 5], "K": 2, "step_condition": True},
    "teacher": {},
    "tsm": {},
}


def tiny_net(device=CPU):
    torch.manual_seed(1)
    net = from_kwargs(
        "EDMPrecond", img_resolution=8, img_channels=1, label_dim=3, model_type="SongUNet", model_channels=8,
        channel_mult=[1, 1], num_blocks=1, attn_resolutions=[4], dropout=0.1,
    )  # fmt: skip
    return net.to(device)


def method_named(name: str, device=CPU) -> Method:
    settings = {"name": name} | SETTINGS[name]
    torch.manual_seed(2)
    if name == "teacher":
        return Teacher(EDMLoss(), tiny_net(device))
    if name == "tsm":
        return TSM(TSMConfig(), tiny_net(device), tiny_net(device))
    method = build_method(METHOD_CONFIGS[settings["name"]](**settings), tiny_net(device))
    for net in method.nets.values():
        net.to(device)
    return method


def run_of(name: str, device=CPU, graphs: Graphs | None = None, **settings) -> Run:
    """A run of 40 iterations with a schedule and a clip, so that rates change and gradients are scaled."""
    optim = OptimConfig(lr=1e-3, betas=[0.5, 0.9], clip=0.5, warmup=5, schedule="linear")
    settings = {"kimg": 0.32, "batch": 8, "optim": {"student": optim}} | settings
    run = Run(method_named(name, device), TrainConfig(**settings), 0, device)
    if graphs is not None:
        run.graphs = graphs
        graphs.reset = run.forget_gradients
        run._place_rates()
    return run


def batch(step: int, device=CPU) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(8, 1, 8, 8, generator=generator) * 2 - 1
    return images.to(device), torch.eye(3)[torch.randint(3, (8,), generator=generator)].to(device)


class Tape(TorchDispatchMode):
    """Records every operation with the tensors it read and wrote; undoes what it did to memory from before."""

    def __init__(self):
        super().__init__()
        self.steps, self.before, self.own = [], [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            assert on_host(args[0]), "a value was read while capturing"
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._remember(value)
        out = func(*args, **kwargs)
        if torch.Tag.inplace_view not in func.tags:  # they change how a tensor is seen, not memory
            self.steps.append((torch.is_grad_enabled(), func, args, kwargs, out, [t.detach() for t in tensors(out)]))
        read = {memory(t) for t in tensors([*args, *kwargs.values()])}
        self.own |= {memory(t) for t in tensors(out)} - read  # a view is no memory of its own
        return out

    def _remember(self, value) -> None:
        for t in tensors(value):
            if memory(t) not in self.own:
                self.before.append((t.detach(), t.detach().clone()))

    def undo(self) -> None:
        for t, old in reversed(self.before):
            t.copy_(old)
        self.before = []

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for grad, func, args, kwargs, _, written in self.steps:
                with torch.set_grad_enabled(grad):
                    again = func(*args, **kwargs)
                for old, new in zip(written, tensors(again), strict=True):
                    if memory(old) != memory(new):
                        old.copy_(new)


def on_host(t: Tensor) -> bool:
    """Would this CPU tensor be one on a GPU's host, too? Schedules are, and they alone are float64 without axes."""
    return t.ndim == 0 and t.dtype is torch.float64


def tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


class Taped:
    """A backend like CUDA's on CPU tensors: capturing has no effect, replaying has, and no Python runs again."""

    def __init__(self, breaks: str = ""):
        self.breaks, self.recovered, self.tapes = breaks, 0, []

    def stream(self):
        return nullcontext()

    def capture(self, body, generators):
        states = [(g, g.get_state()) for g in [*generators, torch.default_generator]]
        tape = Tape()
        with tape:
            body()
        tape.undo()
        for generator, state in states:
            generator.set_state(state)
        if self.breaks:
            raise RuntimeError(self.breaks)
        self.tapes.append(tape)
        return tape.replay

    def recover(self, generators):
        self.recovered += 1


class Watched(TorchDispatchMode):
    """Changes nothing; makes the kernels take the same path on CPU as under a tape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def weights(run: Run) -> list[Tensor]:
    nets = [*run.method.nets.values(), run.ema.net, run.method.state]
    return [t for net in nets for t in net.state_dict().values()]


@pytest.mark.parametrize("micro", [None, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_replayed_iterations_are_those_of_an_eager_run(name, micro):
    """Weights, averages and logs after 16 iterations bit for bit: schedules, clip, dropout, noise, lazy turns, choices."""
    if micro and name not in ("dmd2", "sfd_v", "gdd"):
        pytest.skip("accumulation is the same code for every method; three kinds of shared state are enough")
    graphs = Graphs(Taped(), warmup=2)
    eager, graphed = run_of(name, micro_batch=micro), run_of(name, graphs=graphs, micro_batch=micro)
    for one in eager.trained.values():
        rates_as_tensors(one.optimizer)
    for step in range(16):
        with Watched():
            eager.take(*batch(step))
            graphed.take(*batch(step))
    for a, b in zip(weights(eager), weights(graphed), strict=True):
        assert torch.equal(a, b)
    assert eager.meter.read() == graphed.meter.read()
    report = graphs.report()
    assert report["replayed"] > report["eager"] > 0 and report["stay_eager"] == []
    assert report["captured"] == len(graphs.backend.tapes)
