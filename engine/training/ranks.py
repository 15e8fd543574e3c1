"""The processes of one run under torchrun: they meet, agree, wait for each other, end together, and notice a rank that hangs.

A process that was started alone is a world of one: every function here then does nothing and costs nothing.
"""

# torch.distributed exports its stores, and torch what torch.optim is made of, in name only.
# pyright: reportPrivateImportUsage=false

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from potstill.engine.common.errors import ADVICE, UserError, told
from potstill.engine.common.signals import Interrupted
from potstill.engine.methods.base import OneRank

T = TypeVar("T")

COLLECTIVE = timedelta(minutes=10)  # longest wait of one rank for the gradients of another
PATIENCE = timedelta(hours=24)  # longest wait while rank 0 works alone: measuring, making pairs
BEAT, STALE = 2.0, 30.0  # seconds between two heartbeats, and without one before a rank counts as lost
LAST_WORDS = 5.0  # seconds that a rank with an error waits for the others, so that all end alike
BUCKET = 1 << 25  # bytes that one all-reduce carries at most: large enough for bandwidth, small enough to overlap


class Ranks(OneRank):
    """All processes of a run, as one of them sees them. `connect` before the first collective.

    several: do what several do, with collectives and shards. Tests let a single process do it, on the one GPU they have.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: dist.Store | None = None, *, several: bool | None = None):
        self.rank, self.count, self.store = rank, count, store
        self.several = count > 1 if several is None else several
        self.patient: dist.ProcessGroup | None = None
        self.heartbeat: Heartbeat | None = None
        self._question: tuple[dist.Work, Tensor] | None = None  # of `stop`, one iteration old
        self.late = 0  # a signal that came when a stage had asked for the last time

    @property
    def first(self) -> bool:
        """Is this the rank that writes and speaks?"""
        return self.rank == 0

    def connect(self, device: torch.device) -> torch.device:
        """Open the process groups; returns this rank's own device. UserError where a backend or a GPU is missing."""
        if not self.several or self.patient is not None:
            return self._own(device)
        check_backends(device.type)
        device = self._own(device)
        if self.store is not None:
            self.heartbeat = Heartbeat(self.store.clone(), self.rank, self.count)  # pyright: ignore[reportAttributeAccessIssue]  # torch's types leave it out
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", store=self.store, rank=self.rank, world_size=self.count,
            timeout=COLLECTIVE, device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(patient, dist.ProcessGroup)
        self.patient = patient
        return device

    def _own(self, device: torch.device) -> torch.device:
        """Of several GPUs the one that is this rank's."""
        if not self.several or device.type != "cuda":
            return device
        number, found = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if number >= found:
            raise UserError(f"more processes than GPUs on this machine: wanted a GPU for each, got {found}: lower --nproc-per-node")
        torch.cuda.set_device(number)
        return torch.device("cuda", number)

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over ranks, in a few large all-reduces that run while the next one is packed."""
        if not self.several:
            return
        pending = []
        for bucket in buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket]).div_(self.count)
            pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in pending:
            work.wait()
            parts = [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in bucket]), bucket, strict=True)]
            torch._foreach_copy_(bucket, parts)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.several:
            dist.all_reduce(tensor)
        return tensor

    def on_first(self, work: Callable[[], T]) -> T | None:
        """work() on rank 0 while the others wait. Returns its result on rank 0 and None elsewhere; all ranks raise its UserError."""
        result, message = None, ""
        if self.first:
            try:
                result = work()
            except UserError as error:
                if not self.several:
                    raise
                message = str(error)
        if message := self.agree(message):
            raise UserError(message)
        return result

    def agree(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        values = [value]
        if self.several:
            dist.broadcast_object_list(values, src=0, group=self.patient)
        return values[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.several:
            dist.barrier(group=self.patient)

    def least(self, value: int) -> int:
        """The smallest of all ranks' values."""
        if not self.several:
            return value
        least = torch.tensor(value)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.patient)
        return int(least)

    def stop(self, signum: int, *, last: bool = False) -> int:
        """The signal that any rank had got at the last call (0: none). All ranks get the same answer at the same iteration.

        The answer is one iteration old, so no rank waits for the slowest one; it travels between CPUs. last: the answer of now, for
        which all wait.
        """
        if not self.several:
            return signum
        if last:
            return self.stop(signum) or self.stop(signum)
        answer = 0
        if self._question is not None:
            work, tensor = self._question
            work.wait()
            self._question, answer = None, int(tensor)
        if not answer:
            tensor = torch.tensor(signum)
            work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.patient, async_op=True)
            assert work is not None
            self._question = work, tensor
        return answer

    def close(self) -> None:
        """This rank is done; the others go on without its heartbeat."""
        if self._question is not None:
            self._question[0].wait()
            self._question = None
        if self.heartbeat is not None:
            self.heartbeat.stop()
            self.heartbeat = None
        if self.patient is not None:
            dist.destroy_process_group()
            self.patient = None


ALONE = Ranks()


