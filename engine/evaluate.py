"""The Fréchet distance of student and teacher to the data, with the floor, as one JSON object.

    potstill evaluate runs/digits
    potstill evaluate runs/cifar10 --features inception --reference cifar10-32x32.npz      as EDM's fid.py measures
    potstill evaluate runs/sd15 --prompts coco30k.txt --data val2014 --resize 256 --features inception --scores clip:FOLDER
    torchrun --nproc-per-node 8 -m potstill evaluate runs/cifar10 --features inception --images 50000

The object is the only thing on stdout: {"student": {"fd": …, "nfe": …, …}, "teacher": {…}, "floor": {"fd": …, …}}. Under
torchrun the images are shared out over the processes. --reference means EDM's protocol: 50,000 images from the seeds 0-49999
with the classes that these seeds draw.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from potstill.engine.common.class_names import numbers_in
from potstill.engine.common.cli import parser_of, run
from potstill.engine.common.download import digest, file_at, is_url
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.writing import check_writable
from potstill.engine.data.captions import read_prompts
from potstill.engine.data.images import Images, open_images
from potstill.engine.jobs.shown import shown_of
from potstill.engine.measure.features import Features
from potstill.engine.measure.networks import check_features_name, features_by_name
from potstill.engine.measure.references import read_reference, write_reference
from potstill.engine.measure.resized import LAW, open_resized
from potstill.engine.measure.score import FD, METRICS, Reference, check_fit, picture_shape, reference, score, scored, tools
from potstill.engine.measure.scores import check_score_names, open_score
from potstill.engine.measure.summary import read_summary
from potstill.engine.models import presets
from potstill.engine.models.generate import BALANCED, DATA, RANDOM
from potstill.engine.models.opening import ROLES, STUDENT, TEACHER, Model, device_named, open_models, pipeline_named, settings
from potstill.engine.models.origins import is_pipeline
from potstill.engine.models.router import one_of
from potstill.engine.models.weights import file_hash, weights_hash
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.training.ranks import Ranks, meet, one_voice

MOST = 50_000  # images, unless --n asks for more


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    args.command = shlex.join(["potstill", "evaluate", *argv])
    ranks = meet()
    with one_voice(ranks):
        try:
            found = evaluate(args, ranks, ranks.connect(device_named(args.device)))
            if ranks.first:
                print(json.dumps(found, allow_nan=False))
        finally:
            ranks.close()


def parser() -> argparse.ArgumentParser:
    p = parser_of("evaluate", __doc__)
    p.add_argument(
        "source", type=Path, nargs="?", metavar="RUN_OR_FILE",
        help="a run folder, a .safetensors file, or a pipeline's folder (diffusers); may be left out with --data and --save-reference",
    )  # fmt: skip
    p.add_argument("--data", help="digits, a zip, a folder, an .npz (default: the data of the run)")
    p.add_argument("--unlabelled", action="store_true", help="ignore the data's labels and class folders")
    p.add_argument(
        "--features",
        help="pixels, inception[:FILE|URL], dinov2:FILE|URL, clip:FILE|URL or a TorchScript file (default: the run's, else pixels)",
    )
    p.add_argument(
        "--scores", metavar="NAME,…", type=lambda text: [name for name in text.split(",") if name],
        help="of nets that are told prompts: clip:FOLDER, pickscore:FOLDER, aesthetic:HEAD.safetensors:FOLDER (default: the run's; '': none)",
    )  # fmt: skip
    p.add_argument(
        "--prompts", metavar="FILE", help="that nets are told, in turn: .txt, .jsonl, latents with captions (default: the run's)"
    )
    p.add_argument(
        "--resize", type=int, metavar="R",
        help="measure all pictures, generated and real, as RGB of R x R: the square in the middle by Pillow's Lanczos filter",
    )  # fmt: skip
    p.add_argument("--metrics", default=FD, help=f"some of {','.join(METRICS)}: Fréchet, kernel, precision and recall (default fd)")
    p.add_argument("--reference", help="file or address of mu and sigma, EDM's .npz or EDM2's .pkl, instead of the data's own")
    p.add_argument("--save-reference", type=Path, metavar="FILE.npz", help="write mu and sigma of the data, as EDM's fid.py ref")
    p.add_argument(
        "--n", "--images", type=int, dest="n",
        help="images to generate (default: as the run, else as many as the data, <= 50,000); torchrun takes --n for its own: --images",
    )  # fmt: skip
    p.add_argument("--seed", type=int, help="of the first image; the next one has the next (default: the run's, else 0)")
    p.add_argument(
        "--labels",
        help="data, balanced, random (EDM's, from the seeds) or classes such as 0,1 or cats,dogs (default data; random with --reference)",
    )
    p.add_argument("--best-of", type=int, default=1, metavar="K", help="the smallest of K distances on n seeds each, marked as such")
    p.add_argument("--batch", type=int, help="images at a time (default: the run's, else 256)")
    presets.add_options(p)
    p.add_argument("--which", choices=ROLES, help="of a run folder's nets (default: all there are)")
    p.add_argument("--pipeline", metavar="FOLDER", help="the teacher's, of nets of diffusers, where it is not where the run found it")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    return p


def evaluate(args: argparse.Namespace, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Scores by role, and the floor they share."""
    check_arguments(args)
    recipe = settings(args.source) if args.source else {}
    if args.pipeline is not None and args.source is None:
        raise UserError("--pipeline is the teacher's of a run or weight file, and none is named: name it, or leave --pipeline out")
    pipeline = pipeline_named(args.pipeline)
    chosen = {"features": "pixels", "n": None, "seed": 0, "batch": 256, "scores": []}
    kept = ("features", "batch", "scores") if args.reference else tuple(chosen)  # a published reference goes with published numbers
    chosen |= {k: v for k, v in (recipe.get("eval") or {}).items() if k in kept and v is not None}
    chosen |= {k: v for k in chosen if (v := getattr(args, k)) is not None}
    check_features_name(chosen["features"])
    check_score_names(chosen["scores"])
    told = None if args.prompts is None else read_prompts(args.prompts)
    how = presets.how(args)
    models = open_models(args.source, args.which, **how, device=device, base=pipeline) if args.source else []
    check_text(models, chosen["scores"])
    alone = bool(chosen["scores"]) and not (args.reference or args.data or (recipe.get("data") or {}).get("path"))
    if alone:
        check_alone(args)
    needed = not (args.reference or alone) or args.labels == "data"
    images = open_data(args, recipe.get("data") or {}) if needed or args.data else None
    if images is None and args.unlabelled and args.reference:
        raise UserError("--unlabelled is about data, and with --reference none are read: leave it out")
    default = MOST if args.reference or images is None else min(len(images), MOST)
    n = default if chosen["n"] is None else chosen["n"]
    seed, batch, resize = chosen["seed"], chosen["batch"], args.resize
    check_numbers(n, seed, batch, args.best_of)
    for model in models:
        if images is not None and not args.resize:
            named = (recipe.get("teacher") or {}).get("checkpoint") or (model.path if is_pipeline(model.path) else "FOLDER")
            check_latents(model, images, str(pipeline or named))
        if images is not None:
            check_fit(model.net, images, resize)
    labelled = {model.role: labels_of(model, args) for model in models}
    beside = told is None and args.source and is_pipeline(args.source) and getattr(models[0].net, "text", False)
    asked = (images.captions if images else None) if beside else told
    shown = {model.role: in_turn(ranks, lambda model=model: shown_of(args.source, model, device, asked, pipeline)) for model in models}
    decode = next((one.decode for one in shown.values() if one.decode), None)
    if decode is None and images is not None and images.latent:
        raise UserError(
            f"{images.name} holds latents, and no run with the pipeline or VAE that decodes them is named: name pictures as --data"
        )
    scores = in_turn(ranks, lambda: [open_score(name, device) for name in chosen["scores"]])
    common: dict[str, Any] = {"seed": seed, "batch": batch, "device": device, "ranks": ranks, "resize": resize, "scores": scores}
    metrics = args.metrics.split(",")
    features, against = None, None
    if not alone:
        features = in_turn(ranks, lambda: features_by_name(chosen["features"], command=args.command)).to(device)
        if args.reference:
            shape = picture_shape(models[0].net.shape, decode, resize)
            against = in_turn(ranks, lambda: reference_from_file(args.reference, features, shape, device, n, args.command))
        else:
            assert images is not None
            captions = images.captions if scores else None
            against = reference(images, features, n=n, **common, keep=metrics != [FD], decode=decode, captions=captions)
    if args.save_reference and ranks.first and against is not None:
        write_reference(args.save_reference, against.gaussian)
        print(f"{args.save_reference}: mu and sigma of {against.images} images of {against.data}", file=sys.stderr)

    def say(text: str) -> None:
        if ranks.first:
            print(text, file=sys.stderr)

    if against is not None and features is not None and against.floor is not None:
        say(f"floor: {features.title} {against.floor:.4g} ({against.floor_kind})")
    if against is not None and against.scores:
        say(f"real: {in_words(against.scores)}, {against.scores['scores_of']['n']} images")
    found: dict[str, Any] = {}
    for model in models:
        bar, one_shown = f"measuring the {model.role}" if ranks.first else None, shown[model.role]
        how = common | {"prompts": one_shown.prompts, "decode": one_shown.decode}
        if features is None:
            prompts = how.pop("prompts")
            many = n if chosen["n"] is not None else min(len(prompts), n)
            one = scored(model.net, model.sampler, how.pop("scores"), prompts, n=many, **how, progress=bar)
        else:
            one = score(
                model.net, model.sampler, images, features, n=n, **how, against=against, labels=labelled[model.role], metrics=metrics,
                best_of=args.best_of, progress=bar,
            )  # fmt: skip
        found[model.role] = one = one | about(model)
        say(sentence(model.role, one))
        if "warning" in one:
            say(f"note: {one['warning']}")
        if chosen_by := one.get("weights_chosen_by"):
            best = f"the best of {chosen_by['best_of']} by {chosen_by['metric']}"
            say(f"note: these weights are {best}: on the same seeds their distance is flattered")
    if args.source and STUDENT in found and TEACHER not in found:
        try:
            if known := teacher_of_summary(args.source, found[STUDENT]):
                found["teacher_of_summary"] = known
                say(sentence("teacher (summary.json)", known))
        except Damaged as error:  # what was measured here is worth more
            say(f"note: the teacher's score is not beside the student's: {error}")
    if against is None:
        return found
    if not models:
        found |= {"reference": {"data": against.data, "sha256": against.sha256, "images": against.images}, "tools": tools()}
        found |= {"resize": {"size": resize, "law": LAW}} if resize else {}
    found |= {"real": against.scores} if against.scores else {}
    return found | {"floor": {"fd": against.floor, "kind": against.floor_kind, "n": n}}


