"""The profile of a run: shares from events that are known, and a real one of a few iterations on this CPU."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from potstill.engine.methods.teacher import EDMLoss, Teacher
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.training.loop import LogConfig, train
from potstill.engine.training.profile import STEP, WAITING, Profile, covered, kind, shares
from potstill.engine.training.run import Run, TrainConfig

CPU = torch.device("cpu")


def event(name, start, end, device=DeviceType.CPU):
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end), self_cpu_time_total=end - start)


def test_shares_of_a_gpu_that_waits_for_data():
    """100 us: the host waits for 30 of them; kernels run for 50, ten of which two at a time, and 20 of which are NCCL's."""
    found = shares(
        [
            event(WAITING, 0, 30), event(STEP, 30, 100),
            event("sm90_xmma_fprop_implicit_gemm", 35, 65, DeviceType.CUDA),
            event("ncclDevKernel_AllReduce", 55, 75, DeviceType.CUDA),
            event("void at::native::vectorized_elementwise_kernel<4>", 85, 95, DeviceType.CUDA),
        ],
        torch.device("cuda"),
    )  # fmt: skip
    assert found["waiting_for_data"] == pytest.approx(0.3) and found["communication"] == pytest.approx(0.2)
    assert found["busy"] == pytest.approx(0.5) and found["seconds_per_iteration"] == pytest.approx(1e-4)
    assert found["kinds"] == pytest.approx({"convolution": 0.3, "communication": 0.2, "elementwise": 0.1})


def test_union_of_intervals():
    assert covered([(5, 6), (0, 2), (1, 3), (1, 1.5)]) == 4
    assert covered([]) == 0


@pytest.mark.parametrize(
    ("name", "sort"),
    [
        ("aten::convolution_backward", "convolution"), ("aten::addmm", "matrix product"), ("Memcpy HtoD", "copies"),
        ("aten::native_group_norm", "normalisation"), ("aten::_fused_adam_", "optimiser"), ("qqq", "other"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"), ("_partials_kernel", "our losses and noise"),
    ],
)  # fmt: skip
def test_kinds(name, sort):
    assert kind(name) == sort


def test_a_slow_source_of_images_shows_in_the_table_of_a_run(tmp_path, capsys):
    net = from_kwargs(
        "EDMPrecond", img_resolution=8, img_channels=1, model_type="SongUNet", model_channels=8, channel_mult=[1],
        num_blocks=1, attn_resolutions=[],
    )  # fmt: skip

    slept = []

    def slow(step):
        begun = time.perf_counter()
        time.sleep(0.2)
        slept.append(time.perf_counter() - begun)  # longer on a busy machine
        return torch.zeros(2, 1, 8, 8), None

    run = Run(Teacher(EDMLoss(), net), TrainConfig(kimg=0.014, batch=2, log_iterations=5), 0, CPU)
    train(run, slow, tmp_path, title="x", log=LogConfig(tensorboard=False), profile=Profile(tmp_path, warmup=2, active=3))
    found = json.loads((tmp_path / "profile/table.json").read_text())
    assert found["iterations"] == 3 and found["seconds_per_iteration"] >= 0.2
    assert found["waiting_for_data"] * found["seconds_per_iteration"] == pytest.approx(sum(slept[2:5]) / 3, abs=0.15)
    assert "convolution" in found["kinds"] and 0 < found["busy"] <= 1
    assert "host waits for data" in capsys.readouterr().err
    names = {e.get("name") for e in json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]}
    assert {WAITING, STEP, "aten::convolution"} <= names
    assert run.step == 7  # it went on to the end


def test_a_run_shorter_than_the_warm_up_is_watched_all_the_same(tmp_path):
    profile = Profile(tmp_path)
    profile.start(CPU, left=3)
    assert (profile.warmup, profile.active) == (2, 1)
