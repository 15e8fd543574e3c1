"""MSD by prompts: partitions against NumPy, the router of texts against its students one by one, and whole runs by the commands' own entry.

Pipelines are tiny, random and made here (diffusers_pipelines.py).
"""

import itertools
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

import diffusers_pipelines
from diffusers_pipelines import WORDS
from safetensors.torch import load_file
from toy import Mixture, apart, batch_of, pretrained

from potstill.__main__ import main as potstill
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.diffusion.sampling import Sampler, SeedNoise, one_step
from potstill.engine.export import main as export
from potstill.engine.jobs import shares
from potstill.engine.jobs.finish import Gallery
from potstill.engine.methods.msd import TSM, part_prompts
from potstill.engine.models.opening import open_models
from potstill.engine.models.partitions import Partition, PromptPartition, partition_in
from potstill.engine.models.router import Router, load_router, write_manifest
from potstill.engine.models.student import Student
from potstill.engine.models.weights import read_metadata, save_net
from potstill.engine.nets.conditions import Text
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.train import main as train
from potstill.engine.training.run import Run

# What libraries warn of while they import one another, and of where they are put together here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(?!potstill)", "ignore::FutureWarning:(?!potstill)"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers"),
]
NAN, INF = float("nan"), float("inf")


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def text_of(features):
    """Prompts with these features."""
    return Text(torch.zeros(len(features), 3, 5), pooled=torch.from_numpy(np.asarray(features, np.float32)))


def routed(partition, features):
    return partition.of(text_of(features)).numpy()


# Partitions


def test_a_prompts_feature_is_its_pooled_one_or_the_mean_of_its_tokens():
    embeds, mask = numbers(3, 4, 5), np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    embeds[~mask] = NAN  # what lies under a mask is nothing
    wanted = np.stack([rows[own].mean(0) if own.any() else np.zeros(5) for rows, own in zip(embeds, mask, strict=True)])
    text = Text(torch.from_numpy(embeds), torch.from_numpy(mask))
    np.testing.assert_allclose(text.feature(), wanted, atol=1e-6)
    np.testing.assert_array_equal(text.filled(9).feature(), text.feature())
    np.testing.assert_allclose(Text(torch.from_numpy(numbers(3, 4, 5))).feature(), numbers(3, 4, 5).mean(1), atol=1e-6)
    pooled = replace(text, pooled=torch.from_numpy(numbers(3, 7))).to(dtype=torch.bfloat16).feature()
    assert pooled.dtype == torch.float32
    np.testing.assert_array_equal(pooled, torch.from_numpy(numbers(3, 7)).bfloat16().float())


def test_kmeans_is_the_best_of_all_ways_to_part_few_prompts():
    features = numbers(9, 3)

    def loss(of):
        return sum(((features[of == k] - features[of == k].mean(0)) ** 2).sum() for k in range(2))

    ways = [np.array((0, *rest)) for rest in itertools.product((0, 1), repeat=8) if any(rest)]
    best = min(ways, key=loss)
    partition = part_prompts("kmeans", features, 2, 7)
    of = routed(partition, features)
    assert np.array_equal(of ^ of[0], best)
    for k in range(2):
        np.testing.assert_allclose(partition.vectors[k], features[of == k].mean(0), atol=1e-6)
    unseen = numbers(50, 3, seed=1)
    nearest = ((unseen[:, None] - partition.vectors.numpy()) ** 2).sum(2).argmin(1)
    assert np.array_equal(routed(partition, unseen), nearest) and len(set(nearest)) == 2
    assert part_prompts("kmeans", features, 2, 7).hash == partition.hash
    assert part_prompts("kmeans", features, 2, 2**63 - 1).count == 2


@pytest.mark.parametrize("n", [8, 100, 101, 102, 103])
@pytest.mark.parametrize("count", [2, 4])
def test_quadrants_are_medians_along_principal_components(n, count):
    features = numbers(n, 6) * np.array([1, 5, 1, 3, 1, 1]) + 10
    partition = part_prompts("quadrants", features, count, 0)
    of = routed(partition, features)
    sizes = np.bincount(of, minlength=count)
    assert sizes.sum() == n and sizes.max() - sizes.min() <= 1
    centred = (features - features.mean(0)).astype(np.float64)
    axes = np.linalg.svd(centred, full_matrices=False)[2]
    bits = [centred @ axis > np.median(centred @ axis) for axis in axes[:1]]
    if count == 4:
        along = centred @ axes[1]
        bits.append(np.where(bits[0], along > np.median(along[bits[0]]), along > np.median(along[~bits[0]])))
    wanted = sum(2 ** (len(bits) - 1 - i) * bit for i, bit in enumerate(bits))
    if n % 4 == 0:  # else a prompt is the median itself
        for flips in itertools.product((0, 1), repeat=len(bits)):  # the signs of the axes are nobody's
            turned = [bit ^ bool(flip) for bit, flip in zip(bits, flips, strict=True)]
            if np.array_equal(of, sum(2 ** (len(bits) - 1 - i) * bit for i, bit in enumerate(turned))):
                break
        else:
            pytest.fail(f"{of} is no turning of {wanted}")
    largest = partition.vectors.numpy()[np.arange(len(bits)), abs(partition.vectors.numpy()).argmax(1)]
    assert (largest > 0).all()


