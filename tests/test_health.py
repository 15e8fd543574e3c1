"""What a run says of its health: the statistics that methods log, the alarms on them, and reference curves of the digits recipes.

tests/golden/curves has a teacher of 8,521 parameters, trained on the digits, and the log lines of short runs that distil it.
`python -m tests.test_health` writes these lines anew, after a change that is meant to change them.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.engine.config.library import find
from potstill.engine.config.tree import load
from potstill.engine.data.images import data_variance, open_images
from potstill.engine.data.sampler import Stream
from potstill.engine.diffusion.sigmas import edm_weight, karras_at
from potstill.engine.measure.report import write_report
from potstill.engine.methods import vitals
from potstill.engine.methods.dmd import DMDConfig
from potstill.engine.methods.sim import SIMConfig
from potstill.engine.methods.vitals import Gaps, accuracy, variance
from potstill.engine.models.weights import load_net
from potstill.engine.training.health import REPEAT, Health
from potstill.engine.training.log import LogConfig
from potstill.engine.training.loop import train
from potstill.engine.training.run import Run
from potstill.kernels import Estimate

CURVES = Path(__file__).parent / "golden" / "curves"
ITERATIONS, EVERY = 24, 2
RECIPES = {
    "dmd": ["digits"],
    "dmd2": ["digits", "method.gan=true", "method.fake_per_student=2"],
    "gdd": ["digits_gdd", "method.r1_every=4", "method.width=8"],
    "sim": ["digits_sim"],
    "sid": ["digits_sim", "method.distance=l2", "method.alpha=1.2"],
    "moment_matching": ["digits_moment_matching"],
    "sfd": ["digits_sfd", "method.num_steps=[4]", "method.K=2"],
}  # fmt: skip
SETTINGS = ["train.batch=16", f"train.log_iterations={EVERY}", "train.checkpoint_kimg=1000"]


def method_of(name: str, *more: str):
    """The settings of a tiny run, and its method on the small teacher."""
    recipe, *settings = RECIPES[name]
    cfg = load(find(recipe), [*SETTINGS, *settings, f"train.kimg={ITERATIONS * 16 / 1000}", *more])
    teacher, _ = load_net(CURVES / "teacher.safetensors")
    torch.manual_seed(0)
    return cfg, cfg.method.build(teacher, teacher)


def run_of(name: str, folder: Path, *more: str, change=lambda method: None, stop: int | None = None) -> list[dict]:
    """The lines of a tiny run, alarms among them. change: what is done to the method before. stop: after so many iterations."""
    cfg, method = method_of(name, *more)
    images = open_images("digits")
    method.data_variance = data_variance(images)
    change(method)
    run = Run(method, cfg.train, 0, torch.device("cpu"))
    batches = Stream(images, batch=cfg.train.batch, seed=0, workers=0)
    folder.mkdir(exist_ok=True)

    def batch_at(step: int):
        if step == stop:
            raise Enough
        return batches.at(step)

    with suppress(Enough):
        train(run, batch_at, folder, title=name, log=LogConfig(tensorboard=False))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Enough(Exception):
    """A test has seen enough of a run."""


def curves(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


# Reference curves.


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_has_its_reference_curves(name, tmp_path):
    """A teacher whose weights differ by 1e-6 of themselves, ten times float32's rounding, moves no line by more than 3e-5 + 1e-4 of
    it, so 1e-3 leaves room for other CPUs; but accuracy counts signs, and one logit is 1/64 of it. Of most a quarter is enough."""
    lines = None if name in ("dmd2", "gdd") else ITERATIONS // EVERY // 4
    wanted = json.loads((CURVES / "curves.json").read_text())[name][:lines]
    found = curves(run_of(name, tmp_path, stop=lines and lines * EVERY))
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    for line, other in zip(found, wanted, strict=True):
        for key, value in other.items():
            assert line[key] == pytest.approx(value, rel=1e-3, abs=0.04 if key.endswith("accuracy") else 1e-3), (line["step"], key)


@pytest.mark.parametrize("name", RECIPES)
def test_reference_curves_raise_no_alarm(name, tmp_path):
    said = []
    health = Health(tmp_path, ITERATIONS, said.append)
    for line in json.loads((CURVES / "curves.json").read_text())[name]:
        health.write(line)
    assert said == []


# What methods log.


def test_gaps_are_the_means_of_the_samples_of_a_quarter():
    """By hand for DMD's grid, in float64: quarters of the integers 100 … 899, 200 each; F differs by what λ makes 1 of."""
    index = torch.arange(100, 900)
    sigma = karras_at(index / 999).float()
    x = torch.randn(800, 1, 2, 2)
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    real = Estimate(torch.randn(800, 1, 2, 2), x, torch.ones(800), c_out)
    fake = real._replace(raw=real.raw + torch.randn(800, 1, 2, 2) * (index / 100)[:, None, None, None])
    law = Gaps(lambda u: karras_at((100 + u * 800).long() / 999), edm_weight)
    gaps = law(real, fake, sigma)
    order = torch.randperm(800)
    shuffled = [e._replace(raw=e.raw[order], x_t=x[order], c_skip=torch.ones(800), c_out=c_out[order]) for e in (real, fake)]
    mixed = law(shuffled[0], shuffled[1], sigma[order])
    by_hand = (fake.raw - real.raw).double().numpy().reshape(4, -1)
    wanted = (by_hand**2).mean(1)
    assert np.stack([v.item() for v in gaps.values()]) == pytest.approx(wanted, rel=1e-3)
    assert np.stack([v.item() for v in mixed.values()]) == pytest.approx(wanted, rel=1e-3)
    medians = [karras_at(torch.tensor(i / 999)).item() for i in (199, 399, 599, 799)]
    assert [float(name.removeprefix("gap@")) for name in gaps] == pytest.approx(medians, rel=0.02)


