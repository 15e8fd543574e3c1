"""An endless, shuffled stream of batches. Step s depends on (seed, s) and on nothing else, so a run resumes without saved state.

The images of an epoch are permuted by a generator seeded with (seed, epoch); step s takes the positions
s·batch … (s + 1)·batch - 1 of the epochs laid end to end, so every image comes exactly once an epoch. Latents that are drawn from
moments are drawn for the whole batch of step s by a generator seeded with (seed, s), on the device.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from potstill.engine.common.errors import UserError
from potstill.engine.common.signals import SIGNALS
from potstill.engine.data.images import IN_MEMORY_BYTES, Images
from potstill.engine.data.progress import cores

ENDLESS = 2**62
DRAW = 1  # beside (seed, step), the seed of latents; epochs have none
SOON = 1000  # steps within which a second process that is killed ends the run: memory is too small, and will stay so


class Order:
    """Which images step s takes, and which of them are mirrored: a pure function of (seed, s)."""

    def __init__(self, n: int, *, batch: int, seed: int, flips: bool, window: slice, device: torch.device):
        self.n, self.batch, self.seed, self.flips, self.window, self.device = n, batch, seed, flips, window, device
        self._epochs: dict[int, tuple[Tensor, Tensor]] = {}

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Indices [n] int64 and coins [n] bool of this window of the batch, on the device."""
        position, stop = step * self.batch + self.window.start, step * self.batch + self.window.stop
        every = self.window.step or 1
        indices, coins = [], []
        while position < stop:  # a batch may reach over the end of an epoch, or over several of a small set
            epoch, start = divmod(position, self.n)
            end = min(start + stop - position, self.n)
            order, mirrored = self._epoch(epoch)
            indices.append(order[start:end])
            coins.append(mirrored[start:end])
            position += end - start
        return torch.cat(indices)[::every], torch.cat(coins)[::every]

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """A permutation and one coin a position. The epoch before is kept too: a batch may see its end."""
        if epoch not in self._epochs:
            # Raw bits of Philox never change between versions of numpy; what it makes of them for `permutation` may.
            bits = np.random.Philox(np.random.SeedSequence((self.seed, epoch))).random_raw(2 * self.n)
            order = np.argsort(bits[: self.n], kind="stable")
            coins = (bits[self.n :] >> 63).astype(bool) & self.flips
            both = torch.from_numpy(order).to(self.device), torch.from_numpy(coins).to(self.device)
            self._epochs = {k: v for k, v in self._epochs.items() if k == epoch - 1} | {epoch: both}
        return self._epochs[epoch]


class Stream:
    """Batches of `images`: `stream.at(s)` is (float32 [n, C, H, W], images in [-1, 1], one-hot labels [n, label_dim] or None).

    batch: images of the global batch. window: this process's part of it, a slice, also with a step; default: all. flips: mirror
    half of the images. A set of at most `memory` bytes is decoded once and lies on the device, and batches are gathered there.
    For a larger one `workers` processes read the coming steps (0: this process reads; None: one for each other core, at most 8).
    """

    def __init__(
        self,
        images: Images,
        *,
        batch: int,
        seed: int = 0,
        flips: bool = False,
        workers: int | None = None,
        device: torch.device | str = "cpu",
        window: slice | None = None,
        memory: int = IN_MEMORY_BYTES,
    ):
        start, stop, stride = (window or slice(None)).indices(batch)
        if batch < 1 or stop <= start or stride < 1:
            raise ValueError(f"wanted a window of images of the batch in their order, got {window} of {batch}")
        if seed < 0:
            raise ValueError(f"wanted a seed of at least 0, got {seed}")
        if flips and images.latent:
            raise UserError(f"{images.name} holds latents, and those of a mirrored image are others: set data.flips=false")
        self.images, self.batch, self.flips, self.window = images, batch, flips, slice(start, stop, stride)
        self.device, self.seed = torch.device(device), seed
        order = partial(Order, len(images), batch=batch, seed=seed, flips=flips, window=self.window)
        self._order = order(device=self.device)
        self._labels = None if images.labels is None else torch.from_numpy(images.labels).to(self.device)
        pixels = images.pixels(memory)
        self._pixels = None if pixels is None else torch.from_numpy(pixels).to(self.device)
        self._reader = None if self._pixels is not None else _Reader(images, order(device=torch.device("cpu")), workers, self.device)
        self._ahead = _Ahead(self._reader.at, self.device) if self._reader and self.device.type == "cuda" else None

    def at(self, step: int) -> tuple[Tensor, Tensor | None]:
        """This window of batch `step`. Steps asked for in order come from what the workers have read ahead."""
        indices, mirrored = self._order.at(step)
        if self._pixels is not None:
            rows = self._pixels[indices]
        else:
            assert self._reader is not None
            rows = self._ahead.at(step) if self._ahead else self._reader.at(step).to(self.device)
        if self.flips:
            rows = torch.where(mirrored[:, None, None, None], rows.flip(3), rows)
        return self.images.seen(rows, self._noise(step) if self.images.moments else None), self._one_hot(indices)

    def _noise(self, step: int) -> Tensor:
        """Standard normals [n, C, H, W], whoever else draws those of the batch's other images."""
        seed = np.random.SeedSequence((self.seed, step, DRAW)).generate_state(1, np.uint64)
        generator = torch.Generator(self.device).manual_seed(int(seed[0] >> 1))
        return torch.randn(self.batch, *self.images.shape, generator=generator, device=self.device)[self.window]

    def indices(self, step: int) -> Tensor:
        """Which images [n] `at(step)` takes: to find their captions."""
        return self._order.at(step)[0]

    def _one_hot(self, indices: Tensor) -> Tensor | None:
        if self._labels is None:
            return None
        rows = torch.zeros(len(indices), self.images.label_dim, device=self.device)
        return rows.scatter_(1, self._labels[indices][:, None], 1.0)

    def close(self) -> None:
        """Stop the worker processes; `at` starts new ones."""
        if self._ahead is not None:
            self._ahead.forget()
        if self._reader is not None:
            self._reader.close()


