"""potstill sample: the right image for every seed and label, in every kind of output, and clear refusals."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.engine import sample
from potstill.engine.common.errors import UserError
from potstill.engine.data.images import open_images
from potstill.engine.diffusion.sampling import ode, one_step
from potstill.engine.models.generate import generate
from potstill.engine.models.opening import open_models
from potstill.engine.models.weights import save_net
from potstill.engine.nets.edm import from_kwargs

ROOT = Path(__file__).parent.parent
HEAD = 14  # pixels of the words over a grid's columns, on one line
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


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """An unconditional RGB teacher whose file does not say how to sample it, as a converted one."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("colour") / "colour.safetensors"
    save_net(path, tiny_net(img_channels=3, label_dim=0))
    return path


def read_png(path):
    """[C, H, W] uint8."""
    pixels = np.asarray(Image.open(path))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def made(run, role, labels, seeds, **how):
    model = open_models(run, role, **how)[0]
    return torch.cat(list(generate(model.net, model.sampler, labels, seeds))).numpy()


def test_a_grid_has_a_column_per_class(run_dir, tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    sample.main([str(run_dir), "--seeds", "0-24", "--out", str(out)])
    picture = read_png(out)
    assert picture.shape == (1, HEAD + 3 * 50 - 2, 10 * 50 - 2)
    assert all(picture[:, :HEAD, 50 * k : 50 * k + 48].min() < 128 for k in range(10))  # the class's number
    picture = picture[:, HEAD:]
    images = made(run_dir, "student", np.arange(25) % 10, range(25))
    for i, image in enumerate(images):
        row, column = divmod(i, 10)
        np.testing.assert_array_equal(picture[:, 50 * row : 50 * row + 48 : 6, 50 * column : 50 * column + 48 : 6], image)
    assert "student" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.part"))


def test_three_kinds_of_output_hold_the_same_images(run_dir, tmp_path):
    arguments = [str(run_dir), "--seeds", "7,3-5", "--labels", "4,1"]
    for out in ("x.npz", "folder/", "grid.png"):
        sample.main([*arguments, "--out", str(tmp_path) + "/" + out])
    with np.load(tmp_path / "x.npz") as file:
        images, labels, seeds = file["images"], file["labels"], file["seeds"]
    assert (seeds.tolist(), labels.tolist()) == ([7, 3, 4, 5], [4, 1, 4, 1])
    np.testing.assert_array_equal(images.transpose(0, 3, 1, 2), made(run_dir, "student", labels, seeds.tolist()))
    files = sorted((tmp_path / "folder").iterdir())
    assert [f.name for f in files] == ["000003.png", "000004.png", "000005.png", "000007.png"]
    np.testing.assert_array_equal(read_png(files[3]), images[0].transpose(2, 0, 1))
    assert read_png(tmp_path / "grid.png").shape == (1, HEAD + 98, 98)  # two classes, two columns
    again = open_images(tmp_path / "x.npz")  # what was sampled can be data
    np.testing.assert_array_equal(again.read(1), images[1].transpose(2, 0, 1))
    assert again.labels.tolist() == [4, 1, 4, 1]


def test_the_batch_size_changes_no_image(run_dir, tmp_path):
    """Up to one level: see generate."""
    found = []
    for batch in ("1", "5", "64"):
        sample.main([str(run_dir), "--seeds", "0-11", "--which", "teacher", "--batch", batch, "--out", str(tmp_path / "x.npz")])
        with np.load(tmp_path / "x.npz") as file:
            found.append(file["images"].astype(int))
    assert abs(found[1] - found[0]).max() <= 1
    assert abs(found[2] - found[0]).max() <= 1


def test_a_seed_is_the_same_image_in_any_list(run_dir, tmp_path):
    sample.main([str(run_dir), "--seeds", "0-19", "--out", str(tmp_path / "a")])
    sample.main([str(run_dir), "--seeds", "17", "--out", str(tmp_path / "b/")])
    assert abs(read_png(tmp_path / "a/000017.png").astype(int) - read_png(tmp_path / "b/000017.png")).max() <= 1


def test_steps_and_solvers(run_dir, colour):
    def sampler(where, which, **how):
        return open_models(where, which, **how)[0].sampler

    assert sampler(run_dir, "student") == one_step(80)
    assert sampler(run_dir, "student", steps=1) == one_step(80)
    assert sampler(run_dir, "teacher") == ode("heun", 3)
    assert sampler(run_dir, "teacher", steps=9) == ode("heun", 9)
    assert sampler(run_dir, "teacher", solver="dpmpp_2m") == ode("dpmpp_2m", 3)
    assert sampler(run_dir, "student", steps=4, solver="euler") == ode("euler", 4)
    assert sampler(colour, None) == ode("heun", 18)
    with pytest.raises(UserError, match="distilled for 1 step, got 2"):
        sampler(run_dir, "student", steps=2)
    with pytest.raises(UserError, match="at least 1 step, got 0"):
        sampler(run_dir, "teacher", steps=0)


def test_a_student_that_walks_keeps_its_solver(tmp_path):
    save_net(tmp_path / "student.safetensors", tiny_net(), method="sfd", sampler=ode("dpmpp_2m", 4, sigma_max=40.0).to_dict())
    assert open_models(tmp_path, steps=6)[0].sampler == ode("dpmpp_2m", 6, sigma_max=40.0)


def test_a_teacher_elsewhere_is_found_through_the_settings(run_dir, tmp_path):
    (tmp_path / "student.safetensors").write_bytes((run_dir / "student.safetensors").read_bytes())
    (tmp_path / "config.yaml").write_text(f"teacher: {{checkpoint: {run_dir / 'teacher.safetensors'}}}\n")
    assert [m.role for m in open_models(tmp_path)] == ["student", "teacher"]


def test_an_unconditional_colour_net(colour, tmp_path):
    sample.main([str(colour), "--seeds", "0-5", "--steps", "2", "--out", str(tmp_path / "grid.png")])
    assert read_png(tmp_path / "grid.png").shape == (3, 98, 148)
    sample.main([str(colour), "--seeds", "0-5", "--steps", "2", "--out", str(tmp_path / "x.npz")])
    with np.load(tmp_path / "x.npz") as file:
        assert sorted(file) == ["images", "seeds"]
        assert file["images"].shape == (6, 8, 8, 3)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("0-3", [0, 1, 2, 3]), ("5", [5]), ("3,1,7-9", [3, 1, 7, 8, 9]), (" 1 , 2 ", [1, 2]), ("4-4,4", [4, 4])],
)
def test_seeds(text, wanted):
    assert sample.parse_seeds(text) == wanted


