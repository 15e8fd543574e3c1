"""Weight files: safetensors whose metadata says how to rebuild the net and how to sample it. Nothing is unpickled."""

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.kinds import shown
from potstill.engine.models.descriptions import adapters_in, built, check_described, described, scheme_in
from potstill.engine.models.tensors import Lazily, hash_of, metadata_of, tensors_of, write_tensors
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.nets.lora import merged, with_adapters
from potstill.engine.nets.steps import FREQUENCIES
from potstill.engine.readers.headers import FLOATS, Stored, kinds_of, opened
from potstill.engine.readers.pickles import Unreadable

FORMAT = "potstill-1"


def save_net(path: Path, net: Denoiser, **metadata: Any) -> None:
    """Write the net's weights (float32; of a net with adapters these alone) and, as JSON in the file's metadata, how to build it
    (`descriptions.described`) and `metadata`; atomic.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in net.state_dict().items()}
    save_weights(path, tensors, {"format": FORMAT} | metadata | described(net))


def save_weights(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """A weight file of these tensors and all that it says of itself; atomic."""
    write_tensors(path, tensors, {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()})


def round_weights(file: Path) -> None:
    """Round the matrices and kernels of a weight file to float16, half the bytes; what has one axis (norms, biases, levels) stays as it is.

    Raises:
        UserError: a number is beyond float16's 65,504.
    """
    with opened(file) as weights:
        tensors, metadata = tensors_of(file, weights), dict(weights.metadata())
    rounded = {name: t.half() if t.ndim > 1 and t.dtype == torch.float32 else t for name, t in tensors.items()}
    if far := [name for name, t in rounded.items() if not t.isfinite().all()]:
        raise UserError(f"{far[0]} has numbers beyond float16's 65,504: export it with --bits 32")
    write_tensors(file, rounded, metadata)


def load_net(path: Path, base: Path | None = None) -> tuple[Denoiser, dict[str, Any]]:
    """The net in a weight file, in eval mode, and the file's metadata decoded. UserError if it is not such a file.

    What the file says about its net is compared with the names and sizes of its tensors before a number of either is in memory.

    Args:
        base: of a file of adapters (LoRA): the folder or file of the weights that they belong to; None: where the file says.
    """
    with opened(path) as file:
        meta = metadata_of(path, file)
        check_fits(planned(path, meta, file.keys()), kinds_of(file), str(path))
        tensors = tensors_of(path, file)
    if "lora" in meta:
        net = _on_base(path, meta, base)
    else:
        net = built(meta)
        net.source = str(path.resolve())
    load_strictly(net, tensors, str(path))
    return net.eval(), meta


def planned(path: Path, meta: dict[str, Any], names: Collection[str]) -> Denoiser:
    """The net that a file describes, without memory for its numbers. UserError for none, and one that cannot be."""
    try:
        check_described(path, meta, len(names))
        with torch.device("meta"):
            net = built(meta)
            net = with_adapters(net, adapters_in(meta)) if "lora" in meta else net
    except Unreadable as error:
        raise Damaged(f"{path} {error}: copy or download it again") from error
    except UserError:
        raise
    except (ValueError, RuntimeError, ArithmeticError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise Damaged(f"{path} describes a net that cannot be built: {' '.join(str(error).split()):.300}") from error
    if len(meta.get("classes", ())) > net.label_dim:
        raise Damaged(f"{path} names {len(meta['classes']):,} classes, and its net knows {net.label_dim:,}: copy or download it again")
    if net.knows_steps and FREQUENCIES not in names:
        raise UserError(
            f"{path} is an SFD-v student of an earlier potstill, which embedded the number of steps otherwise than the released "
            "code and this version do, so it would make other images here: sample it with that version, or train it again"
        )
    return net


def _on_base(path: Path, meta: dict[str, Any], given: Path | None) -> Denoiser:
    """The weights that a file's adapters belong to, with fresh adapters. UserError where they are not there, or are others."""
    said = meta["lora"]["base"]
    source, wanted = Path(said["source"]).expanduser(), said["sha256"]
    places = [given] if given is not None else [source, path.parent / source.name]
    place = next((one for one in places if one.name and one.exists()), None)
    if place is None:
        raise UserError(
            f"{path} holds the adapters (LoRA) of {said['source'] or 'another net'}, which is not at {' or '.join(map(str, places))}: "
            "wanted that folder or file where it was, beside the adapters, or named with them (--pipeline FOLDER; in Python pipeline=)"
        )
    dtype = getattr(torch, said["dtype"])
    own = scheme_in(meta)
    if place.is_dir():
        base: Any = DiffusersDenoiser.from_folder(place, dtype=dtype, size=own["size"], fixed=own["fixed"])
    else:
        base = load_net(place)[0].to(dtype)
    base = base if base.adapters is None else merged(base)
    if (found := weights_hash(base)) != wanted:
        raise UserError(
            f"{path} holds adapters (LoRA) of the weights {wanted[:12]}, and those in {place} are {found[:12]}: wanted the very net that they "
            "were trained on, at the same revision"
        )
    net = DiffusersDenoiser(base.model, **own)
    net.source = str(place.resolve())
    return with_adapters(net, adapters_in(meta))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors of a safetensors file and its metadata, JSON values decoded."""
    with opened(path) as file:
        return tensors_of(path, file), metadata_of(path, file)


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
    with opened(path) as file:
        return metadata_of(path, file)


def weights_hash(net: nn.Module) -> str:
    """SHA-256 of a net's weights and buffers: that of a weight file with the same ones."""
    return hash_of(net.state_dict())


def file_hash(path: Path) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors in a weight file, whatever its metadata and their order."""
    with opened(path) as file:
        return hash_of(Lazily(file))


def same_weights(promised: str, net: nn.Module) -> bool:
    """Is this net's the hash that a file promises, also one of an earlier potstill, over names, shapes and float32 values?"""
    if promised == weights_hash(net):
        return True
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return promised == digest.hexdigest()


def load_strictly(net: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Load weights whose names and shapes must all agree and which must be finite; otherwise UserError with the first differences."""
    check_fits(net, {name: Stored(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}, source)
    net.load_state_dict(tensors)
    for name, tensor in net.state_dict().items():
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):  # NaN is both
            raise Damaged(f"{source} holds numbers that are not finite in {name}: its training went wrong, or the file is damaged")


def check_fits(net: nn.Module, found: dict[str, Stored], source: str) -> None:
    """UserError unless a file stores floats of just these names and shapes."""
    wanted = net.state_dict()
    missing, extra = [k for k in wanted if k not in found], [k for k in found if k not in wanted]
    shapes = [
        f"{k} is {list(found[k].shape)}, wanted {list(wanted[k].shape)}"
        for k in wanted
        if k in found and found[k].shape != tuple(wanted[k].shape)
    ]
    if missing or extra or shapes:
        parts = [f"misses {missing[0]} and {len(missing) - 1} more"] if missing else []
        parts += (
            [f"has {extra[0] if extra[0].isprintable() else shown(extra[0])} and {len(extra) - 1} more that the net lacks"] if extra else []
        )
        parts += [f"{shapes[0]} ({len(shapes)} shapes differ)"] if shapes else []
        raise UserError(f"{source} is of another architecture: it {'; it '.join(parts)}")
    for name, (dtype, _) in found.items():
        if dtype not in FLOATS:
            raise Damaged(f"{source} holds {name} as {dtype}, wanted one of {', '.join(FLOATS)}")
