"""Evaluation as published: FID's own network or no FID, EDM's references and seeds, kernel distance, precision and recall."""

import json
import os
import pickle
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from patience import Patience, outlasted
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from torchmetrics.image.fid import FrechetInceptionDistance

from potstill.engine import evaluate
from potstill.engine.common import download
from potstill.engine.common.errors import UserError
from potstill.engine.config.tree import load
from potstill.engine.data.images import open_images
from potstill.engine.diffusion.sampling import ode, one_step
from potstill.engine.formats.card import _quality
from potstill.engine.jobs.job import Job
from potstill.engine.measure import distances, networks
from potstill.engine.measure import features as features_module
from potstill.engine.measure.distances import Gaussian, gathered, kid, moments, precision_recall, share, squared_distance
from potstill.engine.measure.features import Pixels
from potstill.engine.measure.networks import features_by_name, features_by_names
from potstill.engine.measure.references import read_reference, write_reference
from potstill.engine.measure.score import reference, score
from potstill.engine.models.generate import labels_for
from potstill.engine.models.weights import load_net, save_net, weights_hash
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.training.ranks import Ranks
from potstill.engine.training.run import Run

ROOT = Path(__file__).parent.parent
TINY = {"img_resolution": 8, "img_channels": 1, "label_dim": 10, "model_type": "SongUNet", "model_channels": 16}
TINY |= {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


def tiny_net(**changes):
    net = from_kwargs("EDMPrecond", **TINY | changes).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "digits"
    folder.mkdir()
    save_net(folder / "teacher.safetensors", tiny_net(), method="teacher", sampler=ode("heun", 2).to_dict())
    save_net(folder / "student.safetensors", tiny_net(), method="dmd", sampler=one_step(80).to_dict())
    (folder / "config.yaml").write_text("data: {path: digits, resolution: 8}\neval: {n: 64, batch: 100}\n")
    return folder


@pytest.fixture(scope="module")
def digits():
    return open_images("digits")


def random_images(n, shape, seed=0):
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def evaluated(capsys, *arguments):
    evaluate.main([str(a) for a in arguments])
    return json.loads(capsys.readouterr().out)


# The distance


def test_torchmetrics_agrees():
    a, b = random_images(500, (3, 4, 4)), random_images(300, (3, 4, 4), 1)
    a[:, 1], b[:, 2] = a[:, 0] // 2, b[:, 2] // 3
    pixels = Pixels()
    pixels.measure(a)
    theirs = FrechetInceptionDistance(pixels)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    ours = squared_distance(moments(a.split(64), Pixels()).gaussian("real"), moments(b.split(64), Pixels()).gaussian("generated"))
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-8)


def test_two_gaussians_whose_covariances_do_not_commute():
    """Of 2x2 matrices tr √M = sqrt(tr M + 2 sqrt(det M)) for M = Σ_1 Σ_2, which has positive eigenvalues."""
    first, second = torch.tensor([[2.0, 0.6], [0.6, 0.5]]).double(), torch.tensor([[1.0, -0.4], [-0.4, 3.0]]).double()
    product = first @ second
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    assert (first @ second - second @ first).abs().max() > 0.1
    wanted = 3**2 + 4**2 + first.trace() + second.trace() - 2 * root
    found = squared_distance(Gaussian(torch.zeros(2).double(), first), Gaussian(torch.tensor([3.0, 4.0]).double(), second))
    assert found == pytest.approx(float(wanted), rel=1e-13)


def test_a_singular_covariance_costs_no_accuracy():
    """Rank 1 in 50 dimensions, far from unit scale: the roots of rounding errors would show at 1e-7 of the trace."""
    u = torch.randn(50, dtype=torch.float64)
    sigma, mu = 1e4 * torch.outer(u, u), torch.zeros(50).double()
    assert abs(squared_distance(Gaussian(mu, sigma), Gaussian(mu, sigma))) < 1e-12 * sigma.trace()
    assert squared_distance(Gaussian(mu, sigma), Gaussian(mu, 4 * sigma)) == pytest.approx(float(sigma.trace()), rel=1e-12)
    round_one = 1e6 * torch.eye(50, dtype=torch.float64)  # which any root of a rounding error would be multiplied with
    wanted = sigma.trace() + round_one.trace() - 2 * (1e6 * sigma.trace()).sqrt()
    assert squared_distance(Gaussian(mu, sigma), Gaussian(mu, round_one)) == pytest.approx(float(wanted), rel=1e-12)


