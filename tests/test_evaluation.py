"""Distances against closed forms and scipy, images against their seeds, and what the commands and pages say."""

import base64
import hashlib
import io
import itertools
import json
import math
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image, ImageFont
from sklearn.datasets import load_digits

from potstill.engine import evaluate
from potstill.engine.common.errors import UserError
from potstill.engine.data.images import open_images
from potstill.engine.diffusion.sampling import Sampler, ode, one_step
from potstill.engine.formats.pictures import _wrapped, captioned, grid, save_png, sheet
from potstill.engine.measure.chart import chart, read_curves, short
from potstill.engine.measure.distances import moments, squared_distance
from potstill.engine.measure.features import Features, Pixels
from potstill.engine.measure.networks import features_by_name
from potstill.engine.measure.report import write_report
from potstill.engine.measure.score import labels_for, reference, score
from potstill.engine.models.generate import generate, one_hot, to_uint8
from potstill.engine.models.weights import save_net
from potstill.engine.nets.edm import from_kwargs

ROOT = Path(__file__).parent.parent
TINY = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 10,
    "model_type": "SongUNet",
    "model_channels": 16,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
}


def tiny_net(**changes):
    """EDM starts with many weights at almost 0; here all count, so that every input shows in the output."""
    net = from_kwargs("EDMPrecond", **TINY | changes).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


@pytest.fixture(scope="module")
def digits():
    return open_images("digits")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run, as far as evaluation looks at it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "digits"
    folder.mkdir()
    save_net(folder / "teacher.safetensors", tiny_net(), method="teacher", sampler=ode("heun", 2).to_dict())
    save_net(folder / "student.safetensors", tiny_net(), method="dmd", sampler=one_step(80).to_dict())
    (folder / "config.yaml").write_text("data: {path: digits, resolution: 8}\neval: {n: 64, batch: 100, features: pixels}\n")
    return folder


def random_images(n, shape, seed=0):
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def by_scipy(a, b):
    """The formula in numpy, on features [N, D]."""
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)  # for constant pixels c and d are singular
        return mean + np.trace(c) + np.trace(d) - 2 * np.trace(scipy.linalg.sqrtm(c @ d).real)


# The distance


def frechet(real, fake, features):
    """Between two streams of images, put together as a score does it."""
    return squared_distance(moments(real, features).gaussian("real"), moments(fake, features).gaussian("generated"))


def test_two_gaussians_in_closed_form():
    """All sign patterns m ± s: means m and covariance diag(s²)·n/(n-1) exactly, so d² = |m - m'|² + n/(n-1)·|s - s'|²."""

    def patterns(m, s):
        signs = torch.tensor(list(itertools.product((-1, 1), repeat=4)))
        return (torch.tensor(m) + signs * torch.tensor(s)).to(torch.uint8).reshape(16, 1, 2, 2)

    m, s, m_2, s_2 = (100, 120, 90, 130), (10, 20, 5, 40), (90, 125, 100, 128), (30, 10, 5, 1)
    means = sum((a - b) ** 2 for a, b in zip(m, m_2, strict=True))
    spreads = sum((a - b) ** 2 for a, b in zip(s, s_2, strict=True))
    wanted = (means + 16 / 15 * spreads) / 127.5**2
    assert frechet([patterns(m, s)], [patterns(m_2, s_2)], Pixels()) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("n", [40, 400])  # fewer and more than the 48 features: the first covariance is singular
def test_correlated_features_against_scipy(n):
    a, b = random_images(n, (3, 4, 4)), random_images(300, (3, 4, 4), 1)
    a[:, 1], b[:, 2] = a[:, 0] // 2, b[:, 2] // 3
    found = frechet(a.split(64), b.split(64), Pixels())
    flat = [x.flatten(1).numpy() / 127.5 - 1 for x in (a, b)]
    assert found == pytest.approx(by_scipy(*flat), rel=1e-4)


