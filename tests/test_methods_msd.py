"""MSD: partitions, shares, the router, manifests that refuse strangers, teacher score matching, and DMD's regression."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toy import Mixture, apart, batch_of, default_dtype, gradients, learn, pretrained, reached

from potstill.engine import train
from potstill.engine.common.errors import UserError
from potstill.engine.data.images import open_images
from potstill.engine.data.sampler import Stream
from potstill.engine.diffusion.sampling import SeedNoise, one_step
from potstill.engine.methods.base import Pairs
from potstill.engine.methods.dmd import DMD, DMDConfig
from potstill.engine.methods.msd import TSM, make_partition
from potstill.engine.models.partitions import Partition
from potstill.engine.models.router import Router, load_router, student_folder, write_manifest
from potstill.engine.models.weights import save_net
from potstill.engine.nets.edm import from_kwargs

ROOT = Path(__file__).parent.parent
TINY = {"img_resolution": 8, "img_channels": 1, "label_dim": 10, "model_type": "SongUNet", "model_channels": 8}
TINY |= {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0}


def tiny_net(seed):
    torch.manual_seed(seed)
    net = from_kwargs("EDMPrecond", **TINY)
    for p in net.parameters():  # EDM's zero-initialised layers would make all nets the same function
        nn.init.normal_(p, std=0.2)
    return net.eval()


@pytest.mark.parametrize("kind", ["blocks", "random", "kmeans"])
def test_shares_cover_each_class_once_and_are_equal(kind):
    features = np.random.default_rng(0).normal(size=(12, 5))
    partition = make_partition(kind, 12, 4, 0, features)
    shares = [partition.classes(k) for k in range(4)]
    assert sorted(c for share in shares for c in share) == list(range(12))
    assert {len(share) for share in shares} == {3}
    assert {c: partition.student_of[c] for share in shares for c in share} == {c: k for k, share in enumerate(shares) for c in share}


def test_blocks_are_the_papers_and_kmeans_finds_clusters():
    assert make_partition("blocks", 1000, 4, 0).student_of == tuple(label // 250 for label in range(1000))
    centres = np.array([[0, 0], [10, 0], [0, 10]])
    of = np.array([0, 1, 2] * 4)
    points = centres[of] + np.random.default_rng(1).normal(scale=0.5, size=(12, 2))
    found = np.array(make_partition("kmeans", 12, 3, 0, points).student_of)
    assert [len(set(found[of == k])) for k in range(3)] == [1, 1, 1]


def test_hash_is_of_the_assignment_alone():
    blocks, again = make_partition("blocks", 10, 2, 0), Partition("kmeans", (0,) * 5 + (1,) * 5)
    assert blocks.hash == again.hash != make_partition("random", 10, 2, 0).hash


@pytest.mark.parametrize(("classes", "count"), [(10, 3), (10, 0), (0, 2)])
def test_shares_that_cannot_be_equal_are_refused(classes, count):
    with pytest.raises(UserError, match="does not divide"):
        make_partition("blocks", classes, count, 0)


def test_a_student_never_sees_labels_outside_its_share():
    """Neither those it draws itself nor those of real images; the one-hot width stays the whole one."""
    import random

    from potstill.engine.methods.base import Draws

    share = [3, 4, 7]
    drawn = Draws(torch.Generator().manual_seed(0), 3000, slice(0, 3000), random.Random(0), torch.tensor(share)).labels(10)
    counts = drawn.sum(0)
    assert drawn.shape == (3000, 10)
    assert counts[[c for c in range(10) if c not in share]].sum() == 0
    assert counts[share].tolist() == pytest.approx([1000] * 3, abs=4 * (3000 * 2 / 9) ** 0.5)
    stream = Stream(open_images("digits").subset(share), batch=50, seed=0)
    for step in range(20):
        _, labels = stream.at(step)
        assert labels.shape == (50, 10)
        assert set(labels.argmax(1).tolist()) <= set(share)


def test_router_asks_each_samples_own_student():
    """Against calling the students one sample at a time; and route(label) is the filter for every label."""
    partition = make_partition("random", 10, 2, 3)
    students = [tiny_net(k) for k in range(2)]
    router = Router(students, partition).eval()
    labels = torch.eye(10)
    x, sigma = torch.randn(10, 1, 8, 8), torch.linspace(0.1, 5, 10)
    with torch.no_grad():
        together = router(x, sigma, labels)
        for c in range(10):
            alone = students[partition.student_of[c]](x[c : c + 1], sigma[c : c + 1], labels[c : c + 1])
            other = students[1 - partition.student_of[c]](x[c : c + 1], sigma[c : c + 1], labels[c : c + 1])
            torch.testing.assert_close(together[c : c + 1], alone, rtol=1e-4, atol=1e-5)
            assert (together[c : c + 1] - other).abs().max() > 1e-3
        images = one_step(2.5)(router, labels, SeedNoise(range(10)))
    assert images.shape == (10, 1, 8, 8)


@pytest.fixture
def manifest(tmp_path):
    partition = make_partition("blocks", 10, 2, 0)
    for k in range(2):
        student_folder(tmp_path, k).mkdir()
        file = student_folder(tmp_path, k) / "student.safetensors"
        save_net(file, tiny_net(k), sampler=one_step(2.5).to_dict(), method="dmd", partition=partition.hash, student=k)
    write_manifest(tmp_path, partition)
    return tmp_path / "manifest.json"


def test_manifest_round_trip(manifest):
    router, meta = load_router(manifest)
    assert meta["sampler"]["sigmas"] == [2.5]
    torch.testing.assert_close(router.students[1].state_dict(), tiny_net(1).state_dict())


def test_manifest_refuses_students_of_another_partition(manifest):
    other = make_partition("random", 10, 2, 0)
    file = student_folder(manifest.parent, 1) / "student.safetensors"
    save_net(file, tiny_net(1), partition=other.hash, student=1)
    with pytest.raises(UserError, match="students of different partitions do not mix"):
        load_router(manifest)


def test_manifest_refuses_swapped_changed_and_missing_files(manifest):
    file = student_folder(manifest.parent, 1) / "student.safetensors"
    right = make_partition("blocks", 10, 2, 0)
    save_net(file, tiny_net(5), partition=right.hash, student=1)
    with pytest.raises(UserError, match="has changed since"):
        load_router(manifest)
    file.write_bytes((student_folder(manifest.parent, 0) / "student.safetensors").read_bytes())
    with pytest.raises(UserError, match="is student 0 of partition"):
        load_router(manifest)
    file.unlink()
    with pytest.raises(UserError, match="no weight file"):
        load_router(manifest)
    text = json.loads(manifest.read_text())
    text["partition"]["student_of"][0] = 1
    manifest.write_text(json.dumps(text))
    with pytest.raises(UserError, match="contradicts itself"):
        load_router(manifest)
    manifest.write_text("{}")
    with pytest.raises(UserError, match="no manifest"):
        load_router(manifest)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("students.count=3", "does not divide the 10 classes"),
        ("student=2", "student wants 0 … 1, got 2"),
        ("students.partition=alphabet", "blocks, random, kmeans"),
        ("net.conditional=false", "class-conditional"),
        ("students.start=/nowhere", "no checkpoint in"),
    ],
)
def test_bad_settings(tmp_path, override, words):
    small = ["teacher.train.kimg=0.1", "train.kimg=0.1", "net.model_channels=8", "net.num_blocks=1", "log.tensorboard=false"]
    with pytest.raises(UserError, match=words):
        train.main([str(ROOT / "configs/digits_msd.yaml"), f"run_dir={tmp_path}/r", *small, override])


def test_teacher_score_matching_learns_the_teacher():
    """TSM's loss is zero for the teacher itself, and falls for a student that is not."""
    mixture = Mixture()
    loss, _ = TSM(mixture, mixture).loss(batch_of(mixture, 64))
    assert loss.item() < 1e-9
    student = pretrained(mixture)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    method = TSM(mixture, student)
    before = method.loss(batch_of(mixture, 2048))[0].item()
    learn(method, mixture, 200)
    assert method.loss(batch_of(mixture, 2048))[0].item() < 0.2 * before