# Several processes


def test_shares_are_whole_batches_and_make_a_whole():
    for total, batch, world in ((10, 3, 2), (1, 5, 3), (12, 4, 3), (0, 4, 2)):
        shares = [share(Ranks(rank, world), total, batch).tolist() for rank in range(world)]
        assert sorted(item for one in shares for item in one) == list(range(total))
        for one in shares:
            starts = one[::batch]
            assert all(s % batch == 0 for s in starts)
    assert share(Ranks(1, 2), 10, 3).tolist() == [3, 4, 5, 9]
    mine = gathered(Ranks(1, 2, several=False), torch.arange(1, 5), 10, 3)  # with nobody to add the others' rows
    assert mine.tolist() == [0, 0, 0, 1, 2, 3, 0, 0, 0, 4]


@pytest.mark.parallel
def test_two_processes_measure_what_one_does(run_dir, capsys):
    """gloo: the images, their order and all metrics; the sums differ only in the order of adding."""
    arguments = [str(run_dir), "--which", "student", "--images", "150", "--batch", "32", "--metrics", "fd,kid,pr", "--device", "cpu"]
    alone = evaluated(capsys, *arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # as torchrun sets them
    world |= {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "engine.evaluate", *arguments], cwd=ROOT, text=True,
            env=os.environ | world | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    patience = Patience([process.pid for process in started])
    try:
        (out, err), (second, _) = (outlasted(process.communicate, patience) for process in started)
    finally:
        for process in started:
            process.kill()
    assert started[0].returncode == started[1].returncode == 0, err
    assert second == "", "one process prints"
    both = json.loads(out)
    assert (alone["student"]["processes"], both["student"]["processes"]) == (1, 2)
    for key in ("fd", "floor"):
        assert both["student"][key] == pytest.approx(alone["student"][key], rel=1e-10)
    for key in ("kid", "kid_std", "precision", "recall"):
        assert both["student"][key] == pytest.approx(alone["student"][key], rel=1e-12, abs=1e-12)
    assert both["student"]["reference_sha256"] == alone["student"]["reference_sha256"]


# Kernel distance, precision and recall


def test_kernel_distance_of_whole_sets():
    """As many images as a subset: every subset is all of them, and sklearn's kernel gives the unbiased estimate."""
    a, b = torch.randn(60, 5, dtype=torch.float64), torch.randn(60, 5, dtype=torch.float64) * 1.5 + 0.3
    xx, yy, xy = (polynomial_kernel(p, q, degree=3, gamma=1 / 5, coef0=1) for p, q in ((a, a), (b, b), (a, b)))
    wanted = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (60 * 59) - 2 * xy.mean()
    before = torch.random.get_rng_state()
    found = kid(a, b)
    assert torch.equal(torch.random.get_rng_state(), before), "an evaluation moved the training's generator"
    assert found["kid"] == pytest.approx(wanted, rel=1e-12)
    assert (found["kid_std"], found["kid_subset_size"]) == (pytest.approx(0, abs=1e-12), 60)


def test_kernel_distance_is_of_its_seed(monkeypatch):
    monkeypatch.setattr(distances, "SUBSETS", 3)
    a, b = torch.randn(1500, 4, dtype=torch.float64), torch.randn(1200, 4, dtype=torch.float64)
    assert kid(a, b) == kid(a, b) != kid(a, b, seed=1)
    assert kid(a, b)["kid_subset_size"] == 1000
    assert abs(kid(a, b)["kid"]) < 0.05
    with pytest.raises(UserError, match="at least 2 images"):
        kid(a[:1], b)


@pytest.mark.parametrize("block", [7, 1000])
def test_precision_and_recall_against_sklearn(block):
    real, fake = torch.randn(120, 3, dtype=torch.float64), torch.randn(90, 3, dtype=torch.float64) * 0.5 + 0.7

    def covered(centres, points):
        radii = NearestNeighbors(n_neighbors=4).fit(centres).kneighbors(centres)[0][:, 3]
        between = np.linalg.norm(points[:, None].numpy() - centres[None].numpy(), axis=2)
        return (between <= radii).any(1).mean()

    found = precision_recall(real, fake, block=block)
    assert found == {"precision": covered(real, fake), "recall": covered(fake, real), "neighbours": 3}
    assert 0 < found["recall"] < found["precision"] < 1
    assert precision_recall(real, real + 1000) == {"precision": 0, "recall": 0, "neighbours": 3}
    with pytest.raises(UserError, match="more than 3 images"):
        precision_recall(real[:3], fake)


# References


def test_a_reference_goes_round(tmp_path, digits):
    found = reference(digits, Pixels(), n=100)
    write_reference(tmp_path / "a" / "digits.npz", found.gaussian)
    with np.load(tmp_path / "a" / "digits.npz") as file:  # as EDM's fid.py reads it
        mu, sigma = file["mu"], file["sigma"]
    pixels = np.stack([digits.read(i) for i in range(1797)]).reshape(1797, -1) / 127.5 - 1
    np.testing.assert_allclose(mu, pixels.mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(pixels, rowvar=False), rtol=0, atol=1e-12)
    again = read_reference(tmp_path / "a" / "digits.npz")
    assert torch.equal(again.mu, found.gaussian.mu) and torch.equal(again.sigma, found.gaussian.sigma)
    assert os.listdir(tmp_path / "a") == ["digits.npz"]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


GOOD = {"mu": np.zeros(4), "sigma": np.eye(4)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(4)}, "holds mu of mu and sigma, wanted both"),
        ({"a": np.zeros(4)}, "holds neither of mu and sigma"),
        (GOOD | {"mu": np.zeros(3)}, "mu [3] float64 and sigma [4, 4] float64, wanted floats [D] and [D, D]"),
        (GOOD | {"mu": np.zeros((4, 1))}, "mu [4, 1]"),
        (GOOD | {"mu": np.float64(3)}, "mu []"),
        (GOOD | {"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "mu [0]"),
        (GOOD | {"sigma": np.eye(4, dtype=int)}, "sigma [4, 4] int64"),
        (GOOD | {"mu": np.full(4, np.nan)}, "not finite"),
        (GOOD | {"sigma": -np.eye(4)}, "negative variance"),
        (GOOD | {"sigma": np.arange(16.0).reshape(4, 4)}, "not symmetric"),
        (GOOD | {"mu": "EVIL"}, "no complete .npz of plain arrays"),
    ],
)
def test_files_that_are_no_references(tmp_path, arrays, message):
    arrays = {k: np.array([Evil(tmp_path / "executed")], object) if isinstance(v, str) else v for k, v in arrays.items()}
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=re.escape(message)):
        read_reference(tmp_path / "x.npz")
    assert not (tmp_path / "executed").exists()