def test_pixels_of_large_images_are_means_of_blocks():
    """Up to 16x16 as they are, 64x64 as means over 4x4."""
    small, large = (torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8) for side in (16, 64))
    assert torch.equal(Pixels()(small), small.flatten(1).double() / 127.5 - 1)
    means = large.double().reshape(3, 3, 16, 4, 16, 4).mean((3, 5))
    torch.testing.assert_close(Pixels()(large), means.flatten(1) / 127.5 - 1, rtol=1e-12, atol=0)
    pixels = Pixels()
    pixels.measure(large)
    assert pixels.num_features == 768


def test_streaming_equals_one_batch():
    a, b = random_images(100, (1, 4, 4), 0), random_images(100, (1, 4, 4), 1)
    assert frechet(a.split(7), b.split(13), Pixels()) == pytest.approx(frechet([a], [b], Pixels()), rel=1e-12)


def test_pixels_are_not_accumulated_in_float32():
    """Nearly constant images: float32 sums of squares would lose a spread of one level among 250."""
    a, b = torch.full((4000, 1, 1, 2), 250, dtype=torch.uint8), torch.full((4000, 1, 1, 2), 250, dtype=torch.uint8)
    a[::2, ..., 0] += 1
    b[::2, ..., 0] += 3
    wanted = (1.0 / 127.5) ** 2 + 4000 / 3999 * ((1.5 - 0.5) / 127.5) ** 2  # means 250.5 and 251.5, spreads 0.5 and 1.5
    assert frechet(a.split(100), b.split(100), Pixels()) == pytest.approx(wanted, rel=1e-8)


def test_a_distance_wants_two_images():
    two = random_images(2, (1, 4, 4))
    with pytest.raises(UserError, match="at least 2 generated images, got 1"):
        frechet([two], [two[:1]], Pixels())
    with pytest.raises(UserError, match="at least 2 real images, got 1"):
        frechet([two[:1]], [two], Pixels())
    with pytest.raises(UserError, match="at least 2 real images, got 0"):
        frechet([], [two], Pixels())


# Features


