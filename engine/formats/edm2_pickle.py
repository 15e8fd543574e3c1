"""What stands in EDM2's files beside its nets' weights: the encoder of its images, the averages of a training state, its layers' constants.

A snapshot is a dictionary of encoder, dataset_kwargs, loss_fn and ema, the net; a training state one of state dictionaries, where
"ema" has those of several averages, {"stds": [0.05, 0.1], "emas": [state, state]}.
"""

from typing import Any

from potstill.engine.nets.edm2_latents import FINAL_MEAN, FINAL_STD, RAW_MEAN, RAW_STD, VAE, Affine
from potstill.engine.nets.edm2_layers import MPBlock
from potstill.engine.nets.edm_denoiser import EDMDenoiser
from potstill.engine.readers.edm_arguments import is_number
from potstill.engine.readers.numpy_pickles import NumpyArray
from potstill.engine.readers.pickles import Inert, Unreadable, shown
from potstill.engine.readers.torch_pickles import Persistent, modules_of

STABILITY, RGB = "StabilityVAEEncoder", "StandardRGBEncoder"
CHANNELS = 4  # of Stable Diffusion's latents
LARGEST = 1e6  # of a constant; a smallest one keeps it from dividing by nothing
ARGUMENTS = ("vae_name", "raw_mean", "raw_std", "final_mean", "final_std")
MOST_AVERAGES = 16


def encoder_in(content: Any) -> dict[str, Any] | None:
    """What the images of a snapshot's net were encoded with, for JSON: its class, and of a VAE the name, scale and bias; None where it does not say.

    Unreadable for an encoder that is not EDM2's.
    """
    found = content.get("encoder") if type(content) is dict else None
    if not isinstance(found, Persistent):
        return None
    if found.title not in (STABILITY, RGB):
        raise Unreadable(f"holds a net of images encoded by {shown(found.title)}, wanted {STABILITY} or {RGB}")
    if found.title == RGB:
        return {"class": RGB}
    given, named = found.state.get("_init_args", ()), found.state.get("_init_kwargs", {})
    if type(given) is not tuple or type(named) is not dict:
        raise Unreadable(f"does not say what its {STABILITY} was made with")
    said = dict(zip(ARGUMENTS, given, strict=False)) | named
    defaults = {"raw_mean": list(RAW_MEAN), "raw_std": list(RAW_STD), "final_mean": FINAL_MEAN, "final_std": FINAL_STD}
    raw_mean, raw_std, mean, std = (_numbers(name, said.get(name, default)) for name, default in defaults.items())
    affine = Affine.to(mean, std, raw_mean, raw_std)
    for name, ours in affine._asdict().items():
        if name in found.state and not _alike(_numbers(name, found.state[name]), ours):
            raise Unreadable(f"holds a {STABILITY} with another {name} than its arguments make")
    vae = said.get("vae_name", VAE)
    if type(vae) is not str or not vae.isprintable() or len(vae) > 200:
        raise Unreadable(f"holds a {STABILITY} of the VAE {shown(vae)}")
    return {"class": STABILITY, "vae": vae} | {name: list(values) for name, values in affine._asdict().items()}


def _numbers(name: str, value: Any) -> list[float]:
    """One number a channel. Those that divide, or are divided by, are not 0."""
    value = value.value.tolist() if isinstance(value, NumpyArray) and value.value is not None else value
    values = list(value) if type(value) in (list, tuple) else [value] * CHANNELS
    least = 1e-6 if name in ("raw_std", "final_std", "scale") else 0.0
    if len(values) != CHANNELS or not all(is_number(v) and least <= (v if least else abs(v)) <= LARGEST for v in values):
        raise Unreadable(f"holds a {STABILITY} with {name} = {shown(value)}, wanted {CHANNELS} numbers{' above 0' * bool(least)}")
    return [float(v) for v in values]


def _alike(mine: list[float], theirs: tuple[float, ...]) -> bool:
    """Up to float32, in which EDM2's code computes them."""
    return all(abs(a - b) <= 1e-6 * max(1.0, abs(b)) for a, b in zip(mine, theirs, strict=True))


def named_averages(content: Any) -> Any:
    """A training state whose averages have names, as in "ema.0.100"; all else as it is."""
    averages = content.get("ema") if type(content) is dict else None
    if type(averages) is not dict or not {"stds", "emas"} <= averages.keys():
        return content
    stds, states = averages["stds"], averages["emas"]
    plain = type(stds) is list and type(states) is list and len(stds) == len(states) <= MOST_AVERAGES
    if not plain or not all(is_number(std) and 0 < std < 1 for std in stds) or len({f"{std:.3f}" for std in stds}) < len(stds):
        raise Unreadable("holds averages whose widths are not told: it is no training state of EDM2's")
    return content | {"ema": {f"{std:.3f}": state for std, state in zip(stds, states, strict=True)}}


def check_blocks(ours: EDMDenoiser, theirs: Persistent | Inert) -> None:
    """Unreadable where a block says that it computes otherwise than ours of the same name."""
    parts = {prefix.removesuffix("."): module for prefix, module in modules_of(theirs)}
    for name, module in ours.named_modules():
        if not isinstance(module, MPBlock) or name not in parts:
            continue
        state, style = parts[name].state, module.style
        said = {"num_heads": module.heads, "res_balance": style.res_balance, "attn_balance": style.attn_balance, "clip_act": style.clip_act}
        for key, mine in said.items():
            if key in state and state[key] != mine:
                raise Unreadable(f"holds a net whose {name} has {key} = {shown(state[key])}, wanted {mine!r:.40}")
