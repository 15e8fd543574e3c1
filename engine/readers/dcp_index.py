"""The index of a checkpoint of torch.distributed.checkpoint (DCP), read without unpickling anything: which tensors lie where.

PyTorch writes it as a pickle, and a planner of PyTorch's then does with it what it says: an entry that is no tensor is bytes, and
these it unpickles whatever they are. Here the pickle is read by `engine.readers.pickles`, which builds plain data, and every entry is
checked: tensors alone, their parts within them, their bytes within files of the checkpoint's own folder.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from potstill.engine.common.errors import Damaged, reading
from potstill.engine.readers.pickles import Budget, Buildable, Inert, Name, Unreadable, checked, read_pickle

FILE = re.compile(r"__\d{1,9}_\d{1,9}\.distcp")  # as PyTorch names the shards of each rank
MODULE = "torch.distributed.checkpoint.metadata."
MOST_DIMENSIONS = 16
DTYPES = {
    f"torch.{name}": getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
}


@dataclass(eq=False)
class Properties(Buildable):
    """What PyTorch notes of a tensor's kind; its dtype alone counts."""

    dtype: torch.dtype = torch.float32

    def build(self, state: Any) -> None:
        dtype = checked(checked(state, tuple, "the properties of a tensor")[0], Name, "the type of a tensor")
        if dtype.title not in DTYPES:
            raise Unreadable(f"has a tensor of {dtype.title}")
        self.dtype = DTYPES[dtype.title]


def read_index(folder: Path) -> Any:
    """The `Metadata` of a checkpoint folder, for PyTorch's reader. Damaged where it is none, or names anything but tensors."""
    file = folder / ".metadata"
    with reading(file):
        data = memoryview(file.read_bytes())
    budget = Budget(len(data))
    budget.opcodes = len(data)  # an index has millions where many ranks have written
    try:
        found, end = read_pickle(data, 0, _named, budget)
        if end != len(data):
            raise Unreadable(f"has {len(data) - end:,} bytes after its end")
        return _metadata(_state(found, "Metadata"), folder)
    except Unreadable as error:
        raise Damaged(f"{file} {error}: it is no index of tensors, and nothing in it was executed") from error


def _metadata(index: dict[str, Any], folder: Path) -> Any:
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    tensors = {
        _text(key): _tensor(key, _state(entry, "TensorStorageMetadata"))
        for key, entry in checked(index.get("state_dict_metadata"), dict, "its list of tensors").items()
    }
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if FILE.fullmatch(file.name) and not file.is_symlink()}
    places = checked(index.get("storage_data"), dict, "its list of places")
    stored = dict(_place(key, place, tensors, sizes) for key, place in places.items())
    for key, tensor in tensors.items():
        if missing := [chunk for chunk in tensor.chunks if MetadataIndex(key, chunk.offsets) not in stored]:
            raise Unreadable(f"does not say where {key} is from {list(missing[0].offsets)} on")
    return Metadata(state_dict_metadata=dict(tensors), storage_data=stored)


def _tensor(key: str, entry: dict[str, Any]) -> Any:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

    size, chunks = _sizes(entry.get("size")), []
    for chunk in checked(entry.get("chunks"), list, "the parts of a tensor"):
        state = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(state.get("offsets")), _sizes(state.get("sizes"))
        within = len(offsets) == len(sizes) == len(size) and all(o + s <= n for o, s, n in zip(offsets, sizes, size, strict=True))
        if not within:
            raise Unreadable(f"has a part of {key} that is outside of it")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    if sum(chunk.sizes.numel() for chunk in chunks) != size.numel():
        raise Unreadable(f"has parts of {key} that do not make up the whole")
    properties = entry.get("properties")
    if type(properties) is not Properties:
        raise Unreadable(f"does not say what {key} is made of")
    return TensorStorageMetadata(TensorProperties(dtype=properties.dtype), size, chunks)


def _place(index: Any, place: Any, tensors: dict[str, Any], sizes: dict[str, int]) -> tuple[Any, Any]:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex

    found, at = _state(index, "MetadataIndex"), _state(place, "_StorageInfo")
    key, name = _text(found.get("fqn")), _text(at.get("relative_path"))
    start, length = (checked(at.get(part), int, "the place of a tensor") for part in ("offset", "length"))
    if key not in tensors:
        raise Unreadable(f"has a place for {key[:60]!r}, which is no tensor of its list")
    if name not in sizes:
        raise Unreadable(f"names the file {name[:60]!r}, which is none of this checkpoint's")
    if start < 0 or length < 0 or start + length > sizes[name]:
        raise Unreadable(f"wants bytes {start:,} to {start + length:,} of {name}, which has {sizes[name]:,}")
    if at.get("transform_descriptors"):
        raise Unreadable("wants its tensors to be transformed")
    return MetadataIndex(key, _sizes(found.get("offset"))), _StorageInfo(name, start, length)


def _state(thing: Any, title: str) -> dict[str, Any]:
    if type(thing) is not Inert or thing.title != title:
        raise Unreadable(f"has a {thing.title if type(thing) is Inert else type(thing).__name__} where a {title} should be")
    return thing.state


def _text(value: Any) -> str:
    return checked(value, str, "a name")


def _sizes(value: Any) -> torch.Size:
    sizes = checked(value, torch.Size, "sizes of a tensor")
    if len(sizes) > MOST_DIMENSIONS or min(sizes, default=0) < 0:
        raise Unreadable("has a tensor of impossible sizes")
    return sizes


def _size(sizes: Any = ()) -> torch.Size:
    return torch.Size([checked(n, int, "a size") for n in checked(sizes, tuple, "sizes of a tensor")])


def _named(title: str) -> Name:
    if title not in NAMES:
        raise Unreadable(f"asks for {title}, which no tensor needs")
    return NAMES[title]


PLAIN = ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta")
NAMES = {f"{MODULE}{name}": Name(name, new=lambda name=name: Inert(name)) for name in PLAIN}
NAMES |= {title: Name(title) for title in DTYPES}
NAMES |= {
    f"{MODULE}TensorProperties": Name("TensorProperties", new=Properties),
    f"{MODULE}_MEM_FORMAT_ENCODING": Name("_MEM_FORMAT_ENCODING", lambda number: None),
    "torch.distributed.checkpoint.filesystem._StorageInfo": Name("_StorageInfo", new=lambda: Inert("_StorageInfo")),
    "torch.serialization._get_layout": Name("_get_layout", lambda name: None),
    "torch.Size": Name("torch.Size", _size),
    "pathlib.PosixPath": Name("PosixPath", lambda *parts: None),  # the folder it was written to
    "pathlib._local.PosixPath": Name("PosixPath", lambda *parts: None),
}
