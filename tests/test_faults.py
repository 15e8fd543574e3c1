"""What a run survives, and what it refuses: damaged checkpoints, numbers that are none, full disks, two at once, signals, other inputs."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from patience import Patience, until
from torch import nn

from potstill.engine import train as command
from potstill.engine.common import signals
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.config.tree import load
from potstill.engine.data.images import data_variance, open_images
from potstill.engine.jobs.job import Job
from potstill.engine.jobs.lock import lock
from potstill.engine.methods.base import Method, Turn
from potstill.engine.models.weights import load_net, save_net
from potstill.engine.readers.dcp_index import read_index
from potstill.engine.readers.tensors import in_memory
from potstill.engine.readers.torch_pickles import read_archive
from potstill.engine.training.checkpoint import checkpoints, load_newest, put_aside, save_checkpoint
from potstill.engine.training.loop import Interrupted, LogConfig, train
from potstill.engine.training.run import Run, TrainConfig
from potstill.engine.training.states import not_finite, read_state

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
QUIET = LogConfig(tensorboard=False)


class Line(Method):
    """A line through the images' means. `bad`: the mean of the batch that gives NaN."""

    def __init__(self, bad: float | None = None):
        torch.manual_seed(0)
        self.nets, self.bad = {"student": nn.Linear(1, 1)}, bad
        self.turns = (Turn("student", self.loss),)
        self.sampler = None

    def loss(self, b):
        mean = b.images.mean().reshape(1, 1)
        loss = (self.nets["student"](mean) - 3 * mean).square().sum()
        return loss * (float("nan") if self.bad is not None and float(mean) == self.bad else 1.0), {"loss": loss}


def numbered(step):
    """A batch whose mean is its number."""
    return torch.full((10, 1, 1, 1), float(step)), None


def line(folder, bad=None, batch_at=numbered, **settings):
    """20 iterations; a log line every other, a checkpoint every third."""
    run = Run(
        Line(bad), TrainConfig(**{"kimg": 0.2, "batch": 10, "log_iterations": 2, "checkpoint_kimg": 0.03, "keep": 3} | settings), 0, CPU
    )
    train(run, batch_at, folder, title="x", log=QUIET)
    return run


def logged(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if k not in ("seconds", "images_per_second")} for one in lines]


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.method.nets["student"].parameters()])


def some_state(value=1.0):
    tensors = {"a": torch.full((300,), value), "b": torch.arange(7)}
    return {
        "nets": {"student": tensors}, "optimizers": {}, "ema": dict(tensors), "method": {}, "meter": {"sums": {}, "counts": {}},
        "guard": {}, "seconds": 1.5, "best": float("inf"),
    }  # fmt: skip


# --- checkpoints -------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_of_a_checkpoint_is_noticed_or_does_not_count(tmp_path):
    """Against the state itself: whatever byte is flipped, what is loaded is the same, or the one before is."""
    for step, value in ((1, 1.0), (2, 2.0)):
        save_checkpoint(tmp_path, step, some_state(value), 2)
    path, said = tmp_path / "00000002.pt", []
    whole = path.read_bytes()
    wanted, counted = load_newest(tmp_path, CPU, say=said.append), 0
    assert wanted is not None and wanted["step"] == 2 and said == []
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        state = load_newest(tmp_path, CPU, say=said.append)
        if state["step"] == 1:
            counted += 1
            (tmp_path / "00000002.pt.damaged").unlink()
            continue
        assert torch.equal(state["nets"]["student"]["a"], torch.full((300,), 2.0)), at
        assert torch.equal(state["nets"]["student"]["b"], torch.arange(7)), at
        assert {k: v for k, v in state.items() if k not in ("nets", "ema")} == {
            k: v for k, v in wanted.items() if k not in ("nets", "ema")
        }, at
    assert counted == len(said) > len(whole) / 7 / 2
    assert all("00000002.pt" in line and line.endswith("; going on from the one before") for line in said)


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "nan", "no state"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_and_the_run_repeats_exactly(tmp_path, damage, capsys):
    straight = line(tmp_path / "straight")
    folder = tmp_path / "run"
    line(folder, kimg=0.15)
    newest = checkpoints(folder / "checkpoints")[-1]
    if damage == "nan":
        state = load_newest(folder / "checkpoints", CPU)
        state["ema"]["weight"][:] = float("nan")
        torch.save(state, newest)
    elif damage == "no state":
        torch.save({"step": 15}, newest)
    else:
        newest.write_bytes({"cut": newest.read_bytes()[:-100], "empty": b"", "garbage": b"\x80\x04garbage"}[damage])
    run = line(folder)
    said = capsys.readouterr().err
    assert f"checkpoint {newest}" in said and "going on from the one before" in said and "going on from iteration 12" in said
    assert "Traceback" not in said and "weights_only" not in said
    assert torch.equal(weights(run), weights(straight))
    assert logged(folder) == logged(tmp_path / "straight")
    assert newest.with_name(newest.name + ".damaged").exists()


