"""A trained net with its optimiser, as the step, the average and the checkpoint see it. This one is whole on every rank."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from potstill.engine.training.optim import OptimConfig, build_optimizer, state_for
from potstill.engine.training.ranks import Ranks


class Trained:
    """net: what the optimiser trains and the average follows. `give_optimizer` before anything else."""

    cfg: OptimConfig
    optimizer: torch.optim.Optimizer

    def __init__(self, net: nn.Module, ranks: Ranks):
        self.net, self.ranks = net, ranks

    def give_optimizer(self, cfg: OptimConfig, implementation: str, average: nn.Module | None) -> None:
        """average: the copy of the net that AdamEMA lets follow it in every step."""
        self.cfg, self.optimizer = cfg, build_optimizer(self.net, cfg, implementation, average)

    def before_backward(self, *, last: bool) -> None:
        """Is the coming backward that of the last micro-batch?"""

    def average_gradients(self) -> None:
        """Average over ranks; the gradients are then in `net`'s parameters."""
        self.ranks.average([p.grad for p in self.net.parameters() if p.grad is not None])

    def clip_gradients(self) -> Tensor:
        """Returns their norm before clipping."""
        # the optimiser has them in a list; net.parameters() walks the modules, a millisecond of Python a step
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = self.norm([p.grad for p in parameters])
        if self.cfg.clip is not None:
            clip_grads_with_norm_(parameters, self.cfg.clip, norm)
        return norm

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Of the whole gradient."""
        return get_total_norm(gradients)

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

    def whole(self, own: nn.Module) -> nn.Module:
        """A net with all weights, to be sampled and saved. All ranks must ask for it."""
        return own

    def like(self, key: str) -> Tensor | None:
        """The DTensor of that name, or of the trained parameter of that number; None for what is not sharded."""
        return None
