"""AdamEMA's parameter groups: options are set as on any optimiser of torch.optim, and kept where a step finds them.

A step on the device follows an address to the learning rate and the EMA decay of a group, so that a captured CUDA graph sees
whatever is there at a replay: a number or tensor assigned later, or what a scheduler has written into the tensor.
"""

from typing import Any

import torch
from torch import Tensor

from potstill.kernels.tables import Part

RATES = ("lr", "ema_decay")
_NUMBERS = ("eps", "weight_decay")
ABSENT = ("amsgrad", "maximize")


class Group(dict[str, Any]):
    """One parameter group: torch.optim's dictionary, with its tensors in `part` and where its rates lie in `rates`.

    A rate is always a tensor of one element on the device. A float32 or float64 one that is given is kept as it is, as in
    torch.optim, so that it may be written into; of anything else the value is taken, in float64. Tensors read earlier keep
    their values. The other numbers are floats; a captured step goes on with those it was captured with.

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
            self.point()

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

    def point(self) -> None:
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
