"""Students of one, two and four steps by every method that matches distributions: what a step is trained on, and how they are used.

A step's input is the student's own image of the step before under fresh noise; here it is made anew by the sampler's rule, in float64.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_methods_gdd import Waves, move
from toy import Mixture, apart, batch_of, default_dtype, draws, gradients, learn, pretrained, reached

from potstill.engine import evaluate, sample, train
from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.sampling import SeedNoise
from potstill.engine.export import main as export
from potstill.engine.methods.base import Draws, Method, Pairs
from potstill.engine.methods.dmd import DMD, DMDConfig
from potstill.engine.methods.gdd import GDD, GDDConfig
from potstill.engine.methods.parts import Generator
from potstill.engine.methods.sim import SIM, SIMConfig
from potstill.engine.models.router import Router
from potstill.engine.models.student import Student
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.training.checkpoint import load_newest, save_checkpoint
from potstill.engine.training.optim import OptimConfig
from potstill.engine.training.run import Run, TrainConfig, seed_of

ROOT = Path(__file__).parent.parent
STEPS = {1: [600], 2: [800, 450], 4: [900, 650, 450, 250]}


def few(kind: str, steps: list[int], data: Mixture | None = None, **settings) -> Method:
    """A method on the toy, its nets as in the middle of training."""
    data = data or Mixture(4)
    torch.manual_seed(3)  # a discriminator's
    nets = [apart(pretrained(data), seed) for seed in (1, 2)]
    match kind:
        case "dmd":
            return DMD(DMDConfig(steps=steps, **settings), data, *nets)
        case "dmd2":
            return DMD(DMDConfig(steps=steps, gan=True, gan_student=0.3, **settings), data, *nets)
        case "sim":
            return SIM(SIMConfig(steps=steps, **{"scale": 1.0} | settings), data, *nets)
    gdd = GDDConfig(**{"steps": steps, "width": 4, "sum_over": 1.0} | settings)
    return move(GDD(gdd, nets[0], [Waves()]), torch.get_default_dtype())


def karras_level(index: int) -> float:
    return (0.002 ** (1 / 7) + index / 999 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7


def into_step(net, sigmas: list[float], d: Draws, labels) -> tuple[torch.Tensor, int]:
    """What goes into the step that is drawn, and its number: DMD2's Fig. 3, written from the sampler's rule."""
    z, step = d.normal(2, 1, 1), d.choice(range(len(sigmas))) if len(sigmas) > 1 else 0
    x = sigmas[0] * z
    for high, low in zip(sigmas[:step], sigmas[1 : step + 1], strict=True):
        x = net(x, torch.full((len(z),), high), labels).detach() + low * d.normal(2, 1, 1)
    return x, step


# What a step is trained on


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("kind", ["dmd", "dmd2", "sim", "gdd"])
@default_dtype(torch.float64)
def test_a_step_is_trained_on_the_students_own_image_and_alone(kind, n):
    """Seeds until every step was drawn: the input is the one by hand, and the gradient is that of this one evaluation, by the chain rule:
    dL/dx from images that are given, times the net's Jacobian at a constant input."""
    data, method = Mixture(4), few(kind, STEPS[n])
    sigmas, seen = [karras_level(index) for index in STEPS[n]], set()
    assert method.sampler.sigmas == pytest.approx(sigmas, rel=1e-12) and method.sampler.nfe == n
    for seed in range(40):
        if len(seen) == n:
            break
        entered = []
        hook = method.student.register_forward_hook(lambda net, args, out, into=entered: into.append(args))
        found = gradients(method, "student", batch_of(data, seed=seed))["student"]
        hook.remove()
        (x_in, sigma, labels), generate = entered[-1], method.generate
        d, leaf = draws(16, seed), {}
        if kind != "gdd":
            d.labels(4)
        if kind == "sim":  # its fake net has been shown images of other noise
            into_step(method.student, sigmas, d, labels)
            d.normal(), d.normal(2, 1, 1), d.labels(4)
        wanted, step = into_step(method.student, sigmas, d, labels)
        torch.testing.assert_close(x_in, wanted, rtol=1e-9, atol=1e-12)
        assert set(sigma.tolist()) == {method.sampler.sigmas[step]}

        def given(net, drawn, told, leaf=leaf, generate=generate, **how):
            leaf["x"] = generate(net, drawn, told, **how).detach().requires_grad_(torch.is_grad_enabled())
            return leaf["x"]

        method.generate = given
        batch = batch_of(data, seed=seed)
        if kind == "sim":
            method.fake_loss(batch)
        loss = method.student_loss(method.begin(batch))[0]
        (slope,) = torch.autograd.grad(loss, leaf["x"])
        method.generate = generate
        x = method.student(wanted, torch.full((16,), sigmas[step]), labels)
        by_hand = torch.autograd.grad(x, list(method.student.parameters()), slope)
        torch.testing.assert_close(found, list(by_hand), rtol=1e-8, atol=1e-12)
        seen.add(step)
    assert seen == set(range(n))