@pytest.mark.parametrize("cfg", [DMDConfig(match_index=[20, 21]), DMDConfig(match_index=[5, 5]), SIMConfig()])
def test_parts_of_a_law_of_few_levels(cfg):
    """Shares add up, whatever the law; of two levels there are two parts, of one there is one."""
    teacher, _ = load_net(CURVES / "teacher.safetensors")
    gaps = cfg.build(teacher, teacher).gaps
    parts = {"match_index": len({*cfg.match_index})} if isinstance(cfg, DMDConfig) else {"match_index": 4}
    assert len(gaps.names) == len({*gaps.names}) == parts["match_index"]
    assert gaps.shares.sum().item() == pytest.approx(1)
    assert gaps.shares.min().item() >= 0.24


def test_variance_is_numpys():
    x = torch.randn(6, 2, 4, 4)
    wanted = x.double().numpy().var(axis=0, ddof=1).mean()
    assert variance(x)["variance"].item() == pytest.approx(wanted, rel=1e-5)
    assert variance(x, 0.5)["variance_ratio"].item() == pytest.approx(2 * wanted, rel=1e-5)
    assert variance(x[:1]) == {}
    x[0, 0, 0, 0], x[1, 0, 0, 0], x[2, 0, 0, 0] = float("nan"), float("inf"), 1e30
    assert variance(x)["variance"].isfinite()


def test_the_datas_variance_is_of_the_share():
    images = open_images("digits")
    pixels = np.stack([images.read(i) for i in range(len(images))]) / 127.5 - 1
    assert images.labels is not None
    assert data_variance(images) == pytest.approx(pixels.var(0).mean(), rel=0.03)
    assert data_variance(images.subset([1])) == pytest.approx(pixels[images.labels == 1].var(0).mean(), rel=0.03)
    assert data_variance(None) is None


def test_accuracy_is_the_share_of_right_signs():
    fake, real = torch.tensor([[-1.0, 2.0], [-3.0, -4.0]]), torch.tensor([[1.0, 2.0], [-3.0, 4.0]])
    assert accuracy([fake], [real]).item() == 0.75
    assert accuracy([fake, -real], [real, -fake]).item() == 0.75
    assert accuracy([-real.abs()], [real.abs()]).item() == 1


@pytest.mark.parametrize("name", ["dmd2", "gdd", "sim", "moment_matching", "sfd"])
def test_looking_changes_nothing(name, monkeypatch):
    """Two iterations with and without all statistics end with the same bits."""

    def weights() -> list[torch.Tensor]:
        cfg, method = method_of(name, "train.batch=4")
        run = Run(method, cfg.train, 0, torch.device("cpu"))
        for step in range(2):
            run.take(*Stream(open_images("digits"), batch=4, workers=0).at(step))
        return [p.detach() for net in method.nets.values() for p in net.parameters()]

    looked_at = weights()
    module = sys.modules[type(method_of(name)[1]).__module__]
    monkeypatch.setattr(module, "variance", lambda *_: {})
    monkeypatch.setattr(module, "accuracy", lambda *_: torch.zeros(()), raising=False)
    monkeypatch.setattr(vitals.Gaps, "__call__", lambda *_: {})
    assert all(map(torch.equal, looked_at, weights()))


