"""One stage of training: a method's nets, spread over the ranks, with optimisers, average and step counter; its state.

All randomness of iteration n is a function of (seed, n), so the step counter is the whole state of data and noise, and a
run that was killed repeats itself exactly from its last checkpoint.
"""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from potstill.engine.common.checks import BadSetting, above, at_least, finite, one_of, wants
from potstill.engine.common.errors import UserError
from potstill.engine.methods.base import Batch, Draws, Method, modules_of
from potstill.engine.nets.layers import CHECKPOINTING
from potstill.engine.nets.shadow import give_shadows, renew_stale
from potstill.engine.skipping.apply import Guard
from potstill.engine.training.checkpoint import fitted, restore
from potstill.engine.training.compile import MODES as COMPILED
from potstill.engine.training.compile import compile_nets
from potstill.engine.training.ema import EMA, ema_decay
from potstill.engine.training.graphs import MODES as GRAPHS
from potstill.engine.training.graphs import build_graphs, seed_dropout
from potstill.engine.training.log import Meter
from potstill.engine.training.optim import (
    IMPLEMENTATIONS,
    OptimConfig,
    build_optimizer,
    fitting,
    learning_rate,
    rates_as_tensors,
    set_learning_rate,
)
from potstill.engine.training.parallel import MODES as PARALLEL
from potstill.engine.training.parallel import FSDPConfig, Sharded, largest_part, wire
from potstill.engine.training.ranks import ALONE, Ranks
from potstill.engine.training.step import Trained, iteration
from potstill.kernels import AdamEMA


@dataclass
class TrainConfig:
    """How long, how large, how often. One thousand images seen is a kimg; an iteration sees `batch` images."""

    kimg: float = 100.0  # length of the training, in thousands of images
    batch: int = 128  # images per iteration, over all micro-batches and ranks
    micro_batch: int | str | None = None  # images per forward and rank, at most; null: its whole share; auto: what memory allows
    parallel: str = "ddp"  # ddp | fsdp, where there are several ranks (`train.fsdp`)
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    optim: dict[str, OptimConfig] = field(default_factory=dict)  # by net; a net without an entry uses "student"'s
    optimizer: str = "auto"  # auto | torch | adam_ema: who computes Adam; the numbers are the same but for rounding
    compile: str = "off"  # off | blocks | net: torch.compile of the U-Nets; minutes of waiting, for long runs
    shadows: bool = True  # 16-bit nets keep a 16-bit copy of their weights, renewed each step: the same bits as casting
    ema_kimg: float = 500.0  # half-life of the average of the weights (EMA), in thousands of images; 0: no average
    ema_ramp_up: float = 0.05  # but at most this share of the images seen so far
    activation_checkpointing: str = "off"  # off | blocks: compute every block again in backward; a third more work, less memory
    log_iterations: int = 50  # between two log lines
    grid_kimg: float | None = None  # thousands of images between two grids of samples from fixed latents; null: ten over the run
    eval_kimg: float | None = None  # thousands of images between two measurements (`eval`) in the run; null: never
    checkpoint_kimg: float | None = None  # thousands of images between two checkpoints; null: ten over the run
    keep: int = 2  # newest checkpoints kept
    graphs: str = "auto"  # replay every turn as one CUDA graph: auto (where there is CUDA) | on (or stop) | off

    def __post_init__(self):
        finite(self)
        if isinstance(self.micro_batch, str) and self.micro_batch.strip().isdecimal():
            self.micro_batch = int(self.micro_batch)  # recipes are read as text, and this setting may be text
        wants(self, "kimg", self.kimg <= 1e12, "at most 1e12")
        above(self, 0, "kimg", "grid_kimg", "eval_kimg", "checkpoint_kimg")
        at_least(self, 1, "batch", "log_iterations", "keep")
        at_least(self, 0, "ema_kimg", "ema_ramp_up")
        self._check_micro_batch()
        one_of(self, "parallel", PARALLEL)
        one_of(self, "optimizer", IMPLEMENTATIONS)
        one_of(self, "compile", COMPILED)
        one_of(self, "activation_checkpointing", CHECKPOINTING)
        one_of(self, "graphs", GRAPHS)

    def _check_micro_batch(self) -> None:
        micro = self.micro_batch
        wants(self, "micro_batch", not isinstance(micro, str) or micro == "auto", "a number, auto or null")
        if isinstance(micro, int) and (micro < 1 or self.batch % micro):
            raise BadSetting("micro_batch", f"= {micro} does not divide batch = {self.batch}")


