"""The loop: resume after kill -9, averages, schedules, and that nothing depends on how a batch is cut."""

import errno
import gc
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import Patience, outlasted, until
from torch import nn

from potstill.engine.common.errors import UserError
from potstill.engine.common.writing import whole
from potstill.engine.methods.base import Batch, Method, Turn, frozen
from potstill.engine.methods.dmd import DMD, DMDConfig
from potstill.engine.methods.teacher import EDMLoss, Teacher
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.training.log import Meter, MetricsFile
from potstill.engine.training.loop import little_garbage
from potstill.engine.training.optim import OptimConfig, learning_rate
from potstill.engine.training.run import Run, TrainConfig
from potstill.engine.training.state import EMA, ema_decay

ROOT = Path(__file__).parent.parent
TINY = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
CPU = torch.device("cpu")


def tiny_net(**kwargs):
    torch.manual_seed(1)
    return from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, dropout=0.0, **TINY | kwargs)


def batch(step, n=8):
    generator = torch.Generator().manual_seed(step)
    return torch.rand(n, 1, 8, 8, generator=generator) * 2 - 1, None


def losses(run, steps):
    return [run.take(*batch(run.step)) or run.meter.read()["teacher/denoise"] for _ in range(steps)]


def test_micro_batches_do_not_change_an_iteration():
    """Noise belongs to the sample, so cutting the batch in four changes only the order of a sum."""
    nets = []
    for micro in (None, 2):
        run = Run(Teacher(EDMLoss(), tiny_net()), TrainConfig(kimg=1, batch=8, micro_batch=micro), 0, CPU)
        losses(run, 3)
        nets.append(run.method.nets["teacher"])
    for uncut, cut in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(uncut, cut, rtol=1e-4, atol=2e-5)


def test_iterations_draw_different_noise_and_seeds_matter():
    def first_draw(seed, step):
        seen = []
        method = Teacher(EDMLoss(), tiny_net())
        method.turns = (Turn("teacher", lambda b: seen.append(b.draws.normal(3)) or method.loss(b)),)
        run = Run(method, TrainConfig(kimg=1, batch=8), seed, CPU)
        run.step = step
        run.take(*batch(0))
        return seen[0]

    draws = [first_draw(0, 0), first_draw(0, 1), first_draw(1, 0), first_draw(1, 1)]
    for i in range(4):
        for j in range(i):
            assert (draws[i] - draws[j]).abs().min() > 1e-6
    assert torch.equal(first_draw(0, 1), draws[1])


def test_ema_half_life():
    """After H images the old weight counts one half: closed form 0.5^(seen / H)."""
    net = nn.Linear(1, 1, bias=False)
    ema = EMA(net)
    with torch.no_grad():
        ema.net.weight.fill_(1.0)
        net.weight.fill_(0.0)
    for _ in range(40):
        ema.update(ema_decay(batch=5, images=10**9, half_life=100, ramp_up=0.05))
    assert ema.net.weight.item() == pytest.approx(0.5**2, rel=1e-5)


def test_ema_ramps_up():
    """H = 0.05 · images at the start: at one million images 50 thousand (gdd: decay 0.5^(256 / 50000))."""
    assert ema_decay(256, 1_000_000, 500_000, 0.05) == pytest.approx(0.5 ** (256 / 50_000))
    assert ema_decay(256, 0, 500_000, 0.05) == 0.0


def test_the_ramp_counts_the_images_before_the_batch():
    """As EDM's loop does: with batch 8 and H = images the decays of four steps are 0, 0.5, 0.5^(1/2), 0.5^(1/3)."""
    run = Run(Teacher(EDMLoss(), tiny_net()), TrainConfig(kimg=1, batch=8, ema_ramp_up=1.0), 0, CPU)
    weight, average = next(run.method.nets["teacher"].parameters()), next(run.ema.net.parameters())
    wanted = None
    for decay in (0.0, 0.5, 0.5 ** (1 / 2), 0.5 ** (1 / 3)):
        before = torch.zeros_like(weight) if wanted is None else wanted
        run.take(*batch(run.step))
        wanted = decay * before + (1 - decay) * weight.detach().double()
        torch.testing.assert_close(average.double(), wanted, rtol=1e-5, atol=1e-7)


def test_learning_rate_schedules():
    linear = OptimConfig(lr=1.0, warmup=10, schedule="linear")
    assert [learning_rate(linear, s, 110) for s in (0, 4, 9, 10, 60, 110)] == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0])
    halfway = OptimConfig(lr=1.0, schedule="halfway")
    assert [learning_rate(halfway, s, 100) for s in (0, 49, 50, 99)] == pytest.approx([1, 1, 0.1, 0.1])


def test_frozen_view_follows_and_asks_for_no_weight_gradients():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    view = frozen(net)
    x = torch.randn(4, 3, requires_grad=True)
    view(x).sum().backward()
    assert x.grad is not None
    assert [p.grad for p in [*net.parameters(), *view.parameters()] if p.grad is not None] == []
    with torch.no_grad():
        net[0].weight.add_(1)
        net[1].running_mean.add_(1)
    torch.testing.assert_close(view(x), net.eval()(x))


