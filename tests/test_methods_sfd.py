"""SFD: published grids and costs, targets and losses by hand, on-policy and immediate updates, step condition, second stage."""

import copy
import json
import math
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from toy import (
    Mixture,
    ToyNet,
    apart,
    batch_of,
    default_dtype,
    distance,
    draws,
    gradients,
    largest,
    learn,
    pretrained,
    reached,
)

from potstill.engine.common.errors import UserError
from potstill.engine.config.tree import RECIPES, load
from potstill.engine.diffusion.sampling import Sampler, few_step, ode, one_step
from potstill.engine.jobs.build import teacher_sampler
from potstill.engine.methods.sfd import SFD, SFDConfig
from potstill.engine.models.opening import sampler_for
from potstill.engine.models.weights import load_net, read_tensors, save_net
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.layers import UNetBlock
from potstill.engine.nets.steps import StepAffine, add_step_condition
from potstill.engine.training.optim import OptimConfig
from potstill.engine.training.run import Run, TrainConfig

PUBLISHED = {  # num_steps: NFE, levels, teacher timestamps and evaluations per trajectory (mm_sfd B2)
    4: (2, (80, 10.929, 0.6699, 0.006), 13, 12),
    5: (3, (80, 19.003, 3.107, 0.2683, 0.006), 17, 16),
    6: (4, (80, 25.963, 6.788, 1.289, 0.1454, 0.006), 21, 20),
    7: (5, (80, 31.730, 10.929, 3.107, 0.6699, 0.0936, 0.006), 25, 24),
}
SECOND = {"num_steps": [3], "K": 3, "solver": "euler", "teacher_afs": True}


def sfd(data: Mixture, **settings) -> SFD:
    return SFD(SFDConfig(**settings), data, apart(pretrained(data), 1))


class Told(ToyNet):
    """A toy that is told its number of levels: one learnt vector for each, added to its last hidden layer."""

    knows_steps = True

    def __init__(self, data: Mixture):
        super().__init__(data.label_dim)
        self.load_state_dict(pretrained(data).state_dict())
        self.tables = nn.Parameter(torch.zeros(8, self.width))
        self.seen: list[int] = []

    def forward(self, x: Tensor, sigma: Tensor, class_labels=None, augment_labels=None, *, steps: int) -> Tensor:
        return self.with_steps(steps, super().forward, x, sigma, class_labels)

    def estimate(self, x: Tensor, sigma: Tensor, class_labels=None, *, steps: int):
        return self.with_steps(steps, super().estimate, x, sigma, class_labels)

    def with_steps(self, steps, call, *args):
        self.seen.append(steps)
        return call(*args)

    def hidden(self, x, labels, c):
        return super().hidden(x, labels, c) + self.tables[self.seen[-1]]


def tiny(**kwargs):
    shape = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "model_type": "SongUNet"}
    return from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, **shape | {"dropout": 0.0} | kwargs)


ADM = {"model_type": "DhariwalUNet", "model_channels": 32, "attn_resolutions": []}


def warmed(net):
    """Nothing is zero: untrained nets are nearly so where it matters."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


# Grids, samplers, costs


@pytest.mark.parametrize("num_steps", PUBLISHED)
def test_published_grids(num_steps):
    """Student levels are teacher levels, the published ones; NFE and the teacher's evaluations are counted right."""
    nfe, levels, timestamps, evaluations = PUBLISHED[num_steps]
    method = sfd(Mixture(), num_steps=[num_steps])
    teacher = method.teacher_sampler(num_steps)
    assert method.sampler.sigmas == pytest.approx(levels, rel=5e-4)
    assert teacher.sigmas[::4] == pytest.approx(method.sampler.sigmas, rel=1e-12)
    assert (method.sampler.nfe, len(teacher.sigmas), teacher.nfe) == (nfe, timestamps, evaluations)
    assert method.notes == [f"num_steps {num_steps} with AFS is NFE {nfe}"]
    assert len(method.turns) == nfe


@pytest.mark.parametrize(
    "sampler",
    [few_step(4), few_step(4, afs=False), Sampler("heun", [80.0, 9.0, 1.0, 0.1], afs=True), ode("dpmpp_3m", 5), one_step(80.0)],
)
def test_nfe_is_what_is_evaluated(sampler):
    data = Mixture()
    calls = []
    data.register_forward_hook(lambda *args: calls.append(1))
    sampler(data, None, draws(3))
    assert len(calls) == sampler.nfe
    assert Sampler(**sampler.to_dict()) == sampler


