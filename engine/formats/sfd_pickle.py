"""SFD's released students (2409.19681), as their own training code pickles them: {"model": net}. Nothing in them is executed.

Their nets are EDM's without its persistence: plain objects of `models.networks_edm`, which do not say what they were made
with. It is read off their layers. How they are sampled stands in `net.training_kwargs`: Euler over `num_steps` levels, the
first step perhaps analytical (`afs`). Every net has the layers of SFD-v's step condition; only `use_step_condition` says
whether they were trained and are used.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.diffusion.sigmas import geometric, karras, vp_uniform
from potstill.engine.nets.edm_denoiser import EDMDenoiser
from potstill.engine.nets.layers import frequencies
from potstill.engine.nets.steps import FREQUENCIES
from potstill.engine.readers.edm_arguments import LISTS, argument, is_number, is_whole
from potstill.engine.readers.pickles import Inert, Unreadable, checked, shown
from potstill.engine.readers.torch_pickles import SFD_CLASSES, SFD_MODULE, Persistent, StoredTensor, Weights, modules_of

PRECOND = f"{SFD_MODULE}EDMPrecond"
STEPS = re.compile(r"model\.map_step(_layer[01])?\.|\.affine_step\.")
OURS = {".map_step_layer": ".map_steps.layer", ".map_step.": ".map_steps.waves.", ".affine_step.": ".affine.steps."}
LAYER = re.compile(r"model\.(enc|dec)\.(\d+)x\d+_(\w+?)\.")
# What a layer may say of itself and our layer must say too: our attribute, theirs.
SAID = {
    "eps": "eps", "groups": "num_groups", "heads": "num_heads", "skip_scale": "skip_scale", "adaptive_scale": "adaptive_scale",
    "up": "up", "down": "down", "fused_resample": "fused_resample", "endpoint": "endpoint", "max_positions": "max_positions",
    "dropout": "dropout", "label_dropout": "label_dropout",
}  # fmt: skip


class Student(NamedTuple):
    """What a student's net was made with, its weights under our names, how it is sampled, and what is worth telling."""

    kwargs: dict[str, Any]
    weights: Weights
    sampler: Sampler
    notes: list[str]


def is_student(value: Any) -> bool:
    return isinstance(value, Inert) and value.title.startswith(SFD_MODULE) and "_modules" in value.state


def student(net: Inert, weights: Weights) -> Student:
    """The student in a net of `models.networks_edm.EDMPrecond` with these weights. Unreadable where it is not understood."""
    if net.title != PRECOND:
        raise Unreadable(f"holds a net of the class {shown(net.title)}, wanted SFD's {PRECOND}")
    sampler = sampler_of(net)
    kwargs = {name: argument(name, net.state[name]) for name in NET if name in net.state}
    kwargs |= {name: argument(name, value) for name, value in unet_arguments(net, weights).items()}
    if sampler.step_condition is None:
        kept = {name: tensor for name, tensor in weights.items() if not STEPS.search(name)}
        note = "left out the step condition, which is neither trained nor used (use_step_condition is false)"
        return Student(kwargs, kept, sampler, [note] * (len(kept) < len(weights)))
    named: Weights = {}
    for name, tensor in weights.items():
        for theirs, ours in OURS.items():
            name = name.replace(theirs, ours)
        named[name] = tensor
    if FREQUENCIES not in named:  # NCSN++ stores its own, the others compute them
        noise = weights["model.map_layer0.weight"].shape[1]
        named[FREQUENCIES] = frequencies(noise, endpoint=kwargs["model_type"] == "SongUNet")
    return Student(kwargs | {"step_condition": True}, named, sampler, [])


NET = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data")


def sampler_of(net: Inert) -> Sampler:
    """How the released code samples it."""
    told = net.state.get("training_kwargs")
    if type(told) is not dict:
        raise Unreadable("does not say how its student is sampled: its net has no training_kwargs")
    if told.get("model_source", "edm") != "edm" or told.get("guidance_type") is not None:
        source, guidance = shown(told.get("model_source", "edm")), shown(told.get("guidance_type"))
        raise Unreadable(f"holds a student of {source} with the guidance {guidance}: wanted one of an EDM net without guidance")
    afs, knows = (told.get(name) for name in ("afs", "use_step_condition"))
    if type(afs) is not bool or type(knows) is not bool:
        raise Unreadable(f"holds a student trained with afs = {shown(afs)} and use_step_condition = {shown(knows)}: wanted true or false")
    n, rho = told.get("num_steps"), told.get("schedule_rho")
    low, high = (told.get(name, net.state.get(name)) for name in ("sigma_min", "sigma_max"))
    if not is_whole(n, 2 + afs, 1000):
        raise Unreadable(f"holds a student trained with num_steps = {shown(n)}: wanted {2 + afs} to 1000")
    if not (is_number(low) and is_number(high) and is_number(rho) and 1e-6 <= low < high <= 1e6 and 0.1 <= rho <= 1000):
        said = f"sigma_min = {shown(low)}, sigma_max = {shown(high)} and schedule_rho = {shown(rho)}"
        raise Unreadable(f"holds a student trained with {said}, which make no schedule")
    schedule, n = told.get("schedule_type"), int(n)
    if schedule == "polynomial":
        levels: Tensor = karras(n, low, high, rho)
    elif schedule == "logsnr":
        levels, rho = geometric(n, low, high), None
    elif schedule == "time_uniform":
        levels, rho = vp_uniform(n, low, high, rho), None
    else:
        raise Unreadable(f"holds a student trained on the schedule {shown(schedule)}: wanted polynomial, logsnr or time_uniform")
    return Sampler("euler", levels.tolist(), afs=afs, step_condition=n if knows else None, rho=None if rho is None else float(rho))


