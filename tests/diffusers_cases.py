"""Training of tiny random nets of diffusers: runs of every method, with prompts, an iteration or a few at a time, by one rank or several.

Use it behind `pytest.importorskip("diffusers")`.
"""

from functools import cache
from pathlib import Path

import diffusers_models
import torch
from diffusers_models import TINY
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from potstill.engine.data.prompts import Prompts, PromptStream
from potstill.engine.diffusion.tables import scheme_of
from potstill.engine.methods.base import frozen
from potstill.engine.methods.dmd import DMDConfig
from potstill.engine.methods.moment_matching import MomentMatchingConfig
from potstill.engine.methods.sfd import SFDConfig
from potstill.engine.methods.sim import SIMConfig
from potstill.engine.nets.conditions import Condition, Text
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.training.optim import OptimConfig
from potstill.engine.training.parallel import FSDPConfig, shard
from potstill.engine.training.ranks import ALONE, Ranks
from potstill.engine.training.run import Run, TrainConfig
from potstill.engine.training.saver import Saver

CPU = torch.device("cpu")
PROMPTS = 11  # of a file
#: One of every class of diffusers, and what differs from it only in settings.
FAMILIES = ["unet", "sd15", "dit", "pixart", "sd3", "flux", "sana", "qwen", "flux2", "zimage", "lumina2", "wan"]
VARIANTS = [name for name in TINY if name not in FAMILIES]
METHODS = {
    "dmd": DMDConfig(steps=[999], fake_per_student=2),
    "few": DMDConfig(steps=[999, 749, 499, 249], start="unit", fake_per_student=2),
    "gan": DMDConfig(steps=[999, 749, 499, 249], start="unit", fake_per_student=2, gan=True, gan_student=0.1, gan_fake=0.1),
    "sim": SIMConfig(levels="own", weight="one_minus_t", scale=1.0),
    "lognormal": SIMConfig(levels="lognormal", weight="one_minus_t", P_mean=0.7, P_std=1.6, scale=1.0),
    "moments": MomentMatchingConfig(steps=2, levels="own", weight="own"),
    "sfd": SFDConfig(num_steps=[3], K=2, sigma_max=14.6, metric="l2"),
}  # fmt: skip


def denoiser(name: str, seed: int = 0, **more) -> DiffusersDenoiser:
    """A net of `diffusers_models` as a run has it, its null prompt included."""
    scheduler = diffusers_models.scheduler(name)
    scheme = scheme_of(type(scheduler).__name__, scheduler.config)
    return DiffusersDenoiser(
        diffusers_models.model(name, seed), scheme, **{"size": TINY[name].shape[1:], "null": diffusers_models.null(name)} | more
    )


@cache
def prompts(name: str) -> Prompts:
    """A file of prompts, embedded."""
    rows = diffusers_models.text(name, PROMPTS, torch.Generator().manual_seed(7))
    return Prompts([f"prompt {i}" for i in range(PROMPTS)], lambda ids: rows[torch.tensor(ids)], diffusers_models.null(name), CPU)


class Feed:
    """What a run takes: images and their captions or classes as a data set would give them, and prompts, cut to its ranks' share."""

    def __init__(self, name: str, run: Run):
        self.name, self.run, self.shape = name, run, run.method.student.shape
        window, batch = run.batches.window, run.cfg.batch
        self.stream = PromptStream(prompts(name), batch=batch, asks=run.method.asks, window=window) if TINY[name].text else None

    def at(self, step: int) -> tuple[Tensor, Condition | None, tuple[Text, ...]]:
        images = torch.randn(self.run.cfg.batch, *self.shape, generator=torch.Generator().manual_seed(1000 + step))
        labels, window = diffusers_models.condition(self.name, self.run.cfg.batch, seed=step), self.run.batches.window
        return images[window], None if labels is None else labels[window], self.stream.at(step) if self.stream else ()


def new_run(name: str, method: str, ranks: Ranks = ALONE, *, teacher: DiffusersDenoiser | None = None, **settings) -> tuple[Run, Feed]:
    """teacher: instead of a new one. Adam's eps is far above rounding, so that weights without a gradient stay."""
    net = teacher or denoiser(name)
    net.recompute(settings.get("activation_checkpointing", "off"))
    with torch.random.fork_rng():
        torch.manual_seed(3)  # of a head
        made = METHODS[method].build(net, net)
    optim = OptimConfig(lr=1e-3, eps=1e-3, clip=1.0)
    run = Run(made, TrainConfig(**{"kimg": 1, "batch": 4, "optim": {"student": optim}} | settings), 0, CPU, ranks=ranks)
    return run, Feed(name, run)


def advance(run: Run, feed: Feed, steps: int) -> list[dict[str, float]]:
    """What the log says of each of so many iterations, but for the variance of images, which is over a rank's micro-batch."""
    curve = []
    for _ in range(steps):
        run.take(*feed.at(run.step))
        read = run.meter.read(run.ranks)
        curve.append({key: value for key, value in read.items() if not key.endswith(("/variance", "/variance_ratio"))})
    return curve


def weights(run: Run) -> dict[str, Tensor]:
    """All trained nets and the average, whole."""
    nets = {name: one.whole(one.net) for name, one in run.trained.items()} | {"average": run.average()}
    return {f"{name}.{key}": t.clone() for name, one in nets.items() for key, t in one.state_dict().items()}


def D(net: DiffusersDenoiser, name: str) -> Tensor:
    """Of four fixed states."""
    x = torch.randn(4, *net.shape, generator=torch.Generator().manual_seed(5))
    sigma = torch.tensor([0.1, 0.7, 2.0, 9.0])
    with torch.no_grad():
        return net(x * (1 + sigma).reshape(-1, *[1] * (x.ndim - 1)), sigma, diffusers_models.condition(name, 4, seed=6))


def run_all(ranks: Ranks, jobs: list[tuple], parts: list[tuple], folders: dict[str, str]) -> tuple[list, list, list[str]]:
    """(curve, weights, the average's D) of each job (name, method, iterations, settings); what `part` says of each; and of the pipelines
    in `folders` those whose net in 16 bit is another in shards."""
    found = []
    for name, method, steps, settings in jobs:
        run, feed = new_run(name, method, ranks, **settings)
        found.append((advance(run, feed, steps), weights(run), D(run.average(), name)))
    return found, [part(ranks, *one) for one in parts], [name for name in folders if changes_in_shards(ranks, name, folders[name])]


def changes_in_shards(ranks: Ranks, name: str, folder: str) -> bool:
    """Does D change by a bit?"""
    net = frozen(DiffusersDenoiser.from_folder(Path(folder), dtype=torch.bfloat16, size=TINY[name].shape[1:]))
    before = D(net, name)
    shard(net, init_device_mesh("cpu", (ranks.count,), mesh_dim_names=("shards",)), FSDPConfig())
    return not torch.equal(before, D(net, name))


def part(ranks: Ranks, name: str, method: str, folder: str, parallel: str, steps: int) -> list[dict[str, float]]:
    """Go on from the newest checkpoint in `folder` for some iterations, and leave one."""
    run, feed = new_run(name, method, ranks, parallel=parallel)
    saver = Saver(run, Path(folder))
    saver.load(print)
    curve = advance(run, feed, steps)
    saver.save()
    saver.finish()
    ranks.wait()
    return curve
