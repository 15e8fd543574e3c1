"""Nets of diffusers under the engine: CUDA graphs and what waits for the device, resuming, activation checkpointing, torch.compile."""

import sys

import pytest
import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers")
import diffusers_cases as cases
import diffusers_models
from diffusers_models import TINY
from test_graphs import Taped, Watched

from potstill.engine.common.errors import UserError
from potstill.engine.training import run as stage
from potstill.engine.training.compile import compile_nets
from potstill.engine.training.graphs import Graphs, build_graphs
from potstill.engine.training.optim import OptimConfig, rates_as_tensors
from potstill.engine.training.run import Run, waiting

CUDA = torch.device("cuda")


def weights(run: Run) -> list[torch.Tensor]:
    return [t for net in (*run.method.nets.values(), run.ema.net) for t in net.state_dict().values()]


# CUDA graphs


def taped(name: str, method: str, graphs: Graphs | None, **settings) -> tuple[Run, cases.Feed]:
    """A run with a schedule and a clip; PyTorch's optimiser, since ours writes to addresses that a tape does not see."""
    optim = {"student": OptimConfig(lr=1e-3, betas=[0.5, 0.9], clip=0.5, warmup=3, schedule="linear")}
    run, feed = cases.new_run(name, method, batch=2, kimg=0.02, optim=optim, optimizer="torch", graphs="off", **settings)
    if graphs:
        run.use(graphs)
    for one in run.trained.values():
        rates_as_tensors(one.optimizer)
    return run, feed


@pytest.mark.parametrize(
    ("name", "method", "iterations"), [("pixart", "few", 10), ("sd15", "sim", 3), ("sd3", "gan", 5), ("flux", "moments", 5), ("sana", "sfd", 3)]
)  # fmt: skip
def test_replayed_iterations_with_prompts_are_those_of_an_eager_run(name, method, iterations):
    """Weights, average and logs bit for bit: every iteration has other prompts, which a replay reads where the first lay."""
    graphs = Graphs(Taped(), warmup=1)
    (eager, feed), (graphed, _) = taped(name, method, None), taped(name, method, graphs)
    for step in range(iterations):
        batch = feed.at(step)
        with Watched():
            eager.take(*batch)
            graphed.take(*batch)
    assert all(torch.equal(a, b) for a, b in zip(weights(eager), weights(graphed), strict=True))
    assert eager.meter.read() == graphed.meter.read()
    report = graphs.report()
    assert report["replayed"] >= 2 and report["stay_eager"] == []


def test_a_few_step_student_has_a_graph_for_each_of_its_steps():
    """Which step an iteration differentiates the host decides: one graph would repeat the first."""
    graphs = Graphs(Taped(), warmup=1)
    run, feed = taped("pixart", "few", graphs)
    asked = set()
    for step in range(20):
        with Watched():
            run.take(*feed.at(step))
    for key in graphs.captured:
        while isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], int):
            asked.add(key[1])
            key = key[0]
    assert asked == {0, 1, 2, 3}


class Crossings(TorchDispatchMode):
    """Notes operations on tensors of two devices. Numbers are the exception: a kernel is given them by value."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [t for t in _pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if len({t.device.type for t in given if copies or t.ndim or t.device.type != "cpu"}) > 1:
            self.found.add(str(func))
        return out


@pytest.mark.parametrize("name", TINY)
def test_families_that_wait_for_the_device_say_so(name, monkeypatch):
    """The meta device in a GPU's place has no values to read, and what is copied to it shows. What is cached at the first call may be."""
    net = cases.denoiser(name).to("meta")
    condition = diffusers_models.condition(name, 2)
    condition = None if condition is None else condition.to("meta")
    x = torch.empty(2, *net.shape, device="meta", requires_grad=True)
    sigma, crossings, made = torch.empty(2, device="meta"), Crossings(), []
    for word in ("tensor", "as_tensor", "from_numpy"):
        original = getattr(torch, word)
        monkeypatch.setattr(torch, word, lambda *given, original=original, **named: made.append(word) or original(*given, **named))
    waits = False
    for _ in range(2):
        crossings.found.clear()
        made.clear()
        try:
            with crossings:
                net.estimate(x, sigma, condition, guidance=2.0 if net.guidable else 1.0).raw.sum().backward()
                net.levels(x, sigma, condition)
                net.weight(net.told(sigma)), net.level(sigma)
        except NotImplementedError as error:  # what a meta tensor says when it is read
            waits = bool(str(error))
    assert bool(crossings.found or made or waits) == bool(net.waits), (crossings.found, made, net.waits)