def test_what_training_makes_step_by_step_is_what_sampling_makes():
    """The last step of a batch of training and the sampler, given the same noise."""
    method = few("gdd", STEPS[4])
    seed = next(seed for seed in range(40) if draws(16, seed).choice(range(4)) == 3)
    labels = batch_of(Mixture(4)).labels
    trained = method.generate(method.student, draws(16, seed), labels)
    torch.testing.assert_close(method.sampler(method.student, labels, draws(16, seed)), trained, rtol=1e-5, atol=1e-5)


def test_the_earlier_steps_of_sim_are_taken_without_dropout():
    """As in sampling; the last, which learns, has its own."""
    torch.manual_seed(0)
    nets = [tiny(dropout=0.5, label_dim=3) for _ in range(3)]
    for net in nets:
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
    method = SIM(SIMConfig(steps=STEPS[4], dropout=0.5), *nets)
    method.student.train()
    seed, entered = next(seed for seed in range(40) if draws(4, seed).choice(range(4)) == 3), []
    hook = method.student.register_forward_hook(lambda net, args, out: entered.append(args[0]))
    labels = torch.eye(3)[[0, 1, 2, 0]]
    for mask in (0, 1):
        torch.manual_seed(mask)
        out = method.generate(method.student, draws(4, seed), labels, before=method.frozen_student)
        entered.append(out)
    hook.remove()
    assert torch.equal(entered[0], entered[2]) and not torch.equal(entered[1], entered[3])


def test_levels_of_training_are_those_of_sampling():
    """An iDDPM net is sampled at the nearest of its own levels, so several steps are trained there; one step stays where it is."""
    net = tiny("iDDPMPrecond", M=20, model_type="DhariwalUNet", model_channels=64)
    method = Generator(net, 80.0, STEPS[4], "sigma")
    assert method.sigmas == method.sampler.levels(net).tolist() == [net.round_sigma(karras_level(index)) for index in STEPS[4]]
    assert Generator(net, 80.0, [], "sigma").sigmas == [80.0]


def tiny(precond: str = "EDMPrecond", **kwargs):
    shape = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    return from_kwargs(precond, img_resolution=8, img_channels=1, **shape | kwargs)


@pytest.mark.parametrize("kind", ["dmd", "sim", "gdd"])
def test_all_ranks_and_micro_batches_stop_at_one_step(kind):
    """Of what iteration it is the choice is a function, not of whose samples these are; all steps are equally frequent."""
    method, seed = few(kind, STEPS[4]), 5
    windows = [slice(0, 8), slice(8, 16), slice(0, 16, 2), slice(1, 16, 2)]
    whole = method.generate(method.student, draws(16, seed), torch.eye(4)[torch.arange(16) % 4])
    for window in windows:
        part = Draws(torch.Generator().manual_seed(seed), 16, window, random.Random(seed))
        images = method.generate(method.student, part, torch.eye(4)[torch.arange(16) % 4][window])
        torch.testing.assert_close(images, whole[window])
    counts = np.bincount([random.Random(seed_of(0, step, 2)).choice(range(4)) for step in range(4000)])
    assert counts == pytest.approx([1000] * 4, abs=4 * (4000 * 3 / 16) ** 0.5)