def test_where_no_checkpoint_is_whole_the_run_is_refused(tmp_path):
    line(tmp_path, kimg=0.1)
    for path in checkpoints(tmp_path / "checkpoints"):
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"there is none that is whole: restore one, or remove .*checkpoints to start this stage over"):
        line(tmp_path)
    assert len(checkpoints(tmp_path / "checkpoints")) == 3  # where they were, also for the next call


@pytest.mark.filterwarnings("ignore:.*assuming the intent is to save in a single process", "ignore:TypedStorage is deprecated")
def test_a_sharded_index_names_tensors_alone(tmp_path):
    """PyTorch's own writer puts a number beside a tensor as bytes, which its planner would unpickle."""
    from torch.distributed.checkpoint import save
    from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

    tensors = {"a/b": torch.ones(3, 4), "c": torch.ones(2, dtype=torch.bfloat16), "e": torch.zeros(())}
    save(tensors, storage_writer=FileSystemWriter(str(tmp_path / "good")), no_dist=True)
    ours, theirs = read_index(tmp_path / "good"), FileSystemReader(str(tmp_path / "good")).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    save(tensors | {"d": 3}, storage_writer=FileSystemWriter(str(tmp_path / "bytes")), no_dist=True)
    with pytest.raises(Damaged, match="BytesStorageMetadata, which no tensor needs"):
        read_index(tmp_path / "bytes")


def test_a_full_disk_leaves_the_checkpoints_that_are_there(tmp_path):
    """In a child whose files may have 20 kB."""
    big = some_state()
    big["nets"]["student"]["a"] = torch.zeros(10_000)

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        save_checkpoint(tmp_path, 1, some_state(), 2)
        with pytest.raises(UserError, match=r"cannot write .*00000002.pt: File too large"):
            save_checkpoint(tmp_path, 2, big, 2)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert [file.name for file in tmp_path.iterdir()] == ["00000001.pt"]
    assert load_newest(tmp_path, CPU)["step"] == 1


# --- numbers that are none ---------------------------------------------------------------------------------------------


def test_not_finite_names_the_tensor():
    state = some_state()
    assert not_finite(state) is None
    state["nets"]["student"]["c"] = torch.tensor([1.0, float("inf")]).bfloat16()
    assert not_finite(state) == "nets/student/c"


def test_no_checkpoint_holds_what_is_not_finite_and_the_advice_works(tmp_path, capsys):
    """NaN in batch 7, checkpoints at every iteration, log lines at every twentieth."""
    settings = {"log_iterations": 20, "checkpoint_kimg": 0.01}
    with pytest.raises(UserError, match=r"is not finite at iteration 8; .*train.on_nonfinite=rollback goes on"):
        line(tmp_path, bad=7.0, **settings)
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "00000007.pt"
    run = line(tmp_path, bad=7.0, on_nonfinite="rollback", **settings)
    assert run.left_out == [7]
    assert "batch 7 is left out from now on" in capsys.readouterr().err