def test_only_the_nets_of_a_turn_are_stepped():
    """TTUR: the fake net moves in every iteration, the student in every third."""
    method = DMD(DMDConfig(fake_per_student=3), tiny_net(), tiny_net(), tiny_net())
    run = Run(method, TrainConfig(kimg=1, batch=4, optim={"student": OptimConfig(lr=1e-2)}), 0, CPU)
    moved = {"student": [], "fake": []}
    for step in range(6):
        before = {name: [p.clone() for p in net.parameters()] for name, net in method.nets.items()}
        run.take(*batch(step, 4))
        for name, net in method.nets.items():
            pairs = zip(before[name], net.parameters(), strict=True)
            moved[name].append(any(not torch.equal(a, b) for a, b in pairs))
    assert moved["fake"] == [True] * 6
    # At the very first iteration fake = teacher, so the student's gradient is exactly zero.
    assert moved["student"] == [False, False, False, True, False, False]


class Cliff(Method):
    """A loss that stops being a number at the fourth iteration."""

    def __init__(self):
        self.nets, self.step = {"student": nn.Linear(1, 1)}, 0
        self.turns = (Turn("student", self.loss),)
        self.sampler = None

    def loss(self, b: Batch):
        self.step += 1
        loss = self.nets["student"](torch.ones(1, 1)).sum() * (float("nan") if self.step > 3 else 1.0)
        return loss, {"loss": loss.detach()}


def test_divergence_stops_the_run_and_says_where(tmp_path):
    from potstill.engine.training.loop import LogConfig, train

    run = Run(Cliff(), TrainConfig(kimg=1, batch=10, log_iterations=2, checkpoint_kimg=0.02), 0, CPU)
    with pytest.raises(UserError, match="student/loss is not finite at iteration 4"):
        train(run, batch, tmp_path, title="x", log=LogConfig(tensorboard=False))
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["00000002.pt"]


def test_what_lives_is_left_out_of_garbage_but_for_a_program_that_sees_to_it():
    gc.unfreeze()
    try:
        with little_garbage():
            assert gc.get_freeze_count() > 10_000
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()  # as conftest.py had it
    before = gc.get_freeze_count()
    with little_garbage():
        assert gc.get_freeze_count() == before
    assert gc.get_freeze_count() == before


def test_meter_survives_a_checkpoint():
    one, two = Meter(), Meter()
    one.add({"a/loss": torch.tensor(1.0), "a/nonfinite": torch.tensor(2)})
    two.load_state_dict(one.state_dict())
    two.add({"a/loss": torch.tensor(4.0), "a/nonfinite": torch.tensor(1)})
    assert two.read() == {"a/loss": 2.5, "a/nonfinite": 3.0}
    assert two.read() == {}


def test_metrics_after_a_crash_are_cut_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsFile(path, 2).write({"step": 3, "new": True})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "new": True},
    ]


def test_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new/folder/file"

    def fails():
        with whole(path) as part:
            part.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*file: No space left on device; make room"):
        fails()
    assert list(path.parent.iterdir()) == []
    for text in ("one", "two"):
        with whole(path) as part:
            part.write_text(text)
        assert [file.name for file in path.parent.iterdir()] == ["file"]
        assert path.read_text() == text


# --- the whole command, killed -----------------------------------------------------------------------------------------

SMALL = [
    "net.model_channels=8", "net.channel_mult=[1]", "net.num_blocks=1", "net.attn_resolutions=[]",
    "teacher.train.kimg=1", "teacher.train.batch=32", "teacher.loss.sampling_steps=2",
    "train.kimg=6", "train.batch=32", "train.log_iterations=5", "train.checkpoint_kimg=0.5", "train.grid_kimg=6",
    "train.eval_kimg=null", "teacher.train.grid_kimg=1", "eval.n=64", "log.tensorboard=false", "precision=fp32",
]  # fmt: skip


def command(run_dir, *extra):
    return [sys.executable, "-m", "engine.train", "configs/digits.yaml", f"run_dir={run_dir}", *SMALL, *extra]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def metrics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    subprocess.run(command(folder), cwd=ROOT, env=environment(), check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_killed_run_goes_on_exactly(tmp_path, straight, signum):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "teacher.safetensors").write_bytes((straight / "teacher.safetensors").read_bytes())
    process = subprocess.Popen(command(broken), cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    patience = Patience([process.pid])
    until(lambda: process.poll() is not None or len(list((broken / "checkpoints").glob("*.pt"))) >= 2, patience)
    process.send_signal(signum)
    code = outlasted(process.wait, patience)
    process.stderr.close()
    assert code == (-signal.SIGKILL if signum == signal.SIGKILL else 128 + signal.SIGTERM)
    assert metrics(broken)[-1]["step"] < metrics(straight)[-1]["step"], "the run was over before the signal came"
    again = subprocess.run(command(broken), cwd=ROOT, env=environment(), check=True, capture_output=True, text=True)
    assert "going on from iteration" in again.stderr
    assert metrics(broken) == metrics(straight)
    summaries = [json.loads((d / "summary.json").read_text()) for d in (straight, broken)]
    assert summaries[0]["student"]["fd"] == summaries[1]["student"]["fd"]
    assert math.isfinite(summaries[0]["teacher"]["fd"])