class Means(torch.nn.Module):
    """Mean and mean of squares of each channel: a feature net that can be checked by hand."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float().flatten(2)
        return torch.cat([x.mean(2), x.square().mean(2)], 1)


class Wrong(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


def scripted(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(path)
    return path


def test_torchscript_features(tmp_path):
    path = scripted(Means(), tmp_path / "means.pt")
    features = features_by_name(str(path))
    images = random_images(5, (3, 6, 6))
    features.measure(images)
    assert (features.title, features.num_features) == ("FD-means", 6)
    assert features.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    torch.testing.assert_close(features(images), Means()(images).double(), rtol=0, atol=0)
    grey = images[:, :1]
    torch.testing.assert_close(features(grey), Means()(grey.repeat(1, 3, 1, 1)).double(), rtol=0, atol=0)


def test_features_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no features 'inceptoin'.*pixels"):
        features_by_name("inceptoin")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="no TorchScript file"):
        features_by_name(str(tmp_path / "text.pt"))
    images = random_images(4, (3, 6, 6))
    with pytest.raises(UserError, match=r"\[N, D\], got \[1, 3, 6, 6\]"):
        frechet([images], [images], features_by_name(str(scripted(Wrong(), tmp_path / "wrong.pt"))))
    latents, means = random_images(4, (4, 6, 6)), features_by_name(str(scripted(Means(), tmp_path / "means.pt")))
    with pytest.raises(UserError, match="grey or RGB images, got 4 channels"):
        frechet([latents], [latents], means)


def test_features_of_pictures_that_are_not_square_are_tried_on_their_shape(tmp_path):
    """A net that takes 8x16 alone is no worse for that, and one that takes squares alone says so before any picture is read."""
    pictures = open_images("scenes")
    wide, square = (
        scripted(Floats(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * width, 4))), tmp_path / f"{name}.pt")
        for name, width in {"wide": 16, "square": 8}.items()
    )
    assert reference(pictures, features_by_name(str(wide)), n=8, batch=4000).gaussian.mu.shape == (4,)
    with pytest.raises(UserError, match=re.escape("FD-square does not take images [1, 8, 16]")):
        reference(pictures, features_by_name(str(square)), n=8, batch=4000)


class Floats(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images.float())


def test_a_checkpoint_is_not_run(tmp_path):
    """torch.save writes a pickle; a feature file must not be one."""
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pickle.pt")
    with pytest.raises(UserError, match="no TorchScript file"):
        features_by_name(str(tmp_path / "pickle.pt"))


# Images from seeds


def test_rounding_is_edm_s():
    x = torch.tensor([-1.5, -1.0, -0.999, 0.0, 0.00391, 0.00393, 0.996, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 128, 128, 254, 255, 255]
    levels = torch.arange(256) / 127.5 - 1  # how the data come in: every level returns to itself
    assert to_uint8(levels).tolist() == list(range(256))


@pytest.mark.parametrize("sampler", [one_step(80), ode("heun", 3), Sampler("ancestral", [80.0, 2.0, 0.5])])
def test_the_batch_size_changes_no_image(sampler):
    """Up to one level: with another batch size oneDNN blocks its sums otherwise, in the last bits of float32."""
    net, labels, seeds = tiny_net(), np.arange(23) % 10, range(100, 123)
    images = torch.cat(list(generate(net, sampler, labels, seeds, batch=23))).int()
    assert images.float().std() > 10
    for batch in (1, 7, 16):
        pieces = list(generate(net, sampler, labels, seeds, batch=batch))
        assert [len(p) for p in pieces] == [batch] * (23 // batch) + [23 % batch] * (23 % batch > 0)
        assert (torch.cat(pieces).int() - images).abs().max() <= 1
    backwards = torch.cat(list(generate(net, sampler, labels[::-1].copy(), seeds[::-1], batch=23))).int()
    assert (backwards.flip(0) - images).abs().max() <= 1


def test_an_image_is_its_seed_and_its_label():
    net = tiny_net()
    a, b, c, d = next(generate(net, one_step(80), np.array([3, 3, 4, 3]), [7, 8, 7, 7]))
    assert torch.equal(a, d)
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)
    z = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(7))  # the definition, by hand
    by_hand = net(80 * z[None], torch.tensor(80.0), one_hot(np.array([3]), 10)).detach()
    assert (to_uint8(by_hand)[0].int() - a.int()).abs().max() <= 1


def test_broken_nets_are_not_scored():
    net = tiny_net()
    with pytest.raises(ValueError, match=r"net\.eval"):
        next(generate(net.train(), one_step(80), None, range(2)))
    next(net.eval().parameters()).data.fill_(math.nan)
    with pytest.raises(UserError, match="seed 5 is not finite"):
        next(generate(net, one_step(80), None, range(5, 7)))


# Scores


class Replay:
    """A sampler that returns given images [N, C, H, W] in [-1, 1] in their order, and remembers the labels."""

    solver, nfe = "replay", 1

    def __init__(self, images):
        self.images, self.at, self.labels = images, 0, []

    def __call__(self, net, labels, noise):
        n = len(noise.generators)
        self.at += n
        self.labels.append(labels)
        return self.images[self.at - n : self.at]


def test_the_digits_reference(digits):
    """All 1,797 images against themselves: 0, with the data's labels; paler ones: what numpy and scipy say."""
    assert len(digits) == 1797
    pixels = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    replay = Replay(pixels)
    found = score(tiny_net(), replay, digits, Pixels(), n=1797)
    assert abs(found["fd"]) < 2e-3  # sixteenths are rounded to 255ths
    assert torch.cat(replay.labels).argmax(1).tolist() == load_digits().target.tolist()
    assert (found["features"], found["num_features"], found["seeds"]) == ("FD-pixels", 64, "0-1796")
    assert (found["labels"], found["data"], found["reference_images"]) == ("data", "digits", 1797)
    assert found["floor_kind"] == "1797 real images drawn with replacement against all 1797"
    assert 0.03 < found["floor"] < 0.2
    pale = (0.8 * pixels + 0.125).double()
    levels = np.floor(pale.numpy() * 127.5 + 128).reshape(1797, 64)
    real = np.round(load_digits().data / 16 * 255)
    found = score(tiny_net(), Replay(pale), digits, Pixels(), n=1797)
    assert found["fd"] == pytest.approx(by_scipy(real / 127.5 - 1, levels / 127.5 - 1), rel=1e-4)


