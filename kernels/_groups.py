"""AdamEMA's parameter groups: what they may hold, and options that are set as on any optimiser of torch.optim.

A step on the device follows an address to the learning rate and the EMA decay of a group, so that a captured CUDA graph sees
whatever is there at a replay: a number or tensor assigned later, or what a scheduler has written into the tensor.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.kernels._lib import INTERPRET
from potstill.kernels.tables import Part, dense, local, same_layout

RATES = ("lr", "ema_decay")
_NUMBERS = ("eps", "weight_decay")
ABSENT = ("amsgrad", "maximize")


class Group(dict[str, Any]):
    """One parameter group: torch.optim's dictionary, with its tensors in `part` and where its rates lie in `rates`.

    A rate is always a tensor of one element on the device. A float32 or float64 tensor stays the caller's, as in torch.optim,
    so the caller may write into it; any other value is copied to a new float64 tensor. Tensors read earlier keep their
    values. The other numbers are floats; a captured step goes on with those it was captured with.

    Raises:
        ValueError: what is assigned is no number where there must be one, or an option AdamEMA does not have.
    """

    rates: Tensor  # [2, 2] int64 on the device: address of lr and of ema_decay, and the bytes a number has there
    part: Part

    def __init__(self, options: dict[str, Any], device: torch.device):
        super().__init__()
        self.rates = torch.zeros(len(RATES), 2, dtype=torch.int64, device=device)
        self._where = [0] * self.rates.numel()
        self._made: dict[str, Tensor] = {}
        self.update(options)

    def __setitem__(self, name: str, value: Any) -> None:
        check_absent(name, value)
        if name in RATES:
            value = self._rate(name, value)
        elif name in _NUMBERS:
            value = number(name, value)
        elif name == "betas":
            beta1, beta2 = value
            value = number("beta1", beta1), number("beta2", beta2)
        super().__setitem__(name, value)
        if name in RATES:
            self.refresh_addresses()

    def update(self, *others: Any, **options: Any) -> None:
        for name, value in dict(*others, **options).items():
            self[name] = value

    def __ior__(self, other: Any) -> "Group":
        self.update(other)
        return self

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy is a plain dictionary: whose group it is, its optimiser knows."""
        return dict, (dict(self),)

    @torch.no_grad()
    def load(self, name: str, value: Any) -> None:
        """Assign what a state_dict says; into the tensor itself, unless it is somebody else's."""
        if name in self._made and self.get(name) is self._made[name]:
            self[name].fill_(number(name, value))
        else:
            self[name] = number(name, value) if name in RATES else value

    def refresh_addresses(self) -> None:
        """Bring `rates` up to date with where the tensors lie."""
        given = [self[name] for name in RATES if name in self]
        where = [n for t in given for n in (t.data_ptr(), t.element_size())]
        for slot, (old, new) in enumerate(zip(self._where, where, strict=False)):
            if old != new:
                self.rates.view(-1)[slot].fill_(new)
        self._where[: len(where)] = where

    def _rate(self, name: str, value: Any) -> Tensor:
        device = self.rates.device
        if isinstance(value, Tensor) and value.device == device and value.numel() == 1 and value.dtype in (torch.float32, torch.float64):
            return value
        self._made[name] = torch.full((), number(name, value), dtype=torch.float64, device=device)
        return self._made[name]


def check_absent(name: str, value: Any) -> None:
    if name in ABSENT and value:
        raise ValueError(f"AdamEMA wanted {name}=False, got {value}: it is not implemented")


def number(name: str, value: Any) -> float:
    """The value of a number, a scalar of NumPy's, or a tensor of one element, for which it waits."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"AdamEMA wanted {name} as a number or a tensor of one element, got {value!r}") from error


def split_over_groups(groups: list[dict[str, Any]], name: str, tensors: Iterable[Tensor | None] | None) -> None:
    """Cut a list over all parameters into one list a group, under the group's key `name`."""
    if tensors is None:
        return
    tensors = list(tensors)
    at = 0
    for i, group in enumerate(groups):
        group = groups[i] = dict(group)
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        group[name] = tensors[at : at + len(group["params"])]
        at += len(group["params"])
    if at != len(tensors):
        raise ValueError(f"AdamEMA wanted one {name} tensor a parameter, {at}, got {len(tensors)}")


def check_options(group: dict[str, Any]) -> None:
    for name in ABSENT:
        check_absent(name, group.get(name))
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= number(name, group[name]) < float("inf"):
            raise ValueError(f"AdamEMA wanted {name} in [0.0, inf), got {group[name]}")
    for name, value in zip(("beta1", "beta2"), group["betas"], strict=True):
        if not 0.0 <= number(name, value) < 1.0:
            raise ValueError(f"AdamEMA wanted {name} in [0, 1), got {value}")
    if not 0.0 <= number("ema_decay", group.get("ema_decay", 0.0)) <= 1.0:
        raise ValueError(f"AdamEMA wanted ema_decay in [0, 1], got {group['ema_decay']}")


def check_params(params: Sequence[Tensor], device: torch.device) -> None:
    for p in map(local, params):
        if p.device != device:
            raise ValueError(f"AdamEMA wanted all parameters on one device, {device}, got one on {p.device}")
        if not dense(p):
            raise ValueError(f"AdamEMA wanted parameters without gaps in memory, got strides {p.stride()} of {p.shape}")
        if (device.type == "cuda" or INTERPRET) and p.dtype != torch.float32:
            raise ValueError(f"AdamEMA wanted float32 parameters (16-bit weights are their shadow), got {p.dtype}")


def check_companions(
    name: str, tensors: Sequence[Tensor | None] | None, params: Sequence[Tensor], dtypes: Callable[[Tensor], tuple]
) -> None:
    """One tensor a parameter, with the same memory layout, on the same device, of one of these dtypes."""
    if tensors is None:
        return
    if len(tensors) != len(params):
        raise ValueError(f"AdamEMA wanted one {name} tensor a parameter, {len(params)}, got {len(tensors)}")
    there = [(local(t), local(p)) for t, p in zip(tensors, params, strict=True) if t is not None]
    if name != "shadow" and len(there) < len(params):
        raise ValueError(f"AdamEMA wanted one {name} tensor a parameter, got None for {len(params) - len(there)} of {len(params)}")
    for t, p in there:
        if t.dtype not in dtypes(p) or t.device != p.device or not same_layout(t, p):
            raise ValueError(
                f"AdamEMA wanted {name} {tuple(p.shape)} with strides {p.stride()} on {p.device} of dtype "
                f"{' or '.join(map(str, dtypes(p)))}, got {tuple(t.shape)} with {t.stride()} on {t.device} of {t.dtype}"
            )
    if name == "shadow" and len({t.dtype for t, _ in there}) > 1:
        raise ValueError(f"AdamEMA wanted one dtype in {name}, got {sorted({str(t.dtype) for t, _ in there})}")
