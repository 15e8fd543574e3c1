"""--dry-run and the run refuse the same with the same sentence; a method that needs no images trains where there are none."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.engine import convert, evaluate, sample, train
from potstill.engine.common.cli import run
from potstill.engine.common.errors import UserError
from potstill.engine.config.tree import load
from potstill.engine.diffusion.sampling import one_step
from potstill.engine.models.student import Student
from potstill.engine.models.weights import load_net, save_net
from potstill.engine.nets.edm import from_kwargs

TINY = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
QUICK = ["train.kimg=0.064", "train.batch=16", "train.grid_kimg=1", "eval.n=32", "log.tensorboard=false"]


@pytest.fixture
def teacher(tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_net(path, from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, label_dim=10, **TINY), kimg=1.0, method="teacher")
    return path


@pytest.mark.parametrize(
    ("recipe", "settings", "sentence"),
    [
        ("digits", ["data.path=/nowhere.zip"], "data: nothing at /nowhere.zip."),
        ("digits_sim", ["data.path=/nowhere.zip", "teacher.checkpoint={teacher}"], "data: nothing at /nowhere.zip."),
        ("digits", ["teacher.checkpoint=/nowhere.safetensors"], "teacher: no file or pipeline at /nowhere.safetensors."),
        ("digits", ["eval.features=/nowhere.pt"], "no features '/nowhere.pt'"),
        ("digits", ["skipping.plan=/nowhere.json"], "skipping.plan=/nowhere.json was made for one teacher"),
        ("digits", ["skipping.plan=/nowhere.json", "teacher.checkpoint={teacher}"], "no plan at /nowhere.json"),
        ("digits", ["teacher.guide=/nowhere.safetensors"], "/nowhere.safetensors"),
        ("digits", ["teacher.vae=/nowhere"], "VAE: nothing at /nowhere."),
        ("digits", ["text.prompts=/nowhere.txt"], "text.prompts is for teachers that are told prompts"),
        ("digits", ["lora.rank=4"], "lora finds no projections"),
        ("digits", ["method=dmd2", "data.path=null", "teacher.checkpoint={teacher}"], "method dmd2 looks at real images: set data.path"),
        ("digits", ["method.regression=1", "data.path=null"], "data.path=null wants teacher.checkpoint"),
        ("digits_msd", ["data.unlabelled=true"], "students.count = 2 wants a class-conditional teacher"),
        ("digits", ["students.start=/nowhere"], "students.start: no checkpoint in /nowhere/checkpoints."),
        ("digits", ["log.wandb=x"], "package wandb, for log.wandb"),
        ("digits", ["train.optim.fke.lr=1"], "train.optim wants fake or student"),
    ],
)
def test_the_dry_run_and_the_run_refuse_the_same(recipe, settings, sentence, teacher, tmp_path, capsys):
    said = []
    for more in (["--dry-run"], []):
        given = [setting.format(teacher=teacher) for setting in settings]
        with pytest.raises(SystemExit) as ended:
            run(train.main, [recipe, *given, f"run_dir={tmp_path}/run", *more])
        assert ended.value.code == 2
        said.append(capsys.readouterr().err.partition("error: ")[2])
        assert not (tmp_path / "run").exists()
    assert sentence in said[0]
    assert said[0] == said[1]


@pytest.fixture
def recipe(teacher, tmp_path):
    """One of a data-free method, whose images are not there."""
    path = tmp_path / "mine.yaml"
    place = f"data: {{path: {tmp_path}/mine.zip, resolution: 8}}\nteacher: {{checkpoint: {teacher}}}\n"
    path.write_text(f"defaults: [digits_sim, _self_]\n{place}")
    return path


def test_a_method_that_needs_no_images_trains_without_and_is_measured_once_they_are_there(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, note = [str(recipe), *QUICK, "run_dir=run"], f"note: no images at {tmp_path}/mine.zip: trains without, "
    train.main([*command, "--dry-run"])
    assert note in capsys.readouterr().err
    train.main(command)
    assert note in capsys.readouterr().err
    weights = load_net(tmp_path / "run/student.safetensors")[0].state_dict()
    assert "fd" not in json.loads((tmp_path / "run/summary.json").read_text())["student"]
    assert (tmp_path / "run/samples.png").exists()
    evaluate.main(["run", "--data", "digits", "--n", "32"])
    assert json.loads(capsys.readouterr().out)["student"]["fd"] > 0
    convert.main(["images", "digits", "mine.zip", "--resolution", "8"])
    train.main(command)
    assert "no images" not in capsys.readouterr().err
    assert json.loads((tmp_path / "run/summary.json").read_text())["student"]["fd"] > 0
    assert json.loads((tmp_path / "run/inputs.json").read_text()).keys() == {"teacher", "data"}
    shutil.rmtree(tmp_path / "run")
    train.main(command)
    again = load_net(tmp_path / "run/student.safetensors")[0].state_dict()
    assert all(torch.equal(again[name], weights[name]) for name in weights), "other weights than without images"


def test_what_needs_images_besides_is_refused_without_them(recipe, tmp_path, capsys):
    for more in (["method=dmd2"], ["teacher.checkpoint=null"], ["students.count=2", "students.partition=kmeans"]):
        with pytest.raises(SystemExit):
            run(train.main, [str(recipe), *QUICK, f"run_dir={tmp_path}/run", *more])
        assert f"data: nothing at {tmp_path}/mine.zip." in capsys.readouterr().err


def test_a_run_is_called_by_the_method_that_was_chosen(teacher, tmp_path, capsys):
    train.main(["digits", "method=dmd2", f"teacher.checkpoint={teacher}", "method.fake_per_student=1", *QUICK, f"run_dir={tmp_path}/run"])
    assert json.loads((tmp_path / "run/summary.json").read_text())["method"] == "dmd2"
    assert load_net(tmp_path / "run/student.safetensors")[1]["method"] == "dmd2"
    assert re.search(r"^  name: dmd2$", (tmp_path / "run/config.yaml").read_text(), re.MULTILINE)


def test_a_student_prints_as_one_line_and_wants_a_list_of_seeds(tmp_path):
    path = tmp_path / "student.safetensors"
    net = from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, label_dim=10, **TINY)
    save_net(path, net, method="gdd_i", sampler=one_step(2.5).to_dict())
    student, size = Student(path), sum(p.numel() for p in net.parameters())
    assert repr(student) == f"Student(EDMDenoiser, gdd_i, 1x8x8, 10 classes, NFE 1, {size:,} parameters)"
    with pytest.raises(UserError) as refused:
        student(4)
    assert str(refused.value) == "wanted a list of seeds, one for each image, got 4: student([4]) is one, student(range(4)) the first 4"


def test_a_student_takes_arrays_and_tensors_and_refuses_in_one_sentence_what_is_no_list(tmp_path):
    path, names = tmp_path / "student.safetensors", [f"class {k}" for k in range(9)] + ["one, two"]
    net = from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, label_dim=10, **TINY)
    save_net(path, net, method="gdd_i", sampler=one_step(2.5).to_dict(), classes=names)
    student = Student(path)
    wanted = student([3, 4], labels=["one, two", "class 2"])
    for seeds, labels in (
        (np.array([3, 4]), np.array(["one, two", "class 2"])), (torch.tensor([3, 4]), torch.tensor([9, 2])), ([np.int64(3), 4], (9, 2)),
    ):  # fmt: skip
        assert torch.equal(student(seeds, labels=labels), wanted)
    for seeds, labels, said in (
        ("0-3", None, "wanted a list of seeds, whole numbers of 64 bits, such as [0, 1, 2], got '0-3'"),
        ([0.5], None, "wanted a list of seeds, whole numbers of 64 bits, such as [0, 1, 2], got [0.5]"),
        ([2**63], None, "wanted a list of seeds, whole numbers of 64 bits, such as [0, 1, 2], got [9223372036854775808]"),
        ([0, 1], "class 1", "wanted a list of classes, one for each of 2 seeds, got 'class 1'"),
        ([0, 1], 3, "wanted a list of classes, one for each of 2 seeds, got 3"),
        ([0], [True], "a class is a whole number or a name, got True"),
    ):
        with pytest.raises(UserError) as refused:
            student(seeds, labels=labels)
        assert str(refused.value) == said


def test_sampling_a_folder_of_several_runs_names_them(teacher, tmp_path):
    folder = tmp_path / "compare"
    for name in ("sim", "dmd"):
        (folder / name).mkdir(parents=True)
        save_net(folder / name / "student.safetensors", load_net(teacher)[0], method=name, sampler=one_step(2.5).to_dict())
    shutil.copy(teacher, folder / "teacher.safetensors")
    with pytest.raises(UserError) as refused:
        sample.main([str(folder), "--out", str(tmp_path / "a.png")])
    wanted = f"potstill sample {folder}/dmd or {folder}/sim; its teacher alone: --which teacher"
    assert str(refused.value) == f"{folder} holds several runs, got no word of which: {wanted}"
    sample.main([str(folder), "--which", "teacher", "--seeds", "0-1", "--out", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").exists()


def test_a_setting_that_begins_as_another_is_told_that_one():
    with pytest.raises(UserError, match=r"no setting 'train.fake_per'; did you mean method.fake_per_student\?$"):
        load("digits", ["train.fake_per=3"])


def test_a_rehearsal_says_which_batch_its_hours_are_of(capsys):
    train.main(["digits", "rehearse=true", "net.model_channels=8", "net.channel_mult=[1]", "device=cpu"])
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert "synthetic images, 2 images at once in place of the recipe's batch of 64, which would take minutes on a CPU" in said.err
    told = f"projected_hours: train.kimg=24 at {found['images_per_second']:g} images a second, as measured with 2 at once"
    assert f"{told}; an iteration of the recipe is 64" in said.err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["recipes", "--help"], []])
def test_help_loads_no_torch(arguments):
    """Which takes seconds, for a page of text."""
    code = "import sys; from potstill.__main__ import main; main(sys.argv[1:])" if arguments else "import sys, potstill"
    watched = f"import atexit, sys\natexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n{code}"
    done = subprocess.run([sys.executable, "-c", watched, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr) == (0, "False\n")
