"""What skipping saves and what it costs, on the digits: python -m benches.scripts.skipping_evidence [--teacher FILE] [--kimg 12]
or for another teacher, without students: python -m benches.scripts.skipping_evidence --teacher FILE --data ZIP --out FILE.json

Trains the recipe's teacher (or takes one), probes it, and writes one JSON: per budget the per-bin excess on held-out
images and the latency saved; how well criteria rank blocks; measured teacher and trajectory latencies (interleaved
ratios); Fréchet distances of the teacher with plan and with cache; and students distilled with and without the plan.
Wants a quiet machine: under 10 minutes on two cores with the defaults.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from benches import RESULTS, ROOT, harness, rows
from potstill.engine.config.tree import load
from potstill.engine.data.images import open_images
from potstill.engine.diffusion.sampling import ode
from potstill.engine.diffusion.sigmas import digit_reversal, karras_at
from potstill.engine.jobs.job import Job
from potstill.engine.measure.networks import features_by_name
from potstill.engine.measure.score import reference, score
from potstill.engine.methods.base import integer_at
from potstill.engine.methods.sfd import SFD, SFDConfig
from potstill.engine.models.weights import load_net
from potstill.engine.nets.edm_denoiser import EDMDenoiser
from potstill.engine.probe import material
from potstill.engine.skipping.apply import Skipping
from potstill.engine.skipping.blocks import with_unet
from potstill.engine.skipping.plan import Plan, save_plan
from potstill.engine.skipping.probe import make_plan, probe, spearman

RECIPE = ROOT / "configs/digits.yaml"
LAWS = {  # where the recipes ask their teacher, as quantiles
    "dmd": lambda u: karras_at(integer_at(u, 100, 700) / 999),
    "sim": lambda u: karras_at(0.8 * u),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--teacher", type=Path, help="a digits teacher (default: train the recipe's)")
    p.add_argument("--data", default="digits", help="what the teacher has learnt; students and samples are of the digits alone")
    p.add_argument("--kimg", type=float, default=12, help="length of every distillation")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--images", type=int, default=1024, help="for the probe")
    p.add_argument("--bins", type=int, default=8)
    p.add_argument("--batch", type=int, default=128, help="of the probe")
    p.add_argument("--n", type=int, default=1797, help="images per student's Fréchet distance")
    p.add_argument("--teacher-n", type=int, default=500, help="images per teacher's Fréchet distance, 27 evaluations each")
    p.add_argument("--out", type=Path, default=RESULTS / "cpu-digits/skipping.json")
    args = p.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        net = with_unet(load_net(args.teacher or train_teacher(work))[0])
        images = open_images(args.data)
        data = material(images, net, args.images, args.batch, 0, torch.device("cpu"))
        profile = probe(net, data, args.bins, say)
        plans = {budget: make_plan(net, data, profile, budget) for budget in (0.005, 0.02, 0.05)}
        found: dict[str, Any] = {
            "machine": harness.machine(harness.CPU),
            "command": " ".join(["python -m benches.scripts.skipping_evidence", *sys.argv[1:]]),
            "parameters": sum(p.numel() for p in net.parameters()),
            "rank_correlation": {
                "taylor": [spearman(profile.taylor[:, k], profile.alone[:, k]) for k in range(args.bins)],
                "residual_share": [spearman(profile.share[:, k], profile.raw[:, k]) for k in range(args.bins)],
            },
            "budgets": {str(b): summary(plan) for b, plan in plans.items()},
            "teacher": {str(b): teacher_speed(net, plan) for b, plan in plans.items()},
            "trajectory": trajectory_speed(net, plans[0.005]),
        }
        if args.data == "digits":
            found["sampling"] = sampling_quality(net, plans, images, args.teacher_n)
            save_plan(work / "plan.json", plans[0.005])
            file = args.teacher or work / "teacher/teacher.safetensors"
            found["distillation"] = distillation(work, file, work / "plan.json", args)
    found["minutes"] = round((time.perf_counter() - start) / 60, 1)
    rows.write(args.out, found)
    say(f"-> {args.out}")


def train_teacher(work: Path) -> Path:
    """The recipe's teacher; its student is not needed."""
    Job(load(RECIPE, [f"run_dir={work}/teacher", "log.tensorboard=false"])).teacher()
    return work / "teacher/teacher.safetensors"


def summary(plan: Plan) -> dict[str, Any]:
    return {"edges": plan.edges, "order": plan.order, "prefix": plan.prefix, **plan.report}