@pytest.mark.parametrize("text", ["", ",", "a", "1-", "-3", "5-2", "1.5", "1-2-3", "²", str(2**63)])
def test_seeds_that_are_none(text):
    with pytest.raises(UserError, match="seed"):
        sample.parse_seeds(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out", "x.png"], "no run folder or weight file at nowhere"),
        (["EMPTY", "--out", "x.png"], "holds neither student.safetensors nor teacher.safetensors"),
        (["RUN", "--seeds", "9-3", "--out", "x.png"], "the range of seeds 9-3 is empty"),
        (["RUN", "--labels", "3,10", "--out", "x.png"], "among 0 … 9, such as 0,1,2, or all; got '10'"),
        (["RUN", "--labels", "cat", "--out", "x.png"], "got 'cat'"),
        (["RUN", "--out", "x.jpg"], "ending in .png, .npz or .zip, or a folder, got x.jpg"),
        (["RUN", "--out", "FILE"], "is a file: wanted a folder"),
        (["RUN", "--out", "FILE/x.png"], "cannot write"),
        (["RUN/student.safetensors", "--which", "teacher", "--out", "x.png"], "is a student's weight file"),
        (["COLOUR", "--labels", "1", "--out", "x.png"], "knows no classes"),
        (["RUN/broken.safetensors", "--out", "x.png"], "is not a complete safetensors file"),
    ],
)
def test_refusals(run_dir, colour, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("something")
    (run_dir / "broken.safetensors").write_bytes((run_dir / "student.safetensors").read_bytes()[:-9])
    places = {"RUN": str(run_dir), "EMPTY": "empty", "FILE": "file", "COLOUR": str(colour)}
    arguments = [re.sub("RUN|EMPTY|FILE|COLOUR", lambda m: places[m[0]], a) for a in arguments]
    with pytest.raises(UserError, match=re.escape(message)):
        sample.main(arguments)
    assert sorted(os.listdir(tmp_path)) == ["empty", "file"]


def test_a_run_without_that_net(run_dir, tmp_path):
    (tmp_path / "teacher.safetensors").write_bytes((run_dir / "teacher.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"holds no student\.safetensors, only a teacher's"):
        sample.main([str(tmp_path), "--which", "student", "--out", str(tmp_path / "x.png")])
    sample.main([str(tmp_path), "--seeds", "0", "--out", str(tmp_path / "x.png")])  # without --which: what there is


def test_a_place_that_cannot_be_written(run_dir, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="no permission to write"):
        sample.main([str(run_dir), "--out", "x.png"])


def test_as_a_command(run_dir, tmp_path):
    command = [sys.executable, "-m", "engine.sample", str(run_dir), "--seeds", "0-3"]
    done = subprocess.run([*command, "--out", str(tmp_path / "grid.png")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert (tmp_path / "grid.png").is_file()
    failed = subprocess.run([*command, "--out", str(tmp_path / "x.gif")], cwd=ROOT, capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