def test_equal_prompts_are_never_parted():
    of = routed(part_prompts("quadrants", np.repeat(numbers(4, 3), 5, axis=0), 4, 0), np.repeat(numbers(4, 3), 5, axis=0))
    assert all(len(set(five)) == 1 for five in of.reshape(4, 5))
    assert set(routed(part_prompts("quadrants", np.ones((5, 3)), 4, 0), np.ones((5, 3)))) == {0}


@pytest.mark.parametrize(("kind", "count"), [("kmeans", 3), ("quadrants", 2), ("quadrants", 4)])
def test_a_partition_goes_through_json_bit_for_bit(kind, count):
    partition = part_prompts(kind, numbers(40, 6), count, 0)
    again = partition_in(Path("x"), json.loads(json.dumps(partition.described())), "…")
    assert isinstance(again, PromptPartition) and again.kind == kind and again.count == count == partition.count
    assert torch.equal(again.vectors, partition.vectors) and torch.equal(again.thresholds, partition.thresholds)
    assert again.hash == partition.hash
    moved = partition.vectors.clone()
    moved[0, 0] = np.nextafter(moved[0, 0].item(), INF)
    others = [replace(partition, vectors=moved), replace(partition, kind="other"), replace(partition, thresholds=partition.thresholds + 1)]
    assert all(other.hash != partition.hash for other in others[: 3 if kind == "quadrants" else 2])


def test_batches_are_routed_as_rows_alone():
    features = numbers(300, 16)
    for kind, count in (("kmeans", 5), ("quadrants", 4)):
        partition = part_prompts(kind, features, count, 0)
        alone = np.concatenate([routed(partition, features[i : i + 1]) for i in range(300)])
        assert np.array_equal(routed(partition, features), alone)
    with pytest.raises(UserError, match="by 16 numbers of each, got 5: encode the prompts with the pipeline of their teacher"):
        routed(partition, numbers(2, 5))


@pytest.mark.parametrize("kind", ["blocks", "random"])
def test_partitions_of_classes_part_no_prompts(kind):
    with pytest.raises(UserError, match=f"students.partition={kind} does not share out prompts.* take kmeans or quadrants"):
        part_prompts(kind, numbers(4, 2), 2, 0)


# The router


@pytest.fixture(scope="module")
def nets(pipelines):
    """Two students of other weights than each other, a partition, and prompts that both have some of."""
    students = []
    for factor in (0.9, 1.2):
        net = DiffusersDenoiser.from_folder(pipelines("sd15"))
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(factor)
        students.append(net.eval())
    text = Text(torch.from_numpy(numbers(6, 5, 12)))
    partition = part_prompts("kmeans", text.feature().numpy(), 2, 0)
    assert set(partition.of(text).tolist()) == {0, 1}
    return students, partition, text


def router_of(nets):
    return Router(nets[0], nets[1]).eval()


@torch.no_grad()
def test_a_router_asks_each_prompts_own_student(nets):
    students, partition, text = nets
    router, x, sigma = router_of(nets), torch.randn(6, 4, 8, 8), torch.linspace(0.1, 10, 6)
    assert router.text and router.shape == (4, 8, 8) and router.label_dim == 0
    together = router(x, sigma, text)
    for i, k in enumerate(partition.of(text).tolist()):
        row = slice(i, i + 1)
        alone, other = (students[one](x[row], sigma[row], text[row]) for one in (k, 1 - k))
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(router(x[row], sigma[i], text[row]), alone, rtol=1e-4, atol=1e-5)
        assert (together[row] - other).abs().max() > 1e-3


