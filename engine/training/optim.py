"""A trained net with its optimiser and its learning-rate schedule.

Two implementations of the same Adam, whose checkpoints are interchangeable: PyTorch's fused one, after which the EMA and
the 16-bit shadows are a pass each (`_foreach_lerp_`, `_foreach_copy_`), and `kernels.AdamEMA`, which does all three in one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_

from potstill.engine.common.checks import above, at_least, finite, one_of, wants
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.shadow import shadow_of
from potstill.engine.training.ranks import Ranks
from potstill.kernels import AdamEMA, force_weight_norm_, native
from potstill.kernels.total_norm import total_norm


@dataclass
class OptimConfig:
    """Adam or AdamW with a schedule; the defaults are EDM-family habits."""

    name: str = "adam"  # adam | adamw
    lr: float = 1e-4  # learning rate after the warm-up
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # decay of the averages of gradient and square
    eps: float = 1e-8  # added to the root of the square
    weight_decay: float = 0.0  # adam: L2 in the gradient; adamw: decoupled
    clip: float | None = None  # global gradient norm; null: none
    forced_norm: bool = True  # of nets whose weights are directions (EDM2): put them back to unit length in every iteration
    clip_value: float | None = None  # of every single number of the gradient, before `clip`; null: none
    warmup: int = 0  # iterations of linear warm-up
    schedule: str = "constant"  # of the learning rate: constant | linear (to 0 at the end) | halfway (a tenth from the middle on, as SFD)

    def __post_init__(self):
        finite(self)
        one_of(self, "name", KINDS)
        above(self, 0, "lr", "clip", "clip_value")
        wants(self, "betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        at_least(self, 0, "eps", "weight_decay", "warmup")
        one_of(self, "schedule", SCHEDULES)


KINDS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = ("constant", "linear", "halfway")


#: train.optimizer. auto is adam_ema for whole float32 parameters on CUDA, and on CPUs where its C++ is: it makes one pass over
#: memory, and reads learning rate and decay where they lie. Elsewhere AdamEMA is the same fused Adam, and costs more.
IMPLEMENTATIONS = ("auto", "torch", "adam_ema")
#: Settings of the implementation in a checkpoint's groups; the one that loads it keeps its own.
_OWN = ("foreach", "fused", "capturable", "differentiable")


def build_optimizer(
    net: nn.Module, cfg: OptimConfig, implementation: str = "auto", average: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The optimiser of one net's trainable parameters.

    Args:
        average: a copy of the net; AdamEMA, and it alone, lets it follow the net in every step.
    """
    pairs = zip(net.parameters(), (average or net).parameters(), strict=True)
    trained = [(p, a) for p, a in pairs if p.requires_grad]
    parameters, beta1, beta2 = [p for p, _ in trained], *cfg.betas
    options: dict[str, Any] = {"lr": cfg.lr, "betas": (beta1, beta2), "eps": cfg.eps, "weight_decay": cfg.weight_decay}
    if implementation_for(implementation, parameters) == "torch":
        return KINDS[cfg.name](parameters, fused=True, **options)
    shadows = [shadow_of(p) for p in parameters]
    return AdamEMA(
        parameters, decoupled=cfg.name == "adamw", ema=[a for _, a in trained] if average is not None else None,
        shadow=shadows if any(s is not None for s in shadows) else None, nonfinite="ignore", **options,
    )  # fmt: skip


def implementation_for(implementation: str, parameters: Iterable[Tensor]) -> str:
    """ "torch" or "adam_ema"."""
    if implementation != "auto":
        return implementation
    there = native.used()
    taken = all(p.dtype is torch.float32 and (p.is_cuda or (p.is_cpu and there)) and not hasattr(p, "device_mesh") for p in parameters)
    return "adam_ema" if taken else "torch"


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of every group from the next step on; where it is a tensor, a captured graph reads it there."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def state_for(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state_dict of either implementation as this one loads it."""
    groups = [
        loaded | {name: own[name] for name in _OWN if name in own}
        for loaded, own in zip(state["param_groups"], optimizer.param_groups, strict=False)
    ]
    return state | {"param_groups": groups}