def test_afs_wants_an_ode():
    with pytest.raises(ValueError, match=r"afs wants an ODE solver .* got 'one_step'"):
        Sampler("one_step", [80.0], afs=True)


def test_student_sampler_by_hand():
    """80 ε, the analytical first step, two Euler steps (mm_sfd B10), in float64 where the net allows."""
    data = Mixture(4)
    labels = torch.eye(4)[[0, 1, 2, 3, 0]]
    z = draws(5).normal(2, 1, 1).double()
    t = few_step(4).sigmas
    x = 80 * z + (t[1] - 80) * 80 * z / (1 + 80**2) ** 0.5
    assert x.flatten().tolist() == pytest.approx((10.935 * z).flatten().tolist(), rel=1e-3)  # noise relabelled at t_1
    for t_0, t_1 in ((t[1], t[2]), (t[2], t[3])):
        x = x + (t_1 - t_0) * (x - data(x, torch.tensor(t_0), labels)) / t_0
    torch.testing.assert_close(few_step(4)(data, labels, draws(5)), x.float(), rtol=1e-4, atol=1e-5)


def test_steps_of_a_variable_student_are_evaluations():
    student = {"net": tiny(), "solver": None, "source": "s.safetensors"}
    meta = {"sampler": few_step(7, step_condition=True).to_dict()}
    assert sampler_for("student", metadata=meta, steps=2, **student) == few_step(4, step_condition=True)
    assert sampler_for("student", metadata=meta, steps=None, **student) == few_step(7, step_condition=True)
    other = {"sampler": few_step(7, step_condition=True, rho=5.0).to_dict()}  # of method.rho=5
    assert sampler_for("student", metadata=other, steps=2, **student) == few_step(4, step_condition=True, rho=5.0)
    other["sampler"].pop("rho")  # as an earlier version wrote it: which levels another number has cannot be told
    assert sampler_for("student", metadata=other, steps=5, **student).nfe == 5
    with pytest.raises(UserError, match="follow no Karras schedule: it is sampled with NFE 5 only, got 2"):
        sampler_for("student", metadata=other, steps=2, **student)
    fixed = {"sampler": few_step(4).to_dict()}
    assert sampler_for("student", metadata=fixed, steps=2, **student) == few_step(4)
    with pytest.raises(UserError, match="distilled for 2 evaluations, got 3"):
        sampler_for("student", metadata=fixed, steps=3, **student)


# Targets and losses


