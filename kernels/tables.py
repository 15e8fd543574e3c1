"""Lists of tensors as device tables of addresses and chunks, so that one launch updates a whole network."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Elements of one tensor that one program handles.
CHUNK = 2048

#: Pairs of buffers set aside for CUDA graphs at most: as many as the engine keeps graphs.
SPARE = 32

_owner: list[Tensor] | None = None


def local(t: Tensor) -> Tensor:
    """The tensor this process holds: a DTensor's shard, or the tensor itself."""
    to_local = getattr(t, "to_local", None)
    return t if to_local is None else to_local()


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether element i of a's memory is element i of b's: equal shapes, and strides equal where they matter."""
    if a.shape != b.shape:
        return False
    return (
        a.stride() == b.stride() or a.numel() == 0 or all(s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n != 1)
    )


def dense(t: Tensor) -> bool:
    """Whether t fills its memory from first to last element, in whatever order of axes."""
    if t.is_contiguous() or (t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)):
        return True
    expected = 1
    for n, stride in sorted(zip(t.shape, t.stride(), strict=True), key=lambda axis: (axis[1], axis[0])):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True


def chunks(numels: Sequence[int], device: torch.device) -> Tensor:
    """[B, 2] int32: (tensor, chunk of that tensor), one row a program."""
    counts = torch.tensor([-(-n // CHUNK) for n in numels], dtype=torch.int64)
    tensor = torch.repeat_interleave(torch.arange(len(numels)), counts)
    first = torch.arange(len(tensor)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensor, first], 1).to(torch.int32).to(device)


@contextmanager
def owned_by_graph() -> Iterator[list[Tensor]]:
    """What a capture in here reads again at every replay; whoever keeps the graph keeps this list as long."""
    global _owner
    outer, _owner = _owner, []
    try:
        yield _owner
    finally:
        _owner = outer


def pinned(count: int) -> Tensor:
    """int64 in host memory that a GPU reads by itself."""
    return torch.empty(count, dtype=torch.int64, pin_memory=True, device="cpu")


class Addresses:
    """Addresses that may change from step to step, as an int64 device tensor, written without waiting for the device.

    An unchanged list costs nothing. A changed one is copied from pinned memory. Under CUDA graph capture the copy is
    recorded into the graph, between two buffers that an eager call has set aside, since memory cannot be pinned while
    capturing. They are the graph's from then on: `owned_by_graph` has them, and outside of it they are kept for good.
    """

    def __init__(self, count: int, device: torch.device, *, staged: bool | None = None):
        self._values: list[int] | None = None
        self._staged = device.type == "cuda" if staged is None else staged
        self._table = torch.zeros(count, dtype=torch.int64, device=device)
        if self._staged:
            self._pinned = [pinned(count) for _ in range(2)]
            self._copied = [torch.cuda.Event() for _ in range(2)]
            self._turn = 0
            self._spare: list[tuple[Tensor, Tensor]] = []
            self._never_freed: list[Tensor] = []

    def __call__(self, values: list[int]) -> Tensor:
        """The table holding `values`, in the order of the current stream."""
        if self._staged and torch.cuda.is_current_stream_capturing():
            return self._record(values)
        if self._staged and len(self._spare) < SPARE:
            self._spare.append((pinned(len(values)), torch.empty_like(self._table)))
        if values != self._values:
            if self._staged:
                self._copy(values)
            else:
                self._table = torch.tensor(values, dtype=torch.int64, device="cpu")
            self._values = values
        return self._table

    def _copy(self, values: list[int]) -> None:
        self._turn = 1 - self._turn
        pinned, copied = self._pinned[self._turn], self._copied[self._turn]
        copied.synchronize()  # the copy before last, long done; an event never recorded is done
        pinned.copy_(torch.tensor(values, dtype=torch.int64, device="cpu"))
        self._table.copy_(pinned, non_blocking=True)
        copied.record()

    def _record(self, values: list[int]) -> Tensor:
        if not self._spare:
            raise RuntimeError("each CUDA graph of an AdamEMA step wants an eager step of that optimiser before its capture, got none")
        pinned, table = self._spare.pop()
        (self._never_freed if _owner is None else _owner).extend((pinned, table))
        pinned.copy_(torch.tensor(values, dtype=torch.int64, device="cpu"))
        table.copy_(pinned, non_blocking=True)
        return table


class Rows:
    """Tables of weights for a launch over all their rows: [T, 3] int64, address, rows, numbers a row; [P, 2] int32, weight and part of it.

    A table is made once for weights that lie where they lay. One that a CUDA graph was captured with is the graph's from then on.
    """

    def __init__(self):
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._never_freed: list[Tensor] = []

    def __call__(self, weights: Sequence[Tensor], each: int) -> tuple[Tensor, Tensor]:
        """Both tables, with `each` rows a program."""
        facts = [(w.data_ptr(), w.shape[0], w.shape[1:].numel()) for w in weights]
        device = weights[0].device
        key = (device, each, *facts)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if key not in self._made:
            if capturing:
                raise RuntimeError(
                    "a CUDA graph of force_weight_norm_ wants an eager call of the same weights before its capture, got none"
                )
            while len(self._made) >= SPARE:
                self._made.pop(next(iter(self._made)))  # the oldest
            counts = torch.tensor([-(-rows // each) for _, rows, _ in facts], dtype=torch.int64, device="cpu")
            weight = torch.repeat_interleave(torch.arange(len(facts), device="cpu"), counts)
            first = torch.arange(len(weight), device="cpu") - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
            table, programs = torch.tensor(facts, dtype=torch.int64, device="cpu"), torch.stack([weight, first], 1).to(torch.int32)
            self._made[key] = table.to(device), programs.to(device)
        made = self._made[key]
        if capturing:
            (self._never_freed if _owner is None else _owner).extend(made)
        return made


#: Floats per tensor that change from step to step: step size, 1/sqrt(1 - beta2^t), lr·decay, 1 - ema_decay, 1/scale, go.
COEFS = 8
GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Part:
    """One parameter group as the launchers see it: aligned lists of tensors, and the tables that point at them."""

    def __init__(
        self, params: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], ema: list[Tensor] | None,
        shadow: list[Tensor | None] | None, steps: Tensor,
    ):  # fmt: skip
        self.params, self.exp_avg, self.exp_avg_sq, self.ema, self.shadow = params, exp_avg, exp_avg_sq, ema, shadow
        self.steps = steps  # [P] float32: how often each tensor moved
        self.each_step = list(steps.unbind())  # its elements, as state["step"] holds them
        self.grads: list[Tensor | None] = []  # of this step
        self.where: list[int] = []
        self.fixed = self.chunks = self.coefs = self.grad_table = torch.empty(0)
        self.addresses = Addresses(len(params), steps.device)
        self._aligned = False

    def refresh_addresses(self) -> None:
        """Bring the tables up to date with where parameters and this step's gradients are."""
        where = [p.data_ptr() for p in self.params]
        if where != self.where:
            self.where = where
            rows = [self.params, self.exp_avg, self.exp_avg_sq, self.ema, self.shadow]
            numels = [p.numel() for p in self.params]
            addresses = [[0 if t is None else t.data_ptr() for t in row] if row else [0] * len(where) for row in rows]
            self._aligned = all(a % 16 == 0 for row in addresses for a in row)
            self.fixed = torch.tensor([*addresses, numels], dtype=torch.int64).to(self.steps.device)
            self.chunks = chunks(numels, self.steps.device)
            self.coefs = self.steps.new_empty(len(where), COEFS)
        # An empty tensor's address is 0 as well: any other says that there is a gradient.
        grads = [0 if g is None else g.data_ptr() or 16 for g in self.grads]
        self.aligned = self._aligned and all(a % 16 == 0 for a in grads)
        self.grad_table = self.addresses(grads)

    @property
    def float32(self) -> bool:
        """Are parameters and gradients?"""
        return all(t is None or t.dtype is torch.float32 for t in (*self.params, *self.grads))

    @property
    def grad_dtype(self) -> torch.dtype:
        dtypes = {g.dtype for g in self.grads if g is not None} or {torch.float32}
        if len(dtypes) > 1 or not dtypes <= set(GRAD_DTYPES):
            raise ValueError(f"AdamEMA wanted gradients of one dtype (float32, float16, bfloat16), got {dtypes}")
        return dtypes.pop()

    @property
    def shadow_dtype(self) -> torch.dtype:
        return next((s.dtype for s in self.shadow or () if s is not None), torch.bfloat16)


class Flags:
    """The device-side yes or no of a step, one for all groups: `flag` is 1 once a gradient was seen to be non-finite."""

    def __init__(self, device: torch.device):
        self.flag = torch.zeros((), dtype=torch.float32, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.int32, device=device)
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
