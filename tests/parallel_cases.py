"""What tests/test_parallel.py runs in several processes: every method on tiny U-Nets, a few iterations at a time."""

import contextlib
import functools
import importlib
import os
import pickle
import signal
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from potstill.engine.common.errors import UserError
from potstill.engine.methods.base import Method, frozen
from potstill.engine.methods.dmd import DMD, DMDConfig
from potstill.engine.methods.gdd import GDD, GDDConfig
from potstill.engine.methods.moment_matching import Alternating, Instant, MomentMatchingConfig
from potstill.engine.methods.msd import TSM
from potstill.engine.methods.sfd import SFD, SFDConfig
from potstill.engine.methods.sida import SIDA, SIDAConfig
from potstill.engine.methods.sim import SIM, SIMConfig
from potstill.engine.methods.teacher import EDMLoss, Teacher
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.features import load_feature_net
from potstill.engine.skipping.apply import Guard, Skipping
from potstill.engine.skipping.blocks import blocks_of
from potstill.engine.skipping.plan import Plan, SkippingConfig
from potstill.engine.training import ranks as speech
from potstill.engine.training import run as stage
from potstill.engine.training.checkpoint import drop, load_newest, save_checkpoint
from potstill.engine.training.compile import compile_nets
from potstill.engine.training.loop import Interrupted, LogConfig, train
from potstill.engine.training.optim import OptimConfig
from potstill.engine.training.ranks import Ranks, meet, one_voice
from potstill.engine.training.run import Run, TrainConfig
from potstill.engine.training.sharded import ShardedWriter

BATCH, STEPS = 8, 20
CPU = torch.device("cpu")
SHAPE = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


#: Where nets are made: a method is built of nets that lie where it will run, for its frozen views do not move with them.
WHERE = [CPU]