def check_arguments(args: argparse.Namespace) -> None:
    if args.source is None and not (args.data and args.save_reference):
        raise UserError("wanted a run folder or a weight file to evaluate, or --data and --save-reference to write a reference")
    if unknown := [m for m in args.metrics.split(",") if m not in METRICS]:
        raise UserError(f"--metrics wants some of {','.join(METRICS)}, got {unknown[0]!r}")
    if args.save_reference:
        if args.reference:
            raise UserError("--save-reference writes the data's reference: leave --reference out")
        if args.save_reference.suffix != ".npz":
            raise UserError(f"--save-reference wants a name ending in .npz, got {args.save_reference}")
        check_writable(args.save_reference)
    if args.source is None and (args.scores or args.prompts is not None):
        option = "--scores" if args.scores else "--prompts"
        raise UserError(f"{option} is about a net that is told prompts, and none is named: name a run, or leave {option} out")
    if args.resize is not None and args.resize < 1:
        raise UserError(f"pictures are at least 1 pixel wide, got --resize {args.resize}")
    if args.reference and args.metrics != FD:
        raise UserError("kid and pr compare images, and a reference file holds none: leave --reference out, and name --data")
    if args.reference and not is_url(args.reference) and not Path(args.reference).is_file():
        raise UserError(f"no reference at {args.reference}: wanted an .npz with mu and sigma, or its address")


