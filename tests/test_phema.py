"""Power-function averages: against the published numbers and integrals, through runs that are killed and cut into ranks, and any length
of them out of those that were kept."""

import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import parallel_cases as cases
import pytest
import test_graphs as methods
import torch
from killing import killed_in, needs_fork
from test_parallel import world

from potstill import __main__
from potstill.engine import train
from potstill.engine.common.errors import UserError
from potstill.engine.config.tree import load
from potstill.engine.methods.teacher import EDMLoss, Teacher
from potstill.engine.models.opening import open_models
from potstill.engine.models.router import MANIFEST, load_router, read_manifest, write_manifest
from potstill.engine.models.weights import read_tensors, save_net, save_weights
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.training.checkpoint import checkpoints, load_newest, save_checkpoint
from potstill.engine.training.graphs import Graphs
from potstill.engine.training.memory import estimate
from potstill.engine.training.optim import OptimConfig, rates_as_tensors
from potstill.engine.training.phema import Length, combination, decay, gamma_of, is_std, products, std_of
from potstill.engine.training.posthoc import Profile, profile_file, profiles_in, reconstructed
from potstill.engine.training.ranks import ALONE
from potstill.engine.training.run import Run, TrainConfig

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs/digits.yaml")
TINY = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
SHAPE = {"img_resolution": 8, "img_channels": 1, "dropout": 0.0, **TINY}
CPU = torch.device("cpu")
LENGTHS = [0.05, 0.1]

# the arithmetic


def moments(gamma: float) -> float:
    """Standard deviation of p(τ) = (γ+1) τ^γ on [0, 1], by the midpoint rule."""
    tau = (np.arange(1_000_000) + 0.5) / 1_000_000
    p = (gamma + 1) * tau**gamma / 1_000_000
    mean = (p * tau).sum()
    return (p * (tau - mean) ** 2).sum() ** 0.5


def test_exponents_are_the_published_ones_and_lengths_what_they_are_called():
    assert (gamma_of(0.05), gamma_of(0.10)) == pytest.approx((16.9722, 6.9372), abs=5e-5)
    for std in (0.01, 0.05, 0.1, 0.2, 0.28):
        assert std_of(gamma_of(std)) == pytest.approx(std, rel=1e-9)
        assert moments(gamma_of(std)) == pytest.approx(std, rel=1e-5)
    assert [is_std(value) for value in (0, 0.001, 0.2886, 0.289, -1, float("nan"))] == [False, True, True, False, False, False]


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_steps_with_the_decay_integrate_the_power_function(std):
    """Of θ(τ) = sin 9τ + τ², in 20,000 steps: their error falls as 1 / steps."""
    steps, gamma = 20_000, gamma_of(std)
    average = 0.0
    for step in range(1, steps + 1):
        average += (1 - decay(std, 64, 64 * step)) * (np.sin(9 * step / steps) + (step / steps) ** 2 - average)
    tau = (np.arange(1_000_000) + 0.5) / 1_000_000
    wanted = ((gamma + 1) * tau**gamma * (np.sin(9 * tau) + tau**2)).mean()
    assert average == pytest.approx(wanted, abs=20 / steps)
    assert decay(std, 64, 64) == 0.0  # the first step leaves nothing of the beginning


def test_products_are_the_integrals():
    lengths = [Length(images, std) for images in (3.0, 4.0, 7.0) for std in (0.05, 0.2)]
    tau = 7.0 * (np.arange(1_000_000) + 0.5) / 1_000_000
    p = [np.where(tau < t, (gamma_of(std) + 1) * (tau / t) ** gamma_of(std) / t, 0.0) for t, std in lengths]
    wanted = [[7.0 * (a * b).mean() for b in p] for a in p]
    np.testing.assert_allclose(products(lengths, lengths), wanted, rtol=1e-3)


def test_weights_of_profiles_are_the_published_codes():
    kept = [Length(t * 2**20, std) for t in (8, 16) for std in LENGTHS]
    found, off = combination(kept, Length(16 * 2**20, 0.15))
    np.testing.assert_allclose(found, [-0.014496, 0.050141, -0.340512, 1.304866], atol=1e-6)
    assert 0.1 < off < 0.3  # four are too few for it
    same, off = combination(kept, kept[2])
    np.testing.assert_allclose(same, [0, 0, 1, 0], atol=1e-9)
    assert off < 1e-6
    with pytest.raises(np.linalg.LinAlgError):
        combination([kept[0], kept[0]], kept[0])