def test_damaged_references(tmp_path):
    np.savez(tmp_path / "x.npz", **GOOD)
    whole = (tmp_path / "x.npz").read_bytes()
    np.save(tmp_path / "y.npy", np.zeros(3))
    for broken in (whole[:-40], whole[:200], b"", b"hello", (tmp_path / "y.npy").read_bytes()):
        (tmp_path / "x.npz").write_bytes(broken)
        with pytest.raises(UserError, match=r"no complete \.npz"):
            read_reference(tmp_path / "x.npz")


def edm2_reference(path, protocol=4, **entries):
    """As EDM2's calculate_metrics.py pickles its dictionary; of `entries` the mean is i and the variance i + 1."""
    content = {name: {"mu": np.full(d, float(i)), "sigma": np.eye(d) * (i + 1.0)} for i, (name, d) in enumerate(entries.items())}
    path.write_bytes(pickle.dumps({"num_images": 50_000} | content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_references_of_edm2_are_read_by_the_name_of_their_features(tmp_path, protocol):
    path = edm2_reference(tmp_path / "img64.pkl", protocol, fid=2048, fd_dinov2=10)
    fid, dino = read_reference(path, "fid"), read_reference(path, "fd_dinov2")
    assert torch.equal(fid.mu, torch.zeros(2048, dtype=torch.float64)) and torch.equal(fid.sigma, torch.eye(2048, dtype=torch.float64))
    assert torch.equal(dino.mu, torch.ones(10, dtype=torch.float64)) and torch.equal(dino.sigma, 2 * torch.eye(10, dtype=torch.float64))
    with pytest.raises(UserError, match="holds 'fid' and 'fd_dinov2', and nothing for these features: fid goes with --features inception"):
        read_reference(path)
    with pytest.raises(UserError, match="holds 'fid', and no fd_dinov2"):
        read_reference(edm2_reference(tmp_path / "fid.pkl", fid=4), "fd_dinov2")


def test_evaluate_asks_a_reference_of_edm2_for_its_own_features(tmp_path, run_dir):
    net, path = fake_inception(tmp_path / "inception.pt"), edm2_reference(tmp_path / "img64.pkl", fd_dinov2=10, fid=2048)
    found = evaluate.reference_from_file(str(path), features_by_name(f"inception:{net}"), (1, 8, 8), torch.device("cpu"), 8, "again")
    assert found.gaussian.mu.tolist() == [1.0] * 2048 and found.data == "img64.pkl"
    assert (networks.NETWORKS["dinov2"].edm2, networks.NETWORKS["clip"].edm2, Pixels().edm2) == ("fd_dinov2", None, None)
    with pytest.raises(UserError, match="nothing for these features"):
        evaluate.main([str(run_dir), "--reference", str(path), "--n", "8"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_images": 5}, "is a pickle without a reference: wanted EDM2's"),
        ([1, 2], "is a pickle without a reference"),
        ({"fid": {"mu": np.zeros(4)}}, "holds mu of mu and sigma, wanted both"),
        ({"fid": {"mu": [0.0] * 4, "sigma": np.eye(4)}}, "holds sigma of mu and sigma"),
        ({"fid": {"mu": np.zeros(4), "sigma": np.eye(3)}}, "wanted floats [D] and [D, D]"),
        ({"fid": "EVIL"}, "asks for io.open, which no numbers need: refused, and nothing in the file was executed"),
    ],
)
def test_pickles_that_are_no_references(tmp_path, content, message):
    content = {"fid": Evil(tmp_path / "executed")} if content == {"fid": "EVIL"} else content
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=re.escape(message)):
        read_reference(tmp_path / "x.pkl", "fid")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("rounding", [0.0, -2e-13, 2e-13])
def test_a_reference_of_images_that_are_all_alike(tmp_path, rounding):
    """Its covariance is 0 up to rounding, also below 0; the distance is then |m - m'|² + tr Σ'."""
    noise = np.zeros((4, 4))
    noise[0, 1], noise[2, 2] = rounding, rounding
    np.savez(tmp_path / "x.npz", mu=np.full(4, 3.0), sigma=noise)
    other = Gaussian(torch.ones(4, dtype=torch.float64), torch.diag(torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)))
    assert squared_distance(read_reference(tmp_path / "x.npz"), other) == pytest.approx(4 * 2**2 + 10, rel=1e-5)
    alike = torch.full((50, 1, 2, 2), 131, dtype=torch.uint8)
    write_reference(tmp_path / "y.npz", moments([alike], Pixels()).gaussian("real"))
    assert read_reference(tmp_path / "y.npz").mu.tolist() == pytest.approx([131 / 127.5 - 1] * 4)


