"""Safetensors files: what is checked before their metadata are believed, the hash of the tensors, and the checksum of all that is in one.

A file that we write holds in its metadata `checksum`: the sha256 over the other metadata and the tensors. Files of earlier
versions and of other programs have none.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from potstill.engine.common.class_names import NAMES, plain
from potstill.engine.common.errors import Damaged
from potstill.engine.common.kinds import DICT, NUMBER, Kind, check, count, is_list, is_number, is_text, number
from potstill.engine.common.writing import save_tensors, whole

CHECKSUM = "checksum"
TEXTS = ("format", "precond", "method", "data", "license", "source", "sha256", "partition")  # also where they look like numbers


def _is_encoder(value: Any) -> bool:
    """Of EDM2's nets: what their images were encoded with (`formats.edm2_pickle.encoder_in`)."""
    named = (
        isinstance(value, dict)
        and is_text(value.get("class", ""))
        and is_text(value.get("vae", ""))
        and ("scale" in value) == ("bias" in value)
    )
    if not named or "scale" not in value:
        return named
    return all(is_list(value[name], lambda one: is_number(one, -1e6, 1e6), 4, 4) for name in ("scale", "bias")) and 0 not in value["scale"]


ENCODER = Kind(_is_encoder, "a class and perhaps a VAE with its scale and bias")
METADATA: dict[str, Kind] = {
    "method": Kind(lambda value: is_text(value) and len(value) <= 100 and value.isprintable(), "a name"),
    "classes": NAMES, "kwargs": DICT, "diffusers": DICT, "lora": DICT, "encoder": ENCODER, "sampler": DICT, "teacher": DICT, "phema": DICT,
    "reconstructed": DICT, "kimg": NUMBER, "seconds": number(0), "student": count(0),
    "chosen_by": Kind(lambda value: isinstance(value, dict) and {"metric", "best_of"} <= value.keys(), "a metric and best_of"),
}  # fmt: skip


class Lazily(Mapping[str, torch.Tensor]):
    """The tensors of an open file by name, each read when it is asked for."""

    def __init__(self, file: Any):
        self.file, self.names = file, list(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def metadata_of(path: Path, file: Any) -> dict[str, Any]:
    """The metadata of an open file, JSON values decoded, without the checksum. Damaged where one is of another kind than ours are."""
    found = {k: v if k in TEXTS else _decoded(v) for k, v in (file.metadata() or {}).items() if k != CHECKSUM}
    check(path, found, METADATA, "copy or download it again")
    return found | ({"classes": list(map(plain, found["classes"]))} if "classes" in found else {})


def tensors_of(path: Path, file: Any) -> dict[str, torch.Tensor]:
    """All tensors of an open file. Damaged unless they and its metadata have the checksum that it names, if it names one."""
    tensors = dict(Lazily(file))
    _check_promise(path, tensors, file)
    return tensors


def streamed(path: Path, file: Any) -> Lazily:
    """The same, without more than one in memory: they are read once for the checksum, and again when they are asked for."""
    tensors = Lazily(file)
    _check_promise(path, tensors, file)
    return tensors


def _check_promise(path: Path, tensors: Mapping[str, torch.Tensor], file: Any) -> None:
    if not _as_promised(tensors, file.metadata() or {}):
        raise Damaged(f"{path} is damaged (its checksum differs): copy it again; a run makes its own again")


def _as_promised(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bool:
    """Has the file the checksum that it names? Also where a flipped bit is in the checksum's own name, so that it has another one."""
    if CHECKSUM in metadata:
        return metadata[CHECKSUM] == checksum(tensors, metadata)
    hashes = [name for name, value in metadata.items() if name not in TEXTS and re.fullmatch("[0-9a-f]{64}", value)]
    return not any(metadata[name] == checksum(tensors, {k: v for k, v in metadata.items() if k != name}) for name in hashes)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file with its checksum; whole or absent."""
    with whole(path) as part:
        save_tensors(tensors, part, metadata | {CHECKSUM: checksum(tensors, metadata)})


def checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata, the checksum itself apart, and the tensors."""
    said = json.dumps({k: v for k, v in metadata.items() if k != CHECKSUM}, sort_keys=True)
    return hashlib.sha256(f"{said}\n{hash_of(tensors)}".encode()).hexdigest()


def hash_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a text that is no JSON, or that only a trap would hold
        return text
