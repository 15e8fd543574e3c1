"""The keyword arguments that a net in somebody else's file was made with, as plain data: which there may be."""

import math
from typing import Any, TypeGuard

from potstill.engine.readers.numpy_pickles import NumpyArray
from potstill.engine.readers.pickles import Unreadable, shown

# What keyword arguments may be. The bounds only keep a damaged file from asking for the impossible.
COUNTS = {
    "img_resolution": (1, 8192), "img_channels": (1, 256), "label_dim": (0, 1_000_000), "augment_dim": (0, 10_000),
    "model_channels": (1, 65_536), "channel_mult_emb": (1, 64), "num_blocks": (1, 32), "channel_mult_noise": (1, 64),
    "M": (2, 10_000), "channels_per_head": (1, 65_536), "logvar_channels": (1, 65_536),
}  # fmt: skip
LISTS = {"channel_mult": (1, 64), "attn_resolutions": (0, 8192), "resample_filter": (1, 4096)}
LONGEST_LIST = 16
NUMBERS = {
    "sigma_min": (0, 1e6), "sigma_max": (1e-6, math.inf), "sigma_data": (1e-6, 1e6), "beta_d": (1e-6, 1e4), "beta_min": (0, 1e4),
    "epsilon_t": (0, 1), "C_1": (0, 1), "C_2": (0, 1), "dropout": (0, 1), "label_dropout": (0, 1),
    "label_balance": (0, 1), "concat_balance": (0, 1), "res_balance": (0, 1), "attn_balance": (0, 1), "clip_act": (1e-6, math.inf),
}  # fmt: skip
TEXTS = ("model_type", "embedding_type", "encoder_type", "decoder_type")
NONE = ("channel_mult_emb", "channel_mult_noise", "clip_act")  # EDM2's, which have a meaning where they are None


def argument(name: Any, value: Any) -> Any:
    """A keyword argument as plain data, if it is one of EDM's or EDM2's and within reason."""
    if name not in {*COUNTS, *LISTS, *NUMBERS, *TEXTS, "use_fp16"}:
        raise Unreadable(f"holds a net made with {shown(name)}, a keyword argument that is not EDM's")
    if name in NONE and value is None:
        return None
    value = value.value.tolist() if isinstance(value, NumpyArray) and value.value is not None else value
    if name in COUNTS and is_whole(value, *COUNTS[name]):
        return int(value)
    short = name in LISTS and type(value) in (list, tuple) and len(value) <= LONGEST_LIST
    even = name != "resample_filter" or (short and len(value) % 2 == 0)  # an odd number of taps does not double an image
    if short and even and all(is_whole(v, *LISTS[name]) for v in value):
        return [int(v) for v in value]
    if name in NUMBERS and is_number(value) and NUMBERS[name][0] <= value <= NUMBERS[name][1]:
        return float(value)
    if name in TEXTS and type(value) is str:
        return value
    if name == "use_fp16" and type(value) in (bool, int):
        return bool(value)
    raise Unreadable(f"holds a net made with {name} = {shown(value)}{_wanted(name)}")


def _wanted(name: str) -> str:
    """What the argument may be, as the end of a sentence."""
    low, high = (COUNTS | LISTS | NUMBERS).get(name, (None, None))
    if low is None:
        return ""
    bounds = f"from {low:g} to {high:,}" if isinstance(high, int) else f"from {low:g} to {high:g}"
    if name in LISTS:
        even = "an even number of " * (name == "resample_filter")
        return f", wanted {even}whole numbers {bounds}, at most {LONGEST_LIST}"
    return f", wanted a {'whole ' * (name in COUNTS)}number {bounds}"


def is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float)


def is_whole(value: Any, low: int, high: int) -> TypeGuard[float]:
    return is_number(value) and low <= value <= high and value == int(value)
