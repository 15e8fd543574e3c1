"""What potstill sample writes beyond a grid: EDM zips, strips, pictures side by side, churned teachers; and how it streams."""

import json
import os
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.engine import sample
from potstill.engine.common.errors import UserError
from potstill.engine.data.images import open_images
from potstill.engine.diffusion.sampling import SeedNoise, ode, one_step
from potstill.engine.formats import pictures as outputs
from potstill.engine.formats.pictures import sheet
from potstill.engine.models.generate import Between, generate, slerp
from potstill.engine.models.opening import open_models
from potstill.engine.models.presets import PRESETS
from potstill.engine.models.weights import save_net
from potstill.engine.nets.edm import from_kwargs

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
    folder = tmp_path_factory.mktemp("run")
    save_net(folder / "student.safetensors", tiny_net(), method="dmd", sampler=one_step(80).to_dict())
    save_net(folder / "teacher.safetensors", tiny_net(), method="teacher", sampler=ode("heun", 3).to_dict())
    return folder


def made(run, role, labels, seeds, **how):
    model = open_models(run, role, **how)[0]
    return torch.cat(list(generate(model.net, model.sampler, np.array(labels), seeds))).numpy()


def sampled(run, out, *arguments):
    sample.main([str(run), *arguments, "--out", str(out)])
    return out


# Zips


def test_a_zip_is_a_data_set_as_edm_s_tool_writes_it(run_dir, tmp_path):
    out = sampled(run_dir, tmp_path / "x.zip", "--seeds", "3-8", "--labels", "4,1", "--batch", "4")
    images = made(run_dir, "student", [4, 1] * 3, range(3, 9))
    with zipfile.ZipFile(out) as archive:
        names = [f"00000/img{i:08d}.png" for i in range(6)]
        assert archive.namelist() == [*names, "dataset.json"]
        assert json.loads(archive.read("dataset.json"))["labels"] == [[n, k] for n, k in zip(names, [4, 1] * 3, strict=True)]
    data = open_images(out)
    np.testing.assert_array_equal(np.stack([data.read(i) for i in range(6)]), images)
    assert data.labels.tolist() == [4, 1] * 3
    sampled(run_dir, out, "--seeds", "0-1")  # what is there is replaced
    assert len(open_images(out)) == 2


@pytest.mark.parametrize("name", ["x.npz", "x.zip", "x.png"])
def test_a_failure_leaves_nothing_behind(run_dir, tmp_path, monkeypatch, name):
    def broken(*args, **more):
        yield torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        raise UserError("not finite")

    monkeypatch.setattr(sample, "generate", broken)
    with pytest.raises(UserError, match="not finite"):
        sampled(run_dir, tmp_path / name, "--seeds", "0-9")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_sentence(run_dir, tmp_path, monkeypatch):
    def full(member, header):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs.np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(UserError, match=r"cannot write .*x\.npz: No space left on device"):
        sampled(run_dir, tmp_path / "x.npz", "--seeds", "0-9")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["x.npz", "x.zip", "folder"])
def test_images_are_written_as_they_are_made(run_dir, tmp_path, monkeypatch, name):
    """When the next batch is asked for, the one before is no longer held by anybody."""
    held = []

    class Kept:  # a batch that says when it dies
        def __len__(self):
            return 5

        def __init__(self, value):
            self.array = np.full((5, 1, 8, 8), value, np.uint8)

        def cpu(self):
            return self

        def numpy(self):
            array = self.array.view(Tracked)
            array.count = held
            held.append(1)
            return array

    class Tracked(np.ndarray):
        def __del__(self):
            if getattr(self, "count", None) is not None:
                self.count.pop()

    def batches(*args, **more):
        for value in range(6):
            assert len(held) <= 1, f"{len(held)} batches are held"
            yield Kept(value)

    monkeypatch.setattr(sample, "generate", batches)
    out = sampled(run_dir, tmp_path / name, "--seeds", "0-29")
    assert [int(open_images(out, labelled=False).read(i).max()) for i in (0, 4, 5, 29)] == [0, 0, 1, 5]


# Strips


def test_slerp_walks_an_arc_at_constant_speed():
    """In the plane the way from angle 0 to 80° is known; lengths stay, and the ends are exact."""
    degrees = torch.tensor([0.0, 80.0]).double().deg2rad()
    a, b = (torch.stack([2 * d.cos(), 2 * d.sin()]).expand(5, 2) for d in degrees)
    found = slerp(a, b, torch.linspace(0, 1, 5, dtype=torch.float64))
    wanted = torch.arange(0, 81, 20).double().deg2rad()
    torch.testing.assert_close(found, 2 * torch.stack([wanted.cos(), wanted.sin()], 1), rtol=1e-12, atol=1e-12)
    noise = [SeedNoise([s]).normal(3, 8, 8).double() for s in (1, 2)]
    assert torch.equal(slerp(*noise, torch.ones(1)), noise[1]) and torch.equal(slerp(*noise, torch.zeros(1)), noise[0])


