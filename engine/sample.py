"""python -m engine.sample RUN_OR_FILE --seeds 0-63 --out grid.png: images from a student or a teacher, one per seed."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from engine.cli import run
from engine.diffusion.solvers import SOLVERS
from engine.errors import UserError
from engine.evaluation.generate import generate
from engine.evaluation.pictures import default_columns, grid
from engine.evaluation.source import ROLES, STUDENT, TEACHER, Model, device_named, open_models, weight_files
from engine.nets.denoiser import Denoiser
from engine.nets.router import Router
from engine.skipping.apply import Skipping
from engine.skipping.plan import check_plan, load_plan

MOST_COLUMNS = 40  # with more classes than this a grid is square


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    seeds = parse_seeds(args.seeds)
    kind = out_kind(args.out)
    which = args.which or (STUDENT if STUDENT in weight_files(args.source) else None)
    device = device_named(args.device)
    model = open_models(args.source, which, steps=args.steps, solver=args.solver, device=device)[0]
    net = lightened(model, args.plan, args.cache)
    labels = parse_labels(args.labels, model.net.label_dim, seeds)
    batches = generate(net, model.sampler, labels, seeds, batch=args.batch, device=device)
    images = np.concatenate([batch.cpu().numpy() for batch in batches])
    save(args.out, kind, images, labels, seeds)
    print(f"{describe(model, images, labels)} -> {args.out}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m engine.sample", description=__doc__)
    p.add_argument("source", type=Path, metavar="RUN_OR_FILE", help="a run folder or a .safetensors file")
    p.add_argument("--seeds", default="0-63", help="such as 0-63 or 3,5,10-19: one image per seed (default 0-63)")
    p.add_argument(
        "--labels",
        help="classes such as 0,1,2, or all: given to the images in turn (default: seed s has class s mod classes)",
    )
    p.add_argument("--steps", type=int, help="sampling steps (default: those of the file)")
    p.add_argument("--solver", choices=list(SOLVERS), help="sample with this ODE solver")
    p.add_argument("--which", choices=ROLES, help=f"of a run folder's nets (default {STUDENT}, else {TEACHER})")
    p.add_argument(
        "--out", type=Path, required=True, help="grid.png, x.npz (images, labels, seeds), or a folder of PNGs"
    )
    p.add_argument("--plan", type=Path, help="of engine.probe: leave out what the teacher can do without (teachers only)")
    p.add_argument(
        "--cache", type=positive, default=1, metavar="N",
        help="compute deep features at every Nth evaluation only (teachers only; default 1: always)",
    )  # fmt: skip
    p.add_argument("--batch", type=positive, default=256, help="images at a time; changes no image (default 256)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    return p


def lightened(model: Model, plan: Path | None, cache: int) -> Denoiser | Router:
    """The net itself, or a teacher that leaves out layers. Students are never lightened."""
    if plan is None and cache == 1:
        return model.net
    if model.role != TEACHER or not isinstance(model.net, Denoiser):
        raise UserError(f"--plan and --cache are for teachers, {model.path} is a {model.role}: --which teacher takes the run's teacher")
    found = None if plan is None else load_plan(plan)
    if found is not None:
        check_plan(found, model.net, str(plan))
    return Skipping(model.net, found, cache=cache).eval()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"wants to be at least 1, got {number}")
    return number


def parse_seeds(text: str) -> list[int]:
    """`0-63` or `3,5,10-19` as a list, in the order given."""
    seeds: list[int] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"seeds want numbers and ranges such as 0-63 or 3,5,10-19, got {part!r}")
        if dash and int(last) < int(first):
            raise UserError(f"the range of seeds {part} is empty: wanted first-last")
        seeds += range(int(first), int(last if dash else first) + 1)
    if not seeds:
        raise UserError("no seeds: wanted numbers and ranges such as 0-63")
    if max(seeds) >= 2**63:
        raise UserError(f"a seed is below 2^63, got {max(seeds)}")
    return seeds


def parse_labels(text: str | None, label_dim: int, seeds: Sequence[int]) -> np.ndarray | None:
    """The class of every image, [len(seeds)]; None for an unconditional net."""
    if not label_dim:
        if text is not None:
            raise UserError(f"this net knows no classes, got --labels {text}")
        return None
    if text is None:
        return np.array([seed % label_dim for seed in seeds])
    if text == "all":
        return np.arange(len(seeds)) % label_dim
    parts = [part.strip() for part in text.split(",")]
    if bad := [p for p in parts if not p.isdecimal() or int(p) >= label_dim]:
        raise UserError(f"labels want to be among 0 … {label_dim - 1}, such as 0,1,2, or all; got {bad[0]!r}")
    return np.resize([int(part) for part in parts], len(seeds))


def out_kind(out: Path) -> str:
    """png, npz or folder; UserError for what cannot be written there."""
    suffix = "" if out.is_dir() else out.suffix.lower()
    if suffix not in ("", ".png", ".npz"):
        raise UserError(f"--out wants a name ending in .png or .npz, or a folder, got {out}")
    if not suffix and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: wanted a folder, or a name ending in .png or .npz")
    nearest = out if not suffix else out.parent
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{out} cannot be written: no permission to write in {nearest}")
    return suffix.removeprefix(".") or "folder"


def save(out: Path, kind: str, images: np.ndarray, labels: np.ndarray | None, seeds: Sequence[int]) -> None:
    """Every file is written beside its place and moved there, so it is whole or absent."""
    try:
        folder = out if kind == "folder" else out.parent
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "png":
            replace(out, png_bytes(grid(images, columns_for(labels, len(images)))))
        elif kind == "npz":
            replace(out, npz_bytes(images, labels, seeds))
        else:
            for image, seed in zip(images, seeds, strict=True):
                replace(out / f"{seed:06d}.png", png_bytes(grid(image[None], 1, scale=1)))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error


def columns_for(labels: np.ndarray | None, n: int) -> int:
    """One column per class where the classes come in turn, else about square."""
    if labels is not None:
        period = len(np.unique(labels))
        if 1 < period <= MOST_COLUMNS and np.array_equal(labels, np.resize(labels[:period], n)):
            return period
    return default_columns(n)


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def npz_bytes(images: np.ndarray, labels: np.ndarray | None, seeds: Sequence[int]) -> bytes:
    """images [N, H, W, C] uint8, seeds [N] and, for a conditional net, labels [N]: what --data reads."""
    arrays = {"images": images.transpose(0, 2, 3, 1), "seeds": np.array(seeds)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays, **({} if labels is None else {"labels": labels}))
    return buffer.getvalue()


def replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def describe(model: Model, images: np.ndarray, labels: np.ndarray | None) -> str:
    classes = "" if labels is None else f", {len(np.unique(labels))} classes"
    return f"{len(images)} images{classes} by the {model.role} ({model.path}), {model.sampler.solver}, NFE {model.sampler.nfe}"


if __name__ == "__main__":
    run(main)
