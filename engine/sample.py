"""Images from a student or a teacher, one for every seed.

    potstill sample runs/digits --seeds 0-63 --out grid.png
    potstill sample runs/digits --seeds 0-9999 --out images.zip          an EDM data set; also .npz, or a folder of PNGs
    potstill sample runs/digits --beside --out pair.png                  student and teacher from the same noise
    potstill sample runs/sd15 --prompts "a cat" --out cats.png            of nets that are told prompts
    potstill sample PIPELINE_FOLDER --prompts "a cat" --out cats.png      a teacher of diffusers, unguided without --guidance
    potstill sample TEACHER.safetensors --preset imagenet64 --out g.png  a teacher as EDM's authors sampled it

A seed gives the same image on every machine.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from potstill.engine.common.class_names import numbers_in
from potstill.engine.common.cli import parser_of, run
from potstill.engine.common.errors import UserError, writing
from potstill.engine.common.progress import Bar
from potstill.engine.data.captions import read_prompts
from potstill.engine.formats.pictures import Layout, layout, open_output, out_kind, save_png, side_by_side
from potstill.engine.jobs.shown import check_teacher, shown_of
from potstill.engine.models import presets
from potstill.engine.models.generate import Between, generate
from potstill.engine.models.opening import ROLES, STUDENT, TEACHER, Model, device_named, open_models, pipeline_named, weight_files
from potstill.engine.models.origins import is_pipeline
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.skipping.apply import Skipping
from potstill.engine.skipping.blocks import with_unet
from potstill.engine.skipping.plan import check_plan, load_plan

FRAMES = 8  # of a strip


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    seeds = parse_strips(args.strip, args.frames) if args.strip else parse_seeds(args.seeds or "0-63")
    check_arguments(args)
    kind, device = out_kind(args.out), device_named(args.device)
    pipeline = pipeline_named(args.pipeline)
    models = chosen_models(args, device, pipeline)
    models[-1] = with_skipping(models[-1], args.plan, args.cache)
    names = models[0].metadata.get("classes")
    labels = parse_labels(args.labels, models[0].net.label_dim, [s.start if isinstance(s, Between) else s for s in seeds], args, names)
    columns = args.frames if args.strip else None
    shown = shown_of(args.source, models[0], device, prompts_in(args.prompts), pipeline)
    for model in models[1:]:
        if args.beside == "" and pipeline is None:
            check_teacher(args.source, model.path)
        if isinstance(model.net, DiffusersDenoiser) and shown.prompts is not None and shown.prompts.null is not None:
            model.net.null = shown.prompts.null

    def made(model: Model) -> Iterator[np.ndarray]:
        told = shown.prompts if labels is None else labels
        batches = generate(model.net, model.sampler, told, seeds, batch=args.batch, device=device, decode=shown.decode)
        for batch in Bar(f"sampling the {model.role}", len(seeds), unit="images").over(batches):
            yield batch.cpu().numpy()

    if args.beside is not None:
        how = Layout(columns) if columns else layout(labels, len(seeds), names)
        grids = {title(model): how.draw(np.concatenate(list(made(model)))) for model in models}
        with writing(args.out):
            save_png(side_by_side(grids), args.out)
    else:
        numbers = [i if isinstance(seed, Between) else seed for i, seed in enumerate(seeds)]  # frames are counted
        with open_output(args.out, kind, labels, numbers, columns, names) as add:
            for images in made(models[0]):
                add(images)
    said = "; ".join(describe(model, len(seeds), labels) for model in models)
    print(f"{said} -> {args.out}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    p = parser_of("sample", __doc__)
    p.add_argument("source", type=Path, metavar="RUN_OR_FILE", help="a run folder, a .safetensors file, or a pipeline's folder (diffusers)")
    p.add_argument("--seeds", help="such as 0-63 or 3,5,10-19: one image per seed (default 0-63)")
    p.add_argument("--strip", metavar="A-B", help="instead: from seed A's image to seed B's; 3-7,8-9 are two strips")
    p.add_argument("--frames", type=int, help=f"images of a strip, its ends among them (default {FRAMES})")
    p.add_argument(
        "--labels",
        help="classes by number or name, such as 0,1,2 or cats,dogs, or all: given to the images (or strips) in turn (default: seed s has "
        "class s mod classes); number:3 and name:3 where 3 could be either",
    )
    prompts = "of a net that is told some: a file (.txt, .jsonl) or one prompt, given to the images in turn (default: the run's)"
    p.add_argument("--prompts", metavar="FILE|TEXT", help=prompts)
    p.add_argument(
        "--beside", nargs="?", const="", metavar="TEACHER",
        help="a PNG of these images and those of this teacher (default: the run's own, as the run showed it) from the same noise and prompts",
    )  # fmt: skip
    p.add_argument("--pipeline", metavar="FOLDER", help="the teacher's, of nets of diffusers, where it is not where the run found it")
    presets.add_options(p)
    roles = p.add_mutually_exclusive_group()
    roles.add_argument("--which", choices=ROLES, help=f"of a run folder's nets (default {STUDENT}, else {TEACHER})")
    roles.add_argument(
        "--teacher",
        action="store_const",
        const=TEACHER,
        dest="which",
        help="the same as --which teacher: a pipeline with the run's guidance",
    )
    p.add_argument(
        "--out", type=Path, required=True,
        help="grid.png, x.npz (images, labels, seeds), x.zip (an EDM data set), or a folder of PNGs",
    )  # fmt: skip
    p.add_argument("--plan", type=Path, help="of potstill probe: leave out what the teacher can do without (teachers only)")
    p.add_argument(
        "--cache", type=positive, default=1, metavar="N",
        help="compute deep features at every Nth evaluation only (teachers only; default 1: always)",
    )  # fmt: skip
    p.add_argument("--batch", type=positive, default=256, help="images at a time; changes no image (default 256)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    return p


def with_skipping(model: Model, plan: Path | None, cache: int) -> Model:
    """The same model, or a teacher that leaves out layers. Students are never with_skipping."""
    if plan is None and cache == 1:
        return model
    if model.role != TEACHER or not isinstance(model.net, Denoiser):
        raise UserError(f"--plan and --cache are for teachers, {model.path} is a {model.role}: --which teacher takes the run's teacher")
    found = None if plan is None else load_plan(plan)
    if found is not None:
        check_plan(found, with_unet(model.net), str(plan))
    return replace(model, net=Skipping(with_unet(model.net), found, cache=cache).eval())


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"wants to be at least 1, got {number}")
    return number


def check_arguments(args: argparse.Namespace) -> None:
    if args.strip and args.seeds:
        raise UserError("--strip names its own seeds: leave --seeds out")
    if args.frames is not None and not args.strip:
        raise UserError("--frames is of --strip A-B, which is not there")
    if args.beside is not None and args.out.suffix.lower() != ".png":
        raise UserError(f"--beside makes one picture: wanted --out with a name ending in .png, got {args.out}")
    args.frames = args.frames or FRAMES


def chosen_models(args: argparse.Namespace, device: torch.device, pipeline: Path | None = None) -> list[Model]:
    """The net to be sampled and, with --beside, its teacher; they must make images of one size and know the same classes.

    pipeline: the teacher's, of nets of diffusers; None: where the run found it.
    """
    how = presets.how(args)
    files = weight_files(args.source, pipeline)
    runs = [] if args.which or STUDENT in files else sorted(file.parent for file in args.source.glob("*/student.safetensors"))
    if runs:  # of potstill compare
        raise UserError(
            f"{args.source} holds several runs, got no word of which: potstill sample {' or '.join(map(str, runs))}; its teacher alone: --which teacher"
        )
    which = args.which or (STUDENT if STUDENT in files else None)
    if args.beside is None:
        return [open_models(args.source, which, **how, device=device, base=pipeline)[0]]
    own = {"steps": how["steps"], "solver": how["solver"]}
    where, base = Path(args.beside) if args.beside else args.source, pipeline
    if is_pipeline(where) and where != args.source:  # sampled at the student's size, and as its run says
        where, base = args.source, where
    shown = [
        open_models(args.source, which, **own, device=device, base=pipeline)[0],
        open_models(where, TEACHER, of_teacher=how["of_teacher"], device=device, base=base)[0],
    ]
    sizes = [(m.net.shape, m.net.label_dim, getattr(m.net, "text", False)) for m in shown]
    if sizes[0] != sizes[1]:
        texts = ["x".join(map(str, shape)) + (" told prompts" if text else f" with {k} classes") for shape, k, text in sizes]
        raise UserError(f"nets side by side want images of one size: {shown[0].path} makes {texts[0]}, {shown[1].path} {texts[1]}")
    return shown


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


def parse_strips(text: str, frames: int | None) -> list[Between]:
    """`3-7,8-9` as evenly spaced points on two ways, one after the other."""
    frames = FRAMES if frames is None else frames
    if frames < 2:
        raise UserError(f"a strip wants at least 2 frames, got --frames {frames}")
    points = []
    for part in text.split(","):
        first, _, last = (p.strip() for p in part.partition("-"))
        if not (first.isdecimal() and last.isdecimal()) or int(first) == int(last) or max(int(first), int(last)) >= 2**63:
            raise UserError(f"a strip wants two different seeds such as 3-7, got {part!r}")
        points += [Between(int(first), int(last), i / (frames - 1)) for i in range(frames)]
    return points


def parse_labels(
    text: str | None, label_dim: int, seeds: Sequence[int], args: argparse.Namespace, names: Sequence[str] | None = None
) -> np.ndarray | None:  # fmt: skip
    """The class of every image, [len(seeds)]; None for an unconditional net. All frames of a strip have one class."""
    if not label_dim:
        if text is not None:
            raise UserError(f"this net knows no classes, got --labels {text}")
        return None
    if text is None:
        return np.array([seed % label_dim for seed in seeds])
    each = args.frames if args.strip else 1
    classes = range(label_dim) if text == "all" else numbers_in(text, label_dim, names)
    return np.resize(list(classes), len(seeds) // each).repeat(each)


def prompts_in(text: str | None) -> list[str] | None:
    """The prompts of a file, or the one that `text` is; None for none."""
    if text is None:
        return None
    if not text.strip():
        raise UserError("--prompts wants a file or a prompt, got neither")
    return read_prompts(text) if Path(text).suffix in (".txt", ".jsonl") or Path(text).exists() else [text]


def title(model: Model) -> str:
    return f"{model.role}, {model.sampler.nfe} evaluation{'s' * (model.sampler.nfe > 1)}"


def describe(model: Model, n: int, labels: np.ndarray | None) -> str:
    count = 0 if labels is None else len(np.unique(labels))
    classes = f", {count} class{'es' * (count > 1)}" if count else ""
    churn = " with churn" if model.sampler.churn else ""
    guided = (
        f", guidance {model.sampler.guidance:g}"
        if isinstance(model.net, DiffusersDenoiser) and model.net.guidable and model.role == TEACHER
        else ""
    )
    return f"{n} image{'s' * (n > 1)}{classes} by the {model.role} ({model.path}), {model.sampler.solver}{churn}, NFE {model.sampler.nfe}{guided}"


if __name__ == "__main__":
    run(main)
