"""Distil diffusion models into one-step generators: fused losses, an engine, and students for other programs.

    from potstill import Estimate, Student, score_match

Everything public is here; docs/api.md lists it. A name is loaded when it is first asked for, so that `import potstill` costs
nothing and somebody who only wants a loss never loads the engine.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.engine.common.errors import UserError
    from potstill.engine.models.student import Student
    from potstill.kernels import (
        AdamEMA,
        Estimate,
        Losses,
        add_noise,
        denoise,
        discriminator_adversarial,
        force_weight_norm_,
        generator_adversarial,
        moments,
        mp_cat_silu,
        mp_silu,
        mp_sum,
        norm_silu,
        normalized_weight,
        pixel_norm,
        pixel_norm_silu,
        score_implicit,
        score_match,
        trajectory,
    )
    from potstill.kernels.cuda import set_backend
    from potstill.kernels.modules import AdversarialLoss, DenoiseLoss, MomentsLoss, ScoreImplicitLoss, ScoreMatchLoss, TrajectoryLoss

if not os.path.isdir(os.path.join(os.path.dirname(__file__), "kernels")):  # a checkout that lost its links, as git on Windows makes it
    __path__.append(os.path.dirname(os.path.dirname(__file__)))

__version__ = "0.1.0"

__all__ = [
    "AdamEMA",
    "AdversarialLoss",
    "DenoiseLoss",
    "Estimate",
    "Losses",
    "MomentsLoss",
    "ScoreImplicitLoss",
    "ScoreMatchLoss",
    "Student",
    "TrajectoryLoss",
    "UserError",
    "add_noise",
    "denoise",
    "discriminator_adversarial",
    "force_weight_norm_",
    "generator_adversarial",
    "moments",
    "mp_cat_silu",
    "mp_silu",
    "mp_sum",
    "norm_silu",
    "normalized_weight",
    "pixel_norm",
    "pixel_norm_silu",
    "score_implicit",
    "score_match",
    "set_backend",
    "trajectory",
]

_MODULES = ["AdversarialLoss", "DenoiseLoss", "MomentsLoss", "ScoreImplicitLoss", "ScoreMatchLoss", "TrajectoryLoss"]
#: Where a name is; the others are in kernels.
_HOMES = {"Student": "engine.models.student", "UserError": "engine.common.errors", "set_backend": "kernels.cuda"} | dict.fromkeys(
    _MODULES, "kernels.modules"
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'potstill' has no attribute {name!r}")
    value = getattr(import_module(f"potstill.{_HOMES.get(name, 'kernels')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
