"""Pickles with tensors, numpy arrays and NVIDIA's networks in them, and files of torch.save, read as plain data.

What a file may name is the table `CALLS` and little more; a tensor is copied out of the file only when it is asked for.
NVIDIA's persistence format stores a network as a dictionary with the source text of its class: the text is never looked at.
"""

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from potstill.engine.common.errors import UserError, what_it_is
from potstill.engine.readers.numpy_pickles import MOST_DIMENSIONS, NUMPY_CALLS, NUMPY_NAMES, open_mapped
from potstill.engine.readers.pickles import Budget, Inert, Name, Unreadable, checked, hashable, read_pickle, shown, titled

PERSISTENCE_VERSION = 6
MOST_PARTS, LONGEST_PREFIX = 100_000, 500  # of a net
NET_NAME = re.compile(r"[\w.-]{1,300}")
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how a file of torch.save begins that is no zip archive
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip


@dataclass(eq=False)
class Persistent:
    """A network or a part of one in NVIDIA's format: the name of its class and its attributes."""

    title: str
    state: dict[str, Any]


@dataclass(eq=False)
class Storage:
    """Numbers of one type somewhere in the file; None while a file of torch.save has not come to them yet."""

    dtype: torch.dtype
    numel: int
    data: memoryview | None = None

    def fill(self, data: memoryview) -> None:
        if len(data) != self.numel * self.dtype.itemsize:
            raise Unreadable(f"has {len(data):,} bytes for {self.numel:,} numbers of {self.dtype}")
        self.data = data


@dataclass(eq=False)
class StoredTensor:
    """A tensor that is still in the file."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self):
        for number in (self.offset, *self.shape, *self.stride):
            if checked(number, int, "a size of a tensor") < 0:
                raise Unreadable(f"has a tensor with a size or stride of {number}")
        if len(self.shape) != len(self.stride) or len(self.shape) > MOST_DIMENSIONS:
            raise Unreadable(f"has a tensor of {len(self.shape)} sizes and {len(self.stride)} strides")
        if self.offset + self.extent > self.storage.numel or self.numel > self.storage.numel:
            raise Unreadable(f"has a tensor of sizes {list(self.shape)} in {self.storage.numel:,} numbers")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """How many numbers lie from its first to its last."""
        if not self.numel:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    def tensor(self) -> torch.Tensor:
        """A copy."""
        if self.storage.data is None:
            raise Unreadable("does not hold the numbers of one of its tensors")
        if not self.numel:
            raise Unreadable(f"has a tensor without numbers, of sizes {list(self.shape)}")
        size = self.storage.dtype.itemsize
        data = self.storage.data[self.offset * size : (self.offset + self.extent) * size]
        return torch.frombuffer(bytearray(data), dtype=self.storage.dtype).as_strided(self.shape, self.stride)


def _persistent(meta: Any) -> Persistent:
    checked(meta, dict, "the description of a persistent object")
    if meta.get("type") != "class" or meta.get("version") != PERSISTENCE_VERSION:
        raise Unreadable(
            f"has a persistent {shown(meta.get('type'))} of version {shown(meta.get('version'))}, "
            f"wanted a class of version {PERSISTENCE_VERSION}"
        )
    title = checked(meta.get("class_name"), str, "the name of a class")
    return Persistent(title, checked(meta.get("state"), dict, f"the state of {shown(title)}"))


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *gradient_and_hooks: Any) -> StoredTensor:
    shape, stride = (checked(sizes, tuple, "sizes of a tensor") for sizes in (shape, stride))
    return StoredTensor(checked(storage, Storage, "the numbers of a tensor"), offset, shape, stride)


def _parameter(data: Any, *gradient_and_hooks: Any) -> StoredTensor:
    return checked(data, StoredTensor, "the data of a parameter")


def _dictionary(items: Any = ()) -> dict[Any, Any]:
    return {hashable(key): value for key, value in checked(items, (tuple, list), "the items of a dictionary")}


def _set(items: Any = ()) -> set[Any]:
    return set(map(hashable, checked(items, (tuple, list), "the items of a set")))


def _method(owner: Any, name: Any) -> Inert:
    """A method that an object keeps among its attributes, as ECT's loss does. Nothing is looked up: no network needs it."""
    if not isinstance(owner, Persistent):
        raise Unreadable(f"wants getattr of {titled(owner)}: refused, and nothing in the file was executed")
    checked(name, str, "the name of a method")
    return Inert("method")


