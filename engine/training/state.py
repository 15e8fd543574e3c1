"""The state of one stage of training: nets with their optimisers, the average of the product, and how far it has come."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from potstill.engine.common.errors import UserError
from potstill.engine.methods.base import Method, modules_of, taken_apart
from potstill.engine.nets.shadow import give_shadows
from potstill.engine.skipping.apply import Guard
from potstill.engine.training import phema
from potstill.engine.training.checkpoint import load_fitting
from potstill.engine.training.config import TrainConfig
from potstill.engine.training.log import Meter
from potstill.engine.training.optim import rates_as_tensors
from potstill.engine.training.parallel import Sharded, Trained, build_trained
from potstill.engine.training.ranks import Ranks
from potstill.kernels import AdamEMA


class State:
    """Everything that changes in a stage; `state_dict` is what a checkpoint holds of it.

    trained: the method's nets with their optimisers. ema: the average of the product's weights. profiles: more of them, by relative
    length (`engine.training.phema`). step: iterations done.
    seconds: training time so far. best: the least distance measured so far. guard: of a teacher that leaves out layers.
    left_out: numbers of batches that gave something that is not finite (`engine.training.rollback`), ascending.
    """

    def __init__(self, method: Method, cfg: TrainConfig, device: torch.device, ranks: Ranks, *, together: bool):
        self.method, self.cfg, self.device, self.ranks = method, cfg, device, ranks
        self.total = max(1, round(cfg.kimg * 1000 / cfg.batch))
        self.step, self.seconds, self.best = 0, 0.0, float("inf")
        self.left_out: list[int] = []
        self.meter = Meter()
        self.guard: Guard | None = None
        for net in method.nets.values():
            net.train()
        self.trained = build_trained(method, cfg.parallel, cfg.fsdp, ranks, device, together=together)
        self.ema = EMA(self.product.net)
        self.profiles = {std: EMA(self.product.net) for std in cfg.lengths}
        self.averaging_optimizer: AdamEMA | None = None  # the product's optimiser, where it averages as well
        self.weights_with_shadows = give_shadows(modules_of(method)) if cfg.shadows else []
        for name, one in self.trained.items():
            # AdamEMA averages within its step, where at most one turn an iteration trains the product
            averages = one is self.product and taken_apart([turn for turn in method.turns if turn.trains == name])
            one.give_optimizer(cfg.optim_of(name), cfg.optimizer, self.ema.net if averages else None)
            if averages and isinstance(one.optimizer, AdamEMA):
                self.averaging_optimizer = one.optimizer
        self.tensor_rates = device.type == "cuda"  # where graphs may be, a replay reads the learning rates on the device
        self.place_rates()

    @property
    def product(self) -> Trained:
        """What the user came for."""
        return self.trained[self.method.product]

    @property
    def sharded(self) -> bool:
        return any(isinstance(one, Sharded) for one in self.trained.values())

    @property
    def images_seen(self) -> int:
        return self.step * self.cfg.batch

    @property
    def kimg(self) -> float:
        return self.images_seen / 1000

    def batch_number(self, step: int) -> int:
        """Which batch of images and draws iteration `step` takes: its own number, but for those that are left out."""
        for number in self.left_out:
            step += number <= step
        return step

    def due(self, every_kimg: float) -> bool:
        """Has the step just done crossed a multiple of `every_kimg`, or was it the last?"""
        every, now = every_kimg * 1000, self.images_seen
        return now // every > (now - self.cfg.batch) // every or self.step == self.total

    def times(self, every_kimg: float) -> int:
        """How often `due` has said so by now."""
        whole, rest = divmod(self.images_seen, every_kimg * 1000)
        return min(int(whole), self.step) + (self.step == self.total and rest >= self.cfg.batch)

    def average(self) -> nn.Module:
        """The net that is sampled and saved, the average of the product's weights. All ranks must ask for it."""
        return self.product.whole(self.ema.net)

    def profile(self, std: float) -> nn.Module:
        """The average of this relative length, one of `train.phema`. All ranks must ask for it."""
        return self.product.whole(self.profiles[std].net) if std in self.profiles else self.average()

    def decay(self) -> float:
        """Of the average, in the iteration to come."""
        cfg, seen = self.cfg, self.images_seen
        if cfg.ema_std is not None:
            return phema.decay(cfg.ema_std, cfg.batch, seen + cfg.batch)
        return ema_decay(cfg.batch, seen, cfg.ema_kimg * 1000, cfg.ema_ramp_up)

    def update_profiles(self) -> None:
        """After an iteration; its decays are numbers that the host knows, so nothing waits."""
        for std, one in self.profiles.items():
            one.update(phema.decay(std, self.cfg.batch, self.images_seen))

    def forget_gradients(self) -> None:
        for one in self.trained.values():
            one.optimizer.zero_grad(set_to_none=True)

    def place_rates(self) -> None:
        if self.tensor_rates:
            for one in self.trained.values():
                rates_as_tensors(one.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """All ranks must ask for it; it is the same for all, with DTensors for what is sharded."""
        return {
            "nets": {name: one.state(one.net) for name, one in self.trained.items()},
            "optimizers": {name: one.optimizer_state() for name, one in self.trained.items()},
            "ema": self.product.state(self.ema.net),
            "method": self.method.state.state_dict(),
            "meter": self.meter.state_dict(self.ranks),
            "guard": {} if self.guard is None else self.guard.state_dict(),
            "seconds": self.seconds,
            "best": self.best,
            "left_out": list(self.left_out),
        } | ({"phema": {str(std): self.product.state(one.net) for std, one in self.profiles.items()}} if self.profiles else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint: `state_dict` and its step. UserError where it is of other nets or settings."""
        if other := self.trained.keys() ^ state["nets"].keys():
            raise UserError(f"the checkpoint trains other nets ({', '.join(sorted(other))} differ): use another run_dir=")
        for name, one in self.trained.items():
            load_fitting(partial(one.load, one.net), state["nets"][name], f"net {name!r}")
            load_fitting(one.load_optimizer_state, state["optimizers"][name], f"optimiser of {name!r}")
            one.after_step()
        self.place_rates()
        load_fitting(partial(self.product.load, self.ema.net), state["ema"], "EMA")
        for std, one in self.profiles.items():
            load_fitting(partial(self.product.load, one.net), state.get("phema", {}).get(str(std), {}), f"average of std {std:g}")
        load_fitting(self.method.state.load_state_dict, state["method"], "method state")
        self.meter.load_state_dict(state["meter"], self.ranks)
        if self.guard is not None and state.get("guard"):
            self.guard.load_state_dict(state["guard"])
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self.left_out = list(state.get("left_out", []))

    def like(self, key: tuple[Any, ...], size: torch.Size) -> Tensor | None:
        """The DTensor that a checkpoint's tensor is to be cut like, None for what every rank has whole."""
        match key:
            case ("nets", net, name):
                found = self.trained[net].like(name)
            case ("optimizers", net, "state", number, _):
                found = self.trained[net].like(str(number))
            case ("ema", name) | ("phema", _, name):
                found = self.product.like(name)
            case _:
                return None
        return found if found is not None and found.shape == size else None


class EMA:
    """A copy of `net` that follows it; buffers are copied as they are. Weights that do not train, and buffers that belong to no
    checkpoint, are the net's own.
    """

    def __init__(self, net: nn.Module):
        kept = net.state_dict().keys()
        own: list[Tensor] = [p for p in net.parameters() if not p.requires_grad]
        own += [b for name, b in net.named_buffers() if name not in kept]
        self.net = copy.deepcopy(net, {id(t): t for t in own}).eval().requires_grad_(False)
        pairs = [(mine, p.detach()) for mine, p in zip(self.net.parameters(), net.parameters(), strict=True) if mine is not p]
        self._targets: list[Tensor] = [mine for mine, _ in pairs]
        self._sources = [p for _, p in pairs]
        self._buffers = [(mine, b) for mine, b in zip(self.net.buffers(), net.buffers(), strict=True) if mine is not b]

    @torch.no_grad()
    def update(self, decay: float, *, weights: bool = True) -> None:
        """average ← decay · average + (1 - decay) · weights. weights=False: the optimiser has done that; buffers only."""
        if weights:
            torch._foreach_lerp_(self._targets, self._sources, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for target, source in self._buffers:
            target.copy_(source)


def ema_decay(batch: int, images: int, half_life: float, ramp_up: float) -> float:
    """Per-step decay 0.5^(batch / H) with H = min(half_life, ramp_up · images); 0 at the very first step.

    images: how many had been seen before this step's batch, as EDM, SiD and GDD count.
    """
    half_life = min(half_life, images * ramp_up)
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0
