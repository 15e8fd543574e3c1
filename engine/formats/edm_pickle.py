"""EDM, EDM2, SiD, GDD, ECT and SFD network pickles, and PyTorch checkpoints of such nets, as denoisers. Nothing in them is executed.

A pickle says which class its net was and with which keyword arguments it was made: `from_kwargs` makes ours, and the
weights must fit it to the last name. A checkpoint holds weights only and borrows the description from a teacher. What made
the latents of EDM2's nets stands beside them in a pickle (engine.formats.edm2_pickle).
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.precond import iddpm_levels
from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.formats.edm2_pickle import check_blocks, encoder_in, named_averages
from potstill.engine.formats.sfd_pickle import check_layers, is_student, student
from potstill.engine.models.weights import load_strictly, read_metadata, read_tensors
from potstill.engine.nets.edm import SCHEMES, all_kwargs, from_kwargs
from potstill.engine.nets.edm_denoiser import EDMDenoiser
from potstill.engine.readers.edm_arguments import argument
from potstill.engine.readers.pickles import Inert, Unreadable, shown
from potstill.engine.readers.torch_pickles import MOST_PARTS, NET_NAME, Persistent, StoredTensor, Weights, read_file, weights_of

EMA = "ema"
POSITIONAL = ("img_resolution", "img_channels", "label_dim", "use_fp16")  # how EDM's classes begin, all four alike

TITLES = {"Precond": "EDM2Precond"}  # what EDM2 calls its class, and what it is called here
ANCHOR, ANCHOR2 = "map_layer0.weight", "emb_noise.weight"  # every U-Net of EDM's, of EDM2's has it
AUGMENT = "model.map_augment.weight"
WRAPPERS = {"module", "_forward_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
UNUSED = re.compile(r"model\.logvar_linear\.(weight|bias)")  # FastGen: a loss weight, of no use to the denoiser
MOST_NESTED, LONGEST_KEY = 16, 500


class Like(NamedTuple):
    """What a weight file says that its net is: EDM's class name and keyword arguments."""

    path: Path
    precond: str
    kwargs: dict[str, Any]


class Found(NamedTuple):
    """A denoiser out of somebody else's file, under which name it stood there, what is worth telling about it, and where the file says
    so: how it is sampled, and what its images were encoded with (`edm2_pickle.encoder_in`)."""

    net: EDMDenoiser
    name: str
    notes: list[str]
    sampler: Sampler | None = None
    encoder: dict[str, Any] | None = None


def read_net(path: Path, *, net: str | None = None, like: Path | None = None) -> Found:
    """The denoiser in a network pickle or a checkpoint, in eval mode.

    net: which, where a file holds several ("ema", "net", "G_ema", "fake_score"); None takes "ema", or the only one.
    like: a weight file whose class and keyword arguments the net has; wanted for checkpoints, which do not tell theirs.
    Raises UserError for what is damaged, refused, ambiguous or of another architecture, and where `like` contradicts the file.
    """
    named = None if like is None else _named(like)
    try:
        content = _bare_tensors(path, named) if path.suffix == ".safetensors" else read_file(path)
        nets = networks(content)
        if nets and is_student(chosen := nets[name := _chosen(path, nets, net)]):
            return _student(path, name, chosen, named)
        if nets:
            described, weights = _description_of(chosen, named), weights_of(chosen)
        else:
            (name, weights), described = _checkpoint(path, content, net), named and (named.precond, named.kwargs)
        if described is None:
            raise UserError(
                f"{path} holds weights and does not say of which net: add --like TEACHER.safetensors, a converted net "
                "of the same architecture"
            )
        found = _build(path, name, *described, weights)
        if nets and found.net.precond == "EDM2Precond":
            check_blocks(found.net, nets[name])
        return found._replace(encoder=encoder_in(content))
    except Unreadable as error:
        raise UserError(f"{path} {error}") from error


def _student(path: Path, name: str, net: Inert, named: Like | None) -> Found:
    """One of SFD's, which says all about itself."""
    precond = net.title.rpartition(".")[2]
    found = student(net, weights_of(net))
    _check_like(named, precond, found.kwargs)
    fitted = _build(path, name, precond, found.kwargs, found.weights)
    check_layers(fitted.net, net)
    return fitted._replace(notes=[*found.notes, *fitted.notes], sampler=found.sampler)


def _description_of(net: Persistent, named: Like | None) -> tuple[str, dict[str, Any]]:
    """What the file says about its net. --like may fill what it leaves out, and contradict nothing."""
    _check_like(named, TITLES.get(net.title, net.title))
    precond, kwargs = description(net)
    if kwargs is not None:
        _check_like(named, precond, kwargs)
        return precond, kwargs
    if named is None:
        raise Unreadable("does not say what its net was made with: add --like TEACHER.safetensors")
    return named.precond, named.kwargs