def dpm_by_hand(net, x, sigmas):
    """DPM-Solver++ of order 3 with orders 1, 2 at the start and 2, 1 at the end, from the spec's formulas (mm_sfd B3)."""
    states, D, lam = [x], [], []
    for i, (t, t_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        D.insert(0, net(x.float(), t.float()).double())
        lam.insert(0, -t.log())
        h, T = t.log() - t_next.log(), len(sigmas)
        order = i + 1 if i + 1 < 3 else min(3, T - (i + 1))
        p1 = (-h).exp() - 1
        x_next = t_next / t * x - p1 * D[0]
        if order >= 2:
            r0 = (lam[0] - lam[1]) / h
            d0 = (D[0] - D[1]) / r0
        if order == 2:
            x_next = x_next - 0.5 * p1 * d0
        if order == 3:
            r1 = (lam[1] - lam[2]) / h
            d1 = (D[1] - D[2]) / r1
            E1, E2 = d0 + r0 / (r0 + r1) * (d0 - d1), (d0 - d1) / (r0 + r1)
            p2 = p1 / h + 1
            x_next = x_next + p2 * E1 - (p2 / h - 0.5) * E2
        states.append(x := x_next)
    return states


def test_targets_by_hand():
    data = Mixture()
    method = sfd(data, num_steps=[4])
    it = method.begin(batch_of(data))
    t = torch.tensor(method.teacher_sampler(4).sigmas, dtype=torch.float64)
    states = dpm_by_hand(data, 80 * draws(16).normal(2, 1, 1).double(), t)
    torch.testing.assert_close(it.targets, [s.float() for s in states[::4]], rtol=1e-5, atol=1e-5)


def test_an_iddpm_teacher_is_walked_over_its_own_levels():
    """As EDM's code samples it: the teacher's states, the student's levels, its steps and its sampler, all at entries of u."""
    shape = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    torch.manual_seed(2)
    teacher = warmed(from_kwargs("iDDPMPrecond", img_resolution=8, img_channels=1, model_type="SongUNet", **shape)).eval()
    method = SFD(SFDConfig(num_steps=[4], K=2, solver="euler"), teacher, copy.deepcopy(teacher))
    u = teacher.u.double()
    fine = [u[(u - s).abs().argmin()] for s in method.teacher_sampler(4).sigmas]
    it = method.begin(batch_on_images())
    assert it.t == torch.stack(fine[::2]).tolist() == method.sampler.levels(teacher).tolist()
    x = fine[0] * draws(2).normal(1, 8, 8).double()
    for i, (s, s_next) in enumerate(zip(fine[:-1], fine[1:], strict=True)):
        with torch.no_grad():
            x = x + (s_next - s) * (x - teacher(x.float(), s.float()).double()) / s
        if i % 2:
            torch.testing.assert_close(it.targets[i // 2 + 1], x.float(), rtol=1e-5, atol=1e-5 * x.abs().max().item())
    assert method.sampler == few_step(4)  # the file says the schedule: whoever samples rounds it to the net's own levels
    other = SFD(SFDConfig(num_steps=[4]), teacher, tiny())
    assert other.sampler.sigmas == it.t == other.levels[4]  # a student that does not round is told the levels themselves


@pytest.mark.parametrize("metric", ["l1", "l2", "huber"])
@pytest.mark.parametrize("label_dim", [0, 4])
@default_dtype(torch.float64)
def test_gradient_by_hand(metric, label_dim):
    """Step 1's: |x + (t' - t)(x - D(x; t))/t - y|, summed over pixels, averaged over the batch."""
    data = Mixture(label_dim)
    method = sfd(data, num_steps=[4], metric=metric, huber_c=0.2)
    found = gradients(method, "student", batch_of(data))["student"]
    it = method.begin(batch_of(data))
    d = draws(16)
    x = 80 * d.normal(2, 1, 1)
    x = x + (it.t[1] - it.t[0]) * x / (1 + it.t[0] ** 2) ** 0.5
    labels = nn.functional.one_hot(d.integers(0, 3), 4).double() if label_dim else None
    e = x + (it.t[2] - it.t[1]) * (x - method.student(x, torch.tensor(it.t[1]), labels)) / it.t[1] - it.targets[2]
    e = {"l1": e.abs().sum(), "l2": e.square().sum(), "huber": (e.square().flatten(1).sum(1) + 0.04).sqrt().sum()}[metric] / 16
    expected = list(torch.autograd.grad(e, list(method.student.parameters())))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_untrained_loss_is_the_gap_between_the_solvers():
    """mm_sfd B13, check 1, without AFS; and check 2: with the same solver on the same grid there is nothing to learn."""
    data = Mixture()
    student = apart(pretrained(data), 1)
    for K, solver, gap in ((4, "dpmpp_3m", True), (1, "euler", False)):
        method = SFD(SFDConfig(num_steps=[5], K=K, solver=solver, afs=False), student, copy.deepcopy(student))
        it = method.begin(batch_of(data))
        x, t = it.x, it.t
        loss, logs = method.step_loss(0, it)
        euler = x + (t[1] - t[0]) * (x - student(x, torch.tensor(t[0]))) / t[0]
        assert loss.item() == pytest.approx((euler - it.targets[1]).abs().flatten(1).sum(1).mean().item(), abs=1e-5)
        assert (loss.item() > 1e-3) == gap
        assert logs["step0"].item() == pytest.approx(loss.item() / 2)
        if not gap:
            assert max(method.step_loss(i, it)[0].item() for i in (1, 2, 3)) < 2e-5


def test_fixed_point():
    """A student that is the teacher on its own grid receives no gradient in any step."""
    data = Mixture(4)
    found = []
    for settings in ({"K": 1, "solver": "euler", "teacher_afs": True}, {}):
        method = SFD(SFDConfig(metric="l2", **settings), pretrained(data), pretrained(data))
        it = method.begin(batch_of(data))
        for turn in method.turns:
            turn.loss(it)[0].backward()
        found.append(largest(p.grad for p in method.student.parameters()))
    assert found[0] < 1e-4 * found[1]  # another solver is what a gradient looks like


def test_routing():
    data = Mixture(4)
    method = SFD(SFDConfig(), apart(pretrained(data), 2), pretrained(data))
    assert reached(gradients(method, "student", batch_of(data))) == {"student"}
    it = method.begin(batch_of(data))
    method.step_loss(1, it)
    assert not it.x.requires_grad  # no gradient crosses steps
    assert method.cfg.needs().data is False


def test_updates_are_immediate_and_on_policy():
    """Every step has its own optimiser step, and the next starts from what this one said before its update."""
    data = Mixture()
    method = sfd(data, num_steps=[5])
    weights, states, walks = [], [], []
    begin = method.begin
    method.begin = lambda batch: walks.append(begin(batch)) or walks[-1]
    method.after_step = lambda name: (weights.append(copy.deepcopy(method.student)), states.append(walks[-1].x))
    first = copy.deepcopy(method.student)
    run = Run(method, TrainConfig(kimg=1, batch=16, optim={"student": OptimConfig(lr=1e-2)}), 0, torch.device("cpu"))
    run.take(torch.zeros(16, 1, 1, 1), None)
    assert len(weights) == 3
    t = torch.tensor(walks[0].t)
    for i in (1, 2):
        x, x_next, old = states[i - 1], states[i], weights[i - 1]
        torch.testing.assert_close(x_next, x + (t[i + 2] - t[i + 1]) * (x - old(x, t[i + 1])) / t[i + 1], rtol=1e-4, atol=1e-4)
    assert (weights[0].model.out.weight - first.model.out.weight).abs().max() > 5e-3


# SFD-v


def test_variable_nfe():
    """One draw an iteration decides the grid, the number of turns taken and what the net is told."""
    data = Mixture()
    method = SFD(SFDConfig(num_steps=[4, 5, 6, 7], step_condition=True), data, Told(data))
    run = Run(method, TrainConfig(kimg=1, batch=8, micro_batch=4), 0, torch.device("cpu"))
    drawn = set()
    for _ in range(24):
        method.student.seen.clear()
        run.take(torch.zeros(8, 1, 1, 1), None)
        (num_steps,) = set(method.student.seen)
        taken = {name for name in run.meter.read() if "/step" in name and not name.endswith("/grad_norm")}
        assert taken == {f"student/step{i}" for i in range(1, num_steps - 1)}
        assert len(method.student.seen) == 2 * (num_steps - 2)  # two micro-batches, the same draw
        drawn.add(num_steps)
    assert drawn == {4, 5, 6, 7}
    assert len(method.turns) == 5
    assert method.sampler == few_step(7, step_condition=True)
    assert len(method.notes) == 4


@pytest.mark.parametrize("kwargs", [{}, {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}, ADM])
def test_step_condition(kwargs, tmp_path):
    """State dict keys are the plain net's and a few more; with zeros it starts as that net; a file remembers it."""
    plain = warmed(tiny(**kwargs)).eval()
    net, random = (add_step_condition(copy.deepcopy(plain), zero=zero) for zero in (True, False))
    added = net.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() < net.state_dict().keys()
    assert all("steps" in key for key in added)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0])
    torch.testing.assert_close(net(x, sigma, steps=4), plain(x, sigma))
    assert not torch.allclose(random(x, sigma, steps=4), random(x, sigma, steps=5), rtol=1e-3)
    assert random.estimate(x, sigma, steps=5).denoised().tolist() == random(x, sigma, steps=5).tolist()
    for one, steps in ((plain, 4), (net, None)):
        with pytest.raises(ValueError, match=rf"got steps={steps}"):
            one(x, sigma, steps=steps)
    save_net(tmp_path / "net.safetensors", random, sampler=few_step(4, step_condition=True).to_dict())
    again, meta = load_net(tmp_path / "net.safetensors")
    assert Sampler(**meta["sampler"]).step_condition == 4
    torch.testing.assert_close(again(x, sigma, steps=6), random(x, sigma, steps=6))


NCSN = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}