WAYS = {
    "one step": one_step(5.0), "few": Sampler("renoise", [14.0, 3.0, 0.5]), "heun": Sampler("heun", [14.0, 3.0, 0.0]),
    "guided": Sampler("euler", [14.0, 3.0, 0.0], guidance=3.0), "unit": replace(one_step(5.0), start="unit"),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_router_is_sampled_as_one_net_is(nets, way):
    students, partition, text = nets
    router, sampler = router_of(nets), WAYS[way]
    router.null = Text(torch.from_numpy(numbers(1, 5, 12, seed=9)))
    assert all(torch.equal(net.null.embeds, router.null.embeds) for net in students)
    images = sampler(router, text, SeedNoise(range(6)))
    for i, k in enumerate(partition.of(text).tolist()):
        alone, other = (sampler(students[one], text[i : i + 1], SeedNoise([i])) for one in (k, 1 - k))
        torch.testing.assert_close(images[i : i + 1], alone, rtol=1e-3, atol=1e-4)
        assert (images[i : i + 1] - other).abs().max() > 1e-3


@torch.no_grad()
def test_who_says_nothing_gets_the_null_prompts_student(nets):
    students, partition, _ = nets
    router, z = router_of(nets), torch.randn(3, 4, 8, 8)
    student = Student(router, one_step(5.0))
    for net in students:
        for name in ("embeds", "mask", "pooled"):
            setattr(net, f"null_{name}", None)
    with pytest.raises(UserError, match="told prompts, got none"):
        student.generate(z)
    with pytest.raises(ValueError, match="a router wants prompts, or a null prompt"):
        router(z, torch.tensor(1.0))
    router.null = Text(torch.from_numpy(numbers(1, 5, 12, seed=9)))
    own = students[int(partition.of(router.null))]
    torch.testing.assert_close(student.generate(z), Student(own, one_step(5.0)).generate(z), rtol=1e-4, atol=1e-5)
    one = Text(torch.from_numpy(numbers(1, 5, 12, seed=3)))  # one row for all, as a net alone takes it
    assert torch.equal(router(z, torch.tensor(1.0), one), router(z, torch.tensor(1.0), one[torch.zeros(3, dtype=torch.long)]))


def test_a_router_is_differentiable(nets):
    router, z = router_of(nets), torch.randn(6, 4, 8, 8, requires_grad=True)
    Student(router, one_step(5.0)).generate(z, nets[2]).square().sum().backward()
    assert (z.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(p.grad is not None for net in nets[0] for p in net.model.conv_in.parameters())


# Manifests


@pytest.fixture
def manifest(nets, tmp_path):
    students, partition, _ = nets
    for k, net in enumerate(students):
        save_net(
            tmp_path / f"student-{k}/student.safetensors", net, method="dmd", partition=partition.hash, student=k,
            sampler=one_step(5.0).to_dict(),
        )  # fmt: skip
    write_manifest(tmp_path, partition)
    return tmp_path / "manifest.json"


def test_a_manifest_holds_all_that_routes(nets, manifest):
    (model,) = open_models(manifest)
    z = torch.randn(6, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(Student(model.net, model.sampler).generate(z, nets[2]), one_step(5.0)(router_of(nets), nets[2], Given(z)))


class Given:
    def __init__(self, z):
        self.z = z

    def normal(self, *shape):
        return self.z


def quadrants_of(text, directions, thresholds):
    text["partition"] |= {"kind": "quadrants", "vectors": [[0.1] * 12] * directions, "thresholds": [0.5] * thresholds}


DAMAGES = {
    "no vectors": (lambda t: t["partition"].pop("vectors"), "lacks its partition"),
    "no partition": (lambda t: t.update(partition=[]), "lacks its partition"),
    "another kind": (lambda t: t["partition"].update(kind="blocks"), "partition.kind"),
    "a kind of a list": (lambda t: t["partition"].update(kind=[]), "partition.kind"),
    "nan": (lambda t: t["partition"]["vectors"][1].__setitem__(2, NAN), "partition.vectors"),
    "inf": (lambda t: t["partition"]["vectors"][1].__setitem__(2, -INF), "partition.vectors"),
    "huge": (lambda t: t["partition"]["vectors"][1].__setitem__(2, 10**400), "partition.vectors"),
    "a text": (lambda t: t["partition"]["vectors"][1].__setitem__(2, "1"), "partition.vectors"),
    "true": (lambda t: t["partition"]["vectors"][1].__setitem__(2, True), "partition.vectors"),
    "uneven": (lambda t: t["partition"]["vectors"][1].pop(), "partition.vectors"),
    "no row": (lambda t: t["partition"].update(vectors=[]), "partition.vectors"),
    "empty rows": (lambda t: t["partition"].update(vectors=[[], []]), "partition.vectors"),
    "too wide": (lambda t: t["partition"].update(vectors=[[0] * 65_537] * 2), "partition.vectors"),
    "too many": (lambda t: t["partition"].update(vectors=[[0]] * 4097), "partition.vectors"),
    "no list": (lambda t: t["partition"].update(vectors={"a": 1}), "partition.vectors"),
    "long numbers": (lambda t: t["partition"].update(vectors=[[10**29] * 12] * 2), "contradicts itself"),
    "thresholds of k-means": (lambda t: t["partition"].update(thresholds=[0.5]), "kmeans of 2 vectors and 1 thresholds"),
    "a threshold of nan": (lambda t: t["partition"].update(thresholds=[NAN]), "partition.thresholds"),
    "too many thresholds": (lambda t: t["partition"].update(thresholds=[0.0] * 4), "partition.thresholds"),
    "quadrants of three": (lambda t: quadrants_of(t, 3, 3), "contradicts itself"),
    "quadrants of one and three": (lambda t: quadrants_of(t, 1, 3), "contradicts itself"),
    "another partition": (lambda t: quadrants_of(t, 2, 3), "its partition has hash"),
    "a hash of another": (lambda t: t["partition"].update(hash="0123456789abcdef"), "its partition has hash"),
    "moved": (lambda t: t["partition"]["vectors"][0].__setitem__(0, 0.25), "its partition has hash"),
    "too few files": (lambda t: t["students"].pop(), "1 files for 2 students"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_manifests_are_refused_in_one_sentence(damage, manifest):
    change, words = DAMAGES[damage]
    text = json.loads(manifest.read_text())
    change(text)
    manifest.write_text(json.dumps(text))
    with pytest.raises(Damaged) as caught:
        load_router(manifest)
    sentence = str(caught.value)
    assert words in sentence and str(manifest) in sentence and sentence.isprintable() and len(sentence) < 700


def test_students_are_told_what_their_manifest_shares_out(nets, manifest):
    partition = Partition("blocks", (0, 1))
    for k, net in enumerate(nets[0]):
        save_net(manifest.parent / f"student-{k}/student.safetensors", net, partition=partition.hash, student=k)
    with pytest.raises(UserError, match="students of different partitions do not mix"):
        load_router(manifest)
    write_manifest(manifest.parent, partition)
    with pytest.raises(UserError, match="shares out 2 classes, its students know prompts"):
        open_models(manifest)


# Whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    diffusers_pipelines.write_recipe(folder, train="kimg: 0.008, grid_kimg: 0.008, checkpoint_kimg: 0.004")
    return folder


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(Gallery, "count", 10)


KMEANS = ["students.count=2", "students.partition=kmeans"]
QUADRANTS = ["students.count=4", "students.partition=quadrants"]


def arguments(place, name, teacher, *more):
    given = [f"run_dir={place / name}", f"teacher.checkpoint={teacher}", f"text.prompts={place}/prompts.txt", "text.precision=fp32"]
    return [str(place / "tiny.yaml"), *given, *more]


def run(place, name, teacher, *more):
    """A run's folder."""
    train(arguments(place, name, teacher, *more))
    return place / name


@pytest.fixture(scope="module")
def finished(place, pipelines):
    @cache
    def folder(kind, *more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Gallery, "count", 10)
            return run(place, "-".join([kind, *more]), pipelines("sd15"), *{"kmeans": KMEANS, "quadrants": QUADRANTS}[kind], *more)

    return folder


def weights(folder, k):
    return load_file(folder / f"student-{k}/student.safetensors")


def same(one, other, count=2):
    return all(torch.equal(weights(one, k)[name], t) for k in range(count) for name, t in weights(other, k).items())


@pytest.mark.parametrize(("kind", "count"), [("kmeans", 2), ("quadrants", 4)])
def test_each_student_is_trained_on_its_share(kind, count, place, pipelines, taken):
    given = {"kmeans": KMEANS, "quadrants": QUADRANTS}[kind]
    folder = run(place, f"taken-{kind}", pipelines("sd15"), *given)
    kept = json.loads((folder / "partition.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["partition"] == kept["partition"] and kept["captions"] is None
    students = Student.from_pretrained(folder)
    partition, text = students.net.partition, students.encode(WORDS)
    assert partition.kind == kind and partition.count == count and partition.of(text).tolist() == kept["prompts"]
    assert len(taken) == 4 * count
    for i, (_, captions, prompts) in enumerate(taken):
        assert captions is None and all(set(partition.of(one).tolist()) == {i // 4} for one in prompts)
    if kind == "quadrants":
        assert sorted(np.bincount(kept["prompts"])) == [1, 2, 2, 2]
    for k in range(count):
        meta = read_metadata(folder / f"student-{k}/student.safetensors")
        assert meta["partition"] == partition.hash and meta["student"] == k
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["student"]["nfe"] == 1 and (folder / "samples.png").is_file() and (folder / "report.html").is_file()


def test_students_are_one_in_python_and_by_the_commands(place, finished, tmp_path):
    folder = finished("kmeans")
    student, prompts, seeds = Student.from_pretrained(folder), [*WORDS, "a prompt that nobody has seen", "z"], range(9)
    images = student(seeds=seeds, prompts=prompts)
    partition = student.net.partition
    of, z = partition.of(student.encode(prompts)).tolist(), [SeedNoise([seed]).normal(4, 8, 8) for seed in seeds]
    assert set(of) == {0, 1}
    for i, k in enumerate(of):
        alone = Student.from_pretrained(folder / f"student-{k}/student.safetensors")
        assert abs(alone(seeds=[i], prompts=[prompts[i]]).int() - images[i : i + 1].int()).max() <= 1
        apart = student.generate(z[i], student.encode([prompts[i]]))
        torch.testing.assert_close(apart, alone.generate(z[i], alone.encode([prompts[i]])), rtol=1e-4, atol=1e-5)
    (tmp_path / "own.txt").write_text("\n".join(prompts))
    potstill(["sample", str(folder), "--prompts", f"{tmp_path}/own.txt", "--seeds", "0-8", "--device", "cpu", "--out", f"{tmp_path}/a.npz"])
    drawn = np.load(tmp_path / "a.npz")["images"].transpose(0, 3, 1, 2).astype(int)
    assert abs(drawn - images.numpy().astype(int)).max() <= 1
    potstill(["sample", str(folder), "--beside", "--seeds", "0-3", "--device", "cpu", "--out", f"{tmp_path}/b.png"])
    assert (tmp_path / "b.png").is_file()


def test_the_run_shows_what_its_students_draw(place, pipelines, monkeypatch, tmp_path):
    shown, samples = [], Gallery.samples
    nets = []

    def noted(self, net, sampler):
        nets.append(net)
        shown.append(samples(self, net, sampler))
        return shown[-1]

    monkeypatch.setattr(Gallery, "samples", noted)
    folder = run(place, "shown", pipelines("sd15"), *KMEANS)
    assert isinstance(nets[-1], Router) and torch.equal(nets[-1].null.embeds, nets[-2].null.embeds)  # the students' and the teacher's
    potstill(["sample", str(folder), "--seeds", "0-9", "--device", "cpu", "--out", f"{tmp_path}/a.npz"])
    drawn = np.load(tmp_path / "a.npz")["images"].transpose(0, 3, 1, 2).astype(int)
    assert abs(drawn - shown[-1].numpy().astype(int)).max() <= 1


def test_exports_hold_all_students_or_one(place, finished, pipelines, tmp_path):
    folder = finished("kmeans")
    images = Student.from_pretrained(folder)(seeds=range(4), prompts=WORDS[:4])
    for to in ("hub", "safetensors"):
        export([str(folder), "--to", to, "--out", str(tmp_path / to)])
        again = Student.from_pretrained(tmp_path / to, pipeline=pipelines("sd15"))
        assert torch.equal(again(seeds=range(4), prompts=WORDS[:4]), images)
        card = (tmp_path / to / "README.md").read_text()
        assert "2 students, each for its own prompts" in card and "prompts=prompts" in card and "student.encode(prompts)" in card
    potstill(["sample", str(tmp_path / "hub"), "--pipeline", str(pipelines("sd15")), "--prompts", "a", "--out", str(tmp_path / "x.png")])
    with pytest.raises(UserError, match="--to diffusers takes one net, this run has 2 students"):
        export([str(folder), "--to", "diffusers", "--out", str(tmp_path / "both")])
    for k in range(2):
        export([str(folder / f"student-{k}/student.safetensors"), "--to", "diffusers", "--out", str(tmp_path / str(k))])
        unet = load_file(tmp_path / str(k) / "unet/diffusion_pytorch_model.safetensors")
        assert all(torch.equal(unet[name.removeprefix("model.")], t) for name, t in weights(folder, k).items())


def test_jobs_of_one_student_each_are_all_in_turn(place, pipelines, finished, capsys):
    folder = run(place, "jobs", pipelines("sd15"), *KMEANS, "student=1")
    assert not (folder / "manifest.json").exists() and (folder / "partition.json").is_file()
    assert "the run is measured when [0] are, too" in capsys.readouterr().err
    run(place, "jobs", pipelines("sd15"), *KMEANS, "student=0")
    assert same(folder, finished("kmeans"))
    assert (folder / "manifest.json").read_bytes() == (finished("kmeans") / "manifest.json").read_bytes()


def test_a_run_that_is_stopped_goes_on_exactly(place, pipelines, finished, monkeypatch):
    """In the second student's third step. The shares are those that were kept, even if they would be made otherwise now."""
    folder, take, steps = place / "stopped", Run.take, []

    def dying(self, *batch):
        steps.append(1)
        if len(steps) == 7:
            raise RuntimeError("the lights are out")
        return take(self, *batch)

    monkeypatch.setattr(Run, "take", dying)
    with pytest.raises(RuntimeError, match="the lights"):
        run(place, "stopped", pipelines("sd15"), *KMEANS)
    monkeypatch.setattr(Run, "take", take)
    monkeypatch.setattr(shares, "share_out", lambda *_: pytest.fail("made anew"))
    run(place, "stopped", pipelines("sd15"), *KMEANS)
    assert same(folder, finished("kmeans"))


def test_prompts_that_are_embedded_as_the_run_goes_have_the_same_shares(place, pipelines):
    """bf16's embeddings are the same numbers in a cache."""
    kept = [
        run(place, f"how-{how}", pipelines("sd15"), *KMEANS, f"text.how={how}", "text.precision=bf16") / "partition.json"
        for how in ("cached", "live")
    ]
    assert json.loads(kept[0].read_text())["prompts"] == json.loads(kept[1].read_text())["prompts"]


def test_a_later_stage_has_the_shares_of_the_one_before(place, pipelines, finished, taken):
    """Also where it has other prompts, of which k-means would make others."""
    first, words = finished("quadrants"), [*reversed(WORDS), *(f"{word} {word}" for word in WORDS)]
    (place / "more.txt").write_text("\n".join(words))
    more = [f"text.prompts={place}/more.txt", f"students.start={first}"]
    second = run(place, "second", pipelines("sd15"), *QUADRANTS, *more)
    kept, before = (json.loads((folder / "partition.json").read_text()) for folder in (second, first))
    assert kept["partition"] == before["partition"] and kept["prompts"][:7] == before["prompts"][::-1] and len(kept["prompts"]) == 14
    with pytest.raises(UserError, match="has shares by quadrants, wanted some by kmeans"):
        run(place, "third", pipelines("sd15"), "students.count=4", "students.partition=kmeans", *more)
    with pytest.raises(UserError, match="does not hold the prompts of 2 students"):
        run(place, "third", pipelines("sd15"), *KMEANS, *more)


def test_adapters_of_several_students(place, pipelines, finished):
    folder = finished("kmeans", "lora.rank=2")
    student = Student.from_pretrained(folder)
    assert student(seeds=[0, 1], prompts=WORDS[:2]).shape == (2, 3, 64, 64)
    assert all(net.adapters for net in student.net.students)


# Real samples


@pytest.fixture(scope="module")
def latents(place, pipelines):
    """Of 14 pictures 64 x 64, each prompt the caption of two."""
    (place / "captions.txt").write_text("\n".join(WORDS[i % 7] for i in range(14)))
    (place / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (14, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    for i, image in enumerate(noise):
        Image.fromarray(image).save(place / f"pictures/{i:02}.png")
    captions = ["--captions", str(place / "captions.txt")]
    given = [str(place / "pictures"), str(place / "latents"), "--pipeline", str(pipelines("sd15")), "--device", "cpu", *captions]
    potstill(["convert", "latents", *given])
    return place / "latents"


@pytest.mark.parametrize("own", [False, True], ids=["prompts beside captions", "captions alone"])
def test_real_samples_go_to_the_student_of_their_caption(own, place, pipelines, latents, taken, capsys):
    """With their captions; and their variance is that of the share."""
    from potstill.engine.data.images import open_images

    more = ["method.gan=true", f"data.path={latents}", "eval.batch=8", *KMEANS]
    name = "alone" if own else "beside"
    folder = run(place, name, pipelines("sd15"), *more, *(["text.prompts=null"] if own else []))
    kept, student = json.loads((folder / "partition.json").read_text()), Student.from_pretrained(folder)
    assert kept["captions"] == [*kept["prompts"], *kept["prompts"]][:14]
    images, rows = open_images(latents), student.encode([WORDS[i % 7] for i in range(14)]).embeds
    everything = torch.stack([torch.from_numpy(images.read(i)).float() for i in range(14)])
    for step, (samples, captions, prompts) in enumerate(taken):
        for image, embeds in zip(samples, captions.embeds, strict=True):
            number = int((everything - image).flatten(1).abs().amax(1).argmin())
            assert torch.equal(everything[number], image) and kept["captions"][number] == step // 4
            torch.testing.assert_close(embeds, rows[number], rtol=1e-3, atol=2e-3)  # a cache has 16 bit
        assert all(set(student.net.partition.of(one).tolist()) == {step // 4} for one in prompts)
    summary = json.loads((folder / "summary.json").read_text())
    capsys.readouterr()
    potstill(["evaluate", str(folder), "--device", "cpu"])
    found = json.loads(capsys.readouterr().out)
    assert found["student"]["fd"] == pytest.approx(summary["student"]["fd"], rel=1e-4) and found["student"]["labels"] == "prompts"


def test_the_variance_is_that_of_the_share(place, pipelines, latents, monkeypatch):
    from potstill.engine.data.images import data_variance, open_images
    from potstill.engine.jobs.job import Job

    seen, stream = [], Job.stream
    monkeypatch.setattr(Job, "stream", lambda self, cfg, share, *rest: seen.append(share.images) or stream(self, cfg, share, *rest))
    given, variances = Run.__init__, []

    def noted(self, method, *rest):
        variances.append(method.data_variance)
        given(self, method, *rest)

    monkeypatch.setattr(Run, "__init__", noted)
    folder = run(place, "variance", pipelines("sd15"), "method.gan=true", f"data.path={latents}", "eval.batch=8", *KMEANS)
    kept, images = np.array(json.loads((folder / "partition.json").read_text())["captions"]), open_images(latents)
    for k in range(2):
        own = np.stack([images.read(i) for i in np.flatnonzero(kept == k)]).astype(np.float64)
        assert variances[k] == pytest.approx(own.var(0).mean(), rel=1e-5)
        assert variances[k] == data_variance(seen[k]) and len(seen[k]) == (kept == k).sum()


# What cannot be


@pytest.fixture
def refused(place, pipelines, tmp_path, capsys):
    """The sentence of a run, dry or not, that ends with exit code 2 and has trained nothing."""

    def sentence(*more, dry=True):
        with pytest.raises(SystemExit) as stopped:
            potstill(["train", *arguments(place, "none", pipelines("sd15"), f"run_dir={tmp_path}/run", *more), *(["--dry-run"] * dry)])
        assert stopped.value.code == 2 and not list(tmp_path.rglob("checkpoints"))
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        return said[0]

    return sentence


SETTINGS = {
    "blocks": (["students.count=2"], "students.partition=blocks does not share out prompts, which this teacher is told: take kmeans or quadrants"),
    "random": (["students.count=2", "students.partition=random"], "take kmeans or quadrants"),
    "three quadrants": (["students.count=3", "students.partition=quadrants"], "students.count wants 2 or 4 where students.partition=quadrants, got 3"),
    "eight students": (["students.count=8", "students.partition=kmeans"], "8 students want as many different prompts"),
    "which": ([*KMEANS, "student=2"], "student wants 0 … 1, got 2"),
    "pairs": ([*KMEANS, "method.regression=0.5", "method.regression_metric=l2"], "method.regression makes pairs for classes"),
    "another shape": (["students.net.num_blocks=1"], "students.net.model_type=SongUNet cannot learn from a"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be(case, refused):
    more, words = SETTINGS[case]
    for dry in (True, False):
        assert words in refused(*more, dry=dry)


def test_quadrants_are_of_prompts_alone(pipelines, place, capsys):
    given = arguments(place, "dit", pipelines("dit"), "text.prompts=null", "students.count=2", "students.partition=quadrants")
    with pytest.raises(UserError, match="does not share out classes, which this teacher is told: take blocks or random or kmeans"):
        train(given)


def test_prompts_that_are_the_same_count_once(place, refused, tmp_path):
    (place / "twice.txt").write_text("a cat\na cat\na cat\n")
    assert "2 students want as many different prompts" in refused(*KMEANS, f"text.prompts={place}/twice.txt")


@pytest.mark.parametrize("kind", ["kmeans", "quadrants"])
def test_a_share_without_prompts(kind, place, refused):
    """The tokenizer cuts both off before they differ. It is known once they are embedded, and with a cache of them in a dry run."""
    (place / "alike.txt").write_text(f"{'a' * 40} cat\n{'a' * 40} dog\n")
    more = ["students.count=2", f"students.partition={kind}", f"text.prompts={place}/alike.txt", f"text.cache={place}/alike-cache"]
    for dry in (False, True):
        assert "student 1 of 2 has no prompts: take fewer students, more prompts or" in refused(*more, dry=dry)


def test_a_share_without_real_samples(place, pipelines, latents, refused):
    other = shutil.copytree(latents, place / "rain")
    captions = (latents / "captions.jsonl").read_text().splitlines()
    (other / "captions.jsonl").write_text("\n".join(['{"caption": "rain"}'] * len(captions)))
    assert "20 students want as many real samples, rain has 14" in refused(
        "students.count=20", "students.partition=kmeans", "method.gan=true", f"data.path={other}", f"text.prompts={many(place)}"
    )
    more = [*KMEANS, "method.gan=true", f"data.path={other}", "eval.batch=8", f"text.cache={place}/rain-cache"]
    for dry in (False, True):
        assert "of 2 has no real samples, by their captions: take fewer students" in refused(*more, dry=dry)


def many(place):
    (place / "many.txt").write_text("\n".join(f"prompt {i}" for i in range(30)))
    return place / "many.txt"


CHANGES = {
    "cut off": (lambda text: text[:100], "is not readable as JSON"),
    "another list": (lambda text: "[]", "holds a list"),
    "nothing": (lambda text: "{}", "lacks its partition"),
    "no prompts": (lambda text: json.dumps({**json.loads(text), "prompts": None}), "prompts = None"),
    "students out of bounds": (lambda text: json.dumps({**json.loads(text), "prompts": [0, 1, 9, 0, 0, 0, 0]}), "does not share out the prompts"),
    "one student's": (lambda text: json.dumps({**json.loads(text), "prompts": [0] * 7}), "does not share out the prompts"),
    "no numbers": (lambda text: json.dumps({**json.loads(text), "prompts": ["0"] * 7}), "prompts = ["),
    "other captions": (lambda text: json.dumps({**json.loads(text), "captions": [[]]}), "captions = [["),
    "a moved centre": (lambda text: text.replace("0.", "1.", 1), "contradicts itself"),
    "another share": (lambda text: json.dumps({**json.loads(text), "prompts": [1, 0, 1, 1, 0, 0, 1]}), "was begun with another partition"),
    "other prompts": (lambda text: json.dumps({**json.loads(text), "prompts": [0, 1, 0]}), "was begun with another partition"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_shares_that_have_changed_end_a_run_in_a_sentence(change, place, pipelines, finished, tmp_path, capsys):
    folder = shutil.copytree(finished("kmeans"), tmp_path / "run")
    alter, words = CHANGES[change]
    text = (folder / "partition.json").read_text()
    (folder / "partition.json").write_text(alter(text))
    assert (folder / "partition.json").read_text() != text
    for more in ([], ["--dry-run"]):
        with pytest.raises(UserError) as caught:
            train([*arguments(place, "none", pipelines("sd15"), f"run_dir={folder}", *KMEANS), *more])
        assert words in str(caught.value) and str(folder) in str(caught.value)
    if change == "a moved centre":
        (folder / "partition.json").unlink()  # is made again, and the very same
        train(arguments(place, "none", pipelines("sd15"), f"run_dir={folder}", *KMEANS))
        assert (folder / "partition.json").read_text() == text


def test_shares_that_are_not_of_the_prompts(finished, tmp_path):
    """As read with the prompts at hand: the number must agree, too."""
    from potstill.engine.jobs.told import Told

    folder = finished("kmeans")
    seven, three = Told([0] * 7, None), Told([0] * 3, None)
    assert shares.read_shares(folder, 2, seven).captions is None
    for told in (three, Told([0] * 7, [0] * 7)):
        with pytest.raises(Damaged, match="does not share out the prompts of this run"):
            shares.read_shares(folder, 2, told)


def test_another_partition_than_the_run_began_with(place, pipelines, finished, tmp_path):
    """Of a seed that gives other centres, with all hashes right."""
    folder = shutil.copytree(finished("kmeans"), tmp_path / "run")
    kept = json.loads((folder / "partition.json").read_text())
    kept["partition"] = part_prompts("kmeans", numbers(20, 12), 2, 0).described()
    (folder / "partition.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match=r"was begun with another partition: sha256 was .*, now"):
        train(arguments(place, "none", pipelines("sd15"), f"run_dir={folder}", *KMEANS))


# Teacher score matching


def test_teacher_score_matching_passes_captions_on_and_asks_with_prompts_where_there_are_none():
    mixture = Mixture()
    student, asked = apart(pretrained(mixture), 1), []
    text = Text(torch.zeros(8, 1, 1))
    method = TSM(mixture, student)
    for name, net in (("teacher", mixture), ("student", student)):
        calls = net.forward if name == "teacher" else net.estimate

        def noted(x, sigma, labels, calls=calls):
            asked.append(labels)
            return calls(x, sigma, None)

        setattr(method, name, noted if name == "teacher" else type("Net", (), {"estimate": staticmethod(noted)}))
    other = Text(torch.ones(8, 1, 1))
    for labels, prompts, wanted in ((text, (other,), text), (None, (other,), other), (None, (), None)):
        method.teacher.weight = mixture.weight
        method.teacher.level, method.teacher.told = mixture.level, mixture.told
        method.loss(batch_of(mixture, 8)._replace(labels=labels, prompts=prompts))
        assert asked[-2:] == [wanted, wanted]
