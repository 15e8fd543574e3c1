"""What a file of torch.save holds as values in memory: plain data with tensors in it, in proportion to the file."""

from typing import Any

import torch

from potstill.engine.readers.pickles import Unreadable
from potstill.engine.readers.torch_pickles import Storage, StoredTensor

DEEPEST = 64  # values within values
UNFINISHED = object()


def in_memory(tree: Any) -> Any:
    """The same with tensors instead of what is still in the file, each value once however often it is named. Raises Unreadable."""
    return _Unfolding().of(tree, 0)


class _Unfolding:
    """known: what became of every value, by its id; the tree keeps all of them alive, so that no two have the same."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}
        self.storages: dict[int, Storage] = {}
        self.stored, self.copied = 0, 0  # bytes

    def of(self, tree: Any, depth: int) -> Any:
        if not isinstance(tree, dict | list | tuple | StoredTensor):
            return tree
        if depth > DEEPEST:
            raise Unreadable(f"holds values within values, more than {DEEPEST} deep")
        if id(tree) in self.known:
            if self.known[id(tree)] is UNFINISHED:
                raise Unreadable("holds a value within itself")
            if isinstance(tree, dict) and tree:
                raise Unreadable("names a dictionary twice")  # who walks through it afterwards would do so each time
            return self.known[id(tree)]
        self.known[id(tree)] = UNFINISHED
        if isinstance(tree, dict):
            found: Any = {name: self.of(value, depth + 1) for name, value in tree.items()}
        elif isinstance(tree, StoredTensor):
            found = self.copy(tree)
        else:
            found = type(tree)(self.of(value, depth + 1) for value in tree)
        self.known[id(tree)] = found
        return found

    def copy(self, tensor: StoredTensor) -> torch.Tensor:
        storage, size = tensor.storage, tensor.storage.dtype.itemsize
        if id(storage) not in self.storages:
            self.storages[id(storage)] = storage
            self.stored += storage.numel * size
        self.copied += max(tensor.extent, tensor.numel) * size
        if self.copied > 4 * self.stored + 2**20:
            raise Unreadable("would unfold to many times its size: refused")
        try:
            return tensor.tensor() if tensor.numel else torch.empty(tensor.shape, dtype=storage.dtype)
        except (RuntimeError, OverflowError, TypeError) as error:
            raise Unreadable(f"has a tensor of impossible sizes {list(tensor.shape)}") from error