class _Ahead:
    """Copies the next step's images from pinned memory on a stream of its own while this step computes: two buffers.

    An error in the next step's images is kept until that step is asked for: the run may end before.
    """

    def __init__(self, read: Callable[[int], Tensor], device: torch.device):
        self.read, self.device, self.stream = read, device, torch.cuda.Stream(device)
        self.buffers: dict[int, tuple[Tensor, Any]] = {}  # step % 2: the images on the device, and when they were last used
        self.next: tuple[int, Any, UserError | None] = (-1, None, None)  # step, when its copy is done, or what went wrong

    def at(self, step: int) -> Tensor:
        """uint8 [n, C, H, W] of step `step` on the device, valid until the step after next is asked for."""
        if self.next[0] != step:
            self._used(step % 2, torch.cuda.current_stream(self.device))
            self._fetch(step)
        _, copied, error = self.next
        if error is not None:
            self.forget()
            raise error
        now = torch.cuda.current_stream(self.device)
        now.wait_event(copied)
        images, _ = self.buffers[step % 2]
        self._used((step + 1) % 2, now)  # what computes on the step before was launched before this call
        self._fetch(step + 1)
        return images

    def _used(self, slot: int, stream: Any) -> None:
        if slot in self.buffers:
            self.buffers[slot] = self.buffers[slot][0], stream.record_event()

    def _fetch(self, step: int) -> None:
        try:
            pinned = self.read(step)
        except UserError as error:
            self.next = step, None, error
            return
        with torch.cuda.stream(self.stream):
            images, used = self.buffers.get(step % 2, (None, None))
            if images is None or images.shape != pinned.shape:
                images = torch.empty(pinned.shape, dtype=pinned.dtype, device=self.device)
            elif used is not None:
                self.stream.wait_event(used)
            images.copy_(pinned, non_blocking=True)
            self.buffers[step % 2] = images, None
            self.next = step, self.stream.record_event(), None

    def forget(self) -> None:
        """Another order of steps may come."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self.buffers, self.next = {}, (-1, None, None)


class _Reader:
    """Reads the images of coming steps in worker processes, one step a worker at a time.

    Where one is killed, as the kernel does when memory is out, all are started anew at the step that is asked for: nothing is lost.
    """

    def __init__(self, images: Images, order: Order, workers: int | None, device: torch.device):
        self.steps = _Steps(images, order)
        self.workers = max(1, min(8, cores() - 1)) if workers is None else workers
        self.pin = device.type == "cuda"
        self.next = -1
        self.batches: Any = None  # a DataLoader's iterator
        self.killed: int | None = None  # the step at which a worker was last found dead

    def at(self, step: int) -> Tensor:
        """uint8 [n, C, H, W] of step `step`."""
        if self.batches is None or step != self.next:
            self._start(step)
        self.next = step + 1
        while (batch := self._batch()) is None:
            if self.killed is not None and abs(step - self.killed) <= SOON:
                self.close()
                raise UserError(
                    "a process that reads images was killed twice (out of memory?): lower data.workers; the same command goes on from the "
                    "newest checkpoint"
                )
            self.killed = step
            print(f"a process that reads images was killed (out of memory?): they are started anew at step {step:,}", file=sys.stderr)
            self._start(step)
        if isinstance(batch, UserError):
            self.close()
            raise batch
        return batch

    def _start(self, step: int) -> None:
        self.close()
        with _no_alarm():
            self.batches = iter(self._loader(step))

    def _batch(self) -> Tensor | UserError | None:
        """What comes next; None where a worker has been killed."""
        try:
            return None if self._has_died() else next(self.batches)
        except (RuntimeError, OSError, EOFError):  # the last two: what a dead process was about to hand over
            if not self._has_died():
                raise
            return None

    def _has_died(self) -> bool:
        return any(not worker.is_alive() for worker in getattr(self.batches, "_workers", ()))

    def _loader(self, start: int) -> DataLoader:
        return DataLoader(
            self.steps,
            sampler=range(start, ENDLESS),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.pin,
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # else it draws from the global one, and a resumed run would differ
        )

    def close(self) -> None:
        self.batches = None


class _Steps(Dataset):
    """Item s is the window of step s; an error travels as a value, so that it arrives as the one sentence it is."""

    def __init__(self, images: Images, order: Order):
        self.images, self.order = images, order

    def __getitem__(self, step: int) -> Tensor | UserError:
        try:
            return torch.from_numpy(np.stack([self.images.read(i) for i in self.order.at(step)[0].tolist()]))
        except UserError as error:
            return error


@contextmanager
def _no_alarm() -> Iterator[None]:
    """Without the handler of PyTorch's that raises an error wherever the main thread happens to be when a worker is killed.

    It may be halfway through an update of the weights; `_Reader` notices at the next step, where nothing is half done.
    """
    alarm = getattr(signal, "SIGCHLD", None)  # Windows has none, and no such handler
    before = None if alarm is None else signal.getsignal(alarm)
    yield
    if alarm is not None and before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(alarm, before)


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C, SIGTERM and SIGUSR1 reach the whole process group, while the main process wants to finish its step and save.

    SIGTERM is also how a worker is ended, so it must go; but without a status that would raise in the main process.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