def check_alone(args: argparse.Namespace) -> None:
    """UserError for what is about distances, where there are no data for one."""
    asked = {
        "--features": args.features,
        "--metrics": args.metrics != FD,
        "--best-of": args.best_of > 1,
        "--save-reference": args.save_reference,
    }
    if given := [option for option, value in asked.items() if value]:
        raise UserError(f"{given[0]} is about distances from data, and {args.source} names none: give --data, or leave {given[0]} out")


def check_text(models: Iterable[Model], scores: list[str]) -> None:
    """UserError for scores of a net that is told no prompts."""
    if scores and not all(getattr(model.net, "text", False) for model in models):
        model = next(model for model in models if not getattr(model.net, "text", False))
        raise UserError(f"scores are of pictures and their prompts, and {model.path} is told none: leave --scores out")


def labels_of(model: Model, args: argparse.Namespace) -> str | None:
    """How the classes are chosen, by numbers where they are given by names. UserError for a net without, and what it does not know."""
    labels = args.labels
    if not model.net.label_dim:
        if labels is not None:
            raise UserError(f"the {model.role} ({model.path}) knows no classes, got --labels {labels}")
        return None
    if labels is None:
        return RANDOM if args.reference else None
    if labels in (DATA, BALANCED, RANDOM):
        return labels
    return ",".join(map(str, numbers_in(labels, model.net.label_dim, model.metadata.get("classes"))))


def check_latents(model: Model, images: Images, pipeline: str) -> None:
    """UserError for pictures where the net makes latents of another size. pipeline: whose VAE they are of."""
    if isinstance(one_of(model.net), DiffusersDenoiser) and not images.latent and images.shape != model.net.shape:
        size = "x".join(map(str, model.net.shape))
        raise UserError(
            f"{model.path} makes latents {size}, and {images.name} holds pictures {'x'.join(map(str, images.shape))}: potstill convert latents "
            f"{images.source.path} OUT --pipeline {pipeline} makes latents of them, for --data OUT; --resize R compares pictures with pictures"
        )