CALLS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "collections.OrderedDict": _dictionary,
    "builtins.getattr": _method,
    "__builtin__.getattr": _method,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": lambda sizes=(): checked(sizes, tuple, "a torch.Size"),
    "torch.device": lambda *device: None,
} | NUMPY_CALLS
NAMES = {title: Name(title, call) for title, call in CALLS.items()}
NAMES |= {title: Name(title, new=dict) for title in ("dnnlib.util.EasyDict", "dnnlib.EasyDict")}
NAMES |= {f"{module}.{name}": Name(name) for module in ("torch", "torch.cuda", "torch.storage") for name in STORAGES}
NAMES |= {f"torch.{dtype}": Name(dtype) for dtype in ("float64", "float32", "float16", "bfloat16", "int64", "uint8")}
NAMES["numpy.ndarray"] = NUMPY_NAMES["numpy.ndarray"]
SFD_MODULE = "models.networks_edm."  # EDM's classes without its persistence, as SFD's code has them
SFD_CLASSES = (
    "EDMPrecond", "SongUNet", "DhariwalUNet", "UNetBlock", "Conv2d", "Linear", "GroupNorm", "PositionalEmbedding", "FourierEmbedding"
)  # fmt: skip
LAYER = re.compile(r"torch\.nn\.modules\.[a-z]+\.[A-Z]\w*")  # ModuleDict and the like: their attributes are read, no more


def read_file(path: Path) -> Any:
    """What a pickle or a file of torch.save holds: dictionaries, lists, numbers, StoredTensor, NumpyArray, Persistent and
    Inert objects. Nothing in the file is executed. UserError for what cannot be read or is refused.
    """
    if not path.is_file():
        raise UserError(f"no file at {path}")
    data = open_mapped(path)
    try:
        return read_archive(data, path) if data[:4] == b"PK\x03\x04" else _pickle(data)
    except Unreadable as error:
        what = what_it_is(path)
        expected = what in ("it is a pickle", "it is a file of torch.save") or what.startswith("it is of no known kind")
        raise UserError(f"{path} {error}" + ("" if expected else f"; wanted a pickle or a file of torch.save; {what}")) from error


def _pickle(data: memoryview) -> Any:
    budget = Budget(len(data))
    content, end = read_pickle(data, 0, partial(_named, budget), budget)
    if type(content) is int and content == MAGIC:
        return _torch_saved(data, partial(_named, budget), budget)
    if end != len(data):
        raise Unreadable(f"has {len(data) - end:,} bytes after the end of its pickle")
    return content


def _named(budget: Budget, title: str) -> Name:
    if title == "torch.storage._load_from_bytes":
        return Name(title, lambda data: _storage_in(data, budget))
    if title == f"{SFD_MODULE}CFGPrecond":
        raise Unreadable("holds SFD's student of a latent diffusion model (CFGPrecond), wanted one of an EDM net (EDMPrecond)")
    if LAYER.fullmatch(title) or (title.startswith(SFD_MODULE) and title.removeprefix(SFD_MODULE) in SFD_CLASSES):
        return Name(title, new=lambda: Inert(title))
    if title not in NAMES:
        raise Unreadable(f"asks for {title}, which no network needs: refused, and nothing in the file was executed")
    return NAMES[title]


def _storage_in(data: Any, budget: Budget) -> Storage:
    """The storage in a byte string that holds a whole file of torch.save, as tensors are pickled outside of torch.save."""

    def named(title: str) -> Name:
        if type(NAMES.get(title)) is Name and title.rpartition(".")[2] in STORAGES:
            return NAMES[title]
        raise Unreadable(f"asks for {title} where only a storage may be: refused, and nothing in the file was executed")

    if not isinstance(data, memoryview):
        raise Unreadable(f"has a {type(data).__name__} as the bytes of a storage")
    return checked(_torch_saved(data, named, budget), Storage, "a storage")


def _torch_saved(data: memoryview, names: Callable[[str], Name], budget: Budget) -> Any:
    """torch.save's older format: five pickles (magic number, version, machine, object, keys), then the storages."""
    storages: dict[str, Storage] = {}
    parts, at = [], 0
    for _ in range(5):
        part, at = read_pickle(data, at, names, budget, partial(_storage, storages))
        parts.append(part)
    magic, version, machine, content, keys = parts
    if (magic, version) != (MAGIC, PROTOCOL) or checked(machine, dict, "a machine").get("little_endian") is not True:
        raise Unreadable("is of a version of torch.save that is not known here")
    for key in checked(keys, list, "the keys of its storages"):
        storage = storages[key] if type(key) is str and key in storages else None
        if storage is None or at + 8 > len(data):
            raise Unreadable("is cut off before the numbers of its tensors, or names them wrongly")
        (numel,) = struct.unpack_from("<q", data, at)
        end = at + 8 + storage.numel * storage.dtype.itemsize
        if numel != storage.numel or end > len(data):
            raise Unreadable(f"is cut off at byte {at:,}, where {storage.numel:,} numbers should be: copy or download it again")
        storage.fill(data[at + 8 : end])
        at = end
    if at != len(data):
        raise Unreadable(f"has {len(data) - at:,} bytes after its last tensor")
    return content


