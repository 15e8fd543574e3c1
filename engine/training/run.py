"""One iteration of training: its micro-batches with their random numbers, and every turn that is due, in the method's order.

The loop calls `Run.take`, which calls `turn.loss`. Random numbers are a function of (seed, iteration) alone, so the step counter
is the whole state of data and noise, and a run that was killed repeats itself from its last checkpoint.
"""

import math
import random
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from potstill.engine.methods.base import Batch, Draws, Logs, Method, modules_of
from potstill.engine.nets.conditions import Condition, Text
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.shadow import renew_stale
from potstill.engine.training.capture import default_generator
from potstill.engine.training.compile import compile_nets
from potstill.engine.training.config import TrainConfig
from potstill.engine.training.graphs import Graphs, build_graphs
from potstill.engine.training.optim import learning_rate, set_learning_rate
from potstill.engine.training.parallel import largest_part
from potstill.engine.training.ranks import ALONE, Ranks
from potstill.engine.training.state import State


class Share(NamedTuple):
    """This rank's part of a batch: images [n, C, H, W], what they show (rows or None), and n prompts for each time the method asks."""

    images: Tensor
    labels: Condition | None
    prompts: tuple[Text, ...] = ()

    def part(self, window: slice) -> "Share":
        """Some of its rows."""
        labels = None if self.labels is None else self.labels[window]
        return Share(self.images[window], labels, tuple(text[window] for text in self.prompts))


class Run(State):
    """One stage of training: its state, its share of the batches, and the step that moves it on.

    classes: those a student of several is trained on; None: all.
    """

    def __init__(
        self, method: Method, cfg: TrainConfig, seed: int, device: torch.device, classes: Sequence[int] | None = None,
        ranks: Ranks = ALONE,
    ):  # fmt: skip
        self.batches = Batches(method, cfg, seed, device, classes, ranks)
        super().__init__(method, cfg, device, ranks, together=self.batches.together)
        self.compiled = compile_nets(modules_of(method), cfg.compile, device)
        self.graphs: Graphs | None = None
        self.waits = waiting(modules_of(method))
        if not ranks.several and (graphs := build_graphs(cfg.graphs, device, self.waits)):
            self.use(graphs)

    def use(self, graphs: Graphs) -> None:
        """Replay the pieces of an iteration as these graphs."""
        self.graphs, graphs.reset, self.tensor_rates = graphs, self.forget_gradients, True
        self.place_rates()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.graphs is not None:
            self.graphs.forget()  # they hold what has been replaced: PyTorch's moments and rates, the teacher's plan

    def take(self, images: Tensor, labels: Condition | None, prompts: tuple[Text, ...] = ()) -> None:
        """One iteration on this rank's share of the batch (`Share`).

        This is the one place where nets alternate. It never reads a tensor's value, so nothing waits for the GPU.
        """
        method, graphs, own = self.method, self.graphs, Share(images, labels, prompts)
        logs: Logs = {}
        decay = self.decay()
        with graphs.backend.stream() if graphs else nullcontext():
            self._prepare(own, decay)
            shared: list[Any] = self.batches.cut(own, self.batch_number(self.step))
            if type(method).begin is not Method.begin:

                def begin(batches: list[Any]) -> tuple[list[Any], Logs]:
                    return [method.begin(batch) for batch in batches], {}

                shared, _ = graphs.run("begin", begin, shared) if graphs else begin(shared)
            for number, turn in enumerate(method.turns):
                if not turn.due(self.step, self.images_seen):
                    continue
                net = self.trained[turn.trains]

                def take_turn(shared: list[Any]) -> tuple[list[Any], Logs]:
                    """Losses of all micro-batches, backward, clip, optimiser step. Returns what is shared from here on, and logs."""
                    logs: Logs = {}
                    used = False
                    for one in shared:
                        if (result := turn.loss(one)) is None:
                            continue
                        (loss, log), used = result, True
                        net.before_backward(last=one is shared[-1])
                        (loss / len(shared)).backward()
                        for name, value in log.items():
                            add(logs, f"{turn.trains}/{name}", value.detach() if name == "nonfinite" else value.detach() / len(shared))
                    if used:
                        net.average_gradients()
                        logs[f"{turn.trains}/grad_norm"] = norm = net.step()
                        if turn.name:
                            logs[f"{turn.trains}/{turn.name}/grad_norm"] = norm
                        net.optimizer.zero_grad(set_to_none=True)
                        net.after_step()
                        method.after_step(turn.trains)
                    return shared, logs

                shared, turn_logs = graphs.run(f"turn {number} ({turn.trains})", take_turn, shared) if graphs else take_turn(shared)
                for name, value in turn_logs.items():
                    add(logs, name, value)
            self.step += 1
            averaged = self.averaging_optimizer is not None and f"{method.product}/grad_norm" in logs  # its optimiser has done it
            self.ema.update(decay, weights=not averaged)
            self.update_profiles()
            self.meter.add(logs)

    def _prepare(self, own: Share, decay: float) -> None:
        """What comes before the turns: shadows, the guard's look, seeds, learning rates, the decay of the average."""
        for one in self.trained.values():
            one.force_norms()
        renew_stale(self.weights_with_shadows)
        if self.guard is not None:
            before = self.guard.state
            self.meter.add(self.guard.before(self.step, self.total, lambda: self.product_gradient(own)))
            if self.graphs and self.guard.state != before:
                self.graphs.forget()  # those of a teacher that left out something else
        self.batches.seed_dropout(self.batch_number(self.step))
        for one in self.trained.values():
            set_learning_rate(one.optimizer, learning_rate(one.cfg, self.step, self.total))
        if self.averaging_optimizer is not None:
            self.averaging_optimizer.set_ema_decay(decay)

    def product_gradient(self, own: Share) -> Tensor:
        """The gradient for the product's parameters at this iteration, as one vector; changes nothing.

        Of the product's turns those that this part of the run has; before all of them, those that come first.
        """
        number = self.batch_number(self.step)
        self.batches.seed_dropout(number)
        name, batches = self.method.product, self.batches.cut(own, number)
        parameters = [p for p in self.method.nets[name].parameters() if p.requires_grad]
        total = [torch.zeros_like(p) for p in parameters]
        turns = [turn for turn in self.method.turns if turn.trains == name]
        images = max(self.images_seen, min(math.floor(turn.seen[0]) + 1 for turn in turns))
        for shared in map(self.method.begin, batches):
            for turn in turns:
                if turn.counts(images) and (result := turn.loss(shared)) is not None:
                    gradients = torch.autograd.grad(result[0] / len(batches), parameters, materialize_grads=True)
                    total = [t + g for t, g in zip(total, gradients, strict=True)]
        gradient = torch.cat([t.flatten() for t in total])
        self.ranks.average([gradient])
        return gradient

    def graph_report(self) -> dict[str, Any]:
        """How much of this run was replayed, and what was not, and why."""
        if self.graphs is not None:
            return self.graphs.report()
        there = f"there are none on {self.device.type}" if self.device.type != "cuda" else self.waits
        why = "train.graphs=off" if self.cfg.graphs == "off" else there
        return {"mode": "off", "why": f"{self.ranks.count} ranks" if self.ranks.several else why}


