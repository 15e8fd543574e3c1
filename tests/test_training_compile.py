"""The compile switch: what it compiles, that keys stay, that numbers agree, and that nothing compiles after the warm-up."""

import os

import pytest
import torch

from potstill.engine.common.errors import UserError
from potstill.engine.methods.base import modules_of
from potstill.engine.methods.sim import SIM, SIMConfig
from potstill.engine.nets import ops
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.training import compile as switch
from potstill.engine.training import run as stage
from potstill.engine.training.compile import check_compile, compile_nets
from potstill.engine.training.run import Run, TrainConfig

TINY = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
CPU = torch.device("cpu")
pytestmark = [  # Dynamo's own
    pytest.mark.filterwarnings("ignore:.*autograd functions are all static:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def net(dtype):
    torch.manual_seed(1)
    made = from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, dropout=0.0, **TINY)
    made.compute_dtype = dtype
    return made


def new_run(mode, dtype=torch.bfloat16):
    method = SIM(SIMConfig(), net(dtype), net(dtype), net(dtype))
    return Run(method, TrainConfig(kimg=1, batch=4, compile=mode), 0, CPU)


def losses(run, steps):
    found = []
    for _ in range(steps):
        run.take(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(run.step)), None)
        found.append(run.meter.read())
    return found


@pytest.fixture
def traced(monkeypatch):
    """Everything of torch.compile but the code generator: what is a graph, and when, is decided before it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(stage, "compile_nets", lambda *given: compile_nets(*given, backend="eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["blocks", "net"])
def test_nothing_compiles_after_the_first_iteration_and_numbers_stay(mode, traced, monkeypatch):
    run = new_run(mode)
    keys = [n.state_dict().keys() for n in run.method.nets.values()]
    assert keys == [net(torch.float32).state_dict().keys()] * 2
    unets = 5  # teacher, student, fake, and frozen views of the last two
    assert run.compiled == unets * (1 if mode == "net" else len(net(CPU).blocks()))
    first = losses(run, 1)
    stats = torch._dynamo.utils.counters["stats"]
    warm = stats["unique_graphs"]
    assert warm > 0
    later = losses(run, 3)
    assert stats["unique_graphs"] == warm
    assert not torch._dynamo.utils.counters["graph_break"]
    eager = losses(new_run("off"), 4)
    for ours, fused in zip(first + later, eager, strict=True):
        assert ours["fake/denoise"] == pytest.approx(fused["fake/denoise"], rel=1e-4)
    monkeypatch.setattr(ops, "fuses", lambda x: False)  # a compiler sees layers, and eager blocks round otherwise
    assert first + later == losses(new_run("off"), 4)


def test_off_compiles_nothing():
    method = SIM(SIMConfig(), *(net(torch.float32) for _ in range(3)))
    assert compile_nets(modules_of(method), "off", CPU) == 0
    assert all(m._compiled_call_impl is None for n in modules_of(method) for m in n.modules())


def test_the_average_is_a_plain_net_and_the_code_is_kept_in_the_run_folder(tmp_path, monkeypatch, traced):
    run = new_run("net")
    assert run.compiled
    assert all(m._compiled_call_impl is None for m in run.ema.net.modules())
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    switch.cache_in(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")


def test_bad_modes_are_refused(monkeypatch):
    with pytest.raises(UserError, match="compile wants one of off, blocks, net, got 'max'"):
        TrainConfig(compile="max")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="wants a C\\+\\+ compiler"):
        check_compile("net", CPU, "train.compile")