def _check_like(named: Like | None, precond: str, kwargs: dict[str, Any] | None = None) -> None:
    """Unreadable where a file and --like name different classes, or different keyword arguments, defaults included."""
    if named and precond != named.precond:
        raise Unreadable(f"holds a net of the class {shown(precond)}, and --like {named.path} is one of {named.precond}: leave --like out")
    if named and kwargs is not None:
        own, others = all_kwargs(precond, kwargs), all_kwargs(precond, named.kwargs)
        for name in own | others:
            if own.get(name) != others.get(name):
                mine, theirs = (f"{kwargs.get(name)!r:.60}" for kwargs in (own, others))
                raise Unreadable(f"holds a net made with {name} = {mine}, and --like {named.path} one with {theirs}: leave --like out")


def _bare_tensors(path: Path, named: Like | None) -> Weights:
    """The tensors of a safetensors file that does not say what they are of."""
    tensors, metadata = read_tensors(path)
    if "precond" in metadata:
        both = f", of a net of {metadata['precond']} (and --like of one of {named.precond})" if named else ""
        raise Unreadable(f"is a weight file of ours already{both}: use it as it is")
    return {**tensors}


def networks(content: Any) -> dict[str, Any]:
    """The networks in a pickle by name, Persistent or SFD's Inert; "" if it is one itself."""
    if isinstance(content, Persistent) or is_student(content):
        return {"": content}
    named = content.items() if type(content) is dict else ()
    named = [
        (str(name), value) for name, value in named if is_student(value) or (isinstance(value, Persistent) and "_modules" in value.state)
    ]
    return {name: value for name, value in named if NET_NAME.fullmatch(name)}


def _chosen(path: Path, names: Any, wanted: str | None) -> str:
    """Of the nets in a file the one that is wanted."""
    titles = ", ".join(name or "one without a name" for name in names)
    if wanted is not None and wanted not in names:
        raise UserError(f"{path} holds no net {wanted!r}, only: {titles}")
    if wanted is None and EMA not in names and len(names) > 1:
        raise UserError(f"{path} holds several nets: {titles}; choose one with --net")
    return wanted or (EMA if EMA in names else next(iter(names)))


def description(net: Persistent) -> tuple[str, dict[str, Any] | None]:
    """EDM's class name and the keyword arguments the net was made with; None where it does not say."""
    precond = TITLES.get(net.title, net.title)
    if precond not in SCHEMES or net.title in TITLES.values():
        known = [*TITLES, *(name for name in SCHEMES if name not in TITLES.values())]
        raise Unreadable(f"holds a net of the class {shown(net.title)}, wanted one of {', '.join(known)}")
    given, kwargs = net.state.get("_init_args", ()), net.state.get("_init_kwargs")
    if type(given) is not tuple or len(given) > len(POSITIONAL) or type(kwargs) is not dict:
        return precond, None
    named = dict(zip(POSITIONAL, given, strict=False)) | kwargs
    own = {"use_fp16": True} if net.title in TITLES else {}  # EDM2's default, which is not ours
    return precond, {name: argument(name, value) for name, value in (own | named).items()}


def _checkpoint(path: Path, content: Any, wanted: str | None) -> tuple[str, Weights]:
    """Of the nets in a checkpoint the one that is wanted, and its weights under EDM's names.

    Checkpoints differ in what stands before a name (`module.`, `net.`, `model.fake_score.`): a net is found by the layer
    that all U-Nets have, and what stands before it is the net's name.
    """
    tensors = _flat(named_averages(content))
    starts = {
        name.removesuffix(anchor): anchor
        for name in tensors
        for anchor in (ANCHOR, ANCHOR2)
        if name == anchor or name.endswith("." + anchor)
    }
    if not starts:
        raise UserError(
            f"{path} holds no net of EDM's, {_held(content, tensors)}: wanted a network pickle, or a checkpoint with a tensor {ANCHOR} "
            f"or, of EDM2's, {ANCHOR2}"
        )
    titled = {re.sub(r"(^|\.)(model|unet)\.$|\.$", "", start): start for start in sorted(starts)}
    if len(titled) < len(starts):
        raise UserError(f"{path} holds nets that cannot be told apart: {', '.join(sorted(starts))}")
    matching = [title for title in titled if title == wanted or (wanted or EMA) in title.split(".")]
    title = matching[0] if len(matching) == 1 else _chosen(path, titled, wanted)
    start = titled[title]
    if starts[start] == ANCHOR2:
        return title, _edm2_weights(tensors, start)
    weights = {f"model.{name.removeprefix(start)}": tensor for name, tensor in tensors.items() if name.startswith(start)}
    levels = start.removesuffix("model.") + "u"  # the noise levels of iDDPM, beside the U-Net
    return title, weights | ({"u": tensors[levels]} if levels in tensors else {})


