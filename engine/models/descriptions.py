"""What a weight file's metadata say of the net in it: how to build it, without its numbers.

precond, kwargs     of EDM's nets
diffusers           of diffusers' nets: class, config, scheme, size, fixed (`DiffusersDenoiser.description`)
lora                beside it: rank, alpha, targets, dropout; and the base, the net whose weights the adapters are for: its source, the
                    dtype it is to be loaded in, and the sha256 of its weights
"""

from pathlib import Path
from typing import Any

import torch

from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.kinds import DICT, TEXT, Kind, check, count, is_dict, is_list, is_number, is_text, is_whole, number, shown
from potstill.engine.models.tensors import hash_of
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.lora import LoraConfig, base_weights
from potstill.engine.readers.edm_arguments import argument
from potstill.engine.readers.headers import FLOATS

ADVICE = "copy or download it again"
MOST = 2**20  # of a number in a config of diffusers'; the largest that there are is a vocabulary's
LONGEST = 512  # of a list in one
ENDS = Kind(lambda value: is_list(value, lambda end: is_text(end) and end != "", 1, LONGEST), "a list of ends of names")
LORA = {"rank": count(1, 65_536), "alpha": number(1e-6, 1e6), "targets": ENDS, "dropout": number(0, 0.999), "base": DICT}
BASE = {"source": TEXT, "sha256": TEXT, "dtype": Kind(lambda value: value in FLOATS, f"one of {', '.join(FLOATS)}")}
SIZE = Kind(lambda value: is_list(value, lambda side: is_whole(side, 1, MOST), 2, 3), "two or three numbers from 1")
DIFFUSERS = {"class": TEXT, "config": DICT, "scheme": DICT, "size": SIZE}
DIFFUSERS |= {"fixed": Kind(lambda value: is_dict(value) and all(map(is_number, value.values())), "names and numbers")}


def described(net: Any) -> dict[str, Any]:
    """The metadata of a net."""
    if not isinstance(net, DiffusersDenoiser):
        return {"precond": net.precond, "kwargs": net.kwargs}
    if (adapters := net.adapters) is None:
        return {"diffusers": net.description()}
    base = {"source": net.source, "sha256": _base_hash(net), "dtype": str(net.low or torch.float32).removeprefix("torch.")}
    said = {"rank": adapters.rank, "alpha": adapters.alpha, "targets": adapters.targets, "dropout": adapters.dropout, "base": base}
    return {"diffusers": net.description(), "lora": said}


def built(meta: dict[str, Any]) -> Denoiser:
    """The net of a file's metadata with fresh weights, and without adapters."""
    if "diffusers" in meta:
        return DiffusersDenoiser.from_description(meta["diffusers"])
    return from_kwargs(meta["precond"], **meta["kwargs"])


def scheme_in(meta: dict[str, Any]) -> dict[str, Any]:
    """What a `DiffusersDenoiser` takes beside its model."""
    said = meta["diffusers"]
    return {"scheme": said["scheme"], "size": tuple(said["size"]), "fixed": said["fixed"]}


def adapters_in(meta: dict[str, Any]) -> LoraConfig:
    """The adapters of a file."""
    return LoraConfig(**{name: meta["lora"][name] for name in ("rank", "alpha", "targets", "dropout")})


def check_described(path: Path, meta: dict[str, Any], tensors: int) -> None:
    """UserError unless a file with so many tensors says what net it is of; Damaged where that is out of all bounds."""
    if "lora" in meta:
        _whole(path, meta, {"diffusers": DICT}, "")
        _whole(path, meta["lora"], LORA, "lora.")
        _whole(path, meta["lora"]["base"], BASE, "lora.base.")
    if "diffusers" in meta:
        said = meta["diffusers"]
        _whole(path, said, DIFFUSERS, "diffusers.")
        for name, value in said["config"].items():
            most = max(tensors, LONGEST) if "layers" in name else MOST  # else a damaged file asks for a net without end
            if not _within(value, most):
                raise Damaged(f"{path} has diffusers.config.{name} = {shown(value)}, which no net has: {ADVICE}")
    elif "precond" in meta and "kwargs" in meta:
        for name, value in meta["kwargs"].items():
            if name != "step_condition" or not isinstance(value, bool):
                argument(name, value)
    else:
        raise UserError(
            f"{path} holds tensors but does not say which net they belong to (no 'precond' and 'kwargs' in its metadata): "
            "wanted a file written by potstill train or convert"
        )


def _whole(path: Path, found: dict[str, Any], kinds: dict[str, Kind], inside: str) -> None:
    """Damaged where a value is missing or of another kind."""
    if missing := [name for name in kinds if name not in found]:
        raise Damaged(f"{path} lacks {inside}{missing[0]} in its metadata: {ADVICE}")
    check(path, found, kinds, ADVICE, inside=inside)


def _within(value: Any, most: float) -> bool:
    if is_dict(value):
        return len(value) <= LONGEST and all(_within(one, most) for one in value.values())
    if isinstance(value, list):
        return len(value) <= LONGEST and all(_within(one, most) for one in value)
    return value is None or isinstance(value, bool | str) or is_number(value, -most, most)


def _base_hash(net: Any) -> str:
    """Of the weights that the adapters are for, which never change."""
    if "base_sha256" not in vars(net):
        net.base_sha256 = hash_of(base_weights(net))
    return net.base_sha256
