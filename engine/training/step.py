"""One iteration: every turn that is due, in order: losses of all micro-batches, backward, clip, optimiser step.

The one place where the alternation of nets is written. It never reads a tensor's value, so nothing waits for the GPU.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from potstill.engine.methods.base import Batch, Logs, Method, Turn
from potstill.engine.training.graphs import Graphs


@dataclass
class Trained:
    """What the engine keeps for one trained net."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float | None
    # What several ranks need (engine.training.parallel); one rank needs nothing.
    accumulate: Callable[[bool], None] = lambda last: None  # before each backward: is it the last micro-batch's?
    reduce: Callable[[nn.Module], None] = lambda net: None  # average the net's gradients over ranks
    norm: Callable[[Sequence[Tensor]], Tensor] = torch.nn.utils.get_total_norm
    renew: Callable[[], None] = lambda: None  # after the weights have changed


def iteration(
    method: Method, trained: Mapping[str, Trained], micro_batches: Sequence[Batch], step: int, graphs: Graphs | None = None
) -> Logs:
    """Take every turn due at iteration `step` (from 0). Returns device tensors "<net>/<name>", summed over micro-batches."""
    logs: Logs = {}
    shared: list[Any] = list(micro_batches)
    if type(method).begin is not Method.begin:
        work = partial(begun, method)
        shared, _ = graphs.run("begin", work, shared) if graphs else work(shared)
    for number, turn in enumerate(method.turns):
        if step < turn.after or (step - turn.after) % turn.every:
            continue
        work = partial(taken, method, turn, trained[turn.trains])
        shared, own = graphs.run(f"turn {number} ({turn.trains})", work, shared) if graphs else work(shared)
        for name, value in own.items():
            logs[name] = logs[name] + value if name in logs and not name.endswith("/grad_norm") else value
    return logs


def begun(method: Method, micro_batches: Sequence[Batch]) -> tuple[list[Any], Logs]:
    """What the turns of this iteration share, of every micro-batch."""
    return [method.begin(batch) for batch in micro_batches], {}


def taken(method: Method, turn: Turn, trained: Trained, shared: list[Any]) -> tuple[list[Any], Logs]:
    """One turn over all micro-batches. Returns what they share, which it may have changed, and what to log."""
    logs: Logs = {}
    stepped = False
    for one in shared:
        if (result := turn.loss(one)) is None:
            continue
        (loss, log), stepped = result, True
        trained.accumulate(one is shared[-1])
        (loss / len(shared)).backward()
        for name, value in log.items():
            key = f"{turn.trains}/{name}"
            share = value.detach() if name == "nonfinite" else value.detach() / len(shared)
            logs[key] = logs[key] + share if key in logs else share
    if stepped:
        logs[f"{turn.trains}/grad_norm"] = update(trained)
        method.after_step(turn.trains)
    return shared, logs


def update(trained: Trained) -> Tensor:
    """Average over ranks, clip, step, forget the gradients. Returns the gradient norm before clipping."""
    trained.reduce(trained.net)
    # the optimiser has them in a list; net.parameters() walks the modules, a millisecond of Python a step
    parameters = [p for group in trained.optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters]
    norm = trained.norm(gradients)
    if trained.clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, trained.clip, norm)
    trained.optimizer.step()
    trained.optimizer.zero_grad(set_to_none=True)
    trained.renew()
    return norm