def test_every_turns_gradient_norm_is_there():
    cfg, method = method_of("gdd", "train.batch=4")
    run, norms = Run(method, cfg.train, 0, torch.device("cpu")), []
    for step in range(5):
        run.take(*Stream(open_images("digits"), batch=4, workers=0).at(step))
        norms.append({k: v for k, v in run.meter.read().items() if k.endswith("grad_norm")})
    usual = {"student/grad_norm", "discriminator/grad_norm", "discriminator/gan/grad_norm"}
    assert [one.keys() for one in norms] == [usual] * 4 + [usual | {"discriminator/r1/grad_norm"}]
    assert norms[4]["discriminator/grad_norm"] == norms[4]["discriminator/r1/grad_norm"] != norms[4]["discriminator/gan/grad_norm"]


# Alarms.

SHORT = ["train.kimg=0.128", "train.log_iterations=1"]  # eight iterations


def alarms(lines: list[dict]) -> dict[str, str]:
    return {line["kind"]: line["alarm"] for line in lines if "alarm" in line}


def test_a_learning_rate_that_is_far_too_high(tmp_path):
    """The recipe's, times 1000: the student becomes one grey image; the alarm is in the log and in the report."""
    found = alarms(run_of("dmd", tmp_path, *SHORT, "train.optim.student.lr=0.3", "train.kimg=0.256"))
    assert "go on from an earlier checkpoint with a lower train.optim.student.lr" in found["variance"]
    page = write_report(tmp_path).read_text()
    assert "<h2>Alarms</h2>" in page
    assert "which rarely mends itself" in page
    assert "student/variance_ratio" in page


def alike(method) -> None:
    """All the student's images become one, though it trains on."""
    forward = method.student.forward
    method.student.forward = lambda x, *rest: forward(x, *rest) * 1e-2


def test_a_student_whose_images_are_all_alike(tmp_path):
    found = alarms(run_of("gdd", tmp_path, *SHORT, change=alike))
    assert "they are alike (mode collapse)" in found["variance"]


def test_a_fake_net_that_does_not_learn(tmp_path):
    found = alarms(run_of("dmd", tmp_path, *SHORT, "train.optim.fake.lr=1e-6"))
    assert "the student has nothing to go by; raise train.optim.fake.lr" in found["still"]


def lines_of(**metrics) -> list[dict]:
    """Log lines of these values in turn."""
    numbers = {k.replace("__", "/").replace("_at_", "@"): v for k, v in metrics.items()}
    count = max(map(len, numbers.values()))
    return [{"step": 10 * i + 10, "kimg": i + 1.0} | {k: float(v[i]) for k, v in numbers.items()} for i in range(count)]


