"""A dress rehearsal of what runs on a GPU, on a machine without one: POTSTILL_REHEARSE=1 puts its CPU in the GPU's place.

Benches and tests marked gpu put their tensors on `GPU` and ask `THERE` whether they can run. In a rehearsal `GPU` is the CPU
and streams, events, graphs and memory counters of torch.cuda are the stand-ins below, so that every line that only a GPU
would run is run here once, on shapes that take no time. A number from a rehearsal says nothing but that there is one.
"""

import os
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

REHEARSING = os.environ.get("POTSTILL_REHEARSE") == "1"
GPU = torch.device("cpu" if REHEARSING else "cuda")
#: Can what is marked gpu run?
THERE = REHEARSING or torch.cuda.is_available()
NAME = "rehearsal"


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


def memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class Stream:
    """There is one, and everything in it is done."""

    def __init__(self, *_: Any, **__: Any):
        self.device = torch.device("cpu")

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> "Event":
        return event or Event()


class Event:
    """The host's clock."""

    def __init__(self, *_: Any, **__: Any):
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return max(1e3 * (end.at - self.at), 1e-6)


class CUDAGraph:
    """A tape."""

    def __init__(self, *_: Any, **__: Any):
        self.tape, self.generators = Tape(), [torch.default_generator]

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def replay(self) -> None:
        self.tape.replay()

    def pool(self) -> tuple[int, int]:
        return 0, 1

    def reset(self) -> None:
        self.tape = Tape()


@contextmanager
def graph(made: CUDAGraph, *_: Any, **__: Any):
    """Capturing leaves memory and generators as they were."""
    states = [(g, g.get_state()) for g in made.generators]
    try:
        with made.tape:
            yield
    finally:
        made.tape.undo()
        for generator, state in states:
            generator.set_state(state)


def install() -> None:
    """Put the stand-ins where torch.cuda's own are, for the rest of this process."""
    stand_ins = {
        "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: Stream(), "graph_pool_handle": lambda: (0, 1), "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False, "get_device_name": lambda device=None: NAME, "empty_cache": lambda: None,
        "set_sync_debug_mode": lambda mode: None, "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 0, "memory_allocated": lambda device=None: 0,
        "get_device_properties": lambda device=None: SimpleNamespace(name=NAME, L2_cache_size=0, multi_processor_count=1, total_memory=2**30, major=0, minor=0),
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)


if REHEARSING:
    install()
