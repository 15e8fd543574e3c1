"""Turns as graphs: what a replay reads and writes, checked on CPU with a tape in CUDA's place, and on a GPU for real.

The tape knows what a CUDA graph knows: which operations ran on which memory. A replay runs no Python of ours, so whatever
Python would have to decide anew (a rate, a seed, a number of steps) and does not come in through memory shows as another number.
"""

import random
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benches.rehearse import GPU, REHEARSING, Tape, on_host
from potstill.engine.common.errors import UserError
from potstill.engine.methods.base import Draws, Method
from potstill.engine.methods.msd import TSM
from potstill.engine.methods.table import METHODS
from potstill.engine.methods.teacher import EDMLoss, Teacher
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.skipping.apply import Guard, Skipping
from potstill.engine.skipping.blocks import blocks_of
from potstill.engine.skipping.plan import Plan, SkippingConfig
from potstill.engine.training.graphs import CUDA, Graphs, Unfit, build_graphs, first_line, joined, split
from potstill.engine.training.optim import OptimConfig, rates_as_tensors
from potstill.engine.training.run import Run, TrainConfig, seed_dropout
from potstill.kernels._lib import INTERPRET

CPU = torch.device("cpu")
SETTINGS = {
    "dmd": {"fake_per_student": 2},
    "dmd2": {"name": "dmd", "fake_per_student": 2, "gan": True},
    "sim": {"dropout": 0.1},
    "sid": {"name": "sim", "distance": "l2", "alpha": 1.2},
    "sida": {"student_after": 0.008, "gan_after": 0.024, "dropout": 0.1},  # from iterations 2 and 4 on
    "gdd": {"r1_every": 2, "r1_gamma": 0.1, "width": 8},
    "few_dmd2": {"name": "dmd", "fake_per_student": 2, "gan": True, "steps": [700, 300]},
    "few_sim": {"name": "sim", "dropout": 0.1, "steps": [700, 300]},
    "few_gdd": {"name": "gdd", "r1_every": 2, "r1_gamma": 0.1, "width": 8, "steps": [700, 300]},
    "moment_matching": {"steps": 2},
    "instant": {"name": "moment_matching", "variant": "instant", "steps": 2, "measure_every": 2, "measure_batch": 4},
    "instant_difference": {
        "name": "moment_matching",
        "variant": "instant",
        "jvp": "difference",
        "steps": 2,
        "measure_every": 2,
        "measure_batch": 4,
    },
    "sfd": {"num_steps": [4], "K": 2},
    "sfd_v": {"name": "sfd", "num_steps": [4, 5], "K": 2, "step_condition": True},
    "light": {"name": "sim", "dropout": 0.1},
    "teacher": {},
    "tsm": {},
}
# torch.func.jvp (instant) hides its tensors from the tape; dmd and sid are dmd2 and sim with less.
TAPED = [name for name in SETTINGS if name not in ("dmd", "sid", "instant")]


def tiny_net(device=CPU):
    torch.manual_seed(1)
    net = from_kwargs(
        "EDMPrecond", img_resolution=8, img_channels=1, label_dim=3, model_type="SongUNet", model_channels=4,
        channel_mult=[1, 1], num_blocks=1, attn_resolutions=[], dropout=0.1,
    )  # fmt: skip
    return net.to(device)


def method_named(name: str, device=CPU) -> Method:
    settings = {"name": name} | SETTINGS[name]
    torch.manual_seed(2)
    if name == "teacher":
        return Teacher(EDMLoss(), tiny_net(device))
    if name == "tsm":
        return TSM(tiny_net(device), tiny_net(device))
    net = tiny_net(device)
    method = METHODS[settings["name"]](**settings).build(net, net)
    if name == "light":
        method.teacher, method.stratified = Skipping(method.teacher, plan_for(method.teacher), method.teacher_level), True
    for net in method.nets.values():
        net.to(device)
    return method


def plan_for(net) -> Plan:
    """A made-up plan that leaves out three blocks, two, one and none."""
    names = list(blocks_of(net.model))
    affine = {name: {"a": [[0.8] * 4] * 4, "b": [[0.1] * 4] * 4} for name in names[:3]}
    return Plan("", 8, [0.002, 0.1, 1.0, 10.0, 80.0], names, [3, 2, 1, 0], 0.02, affine)


def run_of(name: str, device=CPU, graphs: Graphs | str = "off", **settings) -> Run:
    """A run of 40 iterations with a schedule and a clip, so that rates change and gradients are scaled.

    PyTorch's optimiser: ours writes to addresses, which CUDA records like all else, and the tape cannot see.
    """
    optim = OptimConfig(lr=1e-3, betas=[0.5, 0.9], clip=0.5, warmup=5, schedule="linear")
    settings = {"kimg": 0.32, "batch": 8, "optim": {"student": optim}, "optimizer": "torch"} | settings
    mode = "auto" if isinstance(graphs, Graphs) else graphs
    run = Run(method_named(name, device), TrainConfig(**settings, graphs=mode), 0, device)
    if isinstance(graphs, Graphs):
        run.use(graphs)
    return run


