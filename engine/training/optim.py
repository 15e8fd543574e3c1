"""Optimisers and learning-rate schedules, one of each per trained net."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.errors import UserError


@dataclass
class OptimConfig:
    """Adam or AdamW with a schedule; the defaults are EDM-family habits."""

    name: str = "adam"  # adam | adamw
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None  # global gradient norm; null: none
    warmup: int = 0  # iterations of linear warm-up
    schedule: str = "constant"  # constant | linear (to 0 at the end) | halfway (a tenth from the middle on, as SFD)


KINDS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = ("constant", "linear", "halfway")


def check_optim(cfg: OptimConfig, where: str) -> None:
    """UserError for settings that no optimiser takes."""
    if cfg.name not in KINDS:
        raise UserError(f"{where}: optimiser wants one of {', '.join(KINDS)}, got {cfg.name!r}")
    if cfg.schedule not in SCHEDULES:
        raise UserError(f"{where}: schedule wants one of {', '.join(SCHEDULES)}, got {cfg.schedule!r}")
    if not cfg.lr > 0 or len(cfg.betas) != 2 or not all(0 <= beta < 1 for beta in cfg.betas):
        raise UserError(f"{where}: wanted lr > 0 and two betas in [0, 1), got lr {cfg.lr} and betas {cfg.betas}")
    if cfg.clip is not None and not cfg.clip > 0:
        raise UserError(f"{where}: clip wants more than 0, or null for none, got {cfg.clip}")


def build_optimizer(net: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of one net's trainable parameters."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    beta1, beta2 = cfg.betas
    return KINDS[cfg.name](
        parameters, lr=cfg.lr, betas=(beta1, beta2), eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True
    )


def learning_rate(cfg: OptimConfig, step: int, total: int) -> float:
    """The rate for iteration `step` (from 0) of `total`."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "linear":
        return cfg.lr * (1 - (step - cfg.warmup) / max(total - cfg.warmup, 1))
    if cfg.schedule == "halfway" and step >= total / 2:
        return cfg.lr / 10
    return cfg.lr


def rates_as_tensors(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Learning rates as 0-dim tensors on the device, which a captured step reads anew at every replay."""
    for group in optimizer.param_groups:
        group["capturable"] = device.type == "cuda"
        if not isinstance(group["lr"], Tensor) or group["lr"].device != device:
            group["lr"] = torch.full((), float(group["lr"]), dtype=torch.float32, device=device)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate from the next step on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
