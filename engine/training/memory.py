"""`micro_batch: auto`: how many images a GPU takes at once, found by trying, and what each net takes before the first image."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from potstill.engine.common.errors import UserError
from potstill.engine.methods.base import OneRank, modules_of
from potstill.engine.training.run import Run, Share

SPARE = 0.9  # of the memory: fragments, the allocator of the libraries, a larger batch in an evaluation


def fitting_micro_batch(run: Run, share: tuple[Any, ...], say: Callable[[str], None]) -> int | None:
    """The most images of this rank's share (a `Share`, or a tuple of its first parts) that forward and backward of every turn have room for; None: all of them.

    Weights, optimisers and all state are afterwards as before. Every rank tries the same sizes and takes what fits on all.
    UserError if not even one image fits.
    """
    for line in estimate(run):
        say(line)
    own = Share(*share)
    if run.device.type != "cuda":
        say(f"train.micro_batch=auto: on a {run.device.type} nothing is tried, the whole share of {len(own.images)} images is taken")
        return None
    for size in sizes(len(own.images)):
        peak = run.ranks.least(-peak_memory(run, own, size))
        room = SPARE * torch.cuda.get_device_properties(run.device).total_memory
        if peak and -peak <= room:
            say(
                f"train.micro_batch=auto: {size} of {len(own.images)} images at once ({-peak / 2**30:.1f} of {room / SPARE / 2**30:.1f} GiB)"
            )
            return size
    raise UserError(
        "train.micro_batch=auto: not even one image fits into the GPU's memory: use train.parallel=fsdp, more GPUs or a smaller net"
    )


def sizes(share: int) -> Iterator[int]:
    """Divisors of the share, largest first, about half as many every time."""
    last = 2 * share
    for size in range(share, 0, -1):
        if share % size == 0 and (size <= last // 2 or size == 1):
            yield size
            last = size


def peak_memory(run: Run, own: Share, size: int) -> int:
    """Bytes of one micro-batch through every turn, with gradients and the optimisers' state to come; 0 for too much."""
    method, ranks = run.method, run.method.ranks
    # what losses may change without an optimiser
    state = [*(b for module in (*method.nets.values(), method.state) for b in module.buffers()), *method.state.parameters()]
    before = [(t, t.clone()) for t in state]
    moments = sum(p.nbytes for one in run.trained.values() if not one.optimizer.state for p in one.net.parameters() if p.requires_grad)
    method.ranks = OneRank()  # a rank without memory must not leave the others waiting
    try:
        if torch.backends.cudnn.benchmark:
            every_turn(run, own, size)  # whose convolutions take more memory while cuDNN tries than the one it takes
        torch.cuda.reset_peak_memory_stats(run.device)
        every_turn(run, own, size)
        return torch.cuda.max_memory_allocated(run.device) + 2 * moments  # which the first step makes
    except torch.OutOfMemoryError:
        return 0
    finally:
        method.ranks = ranks
        run.forget_gradients()
        with torch.no_grad():
            for t, value in before:
                t.copy_(value)
        torch.cuda.empty_cache()


def every_turn(run: Run, own: Share, size: int) -> None:
    """Forward and backward of each on one micro-batch; no step."""
    for turn in run.method.turns:
        shared = run.method.begin(run.batches.part(own, run.step, 0, size))
        if (result := turn.loss(shared)) is not None:
            result[0].backward()
        run.forget_gradients()


def estimate(run: Run) -> list[str]:
    """Memory before the first image, by role, in GiB of this rank; what several nets share (LoRA) counts for the first."""
    lines, counted = [], set()
    for name, one in run.trained.items():
        weights = sum(p.nbytes for p in one.net.parameters() if p.data_ptr() not in counted)
        counted |= {p.data_ptr() for p in one.net.parameters()}
        trains = sum(p.nbytes for p in one.net.parameters() if p.requires_grad)
        average = trains * (1 + len(run.profiles)) if name == run.method.product else 0
        total = weights + 3 * trains + average
        lines.append(
            f"memory, {name}: {gib(total)} GiB (weights {gib(weights)}, gradients {gib(trains)}, moments {gib(2 * trains)}"
            + (f", average {gib(average)})" if average else ")")
        )
    fixed = {p.data_ptr(): p.nbytes for m in modules_of(run.method) for p in m.parameters() if p.data_ptr() not in counted}
    return [*lines, f"memory, frozen nets: {gib(sum(fixed.values()))} GiB"]


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