def kinds(folder: Path, lines: list[dict], total: int = 1000) -> list[str]:
    health = Health(folder, total, lambda text: None)
    for line in lines:
        health.write(line)
    file = folder / "metrics.jsonl"
    return [json.loads(line)["kind"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize(
    ("wanted", "metrics"),
    [
        ("variance", {"student__variance_ratio": [0.9] * 4 + [0.2] * 3}),
        ("variance", {"student__variance": [0.01, 0.2, 0.4, 0.4, 0.4, 0.05, 0.05, 0.05]}),
        ("variance", {"student__variance_ratio": [0.05] * 21}),
        ("variance", {"student__variance_ratio": [1, 4, 4, 4]}),
        ("variance", {"student__variance_ratio": [0.8, 1.2, 1.73, 1.71, 1.69]}),  # SIM on captions, guidance 2 of the teacher, as measured
        ("gradient", {"fake__grad_norm": [1, 1.2, 9, 1.1, 1, 1, 0.8, 40, 50, 60]}),
        ("discriminator", {"fake__accuracy": [0.6] * 10 + [0.995] * 12}),
        ("gap", {"student__gap_at_1": [0.1] * 3 + [0.3] * 3 + [0.7] * 3, "student__gap_at_2": [0.2] * 3 + [0.5] * 3 + [1] * 3}),
        ("nonfinite", {"student__nonfinite": [0, 0, 15]}),
    ],
)
def test_an_alarm_rises_once(wanted, metrics, tmp_path):
    assert kinds(tmp_path, lines_of(**metrics)) == [wanted]


@pytest.mark.parametrize(
    "metrics",
    [
        {"student__variance_ratio": [0.01] * 15 + [0.3, 0.6, 0.9, 0.2, 0.9, 1.3, 4, 1]},  # a student that starts as a mean image
        {"student__variance_ratio": [0.26, 0.25, 0.25, 0.2, 0.2, 0.2, 0.24]},
        {"student__variance_ratio": [0.83, 0.88, 0.93, 1.6, 1.4, 1.6, 1.3]},
        {"student__variance": [0.001, 0.01, 0.1, 0.2, 0.2]},
        {"student__variance": [0.0, 0.0, 0.0]},
        {"student__grad_norm": [0, 0.01, 0.1, 0.5, 1, 2, 3, 3, 50, 3, 3]},  # the fake net starts as the teacher
        {"fake__accuracy": [1] * 15 + [0.9, 0.8]},
        {"student__gap_at_1": [0.1, 0.3, 0.6, 0.9, 1, 1, 0.9, 0.8, 0.8], "student__gap_at_2": [1, 0.3, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1]},
        {"student__nonfinite": [0, 5, 0]},
    ],
)
def test_what_is_usual_raises_none(metrics, tmp_path):
    assert kinds(tmp_path, lines_of(**metrics)) == []


def test_a_student_that_began_late_has_its_time_to_rise(tmp_path):
    """SiDA's waits; a fifth of the run counts from its first turn."""
    waiting = lines_of(fake__denoise=[1.0] * 30)
    learning = lines_of(student__variance_ratio=[0.05] * 60)[30:]
    assert kinds(tmp_path, [*waiting, *learning[:20]]) == []
    assert kinds(tmp_path, learning[20:23]) == ["variance"]


@pytest.mark.parametrize(
    ("distances", "said"),
    [
        ([4.5, 2.6, 2.3, 2.2], False),  # DMD on captions, as measured
        ([4.5, 9.3, 8.5], True),  # guided SIM whose fake net lags
        ([2.1, 4.0, 2.2], False),  # it came back
        ([2.1, 2.7], False),  # one measurement is none
        ([2.1, 2.8, 2.9], True),
    ],
)
def test_a_distance_that_rises_and_stays(distances, said, tmp_path):
    health = Health(tmp_path, 1000, lambda text: None)
    for i, distance in enumerate(distances):
        health.write({"step": 10 * i, "kimg": i, "fd@2000": distance, "score/scenes/accuracy": 1.0})
        assert not list(tmp_path.glob("metrics.jsonl")) or i == len(distances) - 1
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] if said else []
    assert [one["kind"] for one in found] == ["distance"] * said and said == (tmp_path / "metrics.jsonl").exists()
    assert not said or f"is {distances[-1]:.3g} and was {min(distances):.3g}" in found[0]["alarm"]


def test_a_resumed_run_goes_on_with_its_alarms(tmp_path):
    """The alarm of before the stop is not repeated at once, and comes again REPEAT lines later."""
    lines = lines_of(student__variance_ratio=[1] * 3 + [0.1] * (REPEAT + 4))
    file = tmp_path / "metrics.jsonl"
    steps = []
    for line in lines:
        health = Health(tmp_path, 1000, lambda text: None)  # stopped and resumed before every line
        with file.open("a") as written:
            written.write(json.dumps(line) + "\n")
        health.write(line)
    for line in map(json.loads, file.read_text().splitlines()):
        steps += [line["step"]] * ("alarm" in line)
    assert steps == [60, 60 + 10 * REPEAT]


def write_curves(folder: Path) -> None:
    found = {name: curves(run_of(name, folder / name)) for name in RECIPES}
    rounded = {
        name: [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()} for line in lines]
        for name, lines in found.items()
    }
    texts = [f'"{name}": [\n' + ",\n".join(map(json.dumps, lines)) + "\n]" for name, lines in rounded.items()]
    (CURVES / "curves.json").write_text("{\n" + ",\n".join(texts) + "\n}\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_curves(Path(folder))