def test_rollback_is_the_run_without_that_batch(tmp_path):
    """Against a run that was never given batch 7."""
    found = line(tmp_path / "a", bad=7.0, on_nonfinite="rollback")
    wanted = line(tmp_path / "b", batch_at=lambda step: numbered(step + (step >= 7)))
    assert torch.equal(weights(found), weights(wanted))
    assert logged(tmp_path / "a") == logged(tmp_path / "b")
    assert line(tmp_path / "a", kimg=0.25, on_nonfinite="rollback").left_out == [7]  # what goes on knows of it


def test_a_training_that_diverges_stops_after_some_rollbacks(tmp_path):
    run = Run(Line(), TrainConfig(kimg=0.2, batch=10, log_iterations=2, on_nonfinite="rollback"), 0, CPU)
    run.method.turns = (Turn("student", lambda b: (run.method.nets["student"](torch.ones(1, 1)).sum() * float("nan"), {})),)
    with pytest.raises(UserError, match=r"after 10 rollbacks; .* The training diverges"):
        train(run, numbered, tmp_path, title="x", log=QUIET)


# --- files beside them -------------------------------------------------------------------------------------------------


def test_damaged_lines_of_metrics_are_dropped_and_the_others_kept(tmp_path):
    line(tmp_path / "straight")
    line(tmp_path / "run", kimg=0.14)
    file = tmp_path / "run/metrics.jsonl"
    good = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(
        b"\xff\xfe\n" + b"".join(good[:3]) + b'[1]\n{"step": "x"}\n' + b"[" * 100_000 + b"\n" + b"".join(good[3:]) + b'{"step": 1'
    )
    line(tmp_path / "run")
    assert logged(tmp_path / "run") == logged(tmp_path / "straight")


def test_pictures_of_a_time_that_comes_again_are_removed(tmp_path):
    line(tmp_path, kimg=0.15)
    (tmp_path / "samples").mkdir()
    for images in (100, 150, 160):
        (tmp_path / f"samples/{images:010d}.png").touch()
    line(tmp_path)
    assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == ["0000000100.png", "0000000150.png"]


def test_a_folder_that_is_removed_meanwhile_is_not_made_again(tmp_path):
    def batch_at(step):
        if step == 10:
            shutil.rmtree(tmp_path / "run")
        return numbered(step)

    with pytest.raises(UserError, match=r"run was removed or replaced while|cannot write .*metrics.jsonl"):
        line(tmp_path / "run", batch_at=batch_at)
    assert not (tmp_path / "run/checkpoints").exists()


# --- two at once, signals ----------------------------------------------------------------------------------------------


def hold(file, ready, reader):
    with lock(file):
        if reader:  # such as a worker of a DataLoader, which lives on for a while
            context = multiprocessing.get_context("fork")
            context.Process(target=time.sleep, args=(30,), daemon=True).start()
        ready.set()
        time.sleep(60)


@pytest.mark.parametrize("reader", [False, True])
def test_a_lock_names_its_owner_and_ends_with_it(tmp_path, reader):
    context = multiprocessing.get_context("fork")
    ready, file = context.Event(), tmp_path / "run/.lock"
    other = context.Process(target=hold, args=(file, ready, reader))
    other.start()
    ready.wait()
    with pytest.raises(UserError, match=f"process {other.pid} on .* works in {tmp_path}/run: wait for it or stop it"), lock(file):
        pass
    other.kill()
    other.join()
    with lock(file), lock(file):
        assert file.exists()
    assert not file.parent.exists()  # nothing has come of it