def test_more_profiles_come_nearer():
    errors = [combination([Length(i / n, std) for i in range(1, n + 1) for std in LENGTHS], Length(1, 0.08))[1] for n in (2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.005


# in a run


def run_of(**settings) -> Run:
    torch.manual_seed(1)
    given = {"kimg": 0.16, "batch": 8, "optim": {"student": OptimConfig(lr=1e-2)}, "phema": LENGTHS} | settings
    return Run(Teacher(EDMLoss(), from_kwargs("EDMPrecond", **SHAPE)), TrainConfig(**given), 0, CPU)


def takes(run: Run, steps: int) -> list[torch.Tensor]:
    """The weights after each of so many iterations, as one float64 vector."""
    found = []
    for _ in range(steps):
        generator = torch.Generator().manual_seed(run.step)
        run.take(torch.rand(8, 1, 8, 8, generator=generator) * 2 - 1, None)
        found.append(vector(run.method.nets[run.method.product]))
    return found


def newest(folder: Path) -> dict:
    state = load_newest(folder, CPU)
    assert state is not None
    return state


def vector(net) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


def summed(weights: list[torch.Tensor], std: float) -> torch.Tensor:
    """What an average is after these, from the definition: every step's share is its own times all later decays."""
    decays = [decay(std, 8, 8 * (i + 1)) for i in range(len(weights))]
    shares = [(1 - decays[i]) * np.prod(decays[i + 1 :]) for i in range(len(weights))]
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    return torch.stack([w * float(s) for w, s in zip(weights, shares, strict=True)]).sum(0)


@pytest.mark.parametrize("optimizer", ["torch", "adam_ema"])
def test_a_run_follows_all_lengths_and_its_own_average_can_be_one(optimizer):
    run = run_of(optimizer=optimizer, ema_std=0.2)
    weights = takes(run, 12)
    for std in (*LENGTHS, 0.2):
        average = run.average() if std == 0.2 else run.profile(std)
        torch.testing.assert_close(vector(average), summed(weights, std), rtol=0, atol=2e-6)
    assert (vector(run.profile(0.05)) - vector(run.profile(0.1))).abs().max() > 1e-3
    assert "average" in estimate(run)[0]


def test_a_length_that_is_the_runs_own_is_followed_once():
    run = run_of(ema_std=0.1)
    assert list(run.profiles) == [0.05]
    takes(run, 3)
    assert run.profile(0.1) is run.average()


def test_a_run_without_the_setting_is_what_it_was():
    """Weights, average and what a checkpoint holds."""
    plain, with_ = run_of(phema=[]), run_of()
    for run in (plain, with_):
        takes(run, 4)
    assert torch.equal(vector(plain.average()), vector(with_.average()))
    assert "phema" not in plain.state_dict()
    assert with_.state_dict().keys() - plain.state_dict().keys() == {"phema"}


def test_a_run_goes_on_to_the_bit(tmp_path):
    straight = run_of(ema_std=0.2)
    takes(straight, 9)
    first = run_of(ema_std=0.2)
    takes(first, 4)
    save_checkpoint(tmp_path, first.step, first.state_dict(), keep=1)
    second = run_of(ema_std=0.2)
    second.load_state_dict(newest(tmp_path))
    takes(second, 5)
    for std in LENGTHS:
        assert torch.equal(vector(second.profile(std)), vector(straight.profile(std)))
    assert torch.equal(vector(second.average()), vector(straight.average()))
    with pytest.raises(UserError, match=r"average of std 0\.15 does not fit this configuration"):
        run_of(phema=[0.15]).load_state_dict(newest(tmp_path))


@pytest.mark.parametrize("name", methods.TAPED)
def test_every_method_trains_with_them_also_replayed(name):
    """Replayed as CUDA graphs are, to the bit; and to the definition's sum."""
    taped: Any = methods.Taped()
    runs = [methods.run_of(name, graphs=graphs, phema=LENGTHS, ema_std=0.2) for graphs in ("off", Graphs(taped, warmup=1))]
    for one in runs[0].trained.values():
        rates_as_tensors(one.optimizer)
    weights = []
    for step in range(6):
        for run in runs:
            with methods.Watched():
                run.take(*methods.batch(step))
        weights.append(vector(runs[0].method.nets[runs[0].method.product]))
    for std in LENGTHS:
        assert torch.equal(vector(runs[0].profile(std)), vector(runs[1].profile(std)))
        torch.testing.assert_close(vector(runs[0].profile(std)), summed(weights, std), rtol=0, atol=2e-6)
    torch.testing.assert_close(vector(runs[0].average()), summed(weights, 0.2), rtol=0, atol=2e-6)


# over ranks

RANKS: list[tuple[str, str, dict]] = [
    ("sim", "ddp", {"phema": LENGTHS, "ema_std": 0.08}),
    ("sim", "fsdp", {"phema": LENGTHS, "ema_std": 0.08}),
]


@pytest.mark.parallel
def test_two_ranks_have_the_averages_of_one(tmp_path):
    found = world(tmp_path, 2, "run_all", RANKS).result
    assert isinstance(found, dict)
    alone = cases.new_run("sim", ALONE, **RANKS[0][2])
    cases.advance(alone, cases.STEPS)
    wanted = cases.weights(alone)
    assert sum(name.startswith("profile 0.05") for name in wanted) > 10
    for job in RANKS:
        _, weights = found[cases.key(*job)]
        assert weights.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parallel
def test_shards_go_on_in_shards_and_on_one_rank(tmp_path):
    """7 iterations of two ranks, and 5 more."""
    folder, straight = tmp_path / "checkpoints", cases.new_run("dmd", ALONE, phema=LENGTHS)
    for steps in (7, 5):
        left = world(tmp_path, 2, "part", str(folder), "fsdp", steps, {"phema": LENGTHS}).result
        assert isinstance(left, tuple)
        assert checkpoints(folder)[-1].suffix == ".dcp"
        run = cases.new_run("dmd", ALONE, phema=LENGTHS)
        run.load_state_dict(newest(folder))
        for name, value in cases.weights(run).items():
            assert torch.equal(value, left[1][name]), name
        cases.advance(straight, steps)
        for std in LENGTHS:
            torch.testing.assert_close(vector(run.profile(std)), vector(straight.profile(std)), rtol=0, atol=1e-5)


# the command

SMALL = [
    "net.model_channels=8", "net.channel_mult=[1]", "net.num_blocks=1", "net.attn_resolutions=[]", "device=cpu", "precision=fp32",
    "teacher.train.kimg=0.64", "teacher.train.batch=32", "teacher.loss.sampling_steps=2", "teacher.train.grid_kimg=1",
    "teacher.train.phema=[0.1]", "teacher.train.phema_kimg=0.32", "train.kimg=3.2", "train.batch=16", "train.grid_kimg=4",
    "train.checkpoint_kimg=1", "train.eval_kimg=null", "eval.n=16", "log.tensorboard=false", "train.phema=[0.05,0.1]", "train.ema_std=0.08",
]  # fmt: skip


def trained(folder: Path, *more: str) -> Path:
    train.main([DIGITS, f"run_dir={folder}", *SMALL, *more])
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run on digits that nobody disturbed; the average that it saves is of std 0.08."""
    return trained(tmp_path_factory.mktemp("straight") / "run")


def convert(*arguments: object) -> None:
    __main__.main(["convert", "phema", *map(str, arguments)])


def apart(a: dict, b: dict) -> float:
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in b) ** 0.5)


def contents(folder: Path) -> dict[str, tuple]:
    """Of every profile its metadata and its tensors' bytes; safetensors writes metadata in any order."""
    read = {path.name: read_tensors(path) for path in sorted(folder.glob("*.safetensors"))}
    return {name: (meta, {key: t.numpy().tobytes() for key, t in tensors.items()}) for name, (tensors, meta) in read.items()}


def test_a_length_that_was_not_kept_is_the_one_that_was_followed(straight, tmp_path, capsys):
    """To a thousandth of what one length differs from another; and at a time in the middle."""
    out = tmp_path / "o.safetensors"
    convert(straight, out, "--std", 0.08)
    line = capsys.readouterr().out
    assert line.startswith(f"{out}: std 0.08 at 3.2 kimg, of 32 profiles of std 0.05, 0.1 (its weights over time off by 0.")
    made, meta = read_tensors(out)
    wanted, of_run = read_tensors(straight / "student.safetensors")
    others = [read_tensors(profile_file(straight, 3200, std))[0] for std in LENGTHS]
    assert made.keys() == wanted.keys()
    assert {t.dtype for t in made.values()} == {torch.float32}
    assert apart(made, wanted) <= 1e-3 * min(apart(other, wanted) for other in others)
    assert meta["sampler"] == of_run["sampler"] and meta["kwargs"] == of_run["kwargs"] and meta["kimg"] == 3.2
    assert "phema" not in meta and meta["reconstructed"]["std"] == 0.08 and len(meta["reconstructed"]["profiles"]) == 32
    assert sum(weight for *_, weight in meta["reconstructed"]["profiles"]) == pytest.approx(1)
    convert(straight / "phema", out, "--std", "0.1", "--kimg", "1.65", "--force")
    assert "std 0.1 at 1.6 kimg, of 16 profiles" in capsys.readouterr().out
    assert apart(read_tensors(out)[0], read_tensors(profile_file(straight, 1600, 0.1))[0]) < 1e-6


def test_profiles_and_what_is_made_of_them_are_sampled(straight, tmp_path, capsys):
    convert(straight, tmp_path / "o.safetensors", "--std", 0.08)
    convert(straight / "teacher", tmp_path / "t.safetensors", "--std", 0.1)
    files = [tmp_path / "o.safetensors", straight / "student.safetensors", profile_file(straight, 3200, 0.05)]
    images = []
    for file in files:
        (model,) = open_models(file)
        assert model.role == "student" and model.sampler.solver == "one_step"
        images.append(model.net(2.5 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 2.5)))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-3)
    assert (images[0] - images[2]).abs().max() > 10 * (images[0] - images[1]).abs().max()
    __main__.main(["sample", str(tmp_path / "t.safetensors"), "--seeds", "0-1", "--out", str(tmp_path / "t.png")])
    assert "by the teacher" in capsys.readouterr().err


