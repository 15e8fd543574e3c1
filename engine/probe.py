"""Which layers a teacher can do without, at which noise level.

    potstill probe TEACHER.safetensors --data digits --out plan.json

Measures every residual block at every noise level, chooses what to leave out within a budget of excess denoising loss, and
writes the plan for `skipping.plan=plan.json` of `potstill train`. Beside it: a heat map (plan.png), and on stdout a table.
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from tqdm import tqdm

from potstill.engine.common.cli import parser_of, run
from potstill.engine.common.errors import UserError
from potstill.engine.common.progress import Bar
from potstill.engine.data.images import Images, open_images
from potstill.engine.jobs.machine import device_title
from potstill.engine.measure.score import check_fit
from potstill.engine.models.generate import one_hot
from potstill.engine.models.opening import device_named
from potstill.engine.models.weights import load_net
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.skipping.blocks import with_unet
from potstill.engine.skipping.freezing import propose
from potstill.engine.skipping.picture import heat_map, table
from potstill.engine.skipping.plan import BUDGET, HARDEST, check_budget, save_plan
from potstill.engine.skipping.probe import Material, make_plan, probe, spearman


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    check_budget(args.budget)
    check_numbers(args)
    device = device_named(args.device)
    net = with_unet(load_net(args.teacher)[0])
    images = open_images(args.data, labelled=not args.unlabelled)
    check_fit(net, images)
    data = material(images, net, args.images, args.batch, args.seed, device)
    with Bar("probing", args.bins, unit="bins") as bar:

        def say(line: str) -> None:
            tqdm.write(line, file=sys.stderr)
            bar.update()

        profile = probe(net.to(device), data, args.bins, say)
    with Bar("choosing layers", None, unit="choices tried") as bar:
        plan = make_plan(net, data, profile, args.budget, bar.update)
    plan.report |= {"data": images.name, "images": len(data.images), "batch": args.batch, "latency": device_title(device)}
    plan.report["rank_correlation"] = {
        "taylor": [round(spearman(profile.taylor[:, k], profile.alone[:, k]), 4) for k in range(plan.bins)],
        "residual_share": [round(spearman(profile.share[:, k], profile.raw[:, k]), 4) for k in range(plan.bins)],
    }
    plan.report["freeze"] = propose(net.model, profile)
    save_plan(args.out, plan)
    heat_map(args.out.with_suffix(".png"), profile, plan)
    print(table(profile, plan))
    report = plan.report
    print(
        f"\ntime saved {report['latency_saved']:.1%}, mean over bins (timing of {report['latency']}); KL budget "
        f"{report['kl_nats']:.3g} nats per image; rank correlation with the error: Taylor "
        f"{fmean(report['rank_correlation']['taylor']):.2f}, residual share {fmean(report['rank_correlation']['residual_share']):.2f}"
    )
    print(f"-> {args.out}, {args.out.with_suffix('.png')}; use it with skipping.plan={args.out}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    p = parser_of("probe", __doc__)
    p.add_argument("teacher", type=Path, metavar="TEACHER.safetensors", help="a weight file of potstill train or convert")
    p.add_argument("--data", required=True, help="the teacher's data: digits, a zip, a folder, an .npz")
    p.add_argument("--unlabelled", action="store_true", help="ignore the data's labels and class folders")
    p.add_argument("--out", type=Path, required=True, help="plan.json; the heat map goes beside it")
    p.add_argument("--bins", type=int, default=8, help="of noise levels, equal in log σ (default 8)")
    p.add_argument("--budget", type=float, default=BUDGET, help=f"excess denoising loss per bin (default {BUDGET}, at most {HARDEST})")
    p.add_argument("--images", type=int, default=1024, help="looked at, at most (default 1024)")
    p.add_argument("--batch", type=int, default=128, help="images at a time, and for the latencies (default 128)")
    p.add_argument("--seed", type=int, default=0, help="of the choice of images and of the noise (default 0)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    return p


def check_numbers(args: argparse.Namespace) -> None:
    if args.batch < 1 or args.images < 1 or args.seed < 0:
        raise UserError(
            f"wanted --batch and --images of at least 1 and --seed of at least 0, got {args.batch}, {args.images} and {args.seed}"
        )
    if args.out.suffix != ".json" or not args.out.resolve().parent.is_dir():
        raise UserError(f"--out wants a name ending in .json in a folder that exists, got {args.out}")


def material(images: Images, net: Denoiser, most: int, batch: int, seed: int, device: torch.device) -> Material:
    """At most `most` images of the set, at random, with the labels that the net knows."""
    chosen = np.random.default_rng(seed).permutation(len(images))[:most]
    pixels = torch.from_numpy(np.stack([images.read(int(i)) for i in chosen]))
    labels = None
    if net.label_dim and images.labels is not None:
        labels = one_hot(images.labels[chosen], net.label_dim).to(device)
    return Material(images.seen(pixels).to(device), labels, batch, seed)


if __name__ == "__main__":
    run(main)