@contextmanager
def tiny(tmp_path, monkeypatch, *settings):
    monkeypatch.chdir(ROOT)
    yield [
        "digits", f"run_dir={tmp_path}/run", "net.model_channels=8", "net.channel_mult=[1]", "net.num_blocks=1", "net.attn_resolutions=[]",
        "teacher.train.kimg=0.064", "teacher.train.batch=16", "teacher.loss.sampling_steps=2", "train.kimg=0.128", "train.batch=16",
        "train.log_iterations=2", "eval.n=8", "log.tensorboard=false", "precision=fp32", "device=cpu", *settings,
    ]  # fmt: skip


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    with tiny(tmp_path, monkeypatch) as found:
        yield found


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_in_the_last_iteration_of_a_stage_ends_the_run(tmp_path, name):
    """Not the stage alone: the next one would train whole before anybody looked."""

    def batch_at(step):
        if step == 19:
            os.kill(os.getpid(), signal.Signals[name])
        return numbered(step)

    with pytest.raises(Interrupted, match=f"{name}: saved .*; the same command goes on"):
        line(tmp_path, batch_at=batch_at)
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "00000020.pt"


def test_a_signal_while_it_measures_is_one_line_and_the_command_goes_on(arguments, monkeypatch, capsys):
    measure = Job.measure
    monkeypatch.setattr(Job, "measure", lambda job, nets: os.kill(os.getpid(), signal.SIGTERM))
    from potstill.engine.common.cli import run

    with pytest.raises(SystemExit) as ended:
        run(command.main, arguments)
    assert ended.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.splitlines()[-1].startswith("SIGTERM: stopped; what is done is kept, and the same command goes on")
    monkeypatch.setattr(Job, "measure", measure)
    run(command.main, arguments)
    assert "student" in capsys.readouterr().out


def test_max_hours_saves_and_ends(tmp_path):
    line(tmp_path / "first")  # what is imported late is there now
    with pytest.raises(Interrupted, match=r"max_hours are over: saved .*; the same command goes on"), signals.stoppable(3 / 3600):
        line(tmp_path / "run", kimg=1e6, checkpoint_kimg=1e6)
    assert len(checkpoints(tmp_path / "run/checkpoints")) == 1


def test_max_hours_of_a_command(arguments):
    from potstill.engine.common.cli import run

    with pytest.raises(SystemExit) as ended:
        run(command.main, [*arguments, "train.kimg=1000", f"max_hours={1 / 3600}"])
    assert ended.value.code == 142


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(one) for one in signals.SIGNALS]
    with signals.stoppable(1.0), signals.collected():
        pass
    assert [signal.getsignal(one) for one in signals.SIGNALS] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_two_runs_in_one_folder(arguments, tmp_path):
    """The second one is refused while the first one trains, and goes on where it is killed."""
    first = subprocess.Popen([sys.executable, "-m", "engine.train", *arguments, "train.kimg=1000"], cwd=ROOT, stderr=subprocess.PIPE)
    until(lambda: (tmp_path / "run/metrics.jsonl").exists() or first.poll() is not None, Patience([first.pid]))
    with pytest.raises(UserError, match=f"process {first.pid} on .* works in {tmp_path}/run"):
        command.main(arguments)
    first.kill()
    first.wait()
    first.stderr.close()
    command.main(arguments)
    assert (tmp_path / "run/summary.json").exists()


# --- other inputs ------------------------------------------------------------------------------------------------------


def test_data_that_were_replaced_are_noticed(tmp_path, monkeypatch):
    file, rng = tmp_path / "data.npz", np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(file, images=images, labels=np.arange(40) % 10)
    with tiny(tmp_path, monkeypatch, f"data.path={file}") as arguments:
        command.main([*arguments, "train.kimg=0.064"])
        before = logged(tmp_path / "run")
        np.savez(file, images=255 - images, labels=np.arange(40) % 10)
        with pytest.raises(UserError, match=r"begun with another data: .*to go on with the new one all the same, remove .*inputs.json"):
            command.main(arguments)
        assert logged(tmp_path / "run") == before
        (tmp_path / "run/inputs.json").unlink()
        command.main(arguments)  # as it said