def teacher_speed(net: EDMDenoiser, plan: Plan, n: int = 64) -> dict[str, float]:
    """Full over light seconds of one evaluation on a stratified batch, per law of σ."""
    x = torch.randn(n, net.img_channels, net.img_resolution, net.img_resolution)
    labels = torch.eye(net.label_dim)[torch.arange(n) % net.label_dim]
    found = {}
    for name, law in LAWS.items():
        sigma = law((torch.tensor(digit_reversal(n)) + 0.5) / n)
        light = Skipping(net, plan, law)
        found[name] = speed_up({"full": lambda s=sigma: net(x, s, labels), "light": lambda s=sigma, one=light: one(x, s, labels)})["light"]
    return found


@torch.no_grad()
def speed_up(calls: dict[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Median over interleaved rounds of the first call's seconds over each other's."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 2):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - begin)
    first = next(iter(calls))
    return {name: median(a / b for a, b in zip(seconds[first], seconds[name], strict=True)) for name in calls if name != first}


@torch.no_grad()
def trajectory_speed(net: EDMDenoiser, plan: Plan, n: int = 32) -> dict[str, Any]:
    """SFD's teacher walk of 12 evaluations: speed-up, and how far its end is from the full walk's (relative RMS)."""
    sampler = SFD(SFDConfig(), net, net).teacher_sampler(4)
    x = 80 * torch.randn(n, net.img_channels, net.img_resolution, net.img_resolution)
    labels = torch.eye(net.label_dim)[torch.arange(n) % net.label_dim]
    variants = {"full": net, **light_teachers(net, {0.005: plan})}
    walks = {name: (lambda one=one: sampler.states(one, x, labels)) for name, one in variants.items()}
    ends = {name: walk()[-1] for name, walk in walks.items()}
    ratios = speed_up(walks, rounds=3)
    return {name: {"speed_up": r, "end_differs": relative(ends[name], ends["full"])} for name, r in ratios.items()}


def light_teachers(net: EDMDenoiser, plans: dict[float, Plan]) -> dict[str, Skipping]:
    first = min(plans)
    found = {f"plan {b}": Skipping(net, plan) for b, plan in plans.items()}
    found |= {f"cache {n}": Skipping(net, None, cache=n) for n in (2, 3)}
    return found | {f"plan {first}, cache 2": Skipping(net, plans[first], cache=2)}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def sampling_quality(net: EDMDenoiser, plans: dict[float, Plan], images: Any, n: int) -> dict[str, float]:
    """The Fréchet distance of Heun's samples, full and light, from the same noise."""
    features = features_by_name("pixels")
    settings = {"n": n, "against": reference(images, features, n=n)}
    variants = {"full": net, **light_teachers(net, plans)}
    return {name: score(one.eval(), ode("heun", 14), images, features, **settings)["fd"] for name, one in variants.items()}


def distillation(work: Path, teacher: Path, plan: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Students of the digits recipe with and without the plan, per seed; gradients compared every 25 iterations."""
    runs = []
    for seed in range(args.seeds):
        one: dict[str, Any] = {"seed": seed}
        for name, more in (("without", []), ("with", [f"skipping.plan={plan}", "skipping.guard_iterations=25"])):
            folder = work / f"{name}-{seed}"
            common = [
                f"run_dir={folder}",
                f"teacher.checkpoint={teacher}",
                f"seed={seed}",
                f"train.kimg={args.kimg}",
                "log.tensorboard=false",
            ]
            common += ["train.log_iterations=25", "train.grid_kimg=1000", "train.checkpoint_kimg=1000", f"eval.n={args.n}"]
            common += ["teacher.loss.sampling_steps=2"]  # the teacher is measured above
            result = Job(load(RECIPE, [*common, *more])).run()
            assert result is not None
            one[name] = {"fd": result["student"]["fd"], "seconds": result["seconds"]["student"]}
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            if compared := [line for line in lines if "skipping/cosine" in line]:
                one["cosine"] = [round(line["skipping/cosine"], 5) for line in compared]
                one["norm"] = [round(line["skipping/norm"], 4) for line in compared]
                one["left_out"] = [line["skipping/left_out"] for line in compared]
        one["fd_ratio"] = one["with"]["fd"] / one["without"]["fd"]
        say(json.dumps(one))
        runs.append(one)
    return {"runs": runs, "fd_ratio": mean(one["fd_ratio"] for one in runs)}


def say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