def net(seed: int, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    made = from_kwargs("EDMPrecond", img_resolution=4, img_channels=1, label_dim=2, dropout=0.0, **SHAPE | kwargs)
    with torch.no_grad():  # a fresh net's last layers are almost zero, and so would be most gradients
        for p in made.parameters():
            p += 0.05 * torch.randn(p.shape)
    return made.to(WHERE[0])


def edm2_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    shape = {
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [],
        "channels_per_head": 4,
        "logvar_channels": 8,
    }
    made = from_kwargs("EDM2Precond", img_resolution=4, img_channels=1, label_dim=2, **shape)
    with torch.no_grad():  # fresh gains are zero, and so would be all gradients
        for name, p in made.named_parameters():
            if "gain" in name:
                p += 0.5
    return made.to(WHERE[0])


def edm2():
    return SIM(SIMConfig(scale=1.0), edm2_net(1), edm2_net(2), edm2_net(3))


def edm2_teacher():
    return Teacher(EDMLoss(P_mean=-0.4, P_std=1.0), edm2_net(1))


def dmd():
    return DMD(DMDConfig(gan=True, gan_student=0.1, gan_fake=0.1, fake_per_student=2), net(1), net(2), net(3))


def sim():
    return SIM(SIMConfig(scale=1.0), net(1), net(2), net(3))


def sida():
    """All three of its turns within 20 iterations; a student that moves, so that its gradient and the GAN's are there from the start."""
    return SIDA(SIDAConfig(scale=1.0, student_after=0.032, gan_after=0.064), net(1), net(2), net(3))


def alternating():
    return Alternating(MomentMatchingConfig(steps=2, weight="flat"), net(1), net(2), net(3))


def instant():
    return Instant(MomentMatchingConfig(variant="instant", weight="flat", measure_batch=4, measure_every=8, eps=1e-2), net(1), net(2))


def gdd():
    teacher = net(1)
    torch.manual_seed(4)
    return GDD(GDDConfig(width=4, sum_over=1.0, r1_every=4, r1_gamma=1.0), net(2), [load_feature_net("teacher", frozen(teacher))])


def few():
    """DMD2 in three steps: all ranks and micro-batches stop at one of them."""
    cfg = DMDConfig(gan=True, gan_student=0.1, gan_fake=0.1, fake_per_student=2, steps=[700, 500, 300])
    return DMD(cfg, net(1), net(2), net(3))


def few_gdd():
    teacher = net(1)
    torch.manual_seed(4)
    cfg = GDDConfig(width=4, sum_over=1.0, r1_every=4, r1_gamma=1.0, steps=[700, 500, 300])
    return GDD(cfg, net(2), [load_feature_net("teacher", frozen(teacher))])


def sfd():
    return SFD(SFDConfig(num_steps=[4, 5], K=2, step_condition=True), net(1), net(2))


def tsm():
    return TSM(net(1), net(2, model_channels=4))


def light():
    """SIM with a teacher that leaves out what a made-up plan says."""
    method, names = sim(), list(blocks_of(net(1).model))
    affine = {name: {"a": [[0.8] * 8] * 2, "b": [[0.1] * 8] * 2} for name in names[:2]}
    plan = Plan("", 4, [0.002, 1.0, 80.0], names, [2, 1], 0.02, affine)
    method.teacher = Skipping(method.teacher, plan, method.teacher_level)
    method.stratified = True
    return method


METHODS = {
    "dmd": dmd,
    "sim": sim,
    "sida": sida,
    "alternating": alternating,
    "instant": instant,
    "gdd": gdd,
    "sfd": sfd,
    "tsm": tsm,
    "few": few,
    "few_gdd": few_gdd,
}
METHODS |= {"edm2": edm2, "edm2_teacher": edm2_teacher}


def made(name: str, device: torch.device) -> Method:
    """The method of that name, on that device."""
    WHERE[0] = device
    return light() if name == "light" else METHODS[name]()


def new_run(name: str, ranks: Ranks, parallel: str = "ddp", device: torch.device = CPU, **settings) -> Run:
    # Adam's eps is far above rounding: else weights without a gradient (a bias before a norm) would follow its noise
    optim = OptimConfig(lr=1e-3, eps=1e-3, clip=1.0)
    cfg = TrainConfig(kimg=BATCH * STEPS / 1000, batch=BATCH, optim={"student": optim}, parallel=parallel, **settings)
    method = made(name, device)
    if cfg.compile != "off":  # all of torch.compile but minutes of C++
        with mock.patch.object(stage, "compile_nets", lambda *given: compile_nets(*given, backend="aot_eager")):
            run = Run(method, cfg, 0, device, ranks=ranks)
        assert run.compiled
        return run
    if name != "light":
        return Run(method, cfg, 0, device, ranks=ranks)
    run = Run(method, cfg, 0, device, ranks=ranks)
    run.guard = Guard(method.teacher, SkippingConfig(guard_iterations=4, cosine=0.9), print)
    return run


def advance(run: Run, steps: int) -> list[dict[str, float]]:
    """What the log says of each of so many iterations.

    The images are drawn from 1000 on: with those from 0 on instant moment matching cancels at iteration 3, and rounding
    shows more there (up to 1e-5 of a gradient's norm; 1e-6 on these).
    """
    curve = []
    for _ in range(steps):
        generator = torch.Generator().manual_seed(1000 + run.step)
        images = torch.rand(BATCH, 1, 4, 4, generator=generator) * 2 - 1
        labels = torch.eye(2)[torch.randint(2, (BATCH,), generator=generator)]
        run.take(images[run.batches.window].to(run.device), labels[run.batches.window].to(run.device))
        read = run.meter.read(run.ranks)  # how varied images are is told of each micro-batch of each rank, so it depends on what these are
        curve.append({name: value for name, value in read.items() if not name.endswith(("/variance", "/variance_ratio"))})
    return curve


def weights(run: Run) -> dict[str, torch.Tensor]:
    """All trained nets and the averages, whole."""
    nets = {name: one.whole(one.net) for name, one in run.trained.items()} | {"average": run.average()}
    nets |= {f"profile {std:g}": run.profile(std) for std in run.cfg.phema}
    return {f"{name}.{key}": t.clone() for name, one in nets.items() for key, t in one.state_dict().items()}


def run_all(ranks: Ranks, jobs: list[tuple[str, str, dict]]) -> dict[tuple, tuple]:
    """(curve, weights) of each job (method, parallel, settings)."""
    found = {}
    for name, parallel, settings in jobs:
        run = new_run(name, ranks, parallel, **settings)
        found[key(name, parallel, settings)] = advance(run, STEPS), weights(run)
    return found


def key(name: str, parallel: str, settings: dict) -> tuple:
    return name, parallel, *sorted((k, str(v)) for k, v in settings.items())


def part(ranks: Ranks, folder: str, parallel: str, steps: int, settings: dict | None = None) -> tuple[list[dict[str, float]], dict]:
    """Go on from the newest checkpoint in `folder` for some steps, and leave one."""
    run, path = new_run("dmd", ranks, parallel, **settings or {}), Path(folder)
    if state := load_newest(path, CPU, run.like if run.sharded else None):
        run.load_state_dict(state)
    curve = advance(run, steps)
    run.meter.add({"x/loss": torch.tensor(float(ranks.rank)), "x/nonfinite": torch.tensor(1)})
    if run.sharded:
        writer = ShardedWriter(path, ranks, functools.partial(drop, keep=2))
        writer.save(run.step, run.state_dict())
        writer.finish()
    else:
        state = run.state_dict()
        if ranks.first:
            save_checkpoint(path, run.step, state, keep=2)
        ranks.wait()
    return curve, weights(run)


def process(rank: int, count: int, port: int, out: str, work: str, arguments: tuple, beats: tuple | None = None) -> None:
    """One of `count` processes: does work(ranks, *arguments); rank 0 leaves the result, or any its error, in `out`.

    work: a function of this module, or MODULE.FUNCTION.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    os.dup2(os.open(f"{out}.{rank}.stderr", os.O_WRONLY | os.O_CREAT), 2)
    # No rank gives up another before the test does, unless that is what is tested: signs of life come late on a busy machine.
    speech.BEAT, speech.STALE, speech.LAST_WORDS = beats or (2.0, 600.0, 5.0)
    try:
        if work == "command":  # which meets the others itself
            return command(speech.ALONE, *arguments)
        ranks = meet()
        ranks.connect(CPU)
        module, _, function = work.rpartition(".")
        result = getattr(importlib.import_module(module or __name__), function)(ranks, *arguments)
        if rank == 0:
            Path(out).write_bytes(pickle.dumps(result))
        ranks.close()
    except BaseException:
        Path(f"{out}.{rank}.error").write_text(traceback.format_exc())
        os._exit(1)


def command(ranks: Ranks, *arguments: str) -> None:
    """potstill train as every rank of torchrun calls it; `ranks` is not there yet."""
    from potstill.engine import train

    train.main(list(arguments))


def meets(ranks: Ranks) -> None:
    """All wait for all, and part."""
    ranks.wait()


def one_refuses(ranks: Ranks) -> None:
    """Rank 1 has something to say, the others wait for it."""
    with one_voice(ranks):
        if ranks.rank == 1:
            raise UserError("only rank 1 has seen this")
        ranks.wait()


def one_hangs(ranks: Ranks) -> None:
    """Rank 1 stops in the middle of everything, as a process does whose machine swaps or is gone."""
    with one_voice(ranks):
        ranks.wait()
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        ranks.wait()


def interrupted(ranks: Ranks, folder: str) -> list[int]:
    """Rank 1 alone is asked to stop after iteration 5. Returns where each rank stopped."""
    run, path = new_run("sim", ranks, "fsdp", log_iterations=2), Path(folder)
    path.mkdir(exist_ok=True)

    def batch_at(step: int) -> tuple[torch.Tensor, None]:
        if step == 5 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.zeros(BATCH // ranks.count, 1, 1, 1), None

    with contextlib.suppress(Interrupted):
        train(run, batch_at, path, title="x", log=LogConfig(tensorboard=False))
    steps = torch.zeros(ranks.count)
    steps[ranks.rank] = run.step
    return [int(s) for s in ranks.total(steps)]