def batch(step: int, device=CPU) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(8, 1, 8, 8, generator=generator) * 2 - 1
    return images.to(device), torch.eye(3)[torch.randint(3, (8,), generator=generator)].to(device)


BATCHES = [batch(step) for step in range(6)]


class Taped:
    """A backend like CUDA's on CPU tensors: capturing has no effect, replaying has, and no Python runs again."""

    def __init__(self, breaks: str = ""):
        self.breaks, self.recovered, self.tapes = breaks, 0, []

    def stream(self):
        return nullcontext()

    def capture(self, body, generators):
        states = [(g, g.get_state()) for g in [*generators, torch.default_generator]]
        tape = Tape()
        with tape:
            body()
        tape.undo()
        for generator, state in states:
            generator.set_state(state)
        if self.breaks:
            raise RuntimeError(self.breaks)
        self.tapes.append(tape)
        return tape.replay

    def recover(self, generators):
        self.recovered += 1
        return True


class Watched(TorchDispatchMode):
    """Changes nothing; makes the kernels take the same path on CPU as under a tape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def weights(run: Run) -> list[Tensor]:
    nets = [*run.method.nets.values(), run.ema.net, run.method.state]
    return [t for net in nets for t in net.state_dict().values()]


@pytest.mark.parametrize(("name", "micro"), [*((name, None) for name in TAPED), ("dmd2", 4), ("few_gdd", 4)])
def test_replayed_iterations_are_those_of_an_eager_run(name, micro):
    """Weights, averages and logs after 6 iterations bit for bit (12 where a step is chosen): schedules, clip, dropout, noise, lazy turns."""
    graphs = Graphs(Taped(), warmup=1)
    eager, graphed = run_of(name, micro_batch=micro), run_of(name, graphs=graphs, micro_batch=micro)
    for one in eager.trained.values():
        rates_as_tensors(one.optimizer)
    for step in range(12 if name.startswith("few_") else 6):
        with Watched():
            eager.take(*batch(step))
            graphed.take(*batch(step))
    for a, b in zip(weights(eager), weights(graphed), strict=True):
        assert torch.equal(a, b)
    assert eager.meter.read() == graphed.meter.read()
    report = graphs.report()
    assert report["replayed"] >= 4 and report["stay_eager"] == []
    assert report["captured"] == len(graphs.backend.tapes) >= len(report["pieces"])


def test_every_step_of_a_few_step_student_has_a_graph_of_its_own():
    """The host's choice is in the key, that of both micro-batches: two steps are two graphs of the student's turn and of the fake net's,
    which has a third for the iterations in which the student's turn has made the images."""
    graphs = Graphs(Taped(), warmup=1)
    run = run_of("few_dmd2", graphs=graphs, micro_batch=4)
    for step in range(20):
        run.take(*batch(step))
    pieces = graphs.report()["pieces"]
    captured = {name.partition("(")[2][:-1]: piece["captured"] for name, piece in pieces.items() if "turn" in name}
    assert captured == {"student": 2, "fake": 3} and graphs.report()["stay_eager"] == []
    answers = [key for key in graphs.captured if isinstance(key[-1], int)]
    assert len({key[-1] for key in answers}) == 2 and all(key[-1] == key[0][-1] for key in answers)  # of micro-batches alike


def test_a_teacher_that_leaves_out_something_else_is_captured_anew():
    """The guard, told never to be content, shrinks the plan before iterations 3 and 6."""
    graphs = Graphs(Taped(), warmup=1)
    eager, graphed = run_of("light"), run_of("light", graphs=graphs)
    for one in eager.trained.values():
        rates_as_tensors(one.optimizer)
    for run in (eager, graphed):
        run.guard = Guard(run.method.teacher, SkippingConfig(guard_iterations=3, norm=1e-12), lambda text: None)
    for step in range(9):
        with Watched():
            eager.take(*batch(step))
            graphed.take(*batch(step))
    for a, b in zip(weights(eager), weights(graphed), strict=True):
        assert torch.equal(a, b)
    assert eager.guard.shrunk == graphed.guard.shrunk == 2
    assert graphs.report()["captured"] == 6 and graphs.report()["stay_eager"] == []  # two turns under each of three plans


def test_a_rate_that_is_a_number_would_be_frozen_by_a_capture():
    """What the device tensors are for; and that the tape can tell."""
    runs = run_of("teacher"), run_of("teacher", graphs=Graphs(Taped(), warmup=1))
    for one in runs[1].trained.values():
        one.optimizer.param_groups[0]["lr"] = 1e-3
    for step in range(4):
        with Watched():
            [run.take(*batch(step)) for run in runs]
    assert not torch.equal(weights(runs[0])[0], weights(runs[1])[0])


