"""What the evidence rests on: pictures as they are in the data, recipes that run, distances of a judge, models of scaling."""

import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benches.scripts import scaling, time_to_quality
from potstill.engine import compare
from potstill.engine.common.errors import UserError
from potstill.engine.config.tree import load
from potstill.engine.data.images import open_images
from potstill.engine.diffusion.sampling import one_step
from potstill.engine.formats.pictures import LINE, grid, save_png, sheet, stacked
from potstill.engine.jobs.job import Job
from potstill.engine.jobs.preflight import check_complete
from potstill.engine.measure.distances import moments, squared_distance
from potstill.engine.measure.features import Pixels
from potstill.engine.measure.networks import features_by_names
from potstill.engine.measure.score import Judge
from potstill.engine.models.generate import generate
from potstill.engine.models.weights import save_net
from potstill.engine.nets.edm import from_kwargs

ROOT = Path(__file__).parent.parent

TINY = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
CLASSES = 4  # of 24 images; MSD's two students share them


def picture(i: int, side: int) -> np.ndarray:
    """An image [side, side, 3] that differs in every channel, row and column, and tells its number: nothing maps to itself."""
    y, x = np.mgrid[:side, :side]
    return np.stack([(y * 5 + i) % 256, (x * 7 + 3 * i) % 256, (x + 2 * y + 90) % 256], 2).astype(np.uint8)