@needs_fork
def test_a_killed_run_keeps_the_same_profiles(straight, tmp_path):
    """Killed at iteration 90 of 200, with a checkpoint of 63; the profiles of later are made again, and a strange one of later is gone."""
    broken = tmp_path / "run"
    broken.mkdir()
    (broken / "teacher.safetensors").write_bytes((straight / "teacher.safetensors").read_bytes())
    killed_in(lambda: trained(broken), 90)
    last = checkpoints(broken / "checkpoints")[-1]
    before = {path.name: path.stat().st_mtime_ns for path in (broken / "phema").glob("*.safetensors")}
    later = {name for name in before if int(name[:10]) > 16 * int(last.stem)}
    assert len(later) == 4
    shutil.copy(profile_file(straight, 3200, 0.05), broken / "phema/0000002999-0.070.safetensors")
    (broken / "phema/0000001600-0.050.safetensors.part").write_bytes(b"half")
    trained(broken)
    ours, theirs = contents(broken / "phema"), contents(straight / "phema")
    assert ours == theirs
    assert {name for name in before if (broken / "phema" / name).stat().st_mtime_ns != before[name]} == later
    assert sorted(path.name for path in (broken / "phema").iterdir()) == sorted(ours)


def test_a_run_that_starts_over_forgets_what_was_kept(straight, tmp_path):
    """Without a checkpoint it begins anew; profiles of another course would stand among its own."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoints")
    trained(folder, "train.kimg=0.32")
    assert {one.images for one in profiles_in(folder)} == {n for n in range(16, 321, 16) if n // 20 > (n - 16) // 20}


def test_each_of_several_students_keeps_its_own(straight, tmp_path):
    given = ["students.count=2", "students.partition=blocks", "train.kimg=0.64", f"teacher.checkpoint={straight}/teacher.safetensors"]
    folder = trained(tmp_path / "run", *given)
    with pytest.raises(UserError, match=r"run holds no profiles, they are those of its students: give one of .*student-0, .*student-1"):
        profiles_in(folder)
    for k in range(2):
        made = reconstructed(profiles_in(folder / f"student-{k}"), 0.08)
        assert (made.metadata["student"], made.images) == (k, 640)
        file = folder / f"student-{k}/student.safetensors"
        wanted, other = (read_tensors(path)[0] for path in (file, profile_file(file.parent, 640, 0.05)))
        assert apart(made.tensors, wanted) < 0.01 * apart(other, wanted)
        save_weights(file, made.tensors, made.metadata)
    write_manifest(folder, read_manifest(folder / MANIFEST).partition)
    assert len(load_router(folder / MANIFEST)[0].students) == 2
    mixed = [*profiles_in(folder / "student-0"), *profiles_in(folder / "student-1")]
    with pytest.raises(UserError, match=r"are both the profile of std 0\.05 at 0\.048 kimg: leave one out"):
        reconstructed(mixed, 0.08)


# profiles from elsewhere


def profiles(steps: int = 6, dtype=torch.float32) -> tuple[list[Profile], list[int]]:
    """In-memory profiles of an EDM net whose tensors are their own numbers, and how many are open at a time."""
    net = from_kwargs("EDMPrecond", **SHAPE | {"model_channels": 4, "channel_mult": [1, 1]})
    meta, state = {"precond": "EDMPrecond", "kwargs": net.kwargs}, net.state_dict()
    opened, most = [0], [0]

    def tensors(seed: int):
        @contextmanager
        def open_():
            opened[0] += 1
            most.append(max(most[-1], opened[0]))
            generator = torch.Generator().manual_seed(seed)
            yield {name: torch.randn(t.shape, generator=generator).to(dtype) for name, t in state.items()}
            opened[0] -= 1

        return open_

    made = [
        Profile(100 * (i + 1), std, tensors(10 * i + round(100 * std)), meta, Path(f"{i}-{std}.pkl"))
        for i in range(steps)
        for std in LENGTHS
    ]
    return made, most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_profiles_of_any_origin_are_summed_one_at_a_time(dtype):
    given, most = profiles(dtype=dtype)
    made = reconstructed(given[::-1], 0.07)
    assert most[-1] == 1
    weights, off = combination([Length(one.images, one.std) for one in given], Length(600, 0.07))
    parameters = {name for name, _ in from_kwargs("EDMPrecond", **SHAPE | {"model_channels": 4, "channel_mult": [1, 1]}).named_parameters()}
    assert made.off == pytest.approx(off, rel=1e-6)
    stored = []
    for one in given:
        with one.tensors() as tensors:
            stored.append(tensors)
    for name, t in made.tensors.items():
        if name in parameters:
            wanted = torch.stack([w * one[name].double() for w, one in zip(weights.tolist(), stored, strict=True)]).sum(0).float()
            torch.testing.assert_close(t, wanted, rtol=1e-6, atol=1e-6)
            assert t.dtype is torch.float32
        else:
            assert torch.equal(t, stored[-1][name])  # a buffer is the last one's
    assert made.tensors.keys() - parameters  # filters of the resampling


def test_times_are_those_that_were_kept():
    given, _ = profiles()
    assert [reconstructed(given, 0.07, kimg).images for kimg in (None, 0.1, 0.24, 0.26, 0.6)] == [600, 100, 200, 300, 600]
    assert reconstructed(given, 0.07, 0.3).used == 6
    for kimg in (0.61, 0, -1, float("nan")):
        with pytest.raises(UserError, match=rf"--kimg wants a time from 0\.1 to 0\.6, where there are profiles, got {kimg:g}"):
            reconstructed(given, 0.07, kimg)


def test_profiles_of_before_the_names_of_variants_were_kept_belong_to_those_of_after():
    given, _ = profiles()
    named = [one._replace(metadata=one.metadata | {"method": "dmd2" if i > 3 else "dmd"}) for i, one in enumerate(given)]
    made = reconstructed(named, 0.07)
    assert made.metadata["method"] == "dmd2"
    assert all(torch.equal(t, made.tensors[name]) for name, t in reconstructed(given, 0.07).tensors.items())


def test_profiles_that_do_not_belong_together_are_refused():
    given, _ = profiles()
    with pytest.raises(UserError, match=r"0-0\.05\.pkl and 0-0\.05\.pkl are both the profile of std 0\.05 at 0\.1 kimg: leave one out"):
        reconstructed([*given, given[0]], 0.07)
    for name, other in (("kwargs", {}), ("precond", "VPPrecond"), ("method", "sim"), ("partition", "x")):
        strange = given[3]._replace(metadata=given[3].metadata | {name: other})
        with pytest.raises(UserError, match=rf"1-0\.1\.pkl is of another net than 5-0\.1\.pkl \({name} differs\)"):
            reconstructed([*given[:3], strange, *given[4:]], 0.07)

    @contextmanager
    def less():
        with given[1].tensors() as tensors:
            yield dict(list(tensors.items())[1:])

    @contextmanager
    def nan():
        with given[1].tensors() as tensors:
            yield {name: t * float("nan") for name, t in tensors.items()}

    @contextmanager
    def wide():
        with given[1].tensors() as tensors:
            yield {name: torch.stack([t, t]) for name, t in tensors.items()}

    for tensors, words in ((less, "is in one of the two only"), (nan, "not finite"), (wide, "is of another architecture: ")):
        with pytest.raises(UserError, match=words):
            reconstructed([given[0], given[1]._replace(tensors=tensors), *given[2:]], 0.07)


# what a user gets wrong


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["convert", "phema", *map(str, arguments)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_command_refuses_in_one_sentence(straight, tmp_path, capsys):
    out = tmp_path / "o.safetensors"
    for std in ("0", "0.289", "-0.1", "nan"):
        assert f"--std wants a relative length above 0 and below 0.289, got {float(std):g}" in refused(
            capsys, straight, out, f"--std={std}"
        )
    assert "--kimg wants a time from 0.208 to 3.2, where there are profiles, got 4" in refused(
        capsys, straight, out, "--std=0.1", "--kimg=4"
    )
    assert f"no folder at {tmp_path}/nowhere" in refused(capsys, tmp_path / "nowhere", out, "--std=0.1")
    assert "ends in .safetensors" in refused(capsys, straight, tmp_path / "o.pt", "--std=0.1")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty} holds no profiles: a run with train.phema=[0.05,0.1] keeps some" in refused(capsys, empty, out, "--std=0.1")
    shutil.copytree(straight / "teacher", empty / "teacher")
    save_net(empty / "teacher.safetensors", from_kwargs("EDMPrecond", **SHAPE))
    assert f"{empty} holds no profiles, they are those of its {empty}/teacher: give that" in refused(capsys, empty, out, "--std=0.1")
    assert not out.exists()
    out.write_text("mine")
    assert "add --force" in refused(capsys, straight, out, "--std=0.1")


def test_damaged_profiles_are_named(straight, tmp_path, capsys):
    folder, out = tmp_path / "phema", tmp_path / "o.safetensors"
    shutil.copytree(straight / "phema", folder)
    file = profile_file(tmp_path, 1600, 0.05)
    tensors, meta = read_tensors(file)
    for said, words in (
        ({"std": 0.05}, "lacks phema.images in its metadata"),
        ({"std": "0.05", "images": 1600}, "has phema.std = '0.05', wanted a number above 0 and below 0.289"),
        ({"std": 0.05, "images": 0}, "has phema.images = 0, wanted a whole number from 1"),
        ({"std": 0.3, "images": 1600}, "has phema.std = 0.3"),
        ([1], "has phema = [1], wanted names and values"),
    ):
        save_weights(file, tensors, meta | {"phema": said})
        assert f"{file} {words}" in refused(capsys, folder, out, "--std=0.08")
    save_weights(file, tensors, {name: value for name, value in meta.items() if name != "phema"})
    assert f"{file} lacks phema in its metadata, and its name says that it is a profile" in refused(capsys, folder, out, "--std=0.08")
    save_weights(file, tensors, meta)
    data = bytearray(file.read_bytes())
    data[-5] ^= 64
    file.write_bytes(data)
    assert f"{file} is damaged (its checksum differs)" in refused(capsys, folder, out, "--std=0.08")
    assert not out.exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.phema=[0.3]", "train.phema wants relative lengths from 0.001 to below 0.289 that differ in their first three decimals"),
        ("train.phema=[0.05,0.0501]", "train.phema wants relative lengths"),
        ("train.phema=[0]", "train.phema wants relative lengths"),
        ("train.phema=[nan]", "train.phema wants finite numbers"),
        ("teacher.train.ema_std=0.29", "teacher.train.ema_std wants a relative length above 0 and below 0.289, got 0.29"),
        ("students.tsm.ema_std=0", "students.tsm.ema_std wants a relative length"),
        ("train.phema_kimg=0", "train.phema_kimg wants more than 0"),
    ],
)
def test_settings_are_checked(setting, words):
    with pytest.raises(UserError) as caught:
        load(DIGITS, [setting])
    assert str(caught.value).startswith(words)


def test_settings_that_do_nothing_are_named(tmp_path, capsys):
    given = ["train.ema_std=0.1", "train.ema_kimg=7", "train.ema_ramp_up=0.1", "teacher.train.phema_kimg=3"]
    train.main([DIGITS, f"run_dir={tmp_path}/r", *given, "--dry-run"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "do nothing" in line]
    assert "train.ema_kimg, train.ema_ramp_up (train.ema_std=0.1)" in line
    assert "teacher.train.phema_kimg (teacher.train.phema=[])" in line


def test_a_run_goes_on_with_another_interval_and_not_with_other_lengths(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    with pytest.raises(UserError, match=r"train\.phema was \[0\.05, 0\.1\], now \[0\.05\]"):
        trained(folder, "train.phema=[0.05]")
    trained(folder, "train.phema_kimg=0.08", "train.kimg=3.36")
    times = sorted({one.images for one in profiles_in(folder)})
    assert times[-3:] == [3200, 3280, 3360]