def test_teacher_score_matching_by_hand():
    """λ(σ) mean (μ_φ - μ_teacher)² in float64, and only the student receives gradients."""
    with default_dtype(torch.float64):
        mixture = Mixture()
        student = apart(pretrained(mixture), 1)
        method, batch = TSM(mixture, student), batch_of(mixture, 32)
        grads = gradients(method, "student", batch_of(mixture, 32))
        assert reached(grads) == {"student"}
        again = batch_of(mixture, 32).draws  # in the order of the method's own draws
        either, index, normal = again.uniform(), again.integers(0, 999), again.normal()
        low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
        sigma = torch.where(either < 0.5, (-1.2 + 1.2 * normal).exp(), (low + index / 999 * (high - low)) ** 7)
        x_t = batch.images + sigma[:, None, None, None] * again.normal(2, 1, 1)
        error = student(x_t, sigma, None) - mixture(x_t, sigma, None).detach()
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        by_hand = torch.autograd.grad((weight * (error**2).mean((1, 2, 3))).mean(), list(student.parameters()))
        for ours, theirs in zip(grads["student"], by_hand, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_regression_is_the_distance_on_the_pairs():
    """DMD 1: + w_R·mean (G(σ z') - y')²; with one pair nothing is left to chance."""
    mixture = Mixture()
    student = apart(pretrained(mixture), 1)
    z, y = torch.randn(1, 2, 1, 1), torch.randn(1, 2, 1, 1)
    values = []
    for weight in (0.0, 0.25):
        method = DMD(DMDConfig(sigma=5.0, regression=weight, regression_metric="l2"), mixture, student, pretrained(mixture))
        method.pairs = Pairs(z, y, None)
        values.append(method.student_loss(method.begin(batch_of(mixture, 16)))[0])
    expected = 0.25 * ((student(5.0 * z, torch.tensor([5.0]), None) - y) ** 2).mean()
    torch.testing.assert_close(values[1] - values[0], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("recipe", "millions"), [("imagenet64_msd_s", 172.8), ("imagenet64_msd_xs", 85.9)])
def test_smaller_students_have_the_reconstructed_sizes(recipe, millions):
    """The shapes whose parameter shares (58 % and 29 % of 295.9 M) and depths agree with the published ones."""
    from potstill.engine.config.tree import load
    from potstill.engine.jobs import build

    cfg = load(ROOT / f"configs/{recipe}.yaml", [])
    assert cfg.students.net is not None
    with torch.device("meta"):
        net = build.build_net(cfg.students.net, 64, 3, 1000)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
