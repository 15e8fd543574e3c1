"""Checkpoints of sharded nets: a folder {step}.dcp that all ranks write at once, in the background (torch.distributed.checkpoint).

It gets its name when it is complete. PyTorch's planner says which rank reads what; the bytes themselves, the index of them and all
that is no tensor (rest.pt) are read here, as data.
"""

import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from potstill.engine.common.download import digest
from potstill.engine.common.errors import Damaged, UserError, told, writing
from potstill.engine.common.writing import flush
from potstill.engine.readers.dcp_index import read_index
from potstill.engine.training.ranks import Ranks
from potstill.engine.training.states import Key, joined, map_tensors, read_state, read_tensor, without_tensors, write_state

SUM = "index.sha256"  # of .metadata, which has no checksum of its own; older checkpoints lack it


class ShardedWriter:
    """Writes folder/{step:08d}.dcp while training goes on: `save` copies the state to host memory and returns.

    drop: called with the folder when there is one checkpoint more.
    """

    def __init__(self, folder: Path, ranks: Ranks, drop: Callable[[Path], None]):
        self.folder, self.ranks, self.drop = folder, ranks, drop
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
            with writing(path):
                shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
                part.mkdir(parents=True)
                write_state(part / "rest.pt", rest)
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
                (part / SUM).write_text(digest(part / ".metadata") + "\n")
                for file in part.iterdir():
                    flush(file)
                shutil.rmtree(path, ignore_errors=True)
                os.replace(part, path)
                flush(path.parent)
                self.drop(self.folder)
        finally:
            named.set()

    def finish(self) -> None:
        """Until the last checkpoint is on disk. UserError if it could not be written."""
        from torch.distributed.checkpoint.api import CheckpointException

        if self.pending is None:
            return
        (future, path, named), self.pending = self.pending, None
        try:
            future.result()
        except OSError as error:
            raise UserError(f"cannot write checkpoint {path}: {told(error)}") from error
        except CheckpointException as error:  # of some ranks; no Exception, and its text is a traceback of each
            reasons = [told(e) if isinstance(e, OSError) else str(e) or type(e).__name__ for e, _ in error.failures.values()]
            raise UserError(f"cannot write checkpoint {path}: {reasons[0].splitlines()[0]}") from error
        named.wait()  # a future has its result before its callbacks have run
        self.ranks.wait()
        if self.ranks.first and not path.is_dir():
            raise UserError(f"cannot write checkpoint {path}: make room or choose another run_dir=")


def load_sharded(path: Path, device: torch.device | str, like: Callable[[Key, torch.Size], Tensor | None] | None) -> dict[str, Any]:
    """Reads what this rank needs, however many ranks wrote it; `like` as of `load_newest`. Damaged where it is not all there."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    if missing := [name for name in ("rest.pt", ".metadata") if not (path / name).is_file()]:
        raise Damaged(f"{path} lacks {missing[0]}")
    if (path / SUM).is_file() and (path / SUM).read_text(errors="replace").strip() != digest(path / ".metadata"):
        raise Damaged(f"{path} is damaged: the checksum of its index differs")
    reader = _reader(path)
    rest = read_state(path / "rest.pt")
    described = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {}

    def room(key: Key, t: Tensor) -> None:
        if (stored := described.get(joined(key))) is None:
            raise Damaged(f"{path} lacks {joined(key)}")
        wanted = like(key, stored.size) if like else None
        options = {"dtype": stored.properties.dtype}
        tensors[joined(key)] = torch.empty(stored.size, device=device, **options) if wanted is None else torch.empty_like(wanted, **options)

    map_tensors(rest, room)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")  # it is
            load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # no Exception, and its text is a traceback
        reasons = [str(e).splitlines()[0] if str(e) else type(e).__name__ for e, _ in error.failures.values()]
        raise Damaged(f"{path} cannot be read ({reasons[0]})") from error
    return map_tensors(rest, lambda key, t: tensors[joined(key)])


def _reader(path: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.planner import LoadItemType

    class Reader(FileSystemReader):
        """PyTorch's, but that it would unpickle the index, whatever it holds, and read tensors without a look at their checksums."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return read_index(path)

        def read_data(self, plan: Any, planner: Any) -> Any:
            for item in plan.items:
                assert item.type is LoadItemType.TENSOR  # the index has nothing else
                place = self.storage_data[item.storage_index]
                whole = read_tensor(path / place.relative_path, place.offset, place.length)
                part = whole[tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))]
                target = planner.resolve_tensor(item).detach()
                if target.shape != part.shape:
                    raise Damaged(f"{path}: {item.storage_index.fqn} is {list(part.shape)} in its file, wanted {list(target.shape)}")
                target.copy_(part)
                planner.commit_tensor(item, target)
            done = torch.futures.Future()
            done.set_result(None)
            return done

    return Reader(path)