def test_evaluate_writes_and_reads_references(run_dir, tmp_path, capsys):
    path = tmp_path / "new" / "ref.npz"
    found = evaluated(capsys, "--data", "digits", "--save-reference", path)
    assert found["reference"]["images"] == 1797 and "torch" in found["tools"]
    direct = evaluated(capsys, run_dir, "--labels", "random")
    by_file = evaluated(capsys, run_dir, "--reference", path, "--n", "64")
    for role in ("student", "teacher"):
        one = by_file[role]
        assert one["fd"] == pytest.approx(direct[role]["fd"], rel=1e-12)
        assert (one["floor"], one["labels"], one["data"], one["seeds"]) == (None, "random", "ref.npz", "0-63")
        assert one["reference_sha256"] == download.digest(path) != direct[role]["reference_sha256"]
    options = evaluate.parser().parse_args([str(run_dir), "--reference", str(path)])
    assert options.n is None  # and without --n:
    with pytest.raises(StopMeasuring, match="50000 seeds from 0"):
        measured_seeds(evaluate, [str(run_dir), "--reference", str(path)])


class StopMeasuring(Exception):
    pass


def measured_seeds(module, arguments):
    """What evaluate would ask score for, without making 50,000 images."""

    def stop(*args, n, seed, labels, **more):
        assert labels == "random"
        raise StopMeasuring(f"{n} seeds from {seed}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "score", stop)
        module.main(arguments)


def test_the_fingerprint_is_of_the_images_and_their_order(digits):
    prints = [reference(digits.subset(c), Pixels(), n=20, batch=b).sha256 for c, b in (([1, 2], 7), ([1, 2], 50), ([1, 3], 7))]
    assert prints[0] == prints[1] != prints[2]
    assert re.fullmatch("[0-9a-f]{64}", prints[0])


# Labels, seeds, the best of several


def test_random_labels_are_drawn_after_the_noise_of_their_seed():
    net = tiny_net()
    labels, kind = labels_for(net, None, 30, "random", seed=4)
    for seed, label in zip(range(4, 34), labels, strict=True):
        torch.manual_seed(seed)
        torch.randn([1, 8, 8])
        assert int(torch.randint(10, size=[])) == label
    assert kind == "random" and len(set(labels)) > 5


def test_labels_by_name(digits):
    net = tiny_net()
    assert labels_for(net, digits.labels, 4, "3,7")[0].tolist() == [3, 7, 3, 7]
    assert labels_for(net, digits.labels, 20, "balanced")[0].tolist() == [*range(10), *range(10)]
    with pytest.raises(UserError, match="among 0 … 9"):
        labels_for(net, digits.labels, 4, "10")
    with pytest.raises(UserError, match="data wants labelled data"):
        labels_for(net, None, 4, "data")
    with pytest.raises(UserError, match="knows no classes"):
        labels_for(tiny_net(label_dim=0), digits.labels, 4, "balanced")


def test_the_best_of_several_is_marked(digits, capsys, run_dir):
    net, pixels = tiny_net(), Pixels()
    each = [score(net, one_step(80), digits, pixels, n=30, seed=s)["fd"] for s in (5, 35, 65)]
    found = score(net, one_step(80), digits, pixels, n=30, seed=5, best_of=3)
    assert found["fd_all"] == pytest.approx(each, rel=1e-12)
    assert found["fd"] == min(found["fd_all"])
    first = 5 + 30 * int(np.argmin(each))
    assert (found["best_of"], found["seeds"], found["seeds_all"]) == (3, f"{first}-{first + 29}", "5-94")
    assert "best_of" not in score(net, one_step(80), digits, pixels, n=30)
    evaluate.main([str(run_dir), "--n", "20", "--best-of", "2"])
    assert "best of 2" in capsys.readouterr().err


def test_weights_that_were_chosen_say_so(run_dir, tmp_path, capsys):
    chosen = {"metric": "FD-pixels@64", "best_of": 7}
    save_net(tmp_path / "best.safetensors", tiny_net(), method="dmd", sampler=one_step(80).to_dict(), chosen_by=chosen)
    evaluate.main([str(tmp_path / "best.safetensors"), "--data", "digits", "--n", "30"])
    out, err = capsys.readouterr()
    assert json.loads(out)["student"]["weights_chosen_by"] == chosen
    assert "best of 7 by FD-pixels@64" in err


@pytest.mark.parametrize(("batch", "kimg", "every"), [(10, 1, 0.1), (7, 1, 0.1), (50, 1, 0.3), (100, 1, 0.05), (64, 0.1, 1)])
def test_evaluations_are_counted(batch, kimg, every):
    total, asked = max(1, round(kimg * 1000 / batch)), 0
    for step in range(1, total + 1):
        run = SimpleNamespace(images_seen=step * batch, step=step, total=total, cfg=SimpleNamespace(batch=batch))
        asked += Run.due(run, every)
        assert Run.times(run, every) == asked


def test_every_number_says_where_it_comes_from(run_dir, capsys):
    student = evaluated(capsys, run_dir)["student"]
    assert student["tools"].keys() >= {"python", "torch", "torchmetrics", "numpy"}
    assert student["weights_sha256"] == weights_hash(load_net(run_dir / "student.safetensors")[0])
    for key in ("n", "seeds", "labels", "reference_sha256", "features_sha256", "floor"):
        assert key in student


def test_the_teacher_s_number_stands_beside_the_student_s(run_dir, tmp_path, capsys):
    """From summary.json where only the student is measured, if it was measured in the same way."""
    both = evaluated(capsys, run_dir)
    for name in ("student.safetensors", "config.yaml"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    (tmp_path / "summary.json").write_text(json.dumps({"teacher": both["teacher"]}))
    evaluate.main([str(tmp_path)])
    out, err = capsys.readouterr()
    assert json.loads(out)["teacher_of_summary"]["fd"] == both["teacher"]["fd"]
    assert f"teacher (summary.json): FD-pixels {both['teacher']['fd']:.4g}" in err
    assert "teacher_of_summary" not in evaluated(capsys, tmp_path, "--n", "63")


# FID's network


class Fake(torch.nn.Module):
    """What NVIDIA's module looks like from outside."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = images.float().mean(dim=[2, 3])
        return x[:, :1].expand(-1, self.width) if return_features else x


def fake_inception(path, width=2048):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Fake(width)).save(path)
    return path


def test_fid_is_only_called_fid_with_its_own_weights(tmp_path, monkeypatch):
    path, images = fake_inception(tmp_path / "inception.pt"), random_images(3, (1, 8, 8))
    found = features_by_name(f"inception:{path}")
    found.measure(images)
    assert (found.title, found.num_features) == ("FD-inception (not FID's Inception: another sha256)", 2048)
    assert torch.equal(found(images)[:, 7], images.double().mean((1, 2, 3)).float().double())
    monkeypatch.setattr(networks, "INCEPTION_SHA256", download.digest(path))
    renamed = tmp_path / "renamed.pt"
    renamed.write_bytes(path.read_bytes())
    for name in (f"inception:{path}", str(path), str(renamed)):  # by its sha256, whatever it is called
        found = features_by_name(name)
        found.measure(images)
        assert (found.title, found.edm2, found.num_features) == ("FID", "fid", 2048)
    assert [one.title for one in features_by_names(f"inception:{path},X:{path}")] == ["FID", "FD-X"]
    small = features_by_name(f"inception:{fake_inception(tmp_path / 'small.pt', 5)}")
    with pytest.raises(UserError, match=r"has 2048 features, FD-small .* has 5"):
        small.measure(images)


class Classifier(torch.nn.Module):
    """Gives what `kind` says for images of 0 … 255, whose mean levels are its features."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float().mean(dim=[2, 3])
        x = torch.cat([x, x.square() / 255], 1)
        if self.kind == "softmax":
            return x.softmax(1)
        if self.kind == "log_softmax":
            return x.log_softmax(1)
        if self.kind == "half":
            return (x / 100).softmax(1).half()
        if self.kind == "constant":
            return 0 * x
        if self.kind == "infinite":
            return (1000 * x).exp()
        if self.kind == "one":
            return x[:1]
        if self.kind == "raises":
            raise ValueError("wants 299 pixels")
        return x


class Flagged(Classifier):
    """NVIDIA's call signature: probabilities, unless asked for features."""

    def forward(self, images: torch.Tensor, return_features: bool = False, use_fp16: bool = False) -> torch.Tensor:
        x = images.float().mean(dim=[2, 3])
        return x if return_features else x.softmax(1)


class Several(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.float().mean(dim=[2, 3]), images.float()


class Named(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": images.float().mean(dim=[2, 3])}


class Mute(torch.nn.Module):
    @torch.jit.export
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images


def scripted(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(path)
    return path


def test_a_file_with_nvidias_call_signature_is_asked_for_its_features(tmp_path):
    """Given as a plain path: the features, and no name but the file's."""
    found, images = features_by_name(str(scripted(Flagged(""), tmp_path / "vgg16.pt"))), random_images(3, (3, 8, 8))
    found.measure(images)
    assert (found.title, found.edm2, found.num_features) == ("FD-vgg16", None, 3)
    assert torch.equal(found(images), images.float().mean((2, 3)).double())


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Classifier("softmax"), "gives probabilities of 6 classes, which sum to 1, wanted features"),
        (Classifier("log_softmax"), "gives probabilities of 6 classes"),
        (Classifier("half"), "gives probabilities of 6 classes"),
        (Classifier("constant"), "do not tell two images apart"),
        (Classifier("one"), "do not tell two images apart"),
        (Classifier("infinite"), "not finite: wanted a net that takes uint8 images, 0 … 255"),
        (Classifier("raises"), "does not take images [3, 8, 8]: builtins.ValueError: wants 299 pixels"),
        (Several(), "gives a tuple, wanted one tensor [N, D]"),
        (Named(), "gives a dict, wanted one tensor [N, D]"),
    ],
)
def test_what_is_plainly_no_features_is_refused(tmp_path, net, message):
    found = features_by_name(str(scripted(net, tmp_path / "net.pt")))
    with pytest.raises(UserError, match=re.escape(message)):
        found.measure(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_logits_are_features_like_any_other(tmp_path):
    found = features_by_name(str(scripted(Classifier("logits"), tmp_path / "net.pt")))
    found.measure(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert (found.title, found.num_features) == ("FD-net", 6)


def test_files_of_another_kind_are_told_which_name_to_go_by(tmp_path):
    with pytest.raises(UserError, match=r"no flag return_features in its forward.*by its path alone"):
        features_by_name(f"inception:{scripted(Classifier('logits'), tmp_path / 'mine.pt')}")
    with pytest.raises(UserError, match="TorchScript without a forward"):
        features_by_name(str(scripted(Mute(), tmp_path / "mute.pt")))
    (tmp_path / "inception.pkl").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match="is a pickle, which would have to be executed: wanted the same network as TorchScript"):
        features_by_name(f"inception:{tmp_path}/inception.pkl")
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"known network, inception:FILE, dinov2:FILE, clip:FILE; it is a file of torch\.save"):
        features_by_name(f"{tmp_path}/weights.pth")


def test_features_are_looked_at_before_the_training(tmp_path):
    path = scripted(Classifier("softmax"), tmp_path / "net.pt")
    with pytest.raises(UserError, match="gives probabilities of 6 classes"):
        Job(load(ROOT / "configs/digits.yaml", [f"eval.features={path}", f"run_dir={tmp_path}/run", "device=cpu"]))
    with pytest.raises(UserError, match="gives probabilities of 6 classes"):
        evaluate.main(["--data", "digits", "--features", str(path), "--save-reference", f"{tmp_path}/ref.npz"])
    assert not (tmp_path / "ref.npz").exists()


def test_a_kernel_distance_is_called_kid_with_inception_alone():
    one = {"features": "FD-pixels", "fd": 1.0, "kid": 0.5, "nfe": 1, "n": 10}
    assert "kernel distance 0.5" in evaluate.sentence("student", one)
    assert "KID 0.5" in evaluate.sentence("student", one | {"features": "FID"})


@pytest.mark.parametrize("title", ["FD-pixels", "FD-fid", "FD-inception (not FID's Inception: another sha256)", "CLIP-FID", "FID"])
def test_a_model_card_says_of_all_but_fid_that_it_is_none(title):
    told = _quality(SimpleNamespace(summary={"student": {"fd": 1.0, "features": title, "n": 10}}))
    assert (f"{title} is no FID" in told) == (title != "FID")


def test_offline_fid_says_the_line_that_gets_it(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    monkeypatch.setenv("POTSTILL_HTTP", "1")
    monkeypatch.setattr(download, "PAUSE", 0)
    url = "http://127.0.0.1:9/metrics/inception-2015-12-05.pt"
    monkeypatch.setattr(networks, "INCEPTION_URL", url)
    place = tmp_path / "127.0.0.1_9@http" / "metrics" / "inception-2015-12-05.pt"
    with pytest.raises(UserError, match=re.escape(f"curl -L --create-dirs -o {place} {url}")):
        features_by_name("inception", command="potstill evaluate X")
    fake_inception(place)
    with pytest.raises(UserError, match=r"has the sha256 .* wanted f58cb9b6"):
        features_by_name("inception")
    monkeypatch.setattr(networks, "INCEPTION_SHA256", download.digest(place))
    assert features_by_name("inception").title == "FID"


def test_a_state_dict_is_read_without_unpickling_it(tmp_path):
    torch.save({"a": Evil(tmp_path / "executed")}, tmp_path / "evil.pth")
    for broken in ("evil.pth", "list.pth", "text.pth"):
        if broken == "list.pth":
            torch.save([1], tmp_path / broken)
        if broken == "text.pth":
            (tmp_path / broken).write_text("hello")
        with pytest.raises(UserError, match="no plain state dict"):
            networks.read_state_dict(tmp_path / broken)
    assert not (tmp_path / "executed").exists()
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pth")
    assert networks.read_state_dict(tmp_path / "good.pth")["a"].tolist() == [1, 1]


@pytest.mark.parametrize("module", ["torch_fidelity", "timm"])
def test_libraries_that_are_not_there_are_named(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    torch.save({}, tmp_path / "x.pth")
    name = f"inception:{tmp_path}/x.pth" if module == "torch_fidelity" else f"clip:{tmp_path}/x.pth"
    with pytest.raises(UserError, match="pip install 'potstill"):
        features_by_name(name)


def test_all_known_networks_are_described():
    assert all(kind in features_module.__doc__ for kind in features_module.KINDS)


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "wanted a run folder or a weight file to evaluate"),
        (["RUN", "--features", "inception:nowhere.pt"], "no file nowhere.pt"),
        (["RUN", "--features", "dinov2"], "no features 'dinov2'"),
        (["RUN", "--labels", "3,10"], "among 0 … 9"),
        (["RUN", "--labels", "cats"], "among 0 … 9"),
        (["RUN", "--metrics", "fid"], "--metrics wants some of fd,kid,pr, got 'fid'"),
        (["RUN", "--metrics", "fd,kid", "--reference", "REF"], "a reference file holds none"),
        (["RUN", "--reference", "nowhere.npz"], "no reference at nowhere.npz"),
        (["RUN", "--reference", "REF"], "is of 4 features, FD-pixels has 64"),
        (["RUN", "--reference", "REF", "--save-reference", "x.npz"], "leave --reference out"),
        (["RUN", "--save-reference", "x.txt"], "ending in .npz"),
        (["RUN", "--save-reference", "REF/x.npz"], "cannot write"),
        (["RUN", "--save-reference", "FOLDER.npz"], "is a folder"),
        (["RUN", "--best-of", "0"], "at least 1 evaluation"),
        (["RUN", "--seed", str(2**63 - 10), "--n", "20"], "beyond the last seed"),
        (["RUN", "--S_max", "5"], "add --S_churn"),
        (["RUN", "--S_churn", "5", "--S_min", "9", "--S_max", "3"], "S_min <= S_max"),
        (["RUN", "--which", "student", "--preset", "cifar10"], "presets, churn and guidance are for teachers"),
        (["RUN", "--which", "student", "--guidance", "2"], "presets, churn and guidance are for teachers"),
        (["RUN", "--which", "teacher", "--guide", "RUN/teacher.safetensors"], "wants --guidance, how strongly"),
        (["RUN", "--which", "teacher", "--guidance", "-1"], "--guidance wants a number above 0"),
    ],
)
def test_evaluate_says_what_is_wrong(run_dir, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "ref.npz", **GOOD)
    (tmp_path / "folder.npz").mkdir()
    places = {"RUN": str(run_dir), "REF": "ref.npz", "FOLDER": "folder"}
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate.main([re.sub("RUN|REF|FOLDER", lambda m: places[m[0]], a) for a in arguments])
    assert sorted(os.listdir(tmp_path)) == ["folder.npz", "ref.npz"]


def test_a_preset_is_the_teacher_s(run_dir, capsys):
    found = evaluated(capsys, run_dir, "--preset", "imagenet64", "--steps", "1", "--n", "10")
    assert (found["student"]["nfe"], found["teacher"]["nfe"]) == (1, 1)
    assert found["teacher"]["churn"] == [40, 0.05, 50, 1.003] and "churn" not in found["student"]