def test_a_teacher_that_was_replaced_is_noticed(tmp_path, arguments, capsys):
    command.main([*arguments, "train.kimg=0.064"])
    file = tmp_path / "run/teacher.safetensors"
    net, meta = load_net(file)
    with torch.no_grad():
        next(net.parameters()).add_(0.01)
    shutil.copy(file, tmp_path / "old.safetensors")
    save_net(file, net, **{k: v for k, v in meta.items() if k not in ("precond", "kwargs", "format", "checksum")})
    with pytest.raises(UserError, match="begun with another teacher: sha256 was"):
        command.main(arguments)
    data = bytearray((tmp_path / "old.safetensors").read_bytes())
    data[-30] ^= 0x40
    file.write_bytes(data)
    capsys.readouterr()
    command.main(arguments)  # it is the run's own, so it is made again from its last checkpoint
    assert "teacher.safetensors is damaged" in capsys.readouterr().err
    assert all(
        torch.equal(a, b)
        for a, b in zip(load_net(file)[0].parameters(), load_net(tmp_path / "old.safetensors")[0].parameters(), strict=True)
    )


def test_another_length_under_a_schedule_is_told(tmp_path, arguments, capsys):
    assert load("digits", []).train.optim["student"].schedule != "constant"
    command.main([*arguments, "train.kimg=0.064"])
    assert "note: train.kimg" not in capsys.readouterr().err
    command.main(arguments)
    assert "note: train.kimg was 0.064, now 0.128: what is spread over the whole length" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_says_what_to_do():
    from potstill.engine.common.errors import writing

    with pytest.raises(UserError, match="cannot write x: No space left on device; make room, or choose another place"), writing("x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- what a review found -----------------------------------------------------------------------------------------------


def saved_in(path, pickled):
    """A file of torch.save with this pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
    return path


def test_values_that_unfold_without_end_are_refused(tmp_path):
    """Two hundred bytes that name a list twice in a list, forty times: 2^40 steps for who walks through it."""
    doubled = (
        b"\x80\x02]q\x00"
        + b"".join(b"]q" + bytes([k]) + b"(h" + bytes([k - 1]) + b"h" + bytes([k - 1]) + b"e" for k in range(1, 41))
        + b"."
    )
    assert isinstance(in_memory(read_archive(*archive_of(saved_in(tmp_path / "a.pt", doubled)))), list)  # each once
    for pickled, words in (
        (b"\x80\x02]q\x00h\x00a.", "holds a value within itself"),
        (b"\x80\x02" + b"]" * 100 + b"a" * 99 + b".", "64 deep"),
    ):
        with pytest.raises(Damaged, match=words):
            read_state(saved_in(tmp_path / "b.pt", pickled))


def archive_of(path):
    return memoryview(path.read_bytes()), path


def test_a_damaged_checkpoint_is_put_aside_a_second_time(tmp_path):
    aside = tmp_path / "00000002.dcp.damaged"
    aside.mkdir()
    (aside / "old").touch()
    (tmp_path / "00000002.dcp").mkdir()
    put_aside(tmp_path / "00000002.dcp")
    assert list(aside.iterdir()) == []


def test_a_lock_that_is_waited_for(tmp_path, capfd):
    context = multiprocessing.get_context("fork")
    ready, file = context.Event(), tmp_path / "run/.lock-common"
    other = context.Process(target=hold, args=(file, ready, False))
    other.start()
    ready.wait()
    threading.Timer(0.5, other.kill).start()
    with lock(file, wait=True):
        assert not other.is_alive() or other.join(5) is None
    assert f"waiting for process {other.pid} on " in capfd.readouterr().err


def test_the_datas_variance_is_numpys():
    images = open_images("digits")
    some = images.thinned(512)
    pixels = np.stack([some.read(i) for i in range(len(some))]) / 127.5
    assert data_variance(images) == pytest.approx(float(pixels.var(0).mean()), rel=1e-12)


def test_a_net_that_no_weight_file_may_hold_is_refused_before_it_is_trained(arguments):
    with pytest.raises(UserError, match=r"net\.num_blocks = 33, wanted a whole number from 1 to 32"):
        command.main([*arguments, "net.num_blocks=33"])
    command.main([*arguments, "net.attn_resolutions=[0]", "train.kimg=0.064"])  # none, as others write it