def test_nets_that_wait_are_not_captured_and_it_is_told_why(monkeypatch):
    run, _ = cases.new_run("lumina2", "dmd")
    assert run.waits == "Lumina2Transformer2DModel (its forward reads the prompts' lengths from the device)"
    assert build_graphs("auto", CUDA, run.waits) is None
    with pytest.raises(UserError, match=r"graphs=on wants nets that do not wait for the device, got Lumina2.* \(its .*\): use auto or off"):
        build_graphs("on", CUDA, run.waits)
    run.device = CUDA
    assert run.graph_report() == {"mode": "off", "why": run.waits}
    assert waiting([cases.denoiser("sd3"), nn.Linear(1, 1)]) == ""


READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")


@pytest.mark.parametrize(
    ("name", "method"), [("sd15", "gan"), ("pixart", "sim"), ("sd3", "moments"), ("flux", "few"), ("dit", "lognormal")]
)
def test_no_iteration_reads_a_value(name, method, monkeypatch):
    run, feed = cases.new_run(name, method)
    batches = [feed.at(step) for step in range(2)]
    if feed.stream:
        feed.stream.close()  # its thread may read
    for read in READS:
        original = getattr(torch.Tensor, read)

        def refused(self, *given, original=original, read=read, **named):
            caller = sys._getframe(1).f_code.co_filename
            if not (self.ndim == 0 and self.dtype is torch.float64) and "/kernels/" not in caller:  # schedules, and CPU kernels
                pytest.fail(f"{read} in {caller}")
            return original(self, *given, **named)

        monkeypatch.setattr(torch.Tensor, read, refused)
    for batch in batches:
        run.take(*batch)


# Resuming


@pytest.mark.parametrize(("name", "method"), [("pixart", "few"), ("sd3", "sim"), ("dit", "moments")])
def test_a_resumed_run_goes_on_exactly(name, method, tmp_path):
    """Three iterations, a checkpoint, two that are lost with the process, and a new process: the bits of a run that never stopped."""
    straight, feed = cases.new_run(name, method)
    wanted = cases.advance(straight, feed, 6)
    found = cases.part(cases.ALONE, name, method, str(tmp_path), "ddp", 3)
    stopped, feed = cases.new_run(name, method)
    saver = cases.Saver(stopped, tmp_path)
    assert saver.load(print)
    cases.advance(stopped, feed, 2)
    resumed, feed = cases.new_run(name, method)
    assert cases.Saver(resumed, tmp_path).load(print) and resumed.step == 3
    found += cases.advance(resumed, feed, 3)
    assert found == wanted
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))
    assert torch.equal(cases.D(straight.average(), name), cases.D(resumed.average(), name))


# Less memory, and more speed


@pytest.mark.parametrize(
    ("name", "method"), [("sd15", "sim"), ("pixart", "gan"), ("sd3", "gan"), ("flux", "gan"), ("dit", "sfd"), ("wan", "sim")]
)
def test_recomputed_blocks_train_alike(name, method):
    """Bit for bit, also through frozen views, and with a GAN on half of a net."""
    found, forwards = [], []
    for mode in ("off", "blocks"):
        run, feed = cases.new_run(name, method, activation_checkpointing=mode)
        student = getattr(run.method.nets["student"], "denoiser", run.method.nets["student"])
        count, block = [], student.blocks()[-1]
        block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        found.append((cases.advance(run, feed, 2), weights(run)))
        forwards.append(len(count))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert forwards[1] > forwards[0]  # in backward, again


@pytest.mark.filterwarnings("ignore:.*autograd functions are all static:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("name", "method"), [("sd15", "sfd"), ("pixart", "gan"), ("sd3", "sim"), ("flux", "sfd")])
def test_compiled_blocks_train_alike(name, method, monkeypatch):
    """All of torch.compile but the code generator: nothing breaks a graph, and nothing compiles once each turn has been taken."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(stage, "compile_nets", lambda *given: compile_nets(*given, backend="eager"))
    run, feed = cases.new_run(name, method, compile="blocks")
    nets = len({id(m) for net in stage.modules_of(run.method) for m in net.modules() if isinstance(m, cases.DiffusersDenoiser)})
    assert run.compiled == nets * len(cases.denoiser(name).blocks())
    curve = cases.advance(run, feed, 2)
    stats = torch._dynamo.utils.counters["stats"]
    warm = stats["unique_graphs"]
    curve += cases.advance(run, feed, 2)
    assert 0 < warm == stats["unique_graphs"] and not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    plain, feed = cases.new_run(name, method)
    assert curve == cases.advance(plain, feed, 4)