def test_a_strip_leads_from_one_seed_to_the_other(run_dir, tmp_path):
    out = sampled(run_dir, tmp_path / "x.npz", "--strip", "3-7,9-2", "--frames", "5", "--batch", "3")
    with np.load(out) as file:
        images, labels = file["images"].transpose(0, 3, 1, 2).astype(int), file["labels"]
    assert labels.tolist() == [3] * 5 + [9] * 5  # the class stays
    ends = made(run_dir, "student", [3, 3, 9, 9], [3, 7, 9, 2]).astype(int)
    assert abs(images[[0, 4, 5, 9]] - ends).max() <= 1
    assert abs(images[2] - images[0]).max() > 5 < abs(images[2] - images[4]).max()
    sampled(run_dir, tmp_path / "x.png", "--strip", "3-7,9-2", "--frames", "5", "--labels", "1")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (5 * 50 - 2, 2 * 50 - 2)  # a row for each
    sampled(run_dir, tmp_path / "folder", "--strip", "3-7", "--frames", "3")
    assert sorted(os.listdir(tmp_path / "folder")) == ["000000.png", "000001.png", "000002.png"]


def test_points_of_a_strip():
    assert sample.parse_strips("3-7", 3) == [Between(3, 7, 0.0), Between(3, 7, 0.5), Between(3, 7, 1.0)]
    for bad in ("3", "3-3", "a-b", "3-7,", f"1-{2**63}"):
        with pytest.raises(UserError, match="two different seeds"):
            sample.parse_strips(bad, 4)


# Side by side


def test_student_and_teacher_from_the_same_noise(run_dir, tmp_path, capsys):
    out = sampled(run_dir, tmp_path / "x.png", "--seeds", "4-7", "--beside")
    labels = [4, 5, 6, 7]
    rows = {"student, 1 evaluation": made(run_dir, "student", labels, range(4, 8))}
    rows["teacher, 5 evaluations"] = made(run_dir, "teacher", labels, range(4, 8))
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(sheet(rows, 4, heads=["4", "5", "6", "7"])))
    assert "by the student" in (err := capsys.readouterr().err) and "by the teacher" in err
    again = sampled(run_dir / "student.safetensors", tmp_path / "y.png", "--seeds", "4-7", "--beside", str(run_dir / "teacher.safetensors"))
    assert again.read_bytes() == out.read_bytes()


# Teachers


def test_presets_cost_what_the_paper_says():
    """2206.00364, Table 2 and its text, and 2312.02696: evaluations per image."""
    nfe = {name: ode("heun", preset["steps"]).nfe for name, preset in PRESETS.items()}
    assert nfe == {"cifar10": 35, "ffhq64": 79, "afhqv2_64": 79, "imagenet64": 511, "edm2": 63}


def test_a_teacher_by_preset_and_by_hand(run_dir, tmp_path, capsys):
    by_preset = sampled(run_dir, tmp_path / "a.npz", "--teacher", "--seeds", "0-3", "--preset", "imagenet64", "--steps", "6")
    by_hand = sampled(
        run_dir, tmp_path / "b.npz", "--which", "teacher", "--seeds", "0-3", "--solver", "heun", "--steps", "6",
        "--S_churn", "40", "--S_min", "0.05", "--S_max", "50", "--S_noise", "1.003",
    )  # fmt: skip
    still = sampled(run_dir, tmp_path / "c.npz", "--teacher", "--seeds", "0-3", "--steps", "6")
    a, b, c = (np.load(path)["images"] for path in (by_preset, by_hand, still))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert "heun with churn, NFE 11" in capsys.readouterr().err


def test_churn_noise_is_each_seed_s_own(run_dir, tmp_path):
    churn = ["--teacher", "--S_churn", "40", "--steps", "4"]
    whole = np.load(sampled(run_dir, tmp_path / "a.npz", *churn, "--seeds", "0-7"))["images"].astype(int)
    one = np.load(sampled(run_dir, tmp_path / "b.npz", *churn, "--seeds", "5"))["images"].astype(int)
    assert abs(whole[5] - one[0]).max() <= 1
    assert abs(whole[5] - whole[4]).max() > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strip", "3-7", "--seeds", "1", "--out", "x.png"], "leave --seeds out"),
        (["--strip", "3", "--out", "x.png"], "two different seeds"),
        (["--strip", "3-7", "--frames", "1", "--out", "x.png"], "at least 2 frames"),
        (["--frames", "4", "--out", "x.png"], "--frames is of --strip"),
        (["--beside", "--out", "x.npz"], "--beside makes one picture"),
        (["--beside", "SMALL", "--out", "x.png"], "small.safetensors 1x16x16 with 10 classes"),
        (["--preset", "cifar10", "--out", "x.png"], "presets, churn and guidance are for teachers"),
        (["--teacher", "--S_noise", "2", "--out", "x.png"], "add --S_churn"),
        (["--teacher", "--S_churn", "-2", "--out", "x.png"], "S_churn >= 0"),
        (["--teacher", "--S_churn", "2", "--solver", "dpmpp_2m", "--out", "x.png"], "churn wants a walk with euler or heun"),
    ],
)
def test_refusals(run_dir, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_net(tmp_path / "small.safetensors", tiny_net(img_resolution=16), method="teacher")
    with pytest.raises(UserError, match=re.escape(message)):
        sample.main([str(run_dir), *(a.replace("SMALL", "small.safetensors") for a in arguments)])
    assert os.listdir(tmp_path) == ["small.safetensors"]
