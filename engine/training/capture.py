"""Records CUDA kernels as a graph, and makes PyTorch usable again after a capture that failed."""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


class CUDA:
    """Captures on one side stream into one memory pool."""

    def __init__(self, device: torch.device):
        self.device, self.side = device, torch.cuda.Stream(device)
        self.latest: torch.cuda.CUDAGraph | None = None  # whose capture has begun
        self._new_pool()

    def _new_pool(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.living: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()  # those that share it

    @contextmanager
    def stream(self) -> Iterator[None]:
        """All work of an iteration runs within it, eager work too: cuBLAS workspaces and autograd's accumulation nodes belong to a stream."""
        outside = torch.cuda.current_stream(self.device)
        self.side.wait_stream(outside)
        with torch.cuda.stream(self.side):
            yield
        outside.wait_stream(self.side)

    def capture(self, body: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        """Record body's work without its effects; returns what repeats it. RuntimeError where it cannot be recorded."""
        if not self.living:  # PyTorch takes no capture into a pool that its last graph has left
            self._new_pool()
        graph = self.latest = torch.cuda.CUDAGraph()
        self._record(graph, body, generators)
        self.latest = None
        self.living.add(graph)
        return graph.replay

    def _record(self, graph: torch.cuda.CUDAGraph, body: Callable[[], None], generators: Sequence[torch.Generator]) -> None:
        for generator in generators:
            graph.register_generator_state(generator)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # a turn that this iteration has no use for
            # thread_local: the thread that pins batches in advance may go on meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"):
                body()

    def recover(self, generators: Sequence[torch.Generator]) -> bool:
        """Make eager work and captures possible again after a capture that failed. Can earlier ones still be replayed?

        After an error of Python's the capture has ended like any other. After one of CUDA's it stays open, and PyTorch with it.

        Then the pool goes on recording and takes no other capture, so it is replaced. The generators believe that they are
        being captured until another capture of theirs ends, so an empty one is made. If that fails, too, they get new
        states, and earlier graphs do not draw from those.
        """
        torch.cuda.synchronize(self.device)
        graph, self.latest = self.latest, None
        if graph is None or ended(graph):
            return True
        ABANDONED.append(graph)
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        with contextlib.suppress(RuntimeError):  # the capture may not have begun
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)
        self._new_pool()
        try:
            self._record(torch.cuda.CUDAGraph(), lambda: None, generators)
        except RuntimeError:
            for generator in [*generators, default_generator(self.device)]:
                generator.graphsafe_set_state(generator.clone_state())
            return False
        return True


#: Graphs whose capture was left open: PyTorch's allocator of pinned memory never stops asking them.
ABANDONED: list[torch.cuda.CUDAGraph] = []


def ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Did PyTorch see its capture to the end? Only then it tells the graph's pool."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that dropout draws from on this device."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