def test_what_cannot_be_captured_stays_eager_says_why_and_changes_nothing():
    said = []
    graphs = Graphs(Taped(breaks="operation not permitted when stream is capturing"), warmup=1, say=said.append)
    eager, graphed = run_of("sim"), run_of("sim", graphs=graphs)
    for one in eager.trained.values():
        rates_as_tensors(one.optimizer)
    for step in range(4):
        eager.take(*batch(step))
        graphed.take(*batch(step))
    for a, b in zip(weights(eager), weights(graphed), strict=True):
        assert torch.equal(a, b)
    report = graphed.graph_report()
    assert (report["captured"], report["replayed"], report["eager"]) == (0, 0, 8) and graphs.backend.recovered == 2
    assert report["stay_eager"] == ["operation not permitted when stream is capturing"]
    assert [text.partition(" stays")[0] for text in said] == ["CUDA graphs: turn 0 (fake)", "CUDA graphs: turn 1 (student)"]
    strict = run_of("sim", graphs=Graphs(Taped(breaks="no"), warmup=1, strict=True))
    strict.take(*batch(0))
    with pytest.raises(UserError, match=r"train.graphs=on, but turn 0 \(fake\) cannot be a CUDA graph \(no\)"):
        strict.take(*batch(1))


def test_graphs_are_bounded():
    graphs = Graphs(Taped(), warmup=1, limit=1)
    run = run_of("sim", graphs=graphs)
    for step in range(3):
        run.take(*batch(step))
    assert len(graphs.captured) == 1
    assert graphs.report()["stay_eager"] == ["the limit of 1 graphs is reached"]


def test_shapes_of_shared_state_round_trip_and_tell_apart_what_differs():
    draws = Draws(torch.Generator(), 4, slice(0, 2), random.Random(0))
    state = [{"a": torch.ones(2, 3), "b": (None, True, 1.5)}, draws, "x"]
    leaves = []
    shape = split(state, leaves)
    again = joined(shape, iter(leaves))
    assert again[0]["a"] is leaves[0] and again[0]["b"] == (None, True, 1.5) and again[1] is draws and again[2] == "x"
    others = [[{"a": torch.ones(3, 2), "b": (None, True, 1.5)}, draws, "x"], [state[0] | {"b": (None, 1, 1.5)}, draws, "x"]]
    assert len({shape, *(split(other, []) for other in others)}) == 3
    with pytest.raises(Unfit, match="a set"):
        split([{1}], [])
    with pytest.raises(Unfit, match="gradient"):
        split(torch.ones(1, requires_grad=True), [])


def test_seeding_for_dropout_is_torchs_on_a_cpu():
    torch.manual_seed(7)
    expected = torch.rand(3), torch.nn.functional.dropout(torch.ones(64))
    seed_dropout(CPU, 7)
    assert torch.equal(torch.rand(3), expected[0]) and torch.equal(torch.nn.functional.dropout(torch.ones(64)), expected[1])


def test_the_error_that_broke_a_capture_is_the_one_told():
    def fails_twice():
        try:
            raise RuntimeError("first\nmore")
        finally:
            raise RuntimeError("then")

    with pytest.raises(RuntimeError, match="then") as caught:
        fails_twice()
    assert first_line(caught.value) == "first"


def test_graphs_on_without_cuda_is_one_sentence():
    with pytest.raises(UserError, match=r"train\.graphs=on wants a CUDA device, and this run is on cpu"):
        build_graphs("on", CPU)
    with pytest.raises(UserError, match="graphs wants one of auto, on, off, got 'yes'"):
        TrainConfig(graphs="yes")
    assert build_graphs("auto", CPU) is None
    assert run_of("teacher", graphs="auto").graph_report() == {"mode": "off", "why": "there are none on cpu"}


READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")


@pytest.mark.parametrize("name", SETTINGS)
def test_no_iteration_reads_a_value(name, monkeypatch):
    """A read would make the host wait for a GPU. The CPU's own kernels may read their own results, and the host its schedules."""
    run = run_of(name)
    if name == "light":
        run.take(*BATCHES[0])  # which samples leave out what is planned once, on the host
    for read in READS:
        original = getattr(Tensor, read)

        def refused(self, *args, original=original, read=read, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            if not on_host(self) and "/kernels/" not in caller:
                pytest.fail(f"{read} in {caller}")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, read, refused)
    for step in range(6):
        run.take(*BATCHES[step])


@pytest.mark.gpu
@pytest.mark.skipif(REHEARSING and INTERPRET, reason="rehearsed without TRITON_INTERPRET=1: every norm takes the interpreter seconds")
@pytest.mark.parametrize("name", SETTINGS)
def test_graphed_training_is_eager_training_on_a_gpu(name):
    """50 iterations, no host sync after the captures. Atomics in cuDNN's and interpolation's backward allow for rounding."""
    device, steps = GPU, 16 if REHEARSING else 50
    runs = [run_of(name, device, graphs=mode) for mode in ("off", Graphs(CUDA(device)) if REHEARSING else "auto")]
    torch.backends.cudnn.deterministic = True
    try:
        for step in range(steps):
            images = batch(step, device)
            torch.cuda.set_sync_debug_mode("error" if step > 20 else "default")  # captures synchronise by design
            for run in runs:
                run.take(*images)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.backends.cudnn.deterministic = False
    report = runs[1].graph_report()
    assert report["stay_eager"] == [] and report["replayed"] > report["eager"], report
    for a, b in zip(weights(runs[0]), weights(runs[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
