"""Every recipe composes, says what it is, and builds its nets and method on paper."""

from pathlib import Path

import pytest

from potstill.engine import train
from potstill.engine.jobs import rehearsal
from potstill.engine.jobs.job import Job

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
IDS = [path.stem for path in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_recipe_opens_with_its_command(recipe):
    head = recipe.read_text().partition("defaults:")[0]
    assert f"#   potstill train {recipe.stem}" in head
    assert all(line.startswith("#") for line in head.splitlines() if line)


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_recipe_builds_on_paper_and_the_dry_run_touches_nothing(recipe, tmp_path, capsys, monkeypatch):
    jobs = []
    monkeypatch.setattr(rehearsal, "Job", lambda *given, **more: jobs.append(Job(*given, **more)) or jobs[-1])
    train.main([str(recipe), "--dry-run", f"run_dir={tmp_path}/run"])
    said = capsys.readouterr()
    assert "# trained: " in said.out
    assert "# memory without activations: " in said.out
    assert "do nothing" not in said.err, "the recipe sets something in vain"
    assert not (tmp_path / "run").exists()
    missing = [line for line in said.out.splitlines() if line.startswith("# missing")]
    assert all(any(c in line for c in ("potstill convert", "potstill train", "pip install")) for line in missing), missing
    method = jobs[0].on_paper.method
    assert "student" in method.nets
    assert method.sampler.nfe >= 1
    assert {turn.trains for turn in method.turns} == set(method.nets)
