"""What a report says of a run: what ran, where it stands, what its numbers must be read with, and what it draws of its own accord."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from potstill.engine.common.errors import UserError
from potstill.engine.common.signals import Interrupted
from potstill.engine.config.tree import load
from potstill.engine.data.images import open_images
from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.formats.card import About, card
from potstill.engine.formats.caveats import caveats
from potstill.engine.formats.pictures import save_png
from potstill.engine.jobs.curve import CurveOf, size_of
from potstill.engine.jobs.finish import print_result
from potstill.engine.jobs.job import Job
from potstill.engine.jobs.progress import tell_end, telling
from potstill.engine.measure.distances import Moments, squared_distance
from potstill.engine.measure.features import Pixels
from potstill.engine.measure.neighbours import by_class, looked_up, nearest
from potstill.engine.measure.report import write_report
from potstill.engine.measure.status import Status, duration, read_status, write_status
from potstill.engine.models.generate import labels_for

CPU = torch.device("cpu")
TINY = [
    "net.model_channels=8", "net.num_blocks=1", "net.channel_mult=[1]", "net.channel_mult_emb=1", "net.attn_resolutions=[]", "device=cpu",
    "precision=fp32", "log.tensorboard=false", "teacher.train.kimg=0.064", "teacher.train.batch=32", "teacher.loss.sampling_steps=2", "eval.n=128",
]  # fmt: skip
GOOD = {
    "student": {"fd": 0.37, "nfe": 1, "n": 1797, "num_features": 64, "features": "FD-pixels", "data": "digits", "reference_images": 1797},
    "teacher": {"fd": 0.23, "nfe": 27}, "floor": {"fd": 0.07}, "seed": 3,
}  # fmt: skip
ONE_SEED = "one seed of training (3): another one ends elsewhere"


def changed(**parts) -> dict:
    """A good summary with some numbers in the place of its own."""
    return GOOD | {name: GOOD[name] | part for name, part in parts.items()}


# What numbers must be read with.


def test_a_good_run_has_one_caveat():
    assert caveats(GOOD) == [ONE_SEED]
    assert caveats({}) == caveats({"student": {"nfe": 1}, "seed": 3}) == []


@pytest.mark.parametrize(("summary", "words"), [
    (changed(student={"n": 64}), "64 images are too few for 64 features: the covariance is singular"),
    (changed(student={"n": 65}), "65 images are too few for 64 features: under 10 for each"),
    (changed(student={"reference_images": 640}), "640 images are too few for 64 features: under 10 for each"),
    (changed(teacher={"fd": 0.71}), "the teacher is 10 times as far from the data as real images are"),
    (changed(student={"fd": 0.22}), "the student is ahead of its teacher"),
    (changed(student={"fd": 0.70}), "the student is 3.0 times as far from the data as its teacher"),
])  # fmt: skip
def test_each_caveat_has_its_bound(summary, words):
    found = caveats(summary)
    assert any(sentence.startswith(words) for sentence in found) and found[-1] == ONE_SEED


def test_nothing_is_said_at_the_bounds():
    for summary in (
        changed(student={"n": 641}),
        changed(teacher={"fd": 0.7}),
        changed(student={"fd": 0.23}),
        changed(student={"fd": 0.69}),
    ):
        few = [sentence for sentence in caveats(summary) if sentence != ONE_SEED and "ahead" not in sentence]
        assert few == []


def test_terminal_report_and_card_say_the_same(tmp_path, capsys):
    summary = changed(student={"n": 200, "fd": 0.2}) | {"seconds": {"teacher": 1.0, "student": 2.0}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    print_result(summary, tmp_path)
    texts = [capsys.readouterr().out, write_report(tmp_path).read_text(), card(About("x", {}, 1, "8x8", summary=summary), "potstill", "")]
    assert len(caveats(summary)) == 3
    for sentence in caveats(summary):
        assert all(sentence in text for text in texts)


# Where a run stands.


def run_folder(folder: Path) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "seed: 5\nmethod: {name: sim}\ndata: {path: digits}\nteacher: {checkpoint: null, train: {kimg: 45}}\ntrain: {kimg: 24, batch: 64}\n"
    )
    save_png(Image.new("L", (8, 8)), folder / "samples/0000012032.png")
    return folder


def test_a_running_run_says_how_far_it_is_and_looks_again(tmp_path):
    write_status(run_folder(tmp_path), Status("running", stage="student", kimg=12.032, of=24, left=183.3))
    page = write_report(tmp_path).read_text()
    assert '<meta http-equiv="refresh" content="30">' in page
    assert "Running: student, 12 of 24 kimg, about 3 min left (on 20" in page
    assert "<figcaption>12 kimg</figcaption>" in page and page.count("not there yet") == 4
    for name, value in (("method", "sim"), ("data", "digits"), ("teacher", "trained here, 45 kimg"), ("seed", "5")):
        assert f"<td>{name}</td><td>{value}</td>" in page
    assert "<td>student</td><td>24 kimg, 375 iterations of 64 images</td>" in page


def test_what_will_never_be_is_not_announced(tmp_path):
    folder = run_folder(tmp_path)
    (folder / "summary.json").write_text(json.dumps(GOOD | {"method": "dmd2"}))
    tell_end(folder)
    page = write_report(folder).read_text()
    assert "refresh" not in page and "not there yet" not in page and "Ended on 20" in page and "The teacher's training" not in page
    assert "<td>method</td><td>dmd2</td>" in page and "<td>evaluations an image</td><td>student 1, teacher 27</td>" in page
    text = (folder / "config.yaml").read_text().replace("checkpoint: null", "checkpoint: t.safetensors")
    (folder / "config.yaml").write_text(text)
    write_status(folder, Status("running"))
    page = write_report(folder).read_text()
    assert "<td>teacher</td><td>t.safetensors</td>" in page and "The teacher's training" not in page and "getting ready" in page


@pytest.mark.parametrize(("error", "words"), [
    (UserError("the loss is nan: lower <lr>"), "Failed on 20"), (Interrupted(2, "saved x"), "Stopped on 20"), (MemoryError(), ": MemoryError"),
])  # fmt: skip
def test_a_run_that_fails_says_so(tmp_path, error, words):
    def work():
        assert read_status(tmp_path).running and "refresh" in (tmp_path / "report.html").read_text()
        raise error

    with pytest.raises(type(error)), telling(tmp_path):
        work()
    page = (tmp_path / "report.html").read_text()
    assert words in page and "refresh" not in page
    assert ("the loss is nan: lower &lt;lr&gt;" in page) == isinstance(error, UserError)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"state": "gone"}', '{"state": "running", "at": -1}', '{"state": "ended", "why": 3}', "\xff"]
)
def test_a_strange_status_is_none(tmp_path, text):
    (tmp_path / "status.json").write_text(text, encoding="latin-1")
    assert read_status(tmp_path) is None
    assert "refresh" not in write_report(tmp_path).read_text()


def test_durations():
    assert [duration(s) for s in (33, 183, 8000)] == ["33 s", "3.05 min", "2.22 h"]


# The curve.


def test_a_curve_takes_its_share_and_no_more():
    images, student, teacher = open_images("digits"), Sampler("one_step", [2.5]), Sampler("heun", [80.0] * 14)
    evaluations = 8 * student.nfe + teacher.nfe
    assert size_of(images, None, 24, student, teacher) == int(0.03 * 8 * 24_000 / evaluations)
    assert size_of(images, None, 1e6, student, teacher) == 256
    assert size_of(images, None, 1, student, teacher) is None
    assert size_of(images.part(np.arange(255)), None, 1e6, student, teacher) is None


def test_floor_and_points_of_a_curve_are_measured_alike():
    """Real images in a student's place are at the floor's distance; the floor is that of no image from itself."""
    images = open_images("digits")
    curve = CurveOf(images, 200, 64, CPU, None, None)
    total = 200 + 1024
    some = np.arange(total) * len(images) // total
    apart = some[np.arange(200) * total // 200]
    rest = np.setdiff1d(some, apart)
    pixels = images.pixels().reshape(len(images), -1) / 127.5 - 1
    gaussians = []
    for which in (rest, apart):
        found = Moments(64)
        found.add(torch.from_numpy(pixels[which]))
        gaussians.append(found.gaussian("real"))
    assert curve.against.floor == pytest.approx(squared_distance(*gaussians), rel=1e-9)
    assert (len(rest), curve.against.images, curve.name) == (1024, 1024, "fd@200-8x8")


@pytest.fixture(scope="module")
def with_and_without(tmp_path_factory):
    """One short run with its curve, and one without."""
    folder = tmp_path_factory.mktemp("runs")
    for name, every in (("with", "null"), ("without", "0")):
        Job(load("digits", [*TINY, f"run_dir={folder / name}", "train.kimg=4.8", "train.batch=64", f"train.eval_kimg={every}"])).run()
    return folder


def test_a_curve_changes_no_weight(with_and_without):
    ours, theirs = (load_file(with_and_without / name / "student.safetensors") for name in ("with", "without"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_curve_has_its_points_and_lines(with_and_without):
    lines = [json.loads(line) for line in (with_and_without / "with/metrics.jsonl").read_text().splitlines()]
    (name,) = {key for line in lines for key in line if key.startswith("fd@")}
    points = [line[name] for line in lines if name in line]
    levels = json.loads((with_and_without / "with/levels.json").read_text())[name]
    assert len(points) == 8 and min(points) > levels["floor"] > 0 and levels["teacher"] > levels["floor"]
    page = (with_and_without / "with/report.html").read_text()
    assert f">{name}<" in page and ">floor " in page and "Ended on" in page and "Nearest training images" in page
    assert "fd@" not in (with_and_without / "without/metrics.jsonl").read_text()


# Neighbours and classes.


def test_a_copy_is_found():
    images = open_images("digits")
    asked = torch.from_numpy(np.stack([images.read(700), images.read(3), 255 - images.read(9)]))
    asked[1, 0, 0, 0] += 8
    found = nearest(asked, images, CPU)
    assert found.numbers[:2] == [700, 3] and found.levels[:2] == pytest.approx([0, 8 / 64**0.5])
    pixels = images.pixels().reshape(len(images), -1).astype(float)
    far = ((pixels - asked[2].flatten().numpy()) ** 2).mean(1) ** 0.5
    assert (found.numbers[2], found.levels[2]) == (far.argmin(), pytest.approx(far.min()))
    assert nearest(asked[:1], images, CPU, [700]).numbers != [700]
    pictures, told = looked_up(asked, images, CPU)
    assert torch.equal(pictures[0], pictures[3]) and told["student"][0] == 0 and min(told["real"]) > 0 and told["images"] == 1797


def test_distances_of_classes_are_those_of_the_same_images():
    """A net whose images are those of the data for its seeds, brightened for one class."""
    images = open_images("digits")
    pixels, labels = torch.from_numpy(images.pixels()), images.labels
    assert labels is not None

    class Net:
        shape, label_dim, training = (1, 8, 8), 10, False

    class Replay:
        nfe = 1

        def __call__(self, net, told, noise):
            rows = pixels[[one.initial_seed() for one in noise.generators]].float() / 127.5 - 1
            return torch.where(told[:, 3, None, None, None] > 0, rows + 0.5, rows)

    told, _ = labels_for(Net(), labels, 1797)
    assert np.array_equal(told, labels)
    found = by_class(Net(), Replay(), images, Pixels(), 1797, seed=0, batch=100, device=CPU)
    assert list(found) == [str(c) for c in range(10)]
    assert all(abs(fd) < 1e-3 for name, fd in found.items() if name != "3")
    real = pixels[labels == 3].double().flatten(1) / 127.5 - 1
    made = ((real + 0.5) * 127.5 + 128).clip(0, 255).floor() / 127.5 - 1
    gaussians = []
    for rows in (real, made):
        one = Moments(64)
        one.add(rows)
        gaussians.append(one.gaussian("x"))
    assert found["3"] == pytest.approx(squared_distance(*gaussians), rel=1e-2)
    assert by_class(Net(), Replay(), images, Pixels(), 1000, seed=0, batch=100, device=CPU) == {}  # 100 of a class, wanted 128