@pytest.mark.parametrize("kwargs", [{}, {"channel_mult_noise": 2}, NCSN, ADM], ids=["ddpm++", "ddpm++2", "ncsn++", "adm"])
@pytest.mark.parametrize("steps", [3, 4, 7])
def test_the_number_of_steps_is_embedded_as_in_the_released_code(kwargs, steps):
    """SongUNet puts the sines first and its frequencies end at 1/10000, ADM's cosines come first and it ends short of that;
    NCSN++ has random frequencies, in turns, of their own. Two layers with SiLU follow."""
    net = warmed(add_step_condition(tiny(**kwargs)))
    found = net.model.map_steps(steps)
    width, adm = net.model.map_layer0.in_features, kwargs.get("model_type") == "DhariwalUNet"
    state = {k.removeprefix("model.map_steps."): t.double() for k, t in net.state_dict().items() if "map_steps" in k}
    if "embedding_type" in kwargs:
        angles = (2 * math.pi * state["waves.freqs"].float() * steps).double()  # so large that float32's rounding is part of it
        assert state["waves.freqs"].std() > 5
        assert not torch.equal(net.model.map_steps.waves.freqs, net.model.map_noise.freqs)
    else:
        angles = torch.tensor([steps * 10000.0 ** -(i / (width // 2 - (0 if adm else 1))) for i in range(width // 2)]).double()
    waves = torch.cat([angles.cos(), angles.sin()] if adm else [angles.sin(), angles.cos()])
    silu = lambda v: v / (1 + (-v).exp())  # noqa: E731
    hidden = silu(state["layer0.weight"] @ waves + state["layer0.bias"])
    wanted = silu(state["layer1.weight"] @ hidden + state["layer1.bias"])
    torch.testing.assert_close(found[0].double(), wanted, rtol=0, atol=3e-7 * max(1, wanted.abs().max().item()))


@pytest.mark.parametrize("kwargs", [{}, NCSN, ADM], ids=["ddpm++", "ncsn++", "adm"])
def test_students_that_were_saved_with_another_embedding_are_refused(kwargs, tmp_path):
    """Their files hold no frequencies. Nothing else tells them apart, and a student must not change what it computes."""
    net, path = add_step_condition(tiny(**kwargs)), tmp_path / "student.safetensors"
    save_net(path, net, method="sfd", sampler=few_step(4, step_condition=True).to_dict())
    tensors, meta = read_tensors(path)
    assert load_net(path)[0].knows_steps
    tensors.pop("model.map_steps.waves.freqs")
    save_file(tensors, path, metadata={k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()})
    with pytest.raises(UserError, match=r"is an SFD-v student of an earlier potstill, .* train it again"):
        load_net(path)


@pytest.mark.parametrize("kwargs", [{}, ADM])
def test_step_modulation_by_hand(kwargs):
    """DDPM++: a second shift before the norm; ADM: a second scale and shift after the first (mm_sfd B8)."""
    net = warmed(add_step_condition(tiny(**kwargs)))
    block = next(b for b in net.model.modules() if isinstance(b, UNetBlock)).eval()
    assert isinstance(block.affine, StepAffine)
    width = block.affine.weight.shape[1]
    emb, steps = torch.randn(2, width), torch.randn(2, width)
    h = torch.randn(2, block.out_channels, 4, 4)
    first = (emb @ block.affine.weight.T + block.affine.bias)[:, :, None, None]
    second = (steps @ block.affine.steps.weight.T + block.affine.steps.bias)[:, :, None, None]
    got = block.affine(torch.cat([emb, steps], 1))[:, :, None, None]
    if kwargs:
        (s, b), (s_2, b_2), (s_got, b_got) = (v.chunk(2, 1) for v in (first, second, got))
        torch.testing.assert_close(h * (1 + s_got) + b_got, (h * (1 + s) + b) * (1 + s_2) + b_2, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(got, first + second)


# The second stage


def test_second_stage_regresses_on_the_first_stages_samples():
    """Its teacher is the student of num_steps 7 walked as it was trained, AFS and step condition included: 5 evaluations."""
    data = Mixture()
    stage_1 = Told(data)
    method = SFD(SFDConfig(**SECOND), stage_1, Told(data))
    assert method.teacher_sampler(3) == Sampler(**few_step(7, step_condition=True).to_dict() | {"lower_order_final": True})
    assert (method.sampler, method.sampler.nfe, len(method.turns)) == (few_step(3, step_condition=True), 1, 1)
    it = method.begin(batch_of(data))
    seen = method.teacher.seen
    assert seen == [7] * 5
    torch.testing.assert_close(it.targets[-1], few_step(7, step_condition=True)(stage_1, None, draws(16)))
    method.step_loss(1, it)
    assert method.student.seen == [3]


def test_second_stage_measures_its_teacher_as_that_was_trained(tmp_path):
    """A teacher that is a student is not sampled by Heun."""
    net = add_step_condition(tiny())
    save_net(tmp_path / "stage1.safetensors", net, method="sfd", sampler=few_step(7, step_condition=True).to_dict())
    save_net(tmp_path / "teacher.safetensors", tiny(), method="teacher", sampler=ode("heun", 5).to_dict())
    cfg = load(RECIPES / "cifar10_sfd_second.yaml", [])
    for name, sampler in (("stage1", few_step(7, step_condition=True)), ("teacher", ode("heun", 18))):
        cfg.teacher.checkpoint = str(tmp_path / f"{name}.safetensors")
        assert teacher_sampler(cfg, net) == sampler


@pytest.fixture
def lpips(monkeypatch):
    class Net(nn.Module):
        def __init__(self, net, verbose):
            assert (net, verbose) == ("vgg", False)
            super().__init__()

        def forward(self, a, b):
            assert a.shape == b.shape == (2, 3, 224, 224)
            return (a - b).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Net))


def test_lpips_weighs_like_l1_and_only_in_the_last_step(lpips):
    """sum |e| + C·H·W · LPIPS (mm_sfd B6)."""
    net = warmed(tiny())
    with_it, without = (SFD(SFDConfig(num_steps=[4], lpips=w), net, copy.deepcopy(net)) for w in (0.5, 0.0))
    walks = [m.begin(batch_on_images()) for m in (with_it, without)]
    losses = [[m.step_loss(i, it)[0] for m, it in zip((with_it, without), walks, strict=True)] for i in (1, 2)]
    assert losses[0][0].item() == losses[0][1].item()
    a, b = (nn.functional.interpolate(v, (224, 224), mode="bilinear") for v in (walks[1].x, walks[1].targets[-1]))
    expected = losses[1][1] + 0.5 * 64 * (a - b).square().mean((1, 2, 3)).mean()
    assert losses[1][0].item() == pytest.approx(expected.item(), rel=1e-4)
    losses[1][0].backward()
    assert largest(p.grad for p in with_it.student.parameters()) > 0


def batch_on_images():
    batch = batch_of(Mixture(), 2)
    return batch._replace(images=torch.zeros(2, 1, 8, 8))


def test_lpips_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"pip install 'potstill\[lpips\]'"):
        SFD(SFDConfig(lpips=1.0), tiny(), tiny())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": [1]}, "at least 3 noise levels"), ({"num_steps": [4, 2]}, "at least 3 noise levels"),
        ({"num_steps": [1], "afs": False}, "at least 2 noise levels"), ({"num_steps": []}, "num_steps"),
        ({"sample_num_steps": 2}, "sample_num_steps"), ({"K": 0}, "K wants at least 1, got 0"), ({"solver": "rk4"}, "rk4"),
        ({"metric": "lpips"}, "one of l1, l2, huber"), ({"sigma_min": 0.0}, "sigma_min"), ({"huber_c": 0.0}, "huber_c"),
    ],
)  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        SFDConfig(**settings)


