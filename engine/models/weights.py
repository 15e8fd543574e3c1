"""Weight files: safetensors whose metadata says how to rebuild the net and how to sample it. Nothing is unpickled."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from potstill.engine.common.errors import Damaged, UserError, what_it_is
from potstill.engine.common.writing import save_tensors, whole
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.steps import FREQUENCIES

FORMAT = "potstill-1"


def save_net(path: Path, net: Denoiser, **metadata: Any) -> None:
    """Write the net's weights (float32) and, as JSON in the file's metadata, precond, kwargs and `metadata`; atomic."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in net.state_dict().items()}
    meta = {"format": FORMAT, "precond": net.precond, "kwargs": net.kwargs} | metadata
    with whole(path) as part:
        save_tensors(tensors, part, {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()})


def load_net(path: Path) -> tuple[Denoiser, dict[str, Any]]:
    """The net in a weight file, in eval mode, and the file's metadata decoded. UserError if it is not such a file."""
    tensors, meta = read_tensors(path)
    if "precond" not in meta or "kwargs" not in meta:
        raise UserError(
            f"{path} holds tensors but does not say which net they belong to (no 'precond' and 'kwargs' in its metadata): "
            "wanted a file written by potstill train or convert"
        )
    try:
        net = from_kwargs(meta["precond"], **meta["kwargs"])
    except ValueError as error:
        raise UserError(f"{path} describes a net that cannot be built: {error}") from error
    if net.knows_steps and FREQUENCIES not in tensors:
        raise UserError(
            f"{path} is an SFD-v student of an earlier potstill, which embedded the number of steps otherwise than the released "
            "code and this version do, so it would make other images here: sample it with that version, or train it again"
        )
    load_strictly(net, tensors, str(path))
    return net.eval(), meta


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors of a safetensors file and its metadata, JSON values decoded."""
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        return tensors, {k: _decoded(v) for k, v in (file.metadata() or {}).items()}


def is_whole(path: Path, say: Callable[[str], None] | None = None) -> bool:
    """Can all of a weight file be read? Else `say` takes a line on what is wrong with it."""
    try:
        read_tensors(path)
    except Damaged as error:
        if say:
            say(f"{error}; it is made again")
        return False
    return True


def read_metadata(path: Path) -> dict[str, Any]:
    """What a weight file says about itself, without reading its tensors."""
    with _opened(path) as file:
        return {k: _decoded(v) for k, v in (file.metadata() or {}).items()}


def weights_hash(net: nn.Module) -> str:
    """SHA-256 of a net's weights and buffers: that of a weight file with the same ones."""
    return _hash(sorted(net.state_dict().items()))


def file_hash(path: Path) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors in a weight file, whatever its metadata and their order."""
    with _opened(path) as file:
        return _hash((name, file.get_tensor(name)) for name in sorted(file.keys()))


def same_weights(promised: str, net: nn.Module) -> bool:
    """Is this net's the hash that a file promises, also one of an earlier potstill, over names, shapes and float32 values?"""
    if promised == weights_hash(net):
        return True
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return promised == digest.hexdigest()


def _hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"no weight file at {path}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        what = what_it_is(path)
        again = "copy or download it again"
        wanted = f"wanted a file written by potstill train or convert; {what}"
        raise UserError(
            f"{path} is not a complete safetensors file ({error}): {again if what == 'it is a safetensors file' else wanted}"
        ) from error


def load_strictly(net: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Load weights whose names and shapes must all agree; otherwise UserError with the first differences."""
    wanted = net.state_dict()
    missing, extra = [k for k in wanted if k not in tensors], [k for k in tensors if k not in wanted]
    shapes = [
        f"{k} is {list(tensors[k].shape)}, wanted {list(wanted[k].shape)}"
        for k in wanted
        if k in tensors and tensors[k].shape != wanted[k].shape
    ]
    if missing or extra or shapes:
        parts = [f"misses {missing[0]} and {len(missing) - 1} more"] if missing else []
        parts += [f"has {extra[0]} and {len(extra) - 1} more that the net lacks"] if extra else []
        parts += [f"{shapes[0]} ({len(shapes)} shapes differ)"] if shapes else []
        raise UserError(f"{source} is of another architecture: it {'; it '.join(parts)}")
    net.load_state_dict(tensors)


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
