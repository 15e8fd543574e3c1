"""The table of methods, and docs/adding_a_method.md's example of a new one: its text is a method that trains and that is its formula."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from toy import draws

from potstill.engine import methods, settings, train
from potstill.engine.common.errors import UserError
from potstill.engine.config.library import RECIPES
from potstill.engine.methods import table
from potstill.engine.methods.base import METHODS, Batch, MethodConfig
from potstill.engine.models.weights import read_metadata
from potstill.engine.nets.edm import from_kwargs

ROOT = Path(__file__).parent.parent
PAPERS = {path.stem for path in (ROOT / "engine/methods").glob("*.py")} - {"__init__", "base", "parts", "table", "teacher", "msd", "vitals"}
TINY = {"img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_type": "SongUNet", "model_channels": 8}
TINY |= {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


def test_the_table_has_every_paper_and_every_yaml_has_its_schema():
    assert set(METHODS) == PAPERS
    for name, config in METHODS.items():
        assert config.name == name
        assert config.__module__ == f"potstill.engine.methods.{name}"
    schemas = {re.search(r"^defaults: \[(\w+)_schema\]", path.read_text(), re.MULTILINE)[1] for path in (RECIPES / "method").glob("*.yaml")}
    assert schemas == PAPERS


def test_a_name_that_another_method_has_is_refused():
    known = dict(METHODS)
    with pytest.raises(TypeError, match="Mine: wanted a name of its own, got 'dmd', which DMDConfig has"):
        type("Mine", (MethodConfig,), {"name": "dmd", "__qualname__": "Mine"})
    assert known == METHODS


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("dmd", {}, {"data": False, "classes": False}),
        ("dmd", {"gan": True, "guidance": 2.0}, {"data": True, "classes": True}),
        ("dmd", {"regression": 0.25, "pairs": 7, "pair_steps": 3}, {"pairs": (7, 3)}),
        ("sim", {"guidance": 1.5}, {"data": False, "classes": True}),
        ("sida", {}, {"data": True, "classes": False, "batch_statistics": True, "whole_teacher": False}),
        ("moment_matching", {}, {"data": True, "batch_statistics": False, "whole_teacher": False}),
        ("moment_matching", {"variant": "instant"}, {"batch_statistics": True, "whole_teacher": True}),
        ("gdd", {}, {"data": True, "batch_statistics": True, "whole_teacher": True}),
        ("sfd", {}, {"data": False, "pairs": None, "nets": ("student",)}),
    ],
)
def test_what_methods_need(name, given, wanted):
    needs = METHODS[name](**given).needs()
    assert {key: getattr(needs, key) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("dmd", {"regression": 0.25}, [("lpips", "method.regression", "set method.regression_metric=l2")]),
        ("dmd", {"regression": 0.25, "regression_metric": "l2"}, []),
        ("sfd", {"lpips": 1.0}, [("lpips", "method.lpips", "set method.lpips=0")]),
        ("sfd", {}, []),
        ("gdd", {"features": ["teacher", "timm:a", "timm:b"]}, [("timm", "timm:a, timm:b", "use method.features=[teacher]")]),
        ("gdd", {}, []),
    ],
)
def test_which_packages_methods_ask_for(name, given, wanted):
    assert [(one.package, one.purpose, one.otherwise) for one in METHODS[name](**given).needs().extras] == wanted


def test_a_config_that_does_not_say_how_it_is_built():
    with pytest.raises(NotImplementedError, match=r"MethodConfig\.build"):
        MethodConfig().build(None, None)


def test_a_rehearsal_of_a_method_with_pairs(capsys):
    """Pairs that nobody has made: a rehearsal takes stand-ins of their shapes."""
    net = ["net.model_channels=8", "net.channel_mult=[1]", "net.num_blocks=1", "net.attn_resolutions=[]", "device=cpu", "precision=fp32"]
    train.main(["digits", "rehearse=true", "method.regression=0.25", "method.regression_metric=l2", *net])
    assert json.loads(capsys.readouterr().out)["images_per_second"] > 0


@pytest.fixture
def example(tmp_path, monkeypatch):
    """docs/adding_a_method.md's method as if its two files lay in their folders; returns its module and a recipe beside its YAML."""
    text = (ROOT / "docs/adding_a_method.md").read_text()
    code, page, recipe = (found[1] for found in re.finditer(r"^```(?:python|yaml)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    (tmp_path / "methods").mkdir()
    (tmp_path / "method").mkdir()
    (tmp_path / "methods/kd.py").write_text(code)
    (tmp_path / "method/kd.yaml").write_text(page)
    (tmp_path / "digits_kd.yaml").write_text(recipe)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
    importlib.reload(table)  # looks for files anew
    yield importlib.import_module("potstill.engine.methods.kd"), str(tmp_path / "digits_kd.yaml")
    sys.modules.pop("potstill.engine.methods.kd")
    METHODS.pop("kd")


def test_the_example_is_short_and_nothing_else_knows_it(example):
    module, _ = example
    assert METHODS["kd"] is module.KDConfig
    assert len(Path(module.__file__).read_text().splitlines()) <= 65


def test_the_loss_of_the_example_is_its_formula(example):
    """Heun's method by hand, in float64, from the same noise and classes."""
    module, _ = example
    torch.manual_seed(0)
    teacher, start = (from_kwargs("EDMPrecond", **TINY).eval() for _ in range(2))
    for p in [*teacher.parameters(), *start.parameters()]:
        torch.nn.init.normal_(p, std=0.1)
    method = module.KDConfig(steps=3).build(teacher, start)
    loss, logs = method.loss(Batch(torch.zeros(4, 1, 8, 8), None, draws(4)))
    same = draws(4)
    labels, z = same.labels(3), same.normal(1, 8, 8)
    levels = [(80 ** (1 / 7) + i / 2 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(3)] + [0.0]
    x = 80.0 * z.double()
    with torch.no_grad():
        for s, t in zip(levels, levels[1:], strict=False):
            slope = (x - teacher(x.float(), torch.tensor(s), labels)) / s
            if t == 0:
                x = x + (t - s) * slope
            else:
                ahead = x + (t - s) * slope
                x = x + (t - s) * (slope + (ahead - teacher(ahead.float(), torch.tensor(t), labels)) / t) / 2
        wanted = (start(80.0 * z, torch.tensor(80.0), labels) - x).square().mean()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=0)  # float32 nets at levels that are rounded to float32
    assert torch.equal(logs["distance"], loss.detach())
    loss.backward()
    assert all(p.grad is None for p in [*teacher.parameters(), *start.parameters()])  # the student is a copy
    assert any(p.grad is not None and p.grad.any() for p in method.nets["student"].parameters())


def test_the_example_trains_on_digits_by_the_usual_command(example, tmp_path, capsys):
    _, recipe = example
    small = [
        "net.model_channels=8", "net.channel_mult=[1,1]", "net.num_blocks=1", "net.attn_resolutions=[]", "precision=fp32", "device=cpu",
        "teacher.train.kimg=1", "teacher.train.batch=32", "teacher.loss.sampling_steps=3", "train.kimg=0.5", "train.batch=16",
        "train.log_iterations=1", "train.optim.student.lr=3e-3", "train.grid_kimg=100", "eval.n=64", "log.tensorboard=false",
    ]  # fmt: skip
    train.main([recipe, "method.steps=6", f"run_dir={tmp_path}/run", *small])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["student/distance"] for line in lines if "student/distance" in line]
    assert len(losses) == 31
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["method"] == "kd"
    assert summary["student"]["nfe"] == 1
    assert read_metadata(tmp_path / "run/student.safetensors")["method"] == "kd"
    with pytest.raises(UserError, match=r"method\.steps wants at least 1, got 0"):
        train.main([recipe, "method.steps=0"])
    capsys.readouterr()
    settings.main(["method.steps"])
    assert "method.steps=8" in capsys.readouterr().out
