"""--dry-run and the run refuse the same with the same sentence; a method that needs no images trains where there are none."""

import json
import shutil

import pytest
import torch

from potstill.engine import convert, evaluate, train
from potstill.engine.common.cli import run
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
