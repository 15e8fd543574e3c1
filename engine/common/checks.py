"""Checks for the `__post_init__` of a settings dataclass: a BadSetting names the setting, what it wants and what it got.

A dataclass does not know its place in the tree of settings: `engine.config.tree.load` does, and puts the path before the name.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from potstill.engine.common.errors import UserError

#: Settings that do nothing beside others of theirs, and why: {"gan_index": "method.gan=false"}.
Unused = dict[str, str]
#: What torch's and numpy's generators both take.
MOST_SEED = 2**63 - 1


class BadSetting(UserError):
    """`name`: the setting's own name; `problem`: the rest of the sentence."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name} {problem}")
        self.name, self.problem = name, problem

    def at(self, path: str) -> "BadSetting":
        """The same of the setting at this path, such as train.optim.student."""
        return BadSetting(f"{path}.{self.name}" if path else self.name, self.problem)


def wants(cfg: Any, name: str, good: bool, wanted: str) -> None:
    """BadSetting unless `good`: "sigma wants a noise level above 0, got -1.0"."""
    if not good:
        raise BadSetting(name, f"wants {wanted}, got {getattr(cfg, name)!r}")


def finite(cfg: Any) -> None:
    """BadSetting for a number, also in a list, that is nan or infinite."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        numbers = value if isinstance(value, list | tuple) else [value]
        wants(
            cfg,
            field.name,
            all(math.isfinite(n) for n in numbers if isinstance(n, float)),
            "finite numbers" if numbers is value else "a finite number",
        )


def at_least(cfg: Any, least: float, *names: str) -> None:
    """BadSetting where one of these is below `least`; null always passes."""
    for name in names:
        value = getattr(cfg, name)
        wants(cfg, name, value is None or value >= least, f"at least {least}")


def above(cfg: Any, least: float, *names: str) -> None:
    """BadSetting where one of these is not above `least`; null always passes."""
    for name in names:
        value = getattr(cfg, name)
        wants(cfg, name, value is None or value > least, f"more than {least}")


def one_of(cfg: Any, name: str, known: Collection[str]) -> None:
    """BadSetting for a word that is none of these."""
    wants(cfg, name, getattr(cfg, name) in known, f"one of {', '.join(known)}")


def probability(cfg: Any, *names: str) -> None:
    """BadSetting for a dropout that is not in [0, 1); null always passes."""
    for name in names:
        value = getattr(cfg, name)
        wants(cfg, name, value is None or 0 <= value < 1, "a probability in [0, 1)")


def seed(cfg: Any, name: str) -> None:
    """BadSetting for a seed that torch's or numpy's generators refuse."""
    wants(cfg, name, 0 <= getattr(cfg, name) <= MOST_SEED, "a whole number from 0 to 2^63 - 1")


def window(cfg: Any, name: str, last: int) -> None:
    """BadSetting unless two whole numbers, first and last of a window, lie in order in 0 … `last`."""
    value = getattr(cfg, name)
    good = len(value) == 2 and 0 <= value[0] <= value[1] <= last
    wants(cfg, name, good, f"two whole numbers, first <= last, from 0 to {last}")