def write_zip(path: Path, side: int, n: int = 24) -> Path:
    """An EDM zip whose classes run against the order of its files."""
    import io

    labels = [[f"00000/img{i:08d}.png", (n - 1 - i) % CLASSES] for i in range(n)]
    with zipfile.ZipFile(path, "w") as archive:
        for i, (name, _) in enumerate(labels):
            buffer = io.BytesIO()
            Image.fromarray(picture(i, side)).save(buffer, "png")
            archive.writestr(name, buffer.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": labels[::-1]}))
    return path


def traced(net: torch.nn.Module, example: torch.Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.export has no such files, and users have them
        torch.jit.trace(net, example).save(str(path))


# pictures


def test_pictures_are_right_side_up_in_their_colours_and_under_their_labels(tmp_path):
    """Data -> the real images of a sheet -> PNG -> pixels: those of the source files, classes in columns."""
    path, side = write_zip(tmp_path / "some.zip", 32), 32
    save_net(
        tmp_path / "teacher.safetensors",
        from_kwargs("EDMPrecond", img_resolution=side, img_channels=3, label_dim=CLASSES, **TINY),
        kimg=0.0,
        seconds=0.0,
    )
    settings = [f"data.path={path}", f"teacher.checkpoint={tmp_path}/teacher.safetensors", f"run_dir={tmp_path}/r"]
    job = Job(load(ROOT / "configs/fast32.yaml", settings), on_paper=True)
    images = job.images
    shown = [int(i) for i in job.gallery.real_places()]
    save_png(grid(torch.from_numpy(np.stack([images.read(i) for i in shown])), CLASSES, scale=1), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as opened:
        pixels = np.asarray(opened.convert("RGB"))
    for place, i in enumerate(shown):
        top, left = (side + LINE) * (place // CLASSES), (side + LINE) * (place % CLASSES)
        np.testing.assert_array_equal(pixels[top : top + side, left : left + side], picture(i, side))
        assert (24 - 1 - i) % CLASSES == place % CLASSES == images.labels[i]


def test_what_the_nets_see_is_the_picture_too(tmp_path):
    """A batch of the training stream, without mirroring, is the source file scaled to [-1, 1], with its one-hot label."""
    settings = [f"data.path={write_zip(tmp_path / 'some.zip', 32)}", "data.flips=false", f"run_dir={tmp_path}/r"]
    cfg = load(ROOT / "configs/fast32.yaml", settings)
    job = Job(cfg, on_paper=True)
    cfg.train.batch = 24
    batch, labels = job.stream(cfg.train, job.share()).at(0)
    seen = {}
    for image, label in zip(((batch + 1) * 127.5).round().byte(), labels, strict=True):
        i = int(image[0, 0, 0])  # (5·0 + i) % 256
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), picture(i, 32))
        seen[i] = int(label.argmax())
    assert seen == {i: (23 - i) % CLASSES for i in range(24)}


def test_stacked_sheets_lie_one_under_the_other():
    a, b = (sheet({"x": np.full((1, 3, 48, 48), v, np.uint8)}, 1) for v in (10, 200))
    both = np.asarray(stacked([a, b]))
    assert both.shape[0] == a.height + b.height
    np.testing.assert_array_equal(both[: a.height, : a.width], np.asarray(a))
    np.testing.assert_array_equal(both[a.height :, : b.width], np.asarray(b))


# recipes

FEW = ["teacher.loss.sampling_steps=2", "teacher.train.kimg=0.008", "teacher.train.batch=4", "train.batch=4", "eval.n=12", "eval.batch=12",
       "log.tensorboard=false", "precision=fp32", "net.model_channels=8", "net.channel_mult=[1,1]", "train.grid_kimg=1",
       "teacher.train.grid_kimg=1"]  # fmt: skip


def test_every_method_of_the_fast_recipe_runs_on_a_zip(tmp_path, capsys):
    """Sized for a CPU and smaller still: two iterations each, one table, features from a TorchScript file."""
    path, methods = write_zip(tmp_path / "some.zip", 32), ["dmd", "gdd_i", "moment_matching", "msd", "sfd", "sim"]
    for name in methods:  # the lengths, as if they had been timed
        (tmp_path / "c" / name).mkdir(parents=True)
        (tmp_path / "c" / name / "kimg.json").write_text(json.dumps({"kimg": 0.008, "seconds": 1.0}))

    class Moment(torch.nn.Module):
        def __init__(self, power: int):
            super().__init__()
            self.power = power

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x / 255.0).pow(self.power).mean(dim=[2, 3])

    for power in (1, 2):
        traced(Moment(power), torch.zeros(2, 3, 32, 32, dtype=torch.uint8), tmp_path / f"m{power}.pt")
    settings = [
        f"data.path={path}",
        "data=fast32_cpu",
        *("--features", f"Means:{tmp_path}/m1.pt,{tmp_path}/m2.pt"),
        *("--seconds", "1", "--points", "1", "--no-apart"),
    ]
    compare.main([str(ROOT / "configs/fast32.yaml"), *settings, f"run_dir={tmp_path}/c", *FEW])
    found = json.loads((tmp_path / "c/summary.json").read_text())
    assert list(found["methods"]) == methods
    for one in [found["floor"], found["teacher"], *found["methods"].values()]:
        assert list(one["scores"]) == ["FD-Means", "FD-m2"]
    assert {name: one["nfe"] for name, one in found["methods"].items()}["moment_matching"] == 4
    assert "FD-Means" in capsys.readouterr().out.splitlines()[-9]


@pytest.mark.parametrize("side", [32, 64])
def test_the_size_for_a_cpu_fits_and_the_error_without_data_names_the_zip(side):
    recipe = ROOT / f"configs/fast{side}.yaml"
    full, small = load(recipe, []), load(recipe, [f"data=fast{side}_cpu"])
    assert (full.net.model_channels, small.net.model_channels) == (64, 16)
    assert small.teacher.train.kimg < full.teacher.train.kimg / 10
    for cfg, low, high in ((full, 10e6, 20e6), (small, 1e6, 2e6)):
        from potstill.engine.jobs import build

        with torch.device("meta"):
            size = sum(p.numel() for p in build.build_net(cfg.net, side, 3, 10).parameters())
        assert low <= size <= high
    with pytest.raises(UserError, match=rf"images-{side}x{side}.zip.*data.path=FILE"):
        check_complete(full)


# the judge


def random_net():
    net = from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, label_dim=10, **TINY).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def test_a_judge_says_what_a_plain_distance_says_in_every_features():
    images, net, n = open_images("digits"), random_net(), 200

    class Halves(Pixels):
        title = "FD-halves"

        def forward(self, images):
            return super().forward(images[..., :4])

    judge = Judge(images, [Pixels(), Halves()], n=n, batch=64)
    labels = images.labels[np.arange(n) * len(images) // n]
    found = judge.scores(net, one_step(2.5))
    real = torch.from_numpy(np.stack([images.read(i) for i in range(len(images))]))
    for features in (Pixels(), Halves()):
        made = generate(net, one_step(2.5), labels, range(n), batch=n)
        wanted = squared_distance(moments([real], features).gaussian("real"), moments(made, features).gaussian("generated"))
        assert found[features.title] == pytest.approx(wanted, rel=1e-5)
    assert found["FD-pixels"] != found["FD-halves"]
    assert all(0 < judge.floors[title] < found[title] for title in found)


def test_thinned_images_are_evenly_taken():
    images = open_images("digits")
    few = images.thinned(10)
    assert len(few) == 10
    assert few.index.tolist() == [i * 1797 // 10 for i in range(10)]
    np.testing.assert_array_equal(few.read(3), images.read(539))
    assert few.labels[3] == images.labels[539]
    assert len(images.thinned(10**6)) == 1797


def test_a_distance_is_named_after_its_features_and_never_fid(tmp_path):
    traced(torch.nn.Flatten(), torch.zeros(2, 3, 8, 8), tmp_path / "net.pt")
    assert [f.title for f in features_by_names(f"FID:{tmp_path}/net.pt,{tmp_path}/net.pt,pixels")] == ["FD-FID", "FD-net", "FD-pixels"]


# time to quality


def test_time_to_quality_is_the_first_moment_at_or_below_the_bar():
    curve = [
        {"images": i, "seconds": s, "scores": {"FD-A": fd}}
        for i, s, fd in ((0, 0.0, 2.0), (8, 1.0, 9.0), (16, 2.0, 3.0), (24, 3.5, 2.4), (32, 5.0, 2.2))
    ]
    found = {"curve": curve, "images_per_second": 8.0, "peak_memory_gib": None}
    row = time_to_quality.row_of("s", "sim", found, "FD-A", bar=2.5)
    assert (row["seconds"], row["images"], row["best"], row["start"]) == (3.5, 24, 2.2, 2.0)
    never = time_to_quality.row_of("s", "sim", found, "FD-A", bar=1.0)
    assert (never["seconds"], never["best"], never["trained"]) == (None, 2.2, 5.0)


def test_a_switch_that_this_version_lacks_is_said_to_be_unavailable():
    recipe = ROOT / "configs/fast32.yaml"
    lacking = time_to_quality.Switch("x", ["train.no_such_switch=off"])
    assert "no_such_switch" in time_to_quality.unavailable(recipe, lacking, [], "sim")
    freeze = time_to_quality.switch_from("frozen=method.freeze=1;ENV:A=b")
    assert (freeze.settings, freeze.environment) == (["method.freeze=1"], {"A": "b"})
    assert time_to_quality.unavailable(recipe, freeze, [], "gdd_i") is None
    assert time_to_quality.unavailable(recipe, freeze, [], "sfd") is not None


# scaling


def test_a_ring_takes_what_a_hand_computes():
    """1 GB over 8 GPUs at 0.8 · 100 GB/s: each link carries 2 · 7/8 GB; over 16 at 0.8 · 10 GB/s it carries 2 · 15/16 GB."""
    cluster = scaling.Cluster(node=8, inside=100e9, between=10e9, efficiency=0.8, latency=0.0)
    assert scaling.all_reduce(1e9, 8, cluster) == pytest.approx(0.021875)
    assert scaling.all_reduce(1e9, 16, cluster) == pytest.approx(0.234375)
    assert scaling.communication(250e6, 8, cluster, "ddp") == pytest.approx(0.021875)  # 250 M gradients of four bytes
    # two gathers of 0.5 GB of bfloat16 weights and a scatter of 1 GB: 7/8 · 2 GB
    assert scaling.communication(250e6, 8, cluster, "fsdp") == pytest.approx(0.021875)
    assert scaling.communication(250e6, 8, cluster, "fsdp, weights kept") == pytest.approx(0.01640625)
    slow = scaling.Cluster(inside=1e30, between=1e30, latency=1e-3)
    assert scaling.all_reduce(1.0, 5, slow) == pytest.approx(8e-3)  # 2 · 4 hops


def test_hours_are_iterations_times_the_longer_of_the_two():
    """3.6 M images in batches of 100 are 36,000 iterations."""
    measured = {10: 0.1, 50: 0.3, 100: 0.5}
    fast = scaling.Cluster(inside=1e30, between=1e30, latency=0.0)
    assert scaling.compute(30, measured) == pytest.approx(0.2)
    assert scaling.compute(5, measured) == pytest.approx(0.1)
    assert scaling.compute(200, measured) == pytest.approx(1.0)
    assert scaling.hours(3.6e6, 100, 1, measured, 1e9, fast) == pytest.approx(5.0)
    assert scaling.hours(3.6e6, 100, 2, measured, 1e9, fast) == pytest.approx(3.0)
    # 2 GPUs at 1 GB/s: 1 GB of gradients takes 1 s, of which 0.8 · 2/3 · 0.3 s = 0.16 s hide
    slow = scaling.Cluster(inside=1e9, between=1e9, efficiency=1.0, latency=0.0)
    assert scaling.hours(3.6e6, 100, 2, measured, 250e6, slow) == pytest.approx(10 * (0.3 + 1 - 0.16))


def test_projections_are_marked_and_keep_their_assumptions(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "JOBS", [("small", "fast32", 1.0)])
    scaling.main(["project", f"{tmp_path}/scaling.json", "--assume-tflops", "100"])
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert found["projection"] is True
    assert found["assumptions"]["overlap"] == scaling.OVERLAP
    job = found["projections"][0]
    # DMD: 4.8 forwards of 5.0 GFLOP an image, at 100 TFLOP/s, for a million images
    assert job["hours"][0] == pytest.approx(1e6 * 4.8 * job["gflop"] * 1e9 / 100e12 / 3600, rel=1e-3)
    assert 4.5 < job["gflop"] < 5.5
    assert {line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()} == {"projected, assumed 100 TFLOP/s a GPU"}