# It learns


@pytest.mark.parametrize(("label_dim", "metric"), [(0, "l1"), (4, "l1"), (0, "l2"), (0, "huber")])
def test_learns_two_evaluations(label_dim, metric):
    """To within the teacher's own error; the start is Euler's, which is a tenth or worse."""
    data = Mixture(label_dim)
    method = SFD(SFDConfig(metric=metric), data, pretrained(data))
    before, after = learn(method, data, 150, betas=(0.9, 0.999), lr=2e-3)
    assert after < before / 10 or after < 1.2 * distance(data, method.teacher_sampler(4), data)


def test_learns_variable_nfe_and_then_one():
    """SFD-v is better than its start at every NFE; the second stage makes one evaluation of it."""
    data = Mixture()
    method = SFD(SFDConfig(num_steps=[4, 5, 6, 7], step_condition=True), data, Told(data))
    samplers = [method.student_sampler(n) for n in (4, 7)]
    before = [distance(method.student, sampler, data) for sampler in samplers]
    learn(method, data, 150, betas=(0.9, 0.999), lr=2e-3)
    after = [distance(method.student, sampler, data) for sampler in samplers]
    assert after[0] < before[0] / 10
    assert after[1] < before[1] / 3
    second = SFD(SFDConfig(**SECOND), method.student, copy.deepcopy(method.student))
    before, after = learn(second, data, 150, betas=(0.9, 0.999), lr=2e-3)
    assert after < before / 10
