"""Nested dictionaries with tensors in them, as checkpoints hold them: walked, taken apart, looked through, written and read."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.engine.common.errors import Damaged, reading, what_it_is
from potstill.engine.readers.numpy_pickles import open_mapped
from potstill.engine.readers.pickles import Unreadable
from potstill.engine.readers.tensors import in_memory
from potstill.engine.readers.torch_pickles import read_archive

Key = tuple[Any, ...]  # where a tensor is
ZIP = b"PK\x03\x04"


def map_tensors(tree: Any, change: Callable[[Key, Tensor], Any], key: Key = ()) -> Any:
    """The dictionaries with change(key, tensor) for every tensor; all else as it is."""
    if isinstance(tree, dict):
        return {name: map_tensors(value, change, (*key, name)) for name, value in tree.items()}
    return change(key, tree) if isinstance(tree, Tensor) else tree


def joined(key: Key) -> str:
    return "/".join(map(str, key))


def without_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by their joined keys, and the same dictionaries with an empty tensor for each."""
    tensors: dict[str, Tensor] = {}

    def take(key: Key, t: Tensor) -> Tensor:
        tensors[joined(key)] = t
        return torch.empty(0)

    rest = map_tensors(state, take)
    return tensors, rest


class NotFinite(Exception):
    """`name`, a metric or a tensor of the state, is not finite at iteration `step`. batch: the number of the one that did it, if known."""

    def __init__(self, name: str, step: int, batch: int | None = None):
        super().__init__(f"{name} is not finite at iteration {step}")
        self.step, self.batch = step, batch


def not_finite(state: dict[str, Any]) -> str | None:
    """The name of a tensor with a NaN or an infinity in it; None where there is none. Of a DTensor this rank's shard counts."""
    alike: dict[Any, dict[str, Tensor]] = {}

    def take(key: Key, t: Any) -> None:
        own = t.to_local() if hasattr(t, "device_mesh") else t
        if own.is_floating_point() and own.numel():
            alike.setdefault((own.device, own.dtype), {})[joined(key)] = own.detach()

    map_tensors(state, take)
    for tensors in alike.values():
        largest = torch.stack(torch._foreach_norm(list(tensors.values()), ord=float("inf")))  # pyright: ignore[reportPrivateImportUsage]
        if not bool(largest.isfinite().all()):
            return list(tensors)[int(largest.isfinite().logical_not().nonzero()[0])]
    return None


def write_state(path: Path, state: dict[str, Any]) -> None:
    """torch.save, with the system's own error where it has one."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # after which PyTorch's writer says something else
                raise error.__context__ from None
            raise


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` has written, in host memory. Nothing in it is executed. Damaged for what is no such file."""
    data = open_mapped(path)
    if data[:4] != ZIP:
        raise Damaged(f"{path} is no file of torch.save; {what_it_is(path)}")
    try:
        found = in_memory(read_archive(data, path))
    except Unreadable as error:
        raise Damaged(f"{path} {error}") from error
    if not isinstance(found, dict):
        raise Damaged(f"{path} holds a {type(found).__name__}, wanted a dictionary")
    return found


def read_tensor(file: Path, start: int, length: int) -> Tensor:
    """The tensor that torch.save has written into these bytes of a file. Damaged where there is none."""
    with reading(file), file.open("rb") as opened:
        opened.seek(start)
        data = opened.read(length)
    try:
        found = in_memory(read_archive(memoryview(data), io.BytesIO(data)))
    except Unreadable as error:
        raise Damaged(f"{file} {error}") from error
    if not isinstance(found, Tensor):
        raise Damaged(f"{file} holds a {type(found).__name__} at byte {start:,}, wanted a tensor")
    return found
