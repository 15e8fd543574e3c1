"""python -m engine.evaluate RUN_OR_FILE: the Fréchet distance of student and teacher, with the floor, as one JSON object.

The object is the only thing on stdout: {"student": {"fd": …, "nfe": …, …}, "teacher": {…}, "floor": {"fd": …, …}}.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from engine.cli import run
from engine.data.images import Images, open_images
from engine.diffusion.solvers import SOLVERS
from engine.errors import UserError
from engine.evaluation.features import load_features
from engine.evaluation.score import check_fit, reference, score
from engine.evaluation.source import ROLES, device_named, open_models, settings

MOST = 50_000  # images, unless --n asks for more


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    print(json.dumps(evaluate(args), allow_nan=False))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m engine.evaluate", description=__doc__)
    p.add_argument("source", type=Path, metavar="RUN_OR_FILE", help="a run folder or a .safetensors file")
    p.add_argument("--data", help="digits, a zip, a folder, an .npz (default: the data of the run)")
    p.add_argument("--features", help="pixels or a TorchScript file (default: those of the run, else pixels)")
    p.add_argument(
        "--n", type=int, help="images to generate (default: as the run, else as many as the data, <= 50,000)"
    )
    p.add_argument(
        "--seed", type=int, help="of the first image; the next one has the next (default: the run's, else 0)"
    )
    p.add_argument("--batch", type=int, help="images at a time (default: the run's, else 256)")
    p.add_argument(
        "--steps", type=int, help="sampling steps, for nets that can be sampled so (default: those of the file)"
    )
    p.add_argument("--solver", choices=list(SOLVERS), help="sample with this ODE solver")
    p.add_argument("--which", choices=ROLES, help="of a run folder's nets (default: all there are)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    return p


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Scores by role, and the floor they share."""
    recipe = settings(args.source)
    chosen = {"features": "pixels", "n": None, "seed": 0, "batch": 256}
    chosen |= {k: v for k, v in (recipe.get("eval") or {}).items() if k in chosen and v is not None}
    chosen |= {k: v for k in chosen if (v := getattr(args, k)) is not None}
    device = device_named(args.device)
    models = open_models(args.source, args.which, steps=args.steps, solver=args.solver, device=device)
    features = load_features(chosen["features"])
    images = open_data(args.data, recipe.get("data") or {}, args.source)
    wanted = min(len(images), MOST) if chosen["n"] is None else chosen["n"]
    n, seed, batch = check_numbers(wanted, chosen["seed"], chosen["batch"])
    for model in models:
        check_fit(model.net, images)
    against = reference(images, features, n=n, seed=seed, batch=batch, device=device)
    floor = {"fd": against.floor, "kind": against.floor_kind, "n": n}
    say(f"floor: {features.title} {against.floor:.4g} ({against.floor_kind})")
    found: dict[str, Any] = {}
    for model in models:
        role, net, sampler = model.role, model.net, model.sampler
        found[role] = score(
            net, sampler, images, features, n=n, seed=seed, batch=batch, device=device, against=against, progress=role
        )
        found[role] |= {"weights": str(model.path)}
        say(f"{role}: {features.title} {found[role]['fd']:.4g}, NFE {sampler.nfe}, {n} images")
        if warning := found[role].get("warning"):
            say(f"warning: {warning}")
    return found | {"floor": floor}


def open_data(named: str | None, recipe: dict[str, Any], source: Path) -> Images:
    """The images of --data, else those of the run's config.yaml."""
    if named is not None:
        return open_images(named)
    if not recipe.get("path"):
        raise UserError(
            f"{source} does not say which data it belongs to: wanted --data (digits, a zip, a folder, an .npz)"
        )
    return open_images(recipe["path"], resolution=recipe.get("resolution"))


def check_numbers(n: int, seed: int, batch: int) -> tuple[int, int, int]:
    if n < 2:
        raise UserError(f"a Fréchet distance wants at least 2 images, got --n {n}")
    if seed < 0:
        raise UserError(f"seeds start at 0, got --seed {seed}")
    if batch < 1:
        raise UserError(f"wanted at least 1 image at a time, got --batch {batch}")
    return n, seed, batch


def say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    run(main)