def waiting(nets: Iterable[nn.Module]) -> str:
    """The first denoiser in them that waits for the device, and why; "": none does."""
    found = (m for net in nets for m in net.modules() if isinstance(m, Denoiser) and m.waits)
    return next((f"{type(m.model).__name__} ({m.waits})" for m in found), "")


def add(logs: Logs, name: str, value: Tensor) -> None:
    """Add to what is logged under that name; of gradient norms the last one stands."""
    logs[name] = logs[name] + value if name in logs and not name.endswith("/grad_norm") else value


class Batches:
    """This rank's share of every batch.

    classes: those that the draws of labels choose from; None: all. size: images of a micro-batch; None: the whole share.
    together: batch statistics are over all ranks' samples, and not over each micro-batch's.
    """

    def __init__(self, method: Method, cfg: TrainConfig, seed: int, device: torch.device, classes: Sequence[int] | None, ranks: Ranks):
        self.method, self.seed, self.device, self.ranks = method, seed, device, ranks
        self.share = cfg.batch // ranks.count
        self.size = largest_part(self.share, cfg.micro_batch) if isinstance(cfg.micro_batch, int) else None
        self.together = self.size is None and not (cfg.micro_batch == "auto" and device.type == "cuda")
        self.classes = None if classes is None else torch.tensor(classes, device=device)
        self.generators: list[torch.Generator] = []  # one a micro-batch, the same in every iteration, since graphs hold them

    @property
    def window(self) -> slice:
        """This rank's images of the batch: every ranks-th where batch statistics are over all ranks, so that any aligned part
        of the batch is shared evenly; else consecutive ones, so that a micro-batch is the same whichever rank has it."""
        return self._samples(0, self.share, self.share)

    def _samples(self, start: int, stop: int, share: int) -> slice:
        """Where this rank's images start … stop - 1 are in the batch of all ranks."""
        ranks, rank = self.ranks.count, self.ranks.rank
        if ranks == 1:
            return slice(start, stop)
        return slice(start * ranks + rank, stop * ranks, ranks) if self.together else slice(rank * share + start, rank * share + stop)

    def cut(self, own: Share, step: int) -> list[Batch]:
        """The micro-batches of batch number `step`."""
        size = self.size or len(own.images)
        return [self.part(own, step, start, size) for start in range(0, len(own.images), size)]

    def part(self, own: Share, step: int, start: int, size: int) -> Batch:
        """The micro-batch of `size` images from number `start` on."""
        share = len(own.images)
        if (number := start // size) == len(self.generators):
            self.generators.append(torch.Generator(self.device))
        generator = self.generators[number].manual_seed(seed_of(self.seed, step, 0))
        host = random.Random(seed_of(self.seed, step, 2))
        samples = self._samples(start, min(start + size, share), share)
        draws = Draws(generator, share * self.ranks.count, samples, host, self.classes, self.method.stratified)
        images, labels, prompts = own.part(slice(start, start + size))
        return Batch(images, labels, draws, prompts)

    def seed_dropout(self, step: int) -> None:
        """Dropout of iteration `step` draws other masks on every rank."""
        seed_dropout(self.device, seed_of(self.seed, step, 1 + 16 * self.ranks.rank))


def seed_dropout(device: torch.device, seed: int) -> None:
    """torch.manual_seed for the host and the one device in use; for all devices it costs milliseconds."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        default_generator(device).manual_seed(seed)


def seed_of(seed: int, step: int, stream: int) -> int:
    """A 63-bit seed from (seed, step, stream) by SplitMix64, so that neighbouring steps share nothing."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + stream * 0x8CB92BA72F3D8DD7) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return (z ^ (z >> 31)) >> 1
