"""Every recipe composes, says what it is, and builds its nets and method on paper."""

from pathlib import Path

import pytest
import torch

from engine import build, preflight, train
from engine.config import load

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
IDS = [path.stem for path in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_recipe_opens_with_its_command(recipe):
    head = recipe.read_text().partition("defaults:")[0]
    assert f"python -m engine.train configs/{recipe.name}" in head
    assert all(line.startswith("#") for line in head.splitlines() if line)


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_recipe_builds_on_paper(recipe):
    cfg = load(recipe, [])
    preflight.check_settings(cfg)
    classes = {"digits": 10, "cifar10_cond": 10, "imagenet64": 1000}
    label_dim = next((n for stem, n in classes.items() if recipe.stem.startswith(stem)), 0)
    channels = 1 if cfg.data.path == "digits" else 3
    with torch.device("meta"):
        resolution = cfg.data.resolution or {1: 8, 3: 32}[channels]
        net = build.build_net(cfg.net, resolution, channels, label_dim)
        method = build.build_method(cfg.method, net)
    assert "student" in method.nets
    assert method.sampler.nfe >= 1
    assert {turn.trains for turn in method.turns} == set(method.nets)
    assert set(cfg.train.optim) <= set(method.nets), "an optimiser for a net that is not trained"


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_dry_run_touches_nothing(recipe, tmp_path, capsys):
    train.main([str(recipe), "--dry-run", f"run_dir={tmp_path}/run"])
    out = capsys.readouterr().out
    assert "# trained: " in out
    assert "# memory without activations: " in out
    assert not (tmp_path / "run").exists()
    missing = [line for line in out.splitlines() if line.startswith("# missing")]
    assert all(any(c in line for c in ("engine.convert", "engine.train", "pip install")) for line in missing), missing
