"""Everything a run needs to go on as if it had never stopped, written whole or not at all.

One rank, and several with replicated nets, write one file, {step}.pt. Sharded nets are written by all ranks at once into a
folder, {step}.dcp (torch.distributed.checkpoint, in the background), which gets its name when it is complete. Either can be
read by any number of ranks, sharded or not. Nothing in them is executed.
"""

import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.common.writing import whole
from potstill.engine.training.ranks import Ranks

Key = tuple[Any, ...]  # where a tensor is in nested dictionaries
Like = Callable[[Key, torch.Size], Tensor | None]  # the DTensor that a tensor shall be cut like; None: it stays whole


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write folder/{step:08d}.pt atomically and drop all but the newest `keep`."""
    path = folder / f"{step:08d}.pt"
    with whole(path) as part, part.open("wb") as file:
        torch.save({"step": step} | state, file)
        file.flush()
        os.fsync(file.fileno())
    drop(folder, keep)
    return path


class ShardedWriter:
    """Writes folder/{step:08d}.dcp while training goes on: `save` copies the state to host memory and returns."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int):
        self.folder, self.ranks, self.keep = folder, ranks, keep
        self.pending: tuple[Future, Path, Event] | None = None
        self.group: Any = None  # of the background's own, so that its messages never meet those of the step

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Start to write; waits for the checkpoint before. All ranks call it at the same step."""
        import torch.distributed as dist
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.finish()
        self.group = self.group or dist.new_group(backend="gloo")
        path = self.folder / f"{step:08d}.dcp"
        part = path.with_suffix(".parts")
        tensors, rest = without_tensors({"step": step} | state)
        if self.ranks.first:
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
            part.mkdir(parents=True)
            torch.save(rest, part / "rest.pt")
        self.ranks.wait()
        future = async_save(tensors, storage_writer=FileSystemWriter(str(part)), process_group=self.group)
        assert isinstance(future, Future)
        named = Event()
        if self.ranks.first:  # whose part is done last: it writes the index when all have written their shards
            future.add_done_callback(lambda written: self._name(part, path, written, named))
        else:
            named.set()
        self.pending = future, path, named
        return path

    def _name(self, part: Path, path: Path, written: Future, named: Event) -> None:
        try:
            if written.exception() is None:
                shutil.rmtree(path, ignore_errors=True)
                os.replace(part, path)
                drop(self.folder, self.keep)
        finally:
            named.set()

    def finish(self) -> None:
        """Until the last checkpoint is on disk. UserError if it could not be written."""
        if self.pending is None:
            return
        (future, path, named), self.pending = self.pending, None
        try:
            future.result()
        except OSError as error:
            raise UserError(f"cannot write checkpoint {path} ({error})") from error
        named.wait()  # a future has its result before its callbacks have run
        self.ranks.wait()
        if self.ranks.first and not path.is_dir():
            raise UserError(f"cannot write checkpoint {path}: make room or choose another run_dir=")


def drop(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in checkpoints(folder)[:-keep]:
        if old.is_dir():
            gone = old.with_suffix(".parts")
            os.replace(old, gone)  # so that it is never half a checkpoint
            shutil.rmtree(gone)
        else:
            old.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted([*folder.glob("[0-9]*.pt"), *folder.glob("[0-9]*.dcp")])


def load_newest(folder: Path, device: torch.device | str, like: Like | None = None) -> dict[str, Any] | None:
    """The newest checkpoint's state, or None if there is none. `like`: what of it is wanted as this rank's shard (a DTensor)."""
    found = checkpoints(folder)
    if not found:
        return None
    try:
        if found[-1].is_dir():
            return _load_sharded(found[-1], device, like)
        state = torch.load(found[-1], map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        others = f", or it alone to go on from {found[-2].name}" if len(found) > 1 else ""
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"checkpoint {found[-1]} cannot be read ({reason}): remove {folder} to start over{others}") from error
    return state if like is None else _shards(state, like)


def _shards(state: dict[str, Any], like: Like) -> dict[str, Any]:
    """The same state with this rank's shards instead of whole tensors."""
    from torch.distributed.tensor import distribute_tensor

    def shard_of(key: Key, t: Tensor) -> Tensor:
        wanted: Any = like(key, t.shape)
        # src_data_rank None: every rank has read the file, so it cuts its own part and sends nothing
        return t if wanted is None else distribute_tensor(t, wanted.device_mesh, wanted.placements, src_data_rank=None)

    return map_tensors(state, shard_of)


def _load_sharded(path: Path, device: torch.device | str, like: Like | None) -> dict[str, Any]:
    """Reads what this rank needs, however many ranks wrote it."""
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = _reader(path)
    rest = torch.load(path / "rest.pt", map_location="cpu", weights_only=True)
    described = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {}

    def room(key: Key, t: Tensor) -> None:
        stored = described[joined(key)]
        wanted = like(key, stored.size) if like else None
        options = {"dtype": stored.properties.dtype}
        tensors[joined(key)] = torch.empty(stored.size, device=device, **options) if wanted is None else torch.empty_like(wanted, **options)

    map_tensors(rest, room)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")  # it is
        load(tensors, storage_reader=reader, no_dist=True)
    return map_tensors(rest, lambda key, t: tensors[joined(key)])


def without_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of nested dictionaries by their joined keys, and the same dictionaries with an empty tensor for each."""
    tensors: dict[str, Tensor] = {}

    def take(key: Key, t: Tensor) -> Tensor:
        tensors[joined(key)] = t
        return torch.empty(0)

    rest = map_tensors(state, take)
    return tensors, rest


def map_tensors(tree: Any, change: Callable[[Key, Tensor], Any], key: Key = ()) -> Any:
    """Nested dictionaries with change(key, tensor) for every tensor; all else as it is."""
    if isinstance(tree, dict):
        return {name: map_tensors(value, change, (*key, name)) for name, value in tree.items()}
    return change(key, tree) if isinstance(tree, Tensor) else tree


def joined(key: Key) -> str:
    return "/".join(map(str, key))


def _reader(path: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        """PyTorch's, but for its index file, which it would unpickle whatever it holds."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (path / ".metadata").open("rb") as file:
                metadata = _Index(file).load()
            return metadata

    return Reader(path)


class _Index(pickle.Unpickler):
    """Knows the classes of an index, which only hold data, and no other."""

    ALLOWED = (
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),  # the folder it was written to
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if module == "torch.distributed.checkpoint.metadata" and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the index of a checkpoint")


def load_fitting(load: Callable[[Any], Any], state: dict[str, Any], what: str) -> None:
    """load(state), told as a UserError when they do not fit."""
    try:
        load(state)
    except (RuntimeError, ValueError, KeyError) as error:
        first = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise UserError(
            f"the checkpoint's {what} does not fit this configuration ({first}): use another run_dir= or the old settings"
        ) from error
