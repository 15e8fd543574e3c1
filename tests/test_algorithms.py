"""Which algorithms PyTorch may choose from: the two settings, what they exclude, and that every method runs on those that repeat."""

from pathlib import Path

import parallel_cases as cases
import pytest
import torch

from potstill.engine import train
from potstill.engine.common.errors import UserError
from potstill.engine.jobs import machine
from potstill.engine.models.weights import read_tensors
from potstill.engine.training import memory
from potstill.engine.training.ranks import ALONE
from potstill.engine.training.run import Share

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DIGITS = str(Path(__file__).parent.parent / "configs/digits.yaml")
SMALL = [
    "net.model_channels=8", "net.channel_mult=[1]", "net.num_blocks=1", "net.attn_resolutions=[]", "device=cpu", "precision=fp32",
    "teacher.train.kimg=0.064", "teacher.train.batch=32", "teacher.loss.sampling_steps=2", "train.kimg=0.128", "train.batch=32",
    "train.eval_kimg=null", "eval.n=16", "log.tensorboard=false",
]  # fmt: skip


@pytest.fixture(autouse=True)
def switches():
    """Both are the whole process's."""
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    yield cudnn
    torch.use_deterministic_algorithms(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]


@pytest.mark.parametrize(
    ("wanted", "deterministic", "device", "searches"),
    [
        (None, False, CUDA, True),
        (True, False, CUDA, True),
        (False, False, CUDA, False),
        (None, True, CUDA, False),
        (None, False, CPU, False),
    ],
)
def test_cudnn_searches_on_gpus_unless_told_not_to(switches, wanted, deterministic, device, searches):
    switches.benchmark = not searches
    assert machine.set_algorithms(wanted, deterministic, device) == ""
    assert switches.benchmark is searches
    assert torch.are_deterministic_algorithms_enabled() is switches.deterministic is deterministic


def test_cudnn_benchmark_says_that_it_does_nothing_on_a_cpu():
    assert (
        machine.set_algorithms(False, False, CPU) == "cudnn_benchmark=false does nothing here: it is of NVIDIA GPUs, and this run is on cpu"
    )


def test_what_excludes_and_what_is_missing_is_one_sentence(monkeypatch):
    with pytest.raises(UserError, match="cudnn_benchmark=true takes convolutions by their speed on the day, and deterministic=true"):
        machine.check_algorithms(True, True, CPU)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(UserError, match="deterministic=true on a GPU wants CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"):
        machine.check_algorithms(None, True, CUDA)
    machine.check_algorithms(None, True, CPU)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    machine.check_algorithms(None, True, CUDA)


def test_settings_are_checked_before_any_work(tmp_path):
    with pytest.raises(UserError, match="unset one of the two"):
        train.main([DIGITS, f"run_dir={tmp_path}/run", *SMALL, "deterministic=true", "cudnn_benchmark=true"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("searches", [True, False])
def test_memory_is_measured_once_cudnn_has_chosen(switches, searches, monkeypatch):
    """What convolutions take that are only tried is not what a micro-batch takes."""
    seen = []
    monkeypatch.setattr(memory, "every_turn", lambda *given: seen.append("turns"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: seen.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: seen.append("read") or 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    switches.benchmark = searches
    memory.peak_memory(cases.new_run("tsm", ALONE), Share(torch.zeros(8, 1, 4, 4), None), 8)
    assert seen == ["turns"] * searches + ["reset", "turns", "read"]


@pytest.mark.parametrize("name", cases.METHODS)
def test_every_method_trains_on_algorithms_that_repeat_and_gives_the_same_bits(name):
    found = []
    for deterministic in (False, True):
        machine.set_algorithms(None, deterministic, CPU)
        run = cases.new_run(name, ALONE)
        found.append((cases.advance(run, 2), cases.weights(run)))
    (curve, weights), (again, same) = found
    assert curve == again
    torch.testing.assert_close(same, weights, rtol=0, atol=0)


def test_a_run_of_digits_repeats_itself(tmp_path, capsys):
    found = []
    for name in "ab":
        train.main([DIGITS, f"run_dir={tmp_path}/{name}", *SMALL, "deterministic=true"])
        assert torch.are_deterministic_algorithms_enabled()
        found.append(read_tensors(tmp_path / name / "student.safetensors")[0])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    capsys.readouterr()