def test_the_floor_is_of_disjoint_draws_where_the_data_allow_it(digits):
    found = reference(digits, Pixels(), n=800)
    assert found.floor_kind == "two disjoint draws of 800 real images"
    again, other = reference(digits, Pixels(), n=800), reference(digits, Pixels(), n=800, seed=1)
    assert found.floor == again.floor != other.floor
    order = np.random.default_rng(0).permutation(1797)
    real = np.stack([digits.read(i) for i in range(1797)]).reshape(1797, -1) / 127.5 - 1
    assert found.floor == pytest.approx(by_scipy(real[order[:800]], real[order[800:1600]]), rel=1e-4)


def test_a_score_is_of_its_seeds(digits):
    net, n = tiny_net(), 40
    labels = digits.labels[np.arange(n) * 1797 // n]
    made = generate(net, one_step(80), labels, range(5, 5 + n))
    wanted = frechet([torch.from_numpy(digits.pixels())], made, Pixels())
    assert score(net, one_step(80), digits, Pixels(), n=n, seed=5)["fd"] == pytest.approx(wanted, rel=1e-6)


def test_labels_have_the_data_s_proportions_whatever_n():
    """Data sorted by class, as folders are: half as many images must not mean half of the classes."""
    net, images = tiny_net(), open_images("digits")
    images.labels = np.sort(images.labels)
    shares = np.bincount(images.labels) / 1797
    for n in (100, 1797, 2500, 3594):
        labels, kind = labels_for(net, images.labels, n)
        assert (len(labels), kind) == (n, "data")
        assert abs(np.bincount(labels) / n - shares).max() <= 1 / n
    np.testing.assert_array_equal(labels_for(net, images.labels, 1797)[0], images.labels)


def test_labels_are_balanced_or_none(digits):
    unlabelled = open_images("digits", labelled=False)
    assert score(tiny_net(), one_step(80), unlabelled, Pixels(), n=64)["labels"] == "balanced"
    assert np.bincount(labels_for(tiny_net(), unlabelled.labels, 50)[0]).tolist() == [5] * 10
    assert score(tiny_net(label_dim=0), one_step(80), digits, Pixels(), n=64)["labels"] == "none"


def test_too_few_images_for_the_features_are_said(digits):
    assert "64 images give a singular covariance of 64 features" in score(tiny_net(), one_step(80), digits, Pixels(), n=64)["warning"]
    assert "warning" not in score(tiny_net(), one_step(80), digits, Pixels(), n=65)


def test_net_and_data_must_fit(digits):
    with pytest.raises(UserError, match="makes 1x16x16 images, digits has 1x8x8"):
        score(tiny_net(img_resolution=16), one_step(80), digits, Pixels(), n=10)
    with pytest.raises(UserError, match="makes 3x8x8 images"):
        score(tiny_net(img_channels=3), one_step(80), digits, Pixels(), n=10)
    with pytest.raises(UserError, match="knows 7 classes, digits has 10"):
        score(tiny_net(label_dim=7), one_step(80), digits, Pixels(), n=10)


# Pictures


def test_a_grid_shows_every_image_in_its_place():
    images = random_images(5, (3, 8, 8))
    picture = np.asarray(grid(images, 3))
    assert picture.shape == (48 + 2 + 48, 48 + 2 + 48 + 2 + 48, 3)
    for i in range(5):
        row, column = divmod(i, 3)
        cell = picture[50 * row : 50 * row + 48, 50 * column : 50 * column + 48]
        np.testing.assert_array_equal(cell[::6, ::6], images[i].permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(cell, cell[::6, ::6].repeat(6, 0).repeat(6, 1))
    np.testing.assert_array_equal(picture[48:, 100:], 255)
    np.testing.assert_array_equal(picture[:, 48:50], 255)
    assert grid(random_images(64, (1, 8, 8))).size == (8 * 50 - 2, 8 * 50 - 2)
    assert grid(random_images(4, (3, 64, 64))).size == (130, 130)
    single = grid(random_images(1, (1, 4, 4)), 10, scale=1)
    assert (single.mode, single.size) == ("L", (4, 4))


def test_a_sheet_has_a_caption_over_every_grid(tmp_path):
    rows = {"real": random_images(4, (1, 8, 8)), "a rather long caption": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}
    picture = sheet(rows, 2)
    save_png(picture, tmp_path / "sheet.png")
    assert not list(tmp_path.glob("*.part"))
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    np.testing.assert_array_equal(pixels[26:124, 12:110], np.asarray(grid(rows["real"], 2).convert("RGB")))
    np.testing.assert_array_equal(pixels[26:74, 122:170], 0)
    assert (pixels[:26, 12:110].min(), pixels[:26, 122:].min()) == (0, 0)  # letters
    np.testing.assert_array_equal(pixels[:, -12:], 255)  # and they end within the sheet


def test_pictures_stand_over_their_captions():
    images = random_images(5, (3, 8, 16))
    long = "seven birds on a wire and more of them than there is room for in three lines of so narrow a picture as this one is"
    picture = np.asarray(captioned(images, ["", "a cat", long, "a\ttab,\x1b[31m red\nand a line", "x" * 99], 2))
    height, width, lines = 7 * 8, 7 * 16, 3 * 12  # of a picture in screen pixels, of its caption
    assert picture.shape == (3 * (height + lines) + 2 * 12, 2 * width + 12, 3)
    for i, image in enumerate(images):
        top, left = i // 2 * (height + lines + 12), i % 2 * (width + 12)
        np.testing.assert_array_equal(picture[top : top + height, left : left + width][::7, ::7], image.permute(1, 2, 0).numpy())
        inked = (picture[top + height : top + height + lines + 12, left : left + width] < 128).any((1, 2))
        assert inked.any() == (i > 0)
        if i == 1:
            assert not inked[14:].any()  # one line
    grey = np.asarray(captioned(random_images(1, (1, 8, 8)), ["x"]))
    assert grey.shape == (14 * 8 + 12, 112, 3) and (grey[:112, :, 0] == grey[:112, :, 2]).all()


def test_captions_are_wrapped_at_words_and_cut_after_three_lines():
    font = ImageFont.load_default(10)
    text = "seven birds on a wire and more of them than there is room for in three lines of so narrow a picture"
    lines = _wrapped(text, font, 112)
    assert len(lines) == 3 and lines[-1].endswith(" …") and text.startswith(" ".join(lines).removesuffix(" …"))
    for some in [*(text[:n] for n in range(1, len(text))), "x" * 99, "a " + "x" * 25, "W" * 9 + " and " + "W" * 60]:
        assert len(wrapped := _wrapped(some, font, 112)) <= 3 and all(font.getlength(line) <= 112 for line in wrapped), wrapped
    assert len(_wrapped(10**6 * "x", font, 112)) == 3  # and in no time
    assert "".join(_wrapped("x" * 25, font, 112)) == "x" * 25
    assert _wrapped("a\ttab,\x1b[31m red\nand \u202ea line", font, 400) == ["a tab, [31m red and a line"]
    assert _wrapped("one two", font, font.getlength("one two")) == ["one two"]
    assert _wrapped("one two", font, font.getlength("one two") - 1) == ["one", "two"]
    assert _wrapped("", font, 112) == [""]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UserError, match=r"1 or 3 channels, got 4.*npz"):
        grid(random_images(1, (4, 8, 8)))
    with pytest.raises(ValueError, match=r"uint8 images .* got float32"):
        grid(np.zeros((1, 1, 8, 8), np.float32))


# The page


class Page(HTMLParser):
    """Opening tags with their attributes, and all text; fails on tags that are not closed in order."""

    VOID = ("meta", "img")

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def test_a_report_of_an_empty_run(tmp_path):
    page = Page(write_report(tmp_path).read_text())
    assert page.text.count("not there yet") == 4
    assert "has not been scored yet" in page.text
    assert torch.__version__ in page.text


def test_a_report_holds_all_there_is(tmp_path):
    folder = tmp_path / "a<b>&c"
    for name in ("", "samples", "teacher/samples"):
        (folder / name).mkdir(parents=True)
    summary = {
        "teacher": {"fd": 0.2104, "nfe": 35, "features": "FD-pixels"},
        "student": {"fd": 0.4208, "nfe": 1, "features": "FD-pixels"},
        "floor": {"fd": 0.085},
        "images_seen": 120_000,
        "seconds": {"teacher": 61.23, "distil": 130.0},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text("note: <script>alert('x')</script>\n")
    lines = [{"step": s, "kimg": s / 10, "seconds": s, "fake/denoise": 3 / s, "fd@64": 9 / s} for s in range(1, 20)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 20, "ki')
    (folder / "teacher/metrics.jsonl").write_text('{"step": 1, "kimg": 1, "teacher/den<oise": 2.0, "bad": NaN}\n')
    for i in range(20):
        save_png(Image.new("L", (8, 8), i), folder / f"samples/{i * 128}.png")
    save_png(Image.new("RGB", (9, 5), "red"), folder / "samples.png")
    html = write_report(folder).read_text()
    page = Page(html)
    assert "The student reaches FD-pixels 0.421 with 1 network evaluation per image, its teacher 0.21 with 35." in page.text
    for text in (
        "0.21",
        "0.085",
        "120k",
        "61.2 s",
        "2.17 min",
        "a<b>&c",
        "<script>alert('x')</script>",
        "teacher/den<oise",
    ):
        assert text in page.text
    assert (page.count("svg"), page.count("img"), page.count("script")) == (3, 1 + 8, 0)
    captions = re.findall(r"<figcaption>([\d.]+) kimg</figcaption>", html)
    assert (captions[0], captions[-1], captions) == ("0", "2.43", sorted(captions, key=float))
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|url\(|@import", html), "the page asks for something outside itself"
    first = next(attrs["src"] for tag, attrs in page.tags if tag == "img")
    assert Image.open(io.BytesIO(base64.b64decode(first.partition(",")[2]))).size == (9, 5)
    assert "teacher 0.21" in page.text  # the level in the chart of fd@64
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"student": 3, "teacher": {"fd": null}, "seconds": [], "versions": 1}',
        '{"student": {"fd": NaN, "nfe": 1}}',
    ],
)
def test_a_report_survives_a_strange_summary(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    Page(write_report(tmp_path).read_text())


def test_a_chart_draws_its_numbers():
    found = chart([(0, 1.0), (10, 3.0), (20, 2.0)], levels={"floor": 0.5})
    assert [x for x, _ in found.points] == pytest.approx([52, 200, 348])
    low, high = 0.5 - 0.15, 3 + 0.15
    assert [y for _, y in found.points] == pytest.approx([174 - 164 * (v - low) / (high - low) for v in (1, 3, 2)])
    assert found.levels == [(pytest.approx(174 - 164 * (0.5 - low) / (high - low)), "floor 0.5")]
    assert [text for _, text in found.x_ticks] == ["0", "5", "10", "15", "20"]
    assert [text for _, text in found.y_ticks] == ["1", "2", "3"]
    assert [y for y, _ in found.y_ticks] == pytest.approx([found.points[i][1] for i in (0, 2, 1)])
    found = chart([(0, 100.0), (1, 1.0), (2, 0.01)])
    assert found.points[0][1] - found.points[1][1] == pytest.approx(found.points[1][1] - found.points[2][1])  # logarithmic
    assert {"0.01", "1", "100"} <= {text for _, text in found.y_ticks}
    assert [text for _, text in chart([(0, 1.0), (1, 40.0)]).y_ticks] == ["1", "2", "5", "10", "20"]


@pytest.mark.parametrize("curve", [[(5.0, 0.0)], [(5.0, 3.0), (5.0, 3.0)], [(0.0, -1e-9), (1.0, 1e12)], [(0.0, 1e-30), (1.0, 1e30)]])
def test_a_chart_of_odd_numbers_stays_on_its_paper(curve):
    points = chart(curve).points
    assert all(0 <= x <= 360 and 0 <= y <= 200 for x, y in points)


def test_a_long_curve_is_averaged(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"kimg": {i}, "a": {i % 2}}}\n' for i in range(4801)))
    curve = read_curves(tmp_path / "metrics.jsonl")["a"]
    points = chart(curve).points
    assert len(curve) == 4801
    assert len(points) == 240
    middle = [y for _, y in points[:-1]]
    assert min(middle) > 92 - 6  # means of ones and zeros: half-way between 10 and 174
    assert max(middle) < 92 + 6


def test_short_numbers():
    assert [short(v) for v in (0, 0.08457, 12.345, 1797, 60_000, 1.2e6, -3.2)] == [
        "0",
        "0.0846",
        "12.3",
        "1797",
        "60k",
        "1.2M",
        "-3.2",
    ]


# The command


def test_evaluate_a_run(run_dir, capsys):
    evaluate.main([str(run_dir)])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert out.count("\n") == 1
    assert list(found) == ["student", "teacher", "floor"]
    assert (found["student"]["nfe"], found["teacher"]["nfe"]) == (1, 3)
    assert found["student"]["floor"] == found["teacher"]["floor"] == found["floor"]["fd"]
    assert found["student"]["n"] == 64  # config.yaml's
    assert found["student"]["fd"] > found["floor"]["fd"] > 0
    assert "teacher: FD-pixels" in err


def test_evaluate_a_file_on_data_that_are_named(run_dir, tmp_path, capsys):
    file = tmp_path / "net.safetensors"
    file.write_bytes((run_dir / "teacher.safetensors").read_bytes())
    with pytest.raises(UserError, match="wanted --data"):
        evaluate.main([str(file)])
    evaluate.main([str(file), "--data", "digits", "--n", "70", "--seed", "5", "--steps", "4", "--features", "pixels"])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["teacher", "floor"]
    assert (found["teacher"]["nfe"], found["teacher"]["seeds"]) == (7, "5-74")
    net, sampler = tiny_net(), ode("heun", 4)
    net.load_state_dict(evaluate.open_models(file)[0].net.state_dict())
    again = score(net, sampler, open_images("digits"), Pixels(), n=70, seed=5, batch=70)
    assert found["teacher"]["fd"] == pytest.approx(again["fd"], rel=1e-3)


def test_evaluate_with_torchscript_features(run_dir, tmp_path, capsys):
    path = scripted(Means(), tmp_path / "means.pt")
    evaluate.main([str(run_dir), "--features", str(path), "--which", "student", "--n", "20"])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["student", "floor"]
    assert (found["student"]["features"], found["student"]["num_features"]) == ("FD-means", 6)
    assert found["student"]["features_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no run folder or weight file at nowhere"),
        (["RUN", "--n", "1"], "at least 2 images, got --n 1"),
        (["RUN", "--n", "0"], "at least 2 images, got --n 0"),
        (["RUN", "--seed", "-1"], "seeds start at 0"),
        (["RUN", "--batch", "0"], "at least 1 image at a time"),
        (["RUN", "--steps", "4"], "was distilled for 1 step, got 4"),
        (["RUN", "--data", "nothing"], "nothing"),
        (["RUN", "--features", "nothing.pt"], "no features 'nothing.pt'"),
        (["RUN", "--device", "tpu"], "device wants"),
        (["RUN", "--device", "cuda:99"], "no device cuda:99"),
    ],
)
def test_evaluate_says_what_is_wrong(run_dir, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate.main([str(run_dir) if a == "RUN" else a for a in arguments])


def test_evaluate_as_a_command(run_dir, tmp_path):
    """stdout is one JSON object; an error is one line and exit code 2."""
    command = [sys.executable, "-m", "engine.evaluate"]
    done = subprocess.run([*command, str(run_dir), "--n", "10"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["student"]["n"] == 10
    failed = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)
    assert "holds neither student.safetensors nor teacher.safetensors" in failed.stderr


def test_features_are_never_called_fid():
    assert Pixels.title == "FD-pixels"
    assert issubclass(Pixels, Features)