def test_one_step_asks_for_no_choice():
    """So that nothing that the engine drew before there were several steps is drawn otherwise."""
    data = Mixture(4)
    for steps in ([], [600]):
        method, batch = few("gdd", steps, data), batch_of(data)
        batch.draws.host = None
        method.student_loss(batch)
        method.discriminator_loss(batch)
    assert GDD(GDDConfig(), apart(pretrained(data), 1), [Waves()]).sampler.to_dict()["sigmas"] == [80.0]


def test_regression_beside_steps_is_of_the_first_alone():
    """+ w mean (G(σ₀ z') - y')², whatever step the batch stops at."""
    mixture = Mixture()
    z, y = torch.randn(1, 2, 1, 1), torch.randn(1, 2, 1, 1)
    for seed in range(6):
        values = []
        for weight in (0.0, 0.25):
            method = few("dmd", STEPS[4], mixture, regression=weight, regression_metric="l2", pairs=1)
            method.pairs = Pairs(z, y, None)
            values.append(method.student_loss(method.begin(batch_of(mixture, 16, seed)))[0])
        sigma = method.sampler.sigmas[0]
        expected = 0.25 * ((method.student(sigma * z, torch.tensor([sigma]), None) - y) ** 2).mean()
        torch.testing.assert_close(values[1] - values[0], expected, rtol=1e-3, atol=1e-6)


