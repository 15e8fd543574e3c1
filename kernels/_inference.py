"""Tensors made under torch.inference_mode as constants of ops with a gradient."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def takes_inference_tensors(op: Callable[P, R]) -> Callable[P, R]:
    """Let op take tensors made under torch.inference_mode as constants.

    Autograd does not save such tensors for backward. So they are copied if there will be a backward, and nothing else is
    copied. Code compiled by torch.compile cannot ask what a tensor is: there PyTorch's own error stands.
    """

    @wraps(op)
    def with_copies(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            tensors = _tensors((*args, *kwargs.values()))
            made = {id(t): t for t in tensors if t.is_inference()}
            if made and any(t.requires_grad for t in tensors):
                copies = {key: t.clone() for key, t in made.items()}
                args, kwargs = _replaced(args, copies), _replaced(kwargs, copies)
        return op(*args, **kwargs)

    return with_copies


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """All tensors among nested arguments."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _replaced(value: Any, by: dict[int, Tensor]) -> Any:
    """Nested arguments with other tensors in the place of those with these ids."""
    if isinstance(value, dict):
        return {key: _replaced(item, by) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_replaced(item, by) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return by.get(id(value), value)