def unet_arguments(net: Inert, weights: Weights) -> dict[str, Any]:
    """The keyword arguments of the U-Net, from the shapes and names of its layers."""
    model = checked(parts(net).get("model"), Inert, "the layer model of a net")
    kind = model.title.removeprefix(SFD_MODULE)
    if kind not in ("SongUNet", "DhariwalUNet"):
        raise Unreadable(f"holds a U-Net of the class {shown(model.title)}, wanted SongUNet or DhariwalUNet")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    layers: dict[tuple[str, int, str], str] = {}  # (enc or dec, resolution, name): what its weights' names begin with
    for name in shapes:
        if found := LAYER.match(name):
            layers[found[1], int(found[2]), found[3]] = found[0]
    resolutions = sorted({res for side, res, _ in layers if side == "enc"}, reverse=True)
    try:
        emb, noise = shapes["model.map_layer0.weight"]
        first = shapes[f"{layers['enc', resolutions[0], 'conv']}weight"][0]
        width = first if kind == "SongUNet" else noise
        wide = [shapes[f"{layers['enc', res, 'block0']}conv1.weight"][0] for res in resolutions]
    except (KeyError, IndexError, ValueError) as error:
        raise Unreadable(f"holds a {kind} without some of EDM's layers ({error})") from error
    if not width or any(size % width for size in (emb, noise, *wide)):
        raise Unreadable(f"holds a {kind} whose widths {[emb, noise, *wide]} are no multiples of {width}")
    blocks = {side: [key for key in layers if key[0] == side] for side in ("enc", "dec")}
    kwargs: dict[str, Any] = {
        "model_type": kind, "model_channels": width, "channel_mult": [size // width for size in wide],
        "channel_mult_emb": emb // width, "num_blocks": sum(res == resolutions[0] and "block" in name for _, res, name in blocks["enc"]),
        "attn_resolutions": [res for res in resolutions if f"{layers['enc', res, 'block0']}qkv.weight" in shapes],
        "augment_dim": shapes.get("model.map_augment.weight", (0,))[-1],
        "dropout": next((m.state["dropout"] for m in parts(model).values() if "dropout" in m.state), 0.1),
        "label_dropout": model.state.get("label_dropout", 0),
    }  # fmt: skip
    if kind == "SongUNet":
        names = {name for _, _, name in layers}
        kwargs |= {
            "channel_mult_noise": noise // width,
            "embedding_type": "fourier" if "model.map_noise.freqs" in shapes else "positional",
            "encoder_type": "residual" if "aux_residual" in names else "skip" if "aux_skip" in names else "standard",
            "decoder_type": "skip" if sum(name == "aux_norm" for _, _, name in blocks["dec"]) > 1 else "standard",
            "resample_filter": taps(weights),
        }
    return kwargs


def taps(weights: Weights) -> list[int]:
    """The resampling filter as whole numbers, from its outer product with itself; [1, 1] where nothing is resampled."""
    found = [tensor for name, tensor in weights.items() if name.endswith("resample_filter")]
    if not found:
        return [1, 1]
    stored = found[0].tensor() if isinstance(found[0], StoredTensor) else found[0]
    if stored.dim() != 4 or stored.shape != (1, 1, len(stored[0, 0]), len(stored[0, 0])):
        raise Unreadable(f"holds a resampling filter of sizes {list(stored.shape)}")
    marginal = stored.double()[0, 0].sum(0)
    whole = (marginal / marginal.min()).round()
    if not whole.isfinite().all() or not all(1 <= tap <= LISTS["resample_filter"][1] for tap in whole.tolist()):
        raise Unreadable("holds a resampling filter that is no ratio of whole numbers")
    if not torch.allclose(whole.outer(whole) / whole.sum() ** 2, stored[0, 0].double(), rtol=1e-5, atol=0):
        raise Unreadable("holds a resampling filter that is no product of one with itself")
    return [int(tap) for tap in whole.tolist()]


def check_layers(ours: EDMDenoiser, net: Inert) -> None:
    """Unreadable where a layer says that it computes otherwise than ours of the same name and shape."""
    theirs = parts(net)
    for name, module in ours.named_modules():
        if (other := theirs.get(name.replace(".map_steps.waves", ".map_step"))) is None:
            continue
        kind, own = other.title.removeprefix(SFD_MODULE), type(module).__name__
        own = "Linear" if own == "StepAffine" else own
        if kind in SFD_CLASSES and kind != own:
            raise Unreadable(f"has a {kind} as {name}, where EDM's net has a {own}")
        for mine, said in SAID.items():
            if hasattr(module, mine) and said in other.state and not same(getattr(module, mine), other.state[said]):
                raise Unreadable(f"holds a net whose {name} has {said} = {shown(other.state[said])}, wanted {getattr(module, mine)!r:.40}")


def same(mine: Any, theirs: Any) -> bool:
    return type(theirs) in (bool, int, float) and abs(float(mine) - float(theirs)) <= 1e-6 * abs(float(mine))


def parts(net: Inert) -> dict[str, Persistent | Inert]:
    """All layers under their dotted names."""
    return {prefix.removesuffix("."): module for prefix, module in modules_of(net) if prefix}