def test_r1_sees_real_images_alone():
    """Its penalty and gradient are the same for students of any number of steps."""
    data, found = Mixture(4), []
    for steps in ([], STEPS[4]):
        method = few("gdd", steps, data, r1_gamma=0.3)
        loss, _ = method.r1_loss(batch_of(data))
        loss.backward()
        found.append([loss, *(p.grad for p in method.discriminator.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dmd2", "sim", "gdd"])
def test_each_turn_of_a_few_step_student_reaches_its_own_net(kind):
    data = Mixture(4)
    for seed in range(4):
        for trains in few(kind, STEPS[4]).nets:
            assert reached(gradients(few(kind, STEPS[4]), trains, batch_of(data, seed=seed))) == {trains}


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [([250, 500], "each less than the one before"), ([1000, 3], "whole numbers of 0 … 999"), ([500, 500], "each less than")],
)
def test_steps_that_are_none(steps, sentence):
    with pytest.raises(UserError, match=sentence):
        GDDConfig(steps=steps)


# That they learn


@pytest.mark.parametrize(
    ("kind", "n", "iterations", "share"),
    [("dmd", 2, 400, 10), ("sim", 2, 400, 10), ("gdd", 2, 400, 10), ("dmd", 4, 500, 5), ("sim", 4, 800, 5), ("gdd", 4, 400, 2)],
)
def test_learns(kind, n, iterations, share):
    """On the ring of Gaussians the energy distance falls below a tenth, as it does for one step; of four steps, which without
    distillation begin four times nearer, below a fifth, and by the GAN alone a half."""
    data = Mixture()
    nets = [pretrained(data) for _ in range(2)]
    match kind:
        case "dmd":
            method, how = DMD(DMDConfig(steps=STEPS[n], fake_per_student=2), data, *nets), {"lr": 2e-3 if n == 2 else 1e-3}
        case "sim":
            method, how = SIM(SIMConfig(steps=STEPS[n]), data, *nets), {"lr": 2e-3 if n == 2 else 1e-3}
        case _:
            torch.manual_seed(3)
            method = GDD(GDDConfig(steps=STEPS[n], width=8, sum_over=1.0, r1_gamma=1e-3), nets[0], [Waves()])
            rates = {"student": 1e-3, "discriminator": 2e-3}
            how = {"optim": {net: OptimConfig(lr=lr, betas=[0.0, 0.99], schedule="linear") for net, lr in rates.items()}}
    before, after = learn(method, data, iterations, **how)
    assert after < before / share, f"energy distance {before:.4f} -> {after:.4f}"


def test_gdd_i_freezes_what_it_freezes_of_one_step():
    """Three iterations at four steps on a U-Net: the same weights stay to the last bit, all others move."""
    torch.manual_seed(0)
    net, moved = tiny(label_dim=3), []
    for steps in ([], STEPS[4]):
        method = GDDConfig(freeze=1, width=4, r1_every=2, steps=steps).build(net, net)
        before = {name: p.clone() for name, p in method.student.named_parameters()}
        run = Run(method, TrainConfig(kimg=1, batch=4, optim={"student": OptimConfig(lr=1e-2)}), 0, torch.device("cpu"))
        for _ in range(3):
            run.take(torch.rand(4, 1, 8, 8) * 2 - 1, torch.eye(3)[torch.arange(4) % 3])
        moved.append({name for name, p in method.student.named_parameters() if not torch.equal(p, before[name])})
    assert moved[0] == moved[1] and 0 < len(moved[0]) < len(before)


@pytest.mark.parametrize("kind", ["dmd2", "sim", "gdd"])
def test_a_run_that_goes_on_draws_the_same_steps(kind, tmp_path):
    """Six iterations, and three and three from a checkpoint's state: all weights, bit for bit."""

    def new() -> Run:
        return Run(few(kind, STEPS[4], data), TrainConfig(kimg=1, batch=16), 0, torch.device("cpu"))

    def advance(run: Run, steps: int) -> Run:
        for step in range(run.step, run.step + steps):
            run.take(*data.sample_data(16, torch.Generator().manual_seed(step)))
        return run

    data = Mixture(4)
    whole, first, second = advance(new(), 6), advance(new(), 3), new()
    save_checkpoint(tmp_path, first.step, first.state_dict(), keep=1)
    second.load_state_dict(load_newest(tmp_path, torch.device("cpu")))
    advance(second, 3)
    for name, net in whole.method.nets.items():
        for a, b in zip(net.state_dict().values(), second.method.nets[name].state_dict().values(), strict=True):
            assert torch.equal(a, b)


# The commands


SMALL = [
    "net.model_channels=8", "net.channel_mult=[1]", "net.attn_resolutions=[]", "train.kimg=0.3", "train.batch=16", "eval.n=40",
    "train.grid_kimg=1", "log.tensorboard=false", "train.log_iterations=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny teacher of digits, and a run of one step that trained it."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    train.main([str(ROOT / "configs/digits.yaml"), f"run_dir={folder}", "teacher.train.kimg=2", *SMALL])
    return folder / "teacher.safetensors"


def trained(teacher: Path, name: str, recipe: str, *settings: str) -> Path:
    folder = teacher.parent.parent / name
    if not (folder / "summary.json").exists():
        train.main([recipe, f"run_dir={folder}", f"teacher.checkpoint={teacher}", *SMALL, *settings])
    return folder


def metadata_of(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return {key: json.loads(value) if value[:1] in '{["' else value for key, value in file.metadata().items()}


@pytest.mark.parametrize("recipe", ["digits", "digits_sim", "digits_gdd"])
def test_a_few_step_student_from_training_to_use(recipe, teacher, tmp_path, capsys):
    """One run of two steps: what file, summary and report say, and the same images by the command, by Python, and by the distance."""
    run = trained(teacher, recipe, recipe, "method.steps=[700,400]")
    sigmas = [karras_level(700), karras_level(400)]
    student = Student(run)
    assert student.sampler.sigmas == pytest.approx(sigmas) and student.sampler.solver == "renoise" and student.draws == 2
    summary = json.loads((run / "summary.json").read_text())
    assert summary["student"]["nfe"] == 2 and "with 2 network evaluations per image" in (run / "report.html").read_text()
    found = student(range(5), dtype=torch.float32)
    noise, labels = SeedNoise(range(5)), torch.eye(10)[:5]
    with torch.no_grad():
        x = student.net(sigmas[0] * noise.normal(1, 8, 8), torch.tensor(sigmas[0]), labels)
        x = student.net(x + sigmas[1] * noise.normal(1, 8, 8), torch.tensor(sigmas[1]), labels)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)
    sample.main([str(run), "--seeds", "0-4", "--out", str(tmp_path / "x.npz"), "--batch", "2"])
    assert "renoise, NFE 2" in capsys.readouterr().err
    with np.load(tmp_path / "x.npz") as file:
        assert abs(file["images"][..., 0].astype(int) - student(range(5))[:, 0].numpy()).max() <= 1
    for more in (["--seeds", "0-3"], ["--strip", "3-7", "--frames", "3"], ["--steps", "2", "--seeds", "1"], ["--beside", "--seeds", "1-2"]):
        sample.main([str(run), *more, "--out", str(tmp_path / "grid.png")])
    with pytest.raises(UserError, match=r"was distilled for 2 steps, got 3: leave steps out, or name a solver"):
        sample.main([str(run), "--steps", "3", "--out", str(tmp_path / "grid.png")])
    capsys.readouterr()
    evaluate.main([str(run), "--which", "student"])
    measured = json.loads(capsys.readouterr().out)["student"]
    assert measured["nfe"] == 2 and measured["fd"] == pytest.approx(summary["student"]["fd"], rel=1e-4)
    for kind in ("hub", "safetensors"):
        export([str(run), "--to", kind, "--out", str(tmp_path / kind)])
        assert torch.equal(Student(tmp_path / kind)(range(5)), student(range(5)))
        text = (tmp_path / kind / "README.md").read_text()
        assert "few-step" in text and "2 network evaluations" in text


def test_students_of_few_steps_each_for_its_classes(teacher, tmp_path, capsys):
    """MSD: two students of two steps by DM, which go on by ADM; the router of both gives each image its own student's."""
    first = trained(teacher, "msd", "digits_msd", "method.steps=[700,400]")
    second = trained(teacher, "adm", "digits_msd", "method=dmd2", "method.steps=[700,400]", f"students.start={first}")
    assert json.loads((second / "summary.json").read_text())["student"]["nfe"] == 2
    for run in (first, second):
        router = Student(run)
        assert isinstance(router.net, Router) and router.sampler.nfe == 2
        both = router(range(10))
        for k in range(2):
            of = [seed for seed in range(10) if router.net.partition.student_of[seed] == k]
            alone = Student(run / f"student-{k}/student.safetensors")
            assert abs(alone(of).int() - both[of].int()).max() <= 1
        sample.main([str(run), "--seeds", "0-9", "--out", str(tmp_path / f"{run.name}.npz")])
        with np.load(tmp_path / f"{run.name}.npz") as file:
            assert abs(file["images"][..., 0].astype(int) - both[:, 0].numpy()).max() <= 1
    assert not torch.equal(Student(first)(range(10)), Student(second)(range(10)))
    export([str(second), "--to", "hub", "--out", str(tmp_path / "hub")])
    assert torch.equal(Student(tmp_path / "hub")(range(10)), Student(second)(range(10)))
    export([str(second / "student-1/student.safetensors"), "--to", "diffusers", "--out", str(tmp_path / "pipe")])
    assert json.loads((tmp_path / "pipe/model_index.json").read_text())["sampler"]["solver"] == "renoise"


def test_a_smaller_student_learns_the_teacher_first_and_then_few_steps(teacher):
    """TSM: the smaller net denoises at all levels before, so any of them can be a step."""
    small = [
        "++students.net.model_channels=4",
        "++students.net.channel_mult=[1]",
        "++students.net.num_blocks=1",
        "++students.net.attn_resolutions=[]",
    ]
    tsm = ["students.tsm.kimg=0.3", "students.tsm.batch=16"]
    run = trained(teacher, "tsm", "digits_gdd", "method.steps=[700,400]", *small, *tsm)
    assert (run / "tsm.safetensors").exists() and Student(run).sampler.nfe == 2


def test_dmd_with_pairs_and_steps_runs(teacher):
    pairs = ["method.regression=0.25", "method.regression_metric=l2", "method.pairs=20", "method.pair_steps=2"]
    run = trained(teacher, "pairs", "digits", "method.steps=[700,400]", *pairs)
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["student/regression"]) for line in logs if "student/regression" in line)
    assert any("student/regression" in line for line in logs)


def test_a_run_with_few_steps_does_not_go_on_as_one_with_others(teacher):
    run = trained(teacher, "digits", "digits", "method.steps=[700,400]")
    with pytest.raises(UserError, match=r"run with other settings: method\.steps"):
        train.main(["digits", f"run_dir={run}", f"teacher.checkpoint={teacher}", *SMALL, "method.steps=[700,300]"])
