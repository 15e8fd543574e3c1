"""Of which kind the values in somebody's file are: what is another, or out of all bounds, is refused by its name."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from potstill.engine.common.errors import Damaged

MOST = 1e30  # no number in a file of ours is larger; a whole number of any length is compared with it as it is
LONGEST = 60  # characters of a value in a sentence


class Kind(NamedTuple):
    """A check, and in words what passes it."""

    fits: Callable[[Any], bool]
    wanted: str


def is_number(value: Any, low: float = -MOST, high: float = MOST) -> TypeGuard[float]:
    """A number within these bounds. True and False are none, and NaN is within no bounds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def is_whole(value: Any, low: float = -MOST, high: float = MOST) -> TypeGuard[int]:
    return isinstance(value, int) and is_number(value, low, high)


def is_list(value: Any, fits: Callable[[Any], bool], least: int = 0, most: float = MOST) -> TypeGuard[list]:
    """A list, or tuple, of `least` to `most` values that all pass."""
    return isinstance(value, list | tuple) and least <= len(value) <= most and all(map(fits, value))


def is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str)


def is_dict(value: Any) -> TypeGuard[dict]:
    return isinstance(value, dict)


def number(low: float = -MOST, high: float = MOST) -> Kind:
    bounds = f" from {low:g}" * (low > -MOST) + f" to {high:g}" * (high < MOST)
    return Kind(lambda value: is_number(value, low, high), f"a finite number{bounds}")


def count(low: int, high: int = 2**63 - 1) -> Kind:
    return Kind(lambda value: is_whole(value, low, high), f"a whole number from {low} to {high:,}")


def numbers(least: int, low: float = -MOST, high: float = MOST) -> Kind:
    return Kind(lambda value: is_list(value, number(low, high).fits, least), f"a list of at least {least} of {number(low, high).wanted}")


def optional(kind: Kind) -> Kind:
    return Kind(lambda value: value is None or kind.fits(value), f"{kind.wanted} or null")


TEXT, FLAG = Kind(is_text, "a text"), Kind(lambda value: isinstance(value, bool), "true or false")
NUMBER, DICT = number(), Kind(is_dict, "names and values")


def check(path: Path, found: Mapping[Any, Any], kinds: Mapping[str, Kind], advice: str, *, inside: str = "") -> None:
    """Damaged for the first value that is not of its kind. Names that are missing pass, and so do those without a kind."""
    for name, kind in kinds.items():
        if name in found and not kind.fits(found[name]):
            raise Damaged(f"{path} has {inside}{name} = {shown(found[name])}, wanted {kind.wanted}: {advice}")


def shown(value: Any) -> str:
    """A value in a sentence, cut short where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested without end; a whole number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
