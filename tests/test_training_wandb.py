"""Weights & Biases, by a stand-in that does what its client and server do: one run at a time, steps that only grow."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from potstill.engine import train as command
from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.sampling import one_step
from potstill.engine.methods.base import Method, Turn
from potstill.engine.training.loop import Interrupted, LogConfig, train
from potstill.engine.training.run import Run, TrainConfig

DIGITS = str(Path(__file__).parent.parent / "configs/digits.yaml")


class Wandb(ModuleType):
    """The module `wandb`, and its server: `stored`, by id."""

    class Error(Exception):
        pass

    class UsageError(Error):
        pass

    class Run:
        def __init__(self, client, id, settings):
            self.client, self.id, self.settings = client, id, settings
            self.history, self.codes = {}, []

        def log(self, data, step):
            if self.client.run is not self:
                raise Wandb.UsageError(f"Run ({self.id}) is finished. The call to `log` will be ignored.")
            if step >= max(self.history, default=0):  # else it is dropped, with a warning
                self.history.setdefault(step, {}).update(data)

        def finish(self, exit_code=None):
            self.codes.append(exit_code)
            self.client.run = None

    def __init__(self):
        super().__init__("wandb")
        self.stored, self.run, self.logged_in = {}, None, True

    def init(self, *, project, dir, id, resume, name, group, job_type):
        if not self.logged_in:
            raise Wandb.UsageError("No API key configured. Use `wandb login` to log in.")
        if self.run is not None:  # reinit="default"
            return self.run
        if any(c in id for c in r"/\#?%:"):
            raise Wandb.UsageError("Invalid Run ID")
        if resume != "allow" or (project, id) not in self.stored:
            self.stored[project, id] = Wandb.Run(self, id, {"name": name, "group": group, "job_type": job_type, "dir": dir})
        self.run = self.stored[project, id]
        return self.run


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


class Falling(Method):
    """A weight that falls; from iteration `breaks` on its loss is no number."""

    def __init__(self, breaks: int):
        self.nets, self.step, self.breaks = {"student": nn.Linear(1, 1)}, 0, breaks
        self.turns, self.sampler = (Turn("student", self.loss),), one_step(1.0)

    def loss(self, b):
        self.step += 1
        loss = self.nets["student"](torch.ones(1, 1)).sum() * (float("nan") if self.step >= self.breaks else 1.0)
        return loss, {"loss": loss.detach()}


def trained(folder: Path, *, stop_at: int | None = None, breaks: int = 99) -> None:
    """Six iterations, a checkpoint at every second, in project p; interrupted at one of them."""
    torch.manual_seed(0)
    run = Run(Falling(breaks), TrainConfig(kimg=0.06, batch=10, log_iterations=1, checkpoint_kimg=0.02), 0, torch.device("cpu"))

    def batch_at(step):
        if step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.zeros(10, 1, 1, 1), None

    train(run, batch_at, folder, title="student", log=LogConfig(tensorboard=False, wandb="p"), group=folder.name)


def lines(folder: Path) -> dict[int, dict]:
    """metrics.jsonl as W&B should have it."""
    found = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        found.setdefault(line.pop("step"), {}).update(line)
    return found


def test_every_stage_is_a_run_of_its_own(tmp_path, wandb):
    small = ["net.model_channels=8", "net.channel_mult=[1]", "net.num_blocks=1", "net.attn_resolutions=[]", "data.path=synthetic:8x1x2x8"]
    short = [f"{stage}.{key}" for stage in ("teacher.train", "train") for key in ("batch=4", "kimg=0.008", "log_iterations=1")]
    students = ["students.count=2", "students.partition=blocks", "teacher.loss.sampling_steps=2", "train.eval_kimg=0.004"]
    command.main([DIGITS, f"run_dir={tmp_path}/r", "log.wandb=p", "log.tensorboard=false", *small, *short, *students])
    runs = list(wandb.stored.values())
    assert [run.settings["name"] for run in runs] == ["r teacher", "r student-0", "r student-1"]
    assert {run.settings["group"] for run in runs} == {"r"}
    assert [run.settings["job_type"] for run in runs] == ["teacher", "student-0", "student-1"]
    assert [run.codes for run in runs] == [[0]] * 3
    for run in runs:
        assert run.history.keys() == {1, 2}
        assert run.history == lines(Path(run.settings["dir"]))
    assert all("fd@8" in run.history[1] for run in runs[1:])


def test_run_that_goes_on_goes_on_in_wandb(tmp_path, wandb):
    with pytest.raises(Interrupted):
        trained(tmp_path / "a", stop_at=3)
    trained(tmp_path / "a")
    (run,) = wandb.stored.values()
    assert run.codes == [1, 0]
    assert run.history == lines(tmp_path / "a")
    trained(tmp_path / "a")  # is done
    assert run.codes == [1, 0]


def test_signal_in_the_last_iteration_ends_the_command_too(tmp_path, wandb):
    """Else a teacher's last one would swallow it, and the student's training begin."""
    with pytest.raises(Interrupted, match="the same command goes on from there"):
        trained(tmp_path / "a", stop_at=6)
    trained(tmp_path / "a")  # nothing is left to do
    assert sorted(lines(tmp_path / "a")) == [1, 2, 3, 4, 5, 6]


def test_runs_of_one_project_are_apart(tmp_path, wandb):
    for parent in ("x", "y"):
        trained(tmp_path / parent / "teacher")
    assert len(wandb.stored) == 2
    assert all(sorted(run.history) == [1, 2, 3, 4, 5, 6] for run in wandb.stored.values())


def test_error_ends_the_run_in_wandb_as_failed(tmp_path, wandb):
    with pytest.raises(UserError, match="not finite at iteration 5"):
        trained(tmp_path / "a", breaks=5)
    assert [run.codes for run in wandb.stored.values()] == [[1]]
    assert wandb.run is None


def test_start_over_is_a_new_run(tmp_path, wandb):
    trained(tmp_path / "a")
    shutil.rmtree(tmp_path / "a/checkpoints")  # as the message about a broken checkpoint says
    trained(tmp_path / "a")
    assert [sorted(run.history) for run in wandb.stored.values()] == [[1, 2, 3, 4, 5, 6]] * 2


def test_no_login_is_one_sentence(tmp_path, wandb):
    wandb.logged_in = False
    with pytest.raises(UserError, match=r"W&B starts no run \(No API key .*: wandb login, or WANDB_MODE=offline"):
        trained(tmp_path / "a")


def test_missing_package_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("potstill.engine.common.packages.installed", lambda package: package != "wandb")
    with pytest.raises(UserError, match=r"package wandb, for log.wandb: pip install 'potstill\[wandb\]'"):
        command.main([DIGITS, f"run_dir={tmp_path}/r", "log.wandb=p"])
    assert not (tmp_path / "r").exists()