def _edm2_weights(tensors: Weights, start: str) -> Weights:
    """A net of EDM2's: its U-Net's tensors, whose names begin so, and beside the U-Net the log-variance head."""
    weights: Weights = {f"unet.{name.removeprefix(start)}": tensor for name, tensor in tensors.items() if name.startswith(start)}
    beside = f"{start.removesuffix('unet.')}logvar_"
    if start.removesuffix("unet.") != start:
        weights |= {f"logvar_{name.removeprefix(beside)}": tensor for name, tensor in tensors.items() if name.startswith(beside)}
    return weights


def _held(content: Any, tensors: Weights) -> str:
    """What a file holds instead of a net, as a part of a sentence."""
    names = list(tensors) or [shown(key) for key in content] if type(content) is dict else list(tensors)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"only {names[0]:.60}{more}" if names else f"only a {type(content).__name__}"


def _flat(content: Any) -> Weights:
    """All tensors in nested dictionaries, by their names joined with dots; wrappers' names are left out."""
    found: Weights = {}
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
    parts = 0
    while waiting:
        path, value = waiting.pop()
        parts += 1
        if parts > MOST_PARTS or len(path) > MOST_NESTED:
            raise Unreadable("holds dictionaries that have no end")
        if isinstance(value, StoredTensor | Tensor):
            name = ".".join(word for part in path for word in part.split(".") if word not in WRAPPERS)
            if not NET_NAME.fullmatch(name):
                continue
            if name in found:
                raise Unreadable(f"holds {shown(name)} more than once")
            found[name] = value
        elif type(value) is dict:
            named = [(str(key), child) for key, child in reversed(value.items())]
            waiting += [((*path, key), child) for key, child in named if len(key) <= LONGEST_KEY]
    return found


def _named(like: Path) -> Like:
    metadata = read_metadata(like)
    if "precond" not in metadata or "kwargs" not in metadata:
        raise UserError(f"{like} does not say which net it holds: wanted a file written by potstill convert or train")
    return Like(like, metadata["precond"], metadata["kwargs"])


def _check_constants(net: EDMDenoiser) -> None:
    """Unreadable where what a file stores beside its weights is not what the net's arguments make."""
    arguments = all_kwargs(net.precond, net.kwargs)
    taps = torch.tensor(arguments.get("resample_filter", [1, 1]), dtype=torch.float32)
    wanted = {"resample_filter": taps.outer(taps)[None, None] / taps.sum() ** 2}
    if net.precond == "iDDPMPrecond":
        wanted["u"] = iddpm_levels(int(arguments["M"]), arguments["C_1"], arguments["C_2"])
    for name, tensor in net.named_buffers():
        made = wanted.get(name.rpartition(".")[2])
        if made is not None and not torch.allclose(tensor.float(), made, rtol=5e-3, atol=0):
            raise Unreadable(f"stores another {name} than its net's arguments make: they are another net's")


def _build(path: Path, name: str, precond: str, kwargs: dict[str, Any], weights: Weights) -> Found:
    """The net of that description with these weights, all of which and no others it must want."""
    notes = []
    if extra := [key for key in weights if UNUSED.fullmatch(key)]:
        weights = {key: tensor for key, tensor in weights.items() if key not in extra}
        notes.append(f"left out {' and '.join(extra)}, which only weighs a training loss")
    if kwargs.get("augment_dim") and AUGMENT not in weights:
        kwargs = kwargs | {"augment_dim": 0}
        notes.append(f"made without augment_dim, as the file has no {AUGMENT}")
    numbers = {key: math.prod(tensor.shape) for key, tensor in weights.items()}
    if 4 * sum(numbers.values()) > 4 * path.stat().st_size + 2**20:
        raise Unreadable("holds tensors that share their numbers, as no net's do")
    try:
        with torch.device("meta"):  # nothing is allocated before the sizes are known to be the file's
            net = from_kwargs(precond, **kwargs)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise Unreadable(f"describes a net that cannot be built: {' '.join(str(error).split()):.200}") from error
    if sum(tensor.numel() for tensor in net.state_dict().values()) > 2 * sum(numbers.values()) + 2**20:
        raise Unreadable(f"describes a far larger net than the {sum(numbers.values()):,} numbers it holds")
    tensors = {key: tensor.tensor() if isinstance(tensor, StoredTensor) else tensor for key, tensor in weights.items()}
    if whole := [key for key, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise Unreadable(f"holds whole numbers as {whole[0]}")
    net = net.to_empty(device="cpu")
    load_strictly(net, tensors, str(path))
    _check_constants(net)
    return Found(net.eval(), name, notes)