def _storage(storages: dict[str, Storage], identity: Any) -> Storage | Name:
    """What a persistent id of torch.save stands for: ('storage', type, key, device, number of elements, view).

    Or, in its older format, ('module', class, file, source text), which is the name of the class.
    """
    if checked(identity, tuple, "a persistent id")[0] == "module":
        return checked(identity[1], Name, "a class")
    kind, name, key, _device, numel, *view = identity
    if kind != "storage" or type(name) is not Name or name.title not in STORAGES or view not in ([], [None]):
        raise Unreadable("has a storage of an unknown kind")
    if checked(numel, int, "the size of a storage") < 0:
        raise Unreadable(f"has a storage of {numel} numbers")
    found = storages.setdefault(checked(key, str, "the key of a storage"), Storage(STORAGES[name.title], numel))
    if (found.dtype, found.numel) != (STORAGES[name.title], numel):
        raise Unreadable("has a storage that is described in two ways")
    return found


def read_archive(data: memoryview, file: Path | BinaryIO) -> Any:
    """torch.save's newer format: an uncompressed zip archive with data.pkl and a file for every storage, each with its checksum.

    data: all of the file. Raises Unreadable.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:  # of a zip that zipfile cannot read
        raise Unreadable(f"is a damaged zip archive ({error})") from error
    if any(name.endswith("/constants.pkl") for name in entries):
        raise Unreadable("holds a program, which is not executed")
    roots = [name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
        raise Unreadable("is a zip archive without the one data.pkl of torch.save")

    def member(name: str) -> memoryview:
        entry = entries.get(roots[0] + name)
        if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise Unreadable(f"is a zip archive without {shown(name)}, or has it compressed or encrypted, as torch.save never does")
        at = entry.header_offset
        if not 0 <= at <= len(data) - 30 or data[at : at + 4] != b"PK\x03\x04":
            raise Unreadable("is a damaged zip archive")
        length, extra = struct.unpack_from("<HH", data, at + 26)
        if not bytes(data[at + 30 : at + 30 + length]).endswith(b"/" + name.encode()):
            raise Unreadable("is a damaged zip archive")
        start = at + 30 + length + extra
        if start + entry.file_size > len(data):
            raise Unreadable("is a zip archive that is cut off: copy or download it again")
        found = data[start : start + entry.file_size]
        if entry.CRC and zlib.crc32(found) != entry.CRC:  # 0: torch.serialization.set_crc32_options(False)
            raise Unreadable(f"is damaged: the checksum of {shown(name)} in it differs: copy or download it again")
        return found

    if roots[0] + "byteorder" in entries and member("byteorder") != b"little":
        raise Unreadable("was written on a big-endian machine")
    storages: dict[str, Storage] = {}
    budget = Budget(len(data))
    content, _ = read_pickle(member("data.pkl"), 0, partial(_named, budget), budget, partial(_storage, storages))
    for key, storage in storages.items():
        storage.fill(member(f"data/{key}"))
    return content


Weights = dict[str, StoredTensor | torch.Tensor]


def weights_of(net: Persistent | Inert) -> Weights:
    """The net's state_dict, its tensors still in the file."""
    found: Weights = {}
    for prefix, module in modules_of(net):
        unsaved = checked(module.state.get("_non_persistent_buffers_set", set()), set, "the names of unsaved buffers")
        for kind in ("_parameters", "_buffers"):
            for name, value in _attributes(module.state, kind):
                if value is not None and not (kind == "_buffers" and name in unsaved):
                    found[prefix + name] = checked(value, StoredTensor, "a tensor")
    return found


def modules_of(net: Any) -> Iterator[tuple[str, Persistent | Inert]]:
    """A net and all its parts, each with what the names of its tensors begin with. Unreadable where there is no end."""
    waiting: list[tuple[str, Any]] = [("", net)]
    parts = 0
    while waiting:
        prefix, module = waiting.pop()
        parts += 1
        if parts > MOST_PARTS or len(prefix) > LONGEST_PREFIX:
            raise Unreadable("holds a net that has no end")
        yield prefix, checked(module, (Persistent, Inert), "a part of a net")
        waiting += [(f"{prefix}{name}.", child) for name, child in _attributes(module.state, "_modules") if child is not None]


def _attributes(state: dict[str, Any], kind: str) -> list[tuple[str, Any]]:
    """The parameters, buffers or modules of a part of a net by name."""
    items = list(checked(state.get(kind, {}), dict, "the attributes of a layer").items())
    for name, _ in items:
        if type(name) is not str or not NET_NAME.fullmatch(name):
            raise Unreadable(f"has a layer or tensor called {shown(name)}")
    return items
