"""Power-function averages of weights (EDM2, 2312.02696): long ones over long trainings, and any length of them out of a few kept ones.

    θ̂(t) = ∫₀ᵗ p(τ) θ(τ) dτ,   p(τ) = (γ+1) τ^γ / t^(γ+1),   std = √((γ+1) / ((γ+2)² (γ+3)))

t counts images. std is an average's relative length: that of p, in units of t. Step by step it is an exponential average whose decay
follows t (`decay`). Averages kept at several times, mostly of two lengths, are profiles in a space of functions of τ: the average of
another length is their combination that is nearest to it there (`combination`).
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

LIMIT = 0.289  # std of a uniform average, γ = 0, is 1/√12; those that fade towards the end have no use


class Length(NamedTuple):
    """One average: how many images had been seen, and its std."""

    images: float
    std: float


def is_std(value: float) -> bool:
    """Has an average such a relative length?"""
    return 0 < value < LIMIT


@cache
def gamma_of(std: float) -> float:
    """The exponent of an average of this std: the largest real root of γ³ + 7γ² + (16 - std⁻²)γ + (12 - std⁻²)."""
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(roots.real[np.abs(roots.imag) <= 1e-9 * np.abs(roots)].max())


def std_of(gamma: float) -> float:
    """The opposite."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


def decay(std: float, batch: int, images: int) -> float:
    """Of the step of `batch` images after which `images` have been seen: (1 - batch / images)^(γ+1), 0 in the first step."""
    return (1 - batch / images) ** (gamma_of(std) + 1)


def combination(kept: Sequence[Length], wanted: Length) -> tuple[np.ndarray, float]:
    """The weight of each kept average in the wanted one, with sum 1; and how far its function of τ is then off, relative to its norm.

    Raises:
        np.linalg.LinAlgError: two are the same.
    """
    inner, right = products(kept, kept), products(kept, [wanted])[:, 0]
    found = np.linalg.solve(inner, right)
    found /= found.sum()
    square = products([wanted], [wanted])[0, 0]
    off = (square - 2 * found @ right + found @ inner @ found) / square
    return found, float(max(off, 0.0) ** 0.5)


def products(a: Sequence[Length], b: Sequence[Length]) -> np.ndarray:
    """∫ p_a p_b dτ of each with each, [len(a), len(b)] in float64."""
    ta, tb = (np.array([one.images for one in side], dtype=np.float64) for side in (a, b))
    ga, gb = (np.array([gamma_of(one.std) for one in side], dtype=np.float64) for side in (a, b))
    ta, ga = ta[:, None], ga[:, None]
    exponent = np.where(ta < tb, gb, -ga)
    return (ga + 1) * (gb + 1) * (ta / tb) ** exponent / ((ga + gb + 1) * np.maximum(ta, tb))