def learning_rate(cfg: OptimConfig, step: int, total: int) -> float:
    """The rate for iteration `step` (from 0) of `total`."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "linear":
        return cfg.lr * (1 - (step - cfg.warmup) / max(total - cfg.warmup, 1))
    if cfg.schedule == "halfway" and step >= total / 2:
        return cfg.lr / 10
    return cfg.lr


def rates_as_tensors(optimizer: torch.optim.Optimizer) -> None:
    """Learning rates as 0-dim tensors on the parameters' device, which a captured step reads anew at every replay."""
    if isinstance(optimizer, AdamEMA):
        return  # they always are
    for group in optimizer.param_groups:
        device = group["params"][0].device
        group["capturable"] = device.type == "cuda"
        if not isinstance(group["lr"], Tensor) or group["lr"].device != device:
            group["lr"] = torch.full((), float(group["lr"]), dtype=torch.float32, device=device)


def denoisers_in(net: nn.Module) -> list[Denoiser]:
    return [module for module in net.modules() if isinstance(module, Denoiser)]


class Trained:
    """A net as the step, the average and the checkpoint see it; this one is whole on every rank.

    net: what the optimiser trains and the average follows. `give_optimizer` before anything else.
    """

    cfg: OptimConfig
    optimizer: torch.optim.Optimizer
    unit: list[Tensor]

    def __init__(self, net: nn.Module, ranks: Ranks):
        self.net, self.ranks = net, ranks

    def give_optimizer(self, cfg: OptimConfig, implementation: str, average: nn.Module | None) -> None:
        """average: the copy of the net that AdamEMA lets follow it in every step."""
        self.cfg, self.optimizer = cfg, build_optimizer(self.net, cfg, implementation, average)
        self.unit = self.directions()

    def directions(self) -> list[Tensor]:
        """The weights that are put back to unit length (`Denoiser.weights_of_unit_length`), as the optimiser sees them."""
        return [p for one in denoisers_in(self.net) for p in one.weights_of_unit_length() if p.requires_grad]

    def force_norms(self) -> None:
        """Put them back, where the settings say so."""
        if self.cfg.forced_norm and self.unit:
            force_weight_norm_(self.unit)

    def before_backward(self, *, last: bool) -> None:
        """Is the coming backward that of the last micro-batch?"""

    def average_gradients(self) -> None:
        """Average over ranks; the gradients are then in `net`'s parameters."""
        self.ranks.average([p.grad for p in self._moved() if p.grad is not None])

    def step(self) -> Tensor:
        """The optimiser's step by the clipped gradient; returns the norm before clipping.

        Clipped by value an infinite number becomes finite, and NaN stays NaN; the norm tells of both, and the run stops. SiD's and
        SiDA's code puts 0 for NaN and ±1e5 for infinities before: here the losses leave out samples that are not finite.
        """
        parameters = self._moved()
        norm = clipped = self.norm([p.grad for p in parameters if p.grad is not None])
        if self.cfg.clip_value is not None:
            clip_grad_value_(parameters, self.cfg.clip_value)
            clipped = norm if self.cfg.clip is None else self.norm([p.grad for p in parameters if p.grad is not None])
        if self.cfg.clip is None:
            self.optimizer.step()
        elif isinstance(self.optimizer, AdamEMA):  # it divides the gradient where it reads it
            self.optimizer.step(grad_scale=((clipped + 1e-6) / self.cfg.clip).clamp(min=1))
        else:
            clip_grads_with_norm_(parameters, self.cfg.clip, clipped)
            self.optimizer.step()
        return norm

    def _moved(self) -> list[Tensor]:
        """Parameters with a gradient. The optimiser has them in a list; net.parameters() walks the modules, a millisecond of Python."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Of the whole gradient."""
        return total_norm(gradients)

    def after_step(self) -> None:
        """The weights have changed."""

    def state(self, own: nn.Module) -> dict[str, Any]:
        """Weights by the net's names; `own` is self.net or the average's copy of it. Of sharded nets, DTensors."""
        return own.state_dict()

    def load(self, own: nn.Module, state: Mapping[str, Any]) -> None:
        """The opposite of `state`."""
        own.load_state_dict(state)

    def optimizer_state(self) -> dict[str, Any]:
        """The same for the optimiser."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_for(self.optimizer, state))
        for p, found in self.optimizer.state.items():  # PyTorch's fused Adam takes memory as it lies
            for name, t in found.items():
                if isinstance(t, Tensor) and t.shape == p.shape and t.stride() != p.stride():
                    found[name] = torch.empty_like(p, dtype=t.dtype).copy_(t)

    def whole(self, own: nn.Module) -> nn.Module:
        """A net with all weights, to be sampled and saved. All ranks must ask for it."""
        return own

    def like(self, key: str) -> Tensor | None:
        """The DTensor of that name, or of the trained parameter of that number; None for what is not sharded."""
        return None