class Run:
    """The moving parts of one stage: a method's nets with their optimisers, the EMA of its product, and the step counter."""

    def __init__(
        self, method: Method, cfg: TrainConfig, seed: int, device: torch.device, classes: Sequence[int] | None = None,
        ranks: Ranks = ALONE,
    ):  # fmt: skip
        self.method, self.cfg, self.seed, self.device, self.ranks = method, cfg, seed, device, ranks
        self.micro = largest_part(cfg.batch // ranks.count, cfg.micro_batch) if isinstance(cfg.micro_batch, int) else None
        self.together = self.micro is None and not (cfg.micro_batch == "auto" and device.type == "cuda")
        self.classes = None if classes is None else torch.tensor(classes, device=device)  # a student's share
        self.total = max(1, round(cfg.kimg * 1000 / cfg.batch))
        optim = {name: optim_config(cfg, name) for name in method.nets}
        self.optim = optim
        for net in method.nets.values():
            net.train()
        self.wired = wire(method, cfg.parallel, cfg.fsdp, ranks, device, together=self.together)
        self.ema = EMA(self.wired[method.product].net)
        self.shadowed = give_shadows(modules_of(method)) if cfg.shadows else []
        self.trained = {
            name: Trained(
                one.net, build_optimizer(one.net, optim[name], cfg.optimizer, self.averaged_with(name)), optim[name].clip,
                one.accumulate, one.reduce, one.norm, one.renew,
            )
            for name, one in self.wired.items()
        }  # fmt: skip
        optimizer = self.trained[method.product].optimizer
        self.compiled = compile_nets(modules_of(method), cfg.compile, device)
        self.averages = isinstance(optimizer, AdamEMA) and self.averaged_with(method.product) is not None
        self.meter = Meter()
        self.step, self.seconds, self.best = 0, 0.0, float("inf")
        self.generators: list[torch.Generator] = []  # one a micro-batch, the same every iteration: graphs know them
        self.guard: Guard | None = None  # of a teacher that leaves out layers
        self.graphs = build_graphs(cfg.graphs, device, self.forget_gradients) if not ranks.several else None
        self._place_rates()

    def _place_rates(self) -> None:
        """Where graphs may be, learning rates lie on the device, so that a replay sees the schedule."""
        if self.graphs or self.device.type == "cuda":
            for one in self.trained.values():
                rates_as_tensors(one.optimizer)

    def forget_gradients(self) -> None:
        for one in self.trained.values():
            one.optimizer.zero_grad(set_to_none=True)

    def graph_report(self) -> dict[str, Any]:
        """How much of this run was replayed, and what was not, and why."""
        if self.graphs is None:
            why = "train.graphs=off" if self.cfg.graphs == "off" else f"there are none on {self.device.type}"
            why = f"{self.ranks.count} ranks" if self.ranks.several else why
            return {"mode": "off", "why": why}
        return self.graphs.report()

    def averaged_with(self, name: str) -> torch.nn.Module | None:
        """What AdamEMA may average within its step: the product, where one turn an iteration trains it."""
        turns = sum(turn.trains == name for turn in self.method.turns)
        return self.ema.net if name == self.method.product and turns == 1 else None

    @property
    def images_seen(self) -> int:
        return self.step * self.cfg.batch

    @property
    def kimg(self) -> float:
        return self.images_seen / 1000

    @property
    def sharded(self) -> bool:
        return any(isinstance(one, Sharded) for one in self.wired.values())

    @property
    def window(self) -> slice:
        """This rank's images of the batch: every ranks-th where batch statistics are over all ranks, so that any aligned part
        of the batch is shared evenly; else consecutive ones, so that a micro-batch is the same whichever rank has it."""
        return self._samples(0, self.cfg.batch // self.ranks.count, self.cfg.batch // self.ranks.count)

    def _samples(self, start: int, stop: int, share: int) -> slice:
        """Where this rank's images start … stop - 1 are in the batch of all ranks."""
        ranks, rank = self.ranks.count, self.ranks.rank
        if ranks == 1:
            return slice(start, stop)
        return slice(start * ranks + rank, stop * ranks, ranks) if self.together else slice(rank * share + start, rank * share + stop)

    def average(self) -> torch.nn.Module:
        """The net that is sampled and saved, the average of the product's weights. All ranks must ask for it."""
        return self.wired[self.method.product].whole(self.ema.net)

    def due(self, every_kimg: float) -> bool:
        """Has the step just done crossed a multiple of `every_kimg`, or was it the last?"""
        every, now = every_kimg * 1000, self.images_seen
        return now // every > (now - self.cfg.batch) // every or self.step == self.total

    def times(self, every_kimg: float) -> int:
        """How often `due` has said so by now."""
        whole, rest = divmod(self.images_seen, every_kimg * 1000)
        return min(int(whole), self.step) + (self.step == self.total and rest >= self.cfg.batch)

    def take(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        """One iteration on this batch."""
        product = self.method.product
        decay = ema_decay(self.cfg.batch, self.images_seen, self.cfg.ema_kimg * 1000, self.cfg.ema_ramp_up)
        with self.graphs.stream() if self.graphs else nullcontext():
            renew_stale(self.shadowed)
            if self.guard is not None:
                self._guarded(self.guard, images, labels)
            seed_dropout(self.device, self._dropout_seed())
            for name, one in self.trained.items():
                set_learning_rate(one.optimizer, learning_rate(self.optim[name], self.step, self.total))
            if self.averages:
                optimizer = self.trained[product].optimizer
                assert isinstance(optimizer, AdamEMA)
                optimizer.set_ema_decay(decay)
            logs = iteration(self.method, self.trained, self.micro_batches(images, labels), self.step, self.graphs)
            self.step += 1
            averaged = self.averages and f"{product}/grad_norm" in logs  # its turn came, so its optimiser has done it
            self.ema.update(decay, weights=not averaged)
            self.meter.add(logs)

    def _guarded(self, guard: Guard, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Let the guard look, and forget graphs of a teacher that left out something else."""
        before = guard.state
        self.meter.add(guard.before(self.step, self.total, lambda: self.product_gradient(images, labels)))
        if self.graphs and guard.state != before:
            self.graphs.forget()

    def product_gradient(self, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The gradient for the product's parameters at this iteration, as one vector; changes nothing."""
        seed_dropout(self.device, self._dropout_seed())
        name, batches = self.method.product, self.micro_batches(images, labels)
        parameters = [p for p in self.method.nets[name].parameters() if p.requires_grad]
        total = [torch.zeros_like(p) for p in parameters]
        for shared in map(self.method.begin, batches):
            for turn in self.method.turns:
                if turn.trains == name and (result := turn.loss(shared)) is not None:
                    gradients = torch.autograd.grad(result[0] / len(batches), parameters, materialize_grads=True)
                    total = [t + g for t, g in zip(total, gradients, strict=True)]
        gradient = torch.cat([t.flatten() for t in total])
        self.ranks.average([gradient])
        return gradient

    def _dropout_seed(self) -> int:
        return mixed(self.seed, self.step, 1 + 16 * self.ranks.rank)

    def micro_batches(self, images: torch.Tensor, labels: torch.Tensor | None) -> list[Batch]:
        micro = self.micro or len(images)
        return [self.micro_batch(images, labels, start, micro) for start in range(0, len(images), micro)]

    def micro_batch(self, images: torch.Tensor, labels: torch.Tensor | None, start: int, micro: int) -> Batch:
        """`micro` images of this rank's share, with the randomness that is theirs."""
        window, share = slice(start, start + micro), len(images)
        if (number := start // micro) == len(self.generators):
            self.generators.append(torch.Generator(self.device))
        generator = self.generators[number].manual_seed(mixed(self.seed, self.step, 0))
        host = random.Random(mixed(self.seed, self.step, 2))
        samples = self._samples(start, min(start + micro, share), share)
        draws = Draws(generator, share * self.ranks.count, samples, host, self.classes, self.method.stratified)
        return Batch(images[window], labels[window] if labels is not None else None, draws)

    def state_dict(self) -> dict[str, Any]:
        """All ranks must ask for it; it is the same for all, with DTensors for what is sharded."""
        return {
            "nets": {name: one.state(one.net) for name, one in self.wired.items()},
            "optimizers": {n: self.wired[n].optimizer_state(one.optimizer.state_dict()) for n, one in self.trained.items()},
            "ema": self.wired[self.method.product].state(self.ema.net),
            "method": self.method.state.state_dict(),
            "meter": self.meter.state_dict(self.ranks),
            "guard": {} if self.guard is None else self.guard.state_dict(),
            "seconds": self.seconds,
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if missing := self.method.nets.keys() ^ state["nets"].keys():
            raise UserError(f"the checkpoint trains other nets ({', '.join(sorted(missing))} differ): use another run_dir=")
        for name, one in self.wired.items():
            fitted(partial(one.load, one.net), state["nets"][name], f"net {name!r}")
            optimizer, own = self.trained[name].optimizer, one.own_optimizer_state(state["optimizers"][name])
            restore(optimizer, fitting(optimizer, own), f"optimiser of {name!r}")
            one.renew()
        self._place_rates()
        fitted(partial(self.wired[self.method.product].load, self.ema.net), state["ema"], "EMA")
        restore(self.method.state, state["method"], "method state")
        self.meter.load_state_dict(state["meter"], self.ranks)
        if self.guard is not None and state.get("guard"):
            self.guard.load_state_dict(state["guard"])
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]

    def like(self, key: tuple[Any, ...], size: torch.Size) -> torch.Tensor | None:
        """The DTensor that a checkpoint's tensor is to be cut like, None for what every rank has whole."""
        match key:
            case ("nets", net, name):
                found = self.wired[net].like(name)
            case ("optimizers", net, "state", number, _):
                found = self.wired[net].like(str(number))
            case ("ema", name):
                found = self.wired[self.method.product].like(name)
            case _:
                return None
        return found if found is not None and found.shape == size else None


def optim_config(cfg: TrainConfig, net: str) -> OptimConfig:
    """The optimiser settings of one net."""
    return cfg.optim.get(net) or cfg.optim.get("student") or OptimConfig()


def mixed(seed: int, step: int, stream: int) -> int:
    """A 63-bit seed from (seed, step, stream) by SplitMix64, so that neighbouring steps share nothing."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + stream * 0x8CB92BA72F3D8DD7) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return (z ^ (z >> 31)) >> 1
