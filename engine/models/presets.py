"""How the authors of EDM and EDM2 sampled their published teachers: steps of Heun's method and, for ImageNet-64, churn.

Sources: the commands beside the published nets, and 2206.00364, Tables 2 and 5; 2312.02696.
"""

from argparse import ArgumentParser, Namespace
from typing import Any

from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.solvers import SOLVERS

Churn = tuple[float, float, float, float]
IMAGENET_CHURN: Churn = (40, 0.05, 50, 1.003)
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {"solver": "heun", "steps": 18},  # 35 evaluations
    "ffhq64": {"solver": "heun", "steps": 40},  # 79
    "afhqv2_64": {"solver": "heun", "steps": 40},
    "edm2": {"solver": "heun", "steps": 32},  # 63; 2312.02696
    "imagenet64": {"solver": "heun", "steps": 256, "churn": IMAGENET_CHURN},  # 511
}


def add_options(p: ArgumentParser) -> None:
    """How a net is sampled, for potstill sample and evaluate."""
    p.add_argument("--steps", type=int, help="sampling steps, for nets that can be sampled so (default: those of the file)")
    p.add_argument("--solver", choices=list(SOLVERS), help="sample with this ODE solver")
    p.add_argument("--preset", choices=list(PRESETS), help="sample the teacher as its authors did for this data set")
    p.add_argument("--guidance", type=float, metavar="W", help="of the teacher: lead away from no class, or from --guide (1: none)")
    p.add_argument("--guide", metavar="FILE", help="a worse net's weight file, to lead the teacher away from (autoguidance)")
    p.add_argument("--S_churn", type=float, metavar="S", help="EDM's stochastic sampler, for the teacher (default 0: none)")
    p.add_argument("--S_min", type=float, metavar="SIGMA", help="churn from this noise level on (default 0)")
    p.add_argument("--S_max", type=float, metavar="SIGMA", help="up to this one (default: no limit)")
    p.add_argument("--S_noise", type=float, metavar="F", help="with noise times this (default 1)")


def how(args: Namespace) -> dict[str, Any]:
    """The options as arguments of `open_models`; a preset, guidance and churn apply to the teacher only."""
    given, preset = {"steps": args.steps, "solver": args.solver}, PRESETS.get(args.preset, {})
    changed = {key: value for key, value in given.items() if preset and value is not None}
    guidance = {"guide": args.guide, "guidance": args.guidance}
    of_teacher = preset | changed | guidance | {"churn": chosen_churn(args, preset.get("churn"))}
    return given | {"of_teacher": {key: value for key, value in of_teacher.items() if value is not None} or None}


def chosen_churn(args: Namespace, preset: Churn | None) -> Churn | None:
    own = (args.S_churn, args.S_min, args.S_max, args.S_noise)
    if own == (None, None, None, None):
        return preset
    if args.S_churn is None and preset is None:
        raise UserError("--S_min, --S_max and --S_noise belong to churn: add --S_churn")
    base = preset or (0.0, 0.0, float("inf"), 1.0)
    churn, low, high, noise = (default if value is None else value for value, default in zip(own, base, strict=True))
    if not churn >= 0 or not 0 <= low <= high or not noise > 0:
        raise UserError(f"churn wants S_churn >= 0, 0 <= S_min <= S_max and S_noise > 0, got {churn:g}, {low:g}, {high:g}, {noise:g}")
    return (churn, low, high, noise) if churn else None