def in_turn(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """The result of work(), which rank 0 calls first: the other ranks then find its downloads in the cache."""
    found = ranks.on_first(work)
    return found if ranks.first else work()


def reference_from_file(
    where: str, features: Features, shape: tuple[int, ...], device: torch.device, n: int, command: str
) -> Reference:  # fmt: skip
    """The Gaussian of a file or address, if it is one of these features. shape: of the pictures, [C, H, W]."""
    path = file_at(where, command=command)
    gaussian = read_reference(path, features.edm2)
    features.try_on(shape, device)
    if len(gaussian.mu) != features.num_features:
        raise UserError(
            f"{path} is of {len(gaussian.mu)} features, {features.title} has {features.num_features}: "
            "name the --features that it was made with"
        )
    return Reference(gaussian, n, None, "not known: a reference file holds no images", path.name, None, digest(path))


def open_data(args: argparse.Namespace, recipe: dict[str, Any]) -> Images:
    """The images of --data, else those of the run's config.yaml."""
    if args.data is not None:
        return opened(args.data, args.resize, labelled=not args.unlabelled)
    if not recipe.get("path"):
        raise UserError(f"{args.source} does not say which data it belongs to: wanted --data (digits, a zip, a folder, an .npz)")
    labelled = not (args.unlabelled or recipe.get("unlabelled"))
    return opened(recipe["path"], args.resize, labelled=labelled, resolution=recipe.get("resolution"))


def opened(path: str, resize: int | None, *, labelled: bool, resolution: int | None = None) -> Images:
    return open_resized(path, resize, labelled=labelled) if resize else open_images(path, resolution=resolution, labelled=labelled)


def check_numbers(n: int, seed: int, batch: int, best_of: int) -> None:
    if n < 2:
        raise UserError(f"a Fréchet distance wants at least 2 images, got --n {n}")
    if seed < 0:
        raise UserError(f"seeds start at 0, got --seed {seed}")
    if best_of < 1:
        raise UserError(f"wanted at least 1 evaluation, got --best-of {best_of}")
    if seed + n * best_of > 2**63:
        raise UserError(f"{n * best_of} images from seed {seed} on go beyond the last seed, 2^63 - 1: take a smaller --seed")
    if batch < 1:
        raise UserError(f"wanted at least 1 image at a time, got --batch {batch}")


def about(model: Model) -> dict[str, Any]:
    """Of the weights: where they lie, and whether they were chosen by their distance."""
    if is_pipeline(model.path):
        sha256 = weights_hash(model.net)
    else:
        sha256 = digest(model.path) if model.path.suffix == ".json" else file_hash(model.path)
    more = {"churn": list(model.sampler.churn)} if model.sampler.churn else {}
    more |= {"weights_chosen_by": chosen} if (chosen := model.metadata.get("chosen_by")) else {}
    return {"weights": str(model.path), "weights_sha256": sha256} | more


def in_words(one: dict[str, Any]) -> str:
    return ", ".join(f"{figure} {mean:.4g}" for figure, mean in one.get("scores", {}).items())


def sentence(role: str, one: dict[str, Any]) -> str:
    if "fd" not in one:
        return f"{role}: {in_words(one)}, NFE {one['nfe']}, {one['n']} images"
    more = f", best of {one['best_of']}" if "best_of" in one else ""
    kernel = "KID" if one["features"] == "FID" else "kernel distance"  # the I is for Inception
    more += f", {kernel} {one['kid']:.4g}" if "kid" in one else ""
    more += f", precision {one['precision']:.3f}, recall {one['recall']:.3f}" if "precision" in one else ""
    more += f", {in_words(one)}" if "scores" in one else ""
    return f"{role}: {one['features']} {one['fd']:.4g}{more}, NFE {one['nfe']}, {one['n']} images"


def teacher_of_summary(source: Path, student: dict[str, Any]) -> dict[str, Any] | None:
    """The teacher's score that the run has kept, if it was measured as the student's is now. Damaged if nobody can read it."""
    known = (read_summary(source if source.is_dir() else source.parent) or {}).get("teacher")
    alike = ("features", "features_sha256", "n", "seeds", "data", "labels", "reference_sha256", "prompts", "resize")
    if not known or "fd" not in student or not {"fd", "nfe", "n", "features"} <= known.keys():
        return None
    return known if all(known.get(k) == student.get(k) for k in alike) else None


if __name__ == "__main__":
    run(main)