def meet() -> Ranks:
    """The ranks that torchrun started (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT); else ALONE."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return ALONE
    if not dist.is_available():
        raise UserError(f"{count} processes were started, but this PyTorch has no torch.distributed: start one, without torchrun")
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(iter(rendezvous("env://", timeout=timedelta(minutes=5))))
    return Ranks(rank, count, dist.PrefixStore("potstill", store))


def check_backends(kind: str) -> None:
    """UserError where PyTorch lacks what processes on such devices talk through."""
    if not dist.is_gloo_available():
        raise UserError("several processes want PyTorch's gloo backend, and this build has none: start one, without torchrun")
    if kind == "cuda" and not dist.is_nccl_available():
        raise UserError("several processes on GPUs want the NCCL backend, and this PyTorch has none: use device=cpu, or one process")


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, in groups of one dtype of at most BUCKET bytes (or of one tensor)."""
    bucket: list[Tensor] = []
    size = 0
    for t in tensors:
        if bucket and (t.dtype is not bucket[0].dtype or size + t.nbytes > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(t)
        size += t.nbytes
    if bucket:
        yield bucket


@contextmanager
def one_voice(ranks: Ranks) -> Iterator[None]:
    """What ends the run ends it on all ranks and is printed once: a UserError with exit code 2, a signal with 128 + its number,
    a lost rank with 1.

    In a world of one every exception passes.
    """
    if ranks.count == 1:
        yield
        return
    try:
        yield
    except UserError as error:
        finish(ranks, 2, f"error: {error}")
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        finish(ranks, 2, f"error: cannot go on: {told(error)}")
    except Interrupted as stop:
        finish(ranks, 128 + stop.signum, str(stop))
    except RuntimeError as error:
        if not is_lost(error):
            raise
        finish(ranks, 1, f"error: rank {ranks.rank} lost touch with another rank, which died or hangs; the same command goes on from "
               "the newest checkpoint")  # fmt: skip


def is_lost(error: RuntimeError) -> bool:
    """Did a collective fail because of another process?"""
    words = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "timed out waiting", "socket")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def finish(ranks: Ranks, code: int, sentence: str) -> NoReturn:
    """Exit with `code` when all ranks are here or LAST_WORDS seconds have passed. The first rank to come prints the sentence.

    A UserError or a signal of one rank makes the others lose touch with it: they print nothing, and take over its code.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others as soon as one has gone
    assert ranks.store is not None
    if ranks.heartbeat is not None:
        ranks.heartbeat.stop()  # it would take over the code that stands here in a moment
    try:
        store, deadline = ranks.store, time.monotonic() + LAST_WORDS
        if code != 1:
            store.set("code", str(code))
        if store.add("said", 1) == 1:
            print(sentence, file=sys.stderr, flush=True)
        while store.add("said", 0) < ranks.count and time.monotonic() < deadline:
            time.sleep(0.05)
        code = int(store.get("code")) if store.check(["code"]) else code
        if not ranks.first:
            store.add("gone", 1)
        while ranks.first and store.add("gone", 0) < ranks.count - 1 and time.monotonic() < deadline:
            time.sleep(0.05)  # without torchrun it is rank 0 who holds the store
    except (dist.DistError, RuntimeError):  # the store went with the rank that held it
        print(sentence, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # destructors of process groups wait for the dead


class Heartbeat:
    """A thread that counts up this rank's heartbeat every few seconds, and ends the process when another rank's stands still, or has
    ended the run.

    torchrun notices a rank that was killed. It does not notice one that hangs (stopped, swapping, a machine that is gone): it
    watches processes, and torchelastic's timers kill only what its own agent has started, on the same machine, with
    TORCHELASTIC_ENABLE_FILE_TIMER=1. NCCL's watchdog waits as long as the longest collective may take, and gloo has none.
    """

    def __init__(self, store: dist.Store, rank: int, count: int):
        self.store, self.rank, self.count = store, rank, count
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()

    def _run(self) -> None:
        last = {other: (0, time.monotonic()) for other in range(self.count) if other != self.rank}  # heartbeats, and when they changed
        try:
            while not self.stopped.wait(BEAT):
                self.store.add(f"beat/{self.rank}", 1)
                if self.store.check(["code"]):
                    self._follow()
                for other in list(last):
                    beats, now = self.store.add(f"beat/{other}", 0), time.monotonic()
                    if beats != last[other][0]:
                        last[other] = beats, now
                    elif self.store.check([f"left/{other}"]):
                        del last[other]
                    elif now - last[other][1] > STALE:
                        self._end(other)
            self.store.set(f"left/{self.rank}", "")
        except (dist.DistError, RuntimeError):  # the store's process has ended; collectives will say so
            return

    def _follow(self) -> NoReturn:
        """Another rank has said why the run ends, while this one waits for it in a collective."""
        code, deadline = int(self.store.get("code")), time.monotonic() + LAST_WORDS
        self.store.add("said", 1)
        if self.rank:
            self.store.add("gone", 1)
        while not self.rank and self.store.add("gone", 0) < self.count - 1 and time.monotonic() < deadline:
            time.sleep(0.05)  # without torchrun it is rank 0 who holds the store
        os._exit(code)

    def _end(self, other: int) -> NoReturn:
        if self.store.add("said", 1) == 1:
            print(
                f"error: rank {other} has given no sign of life for {STALE:.0f} s: it died or hangs; "
                "the same command goes on from the newest checkpoint",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        os._exit(1)
