"""Every recipe composes, says what it is, builds its nets and method on paper, and means today what it meant yesterday.

golden/recipes.yaml holds what every recipe resolves to: the schema's defaults once, and of each recipe what differs from them.
A recipe that changes on purpose, and a new one, are written into it by `python -m tests.test_configs`: look at the difference.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.engine import train
from potstill.engine.common.errors import UserError
from potstill.engine.config.chosen import as_lines, chosen
from potstill.engine.config.library import find, groups_of, names, text_of
from potstill.engine.config.schema import Config
from potstill.engine.config.tree import defaults_under, load
from potstill.engine.jobs import rehearsal
from potstill.engine.jobs.job import Job
from potstill.engine.jobs.preflight import Missing
from potstill.engine.methods.table import METHODS, settings_of
from potstill.engine.models import origins
from potstill.engine.training.optim import OptimConfig

SNAPSHOT = Path(__file__).parent / "golden/recipes.yaml"
#: What the heads of recipes, the README and benches/ choose among groups, besides single settings.
CHOICES = {
    **{name: [f"data={name[:6]}_cpu"] for name in names() if name.startswith("fast")},
    "fast32": ["data=fast32_cpu", "data=fast32_night"],
    "ffhq64": ["method=sim", "method=dmd2", "method=moment_matching", "method=sfd"],
}
CASES = sorted([*names(), *(f"{name} {choice}" for name, choices in CHOICES.items() for choice in choices)])


def differences(tree: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} where `tree` differs from `defaults`; of a net's optimiser, in which NET is any net, {name: value}."""
    found: dict[str, Any] = {f"{prefix}{name}": "left out" for name in defaults if name not in tree and name != "NET"}
    for name, value in tree.items():
        if "NET" in defaults:
            found[f"{prefix}{name}"] = differences(value, defaults["NET"])
        elif isinstance(value, dict) and isinstance(defaults.get(name), dict):
            found |= differences(value, defaults[name], f"{prefix}{name}.")
        elif name not in defaults or value != defaults[name]:
            found[f"{prefix}{name}"] = value
    return found


def resolved(case: str) -> dict[str, Any]:
    """The whole tree of a recipe with overrides, of which to_yaml is the text."""
    name, *overrides = case.split(" ")
    return dataclasses.asdict(load(name, overrides))


def with_defaults(tree: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The defaults of this recipe's method in place of those of every method."""
    kind = settings_of(tree["method"]["name"])
    assert kind is not None
    return {**defaults, "method": defaults["method"][kind.name]}


def write_snapshot() -> None:
    defaults = dataclasses.asdict(Config())
    defaults["method"] = {kind.name: dataclasses.asdict(kind()) for kind in METHODS.values()}
    for stage in (defaults["teacher"]["train"], defaults["students"]["tsm"], defaults["train"]):
        stage["optim"] = {"NET": dataclasses.asdict(OptimConfig())}
    lines = [
        "# What every recipe resolves to, written by python -m tests.test_configs",
        yaml.safe_dump({"defaults": defaults}, sort_keys=False, width=140, default_flow_style=None),
        "recipes:",
    ]
    for case in CASES:
        tree = resolved(case)
        lines.append(f"  {case}:")
        for setting in differences(tree, with_defaults(tree, defaults)).items():
            lines.append("    " + yaml.safe_dump(dict([setting]), default_flow_style=True, width=math.inf)[1:-2])
    SNAPSHOT.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def snapshot():
    return yaml.safe_load(SNAPSHOT.read_text())


@pytest.mark.parametrize("case", CASES)
def test_recipe_resolves_to_what_it_did(case, snapshot):
    tree = resolved(case)
    assert differences(tree, with_defaults(tree, snapshot["defaults"])) == snapshot["recipes"][case]


def test_no_recipe_is_lost(snapshot):
    assert list(snapshot["recipes"]) == CASES


@pytest.mark.parametrize("name", names())
def test_recipe_opens_with_its_command(name):
    head = text_of(find(name)).partition("defaults:")[0]
    assert f"#   potstill train {name}" in head
    assert all(line.startswith("#") for line in head.splitlines() if line)


def refusal_of_dry_run(name, tmp_path):
    """What it says is missing, after all else; "" for nothing."""
    try:
        train.main([name, "--dry-run", f"run_dir={tmp_path}/run"])
    except Missing as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", [name for name in names() if "net" in groups_of(find(name))])
def test_recipe_builds_on_paper_and_the_dry_run_touches_nothing(name, tmp_path, capsys, monkeypatch):
    jobs = []
    monkeypatch.setattr(rehearsal, "Job", lambda *given, **more: jobs.append(Job(*given, **more)) or jobs[-1])
    refused = refusal_of_dry_run(name, tmp_path)
    said = capsys.readouterr()
    assert "# trained: " in said.out
    assert "# memory without activations: " in said.out
    assert "do nothing" not in said.err, "the recipe sets something in vain"
    assert not (tmp_path / "run").exists()
    missing = [line for line in said.out.splitlines() if line.startswith("# missing")]
    assert refused.count("\n  - ") == len(missing)
    assert all(any(c in line for c in ("potstill convert", "potstill train", "pip install")) for line in missing), missing
    method = jobs[0].on_paper.method
    assert set(method.nets) == set(jobs[0].cfg.method.needs().nets)
    assert method.sampler.nfe >= 1
    assert {turn.trains for turn in method.turns} == set(method.nets)


@pytest.mark.parametrize("name", names())
def test_what_a_dry_run_prints_is_all_that_is_set(name, tmp_path):
    cfg = load(name, [])
    found = list(chosen(cfg, defaults_under(cfg.method.name)))
    assert len(found) < 60 and all(one.about for one in found)
    overrides = [as_lines([one])[0].removesuffix(one.about).strip() for one in found]
    (tmp_path / "bare.yaml").write_text(f"defaults: [schema, {{method: {cfg.method.name}}}, _self_]\n")
    again = load(tmp_path / "bare.yaml", overrides)
    for one in (cfg, again):
        one.data.how = one.teacher.how = ""
        one.train.optim = {net: optim for net, optim in one.train.optim.items() if optim != OptimConfig()}  # a branch without a word
    assert dataclasses.asdict(again) == dataclasses.asdict(cfg)


@pytest.mark.parametrize("name", [name for name in names() if "net" not in groups_of(find(name))])
def test_dry_run_of_a_recipe_for_a_pipeline_says_what_is_missing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(origins, "_snapshot", lambda name: None)
    refusal_of_dry_run(name, tmp_path)
    said, cfg = capsys.readouterr(), load(name, [f"run_dir={tmp_path}/run"])
    missing = "".join(line for line in said.out.splitlines() if line.startswith("# missing"))
    assert f"no file or pipeline at {cfg.teacher.checkpoint}. potstill train downloads it from the Hugging Face hub" in missing
    assert f"# iterations: {round(cfg.train.kimg * 1000 / cfg.train.batch):,} of batch {cfg.train.batch}" in said.out
    assert "memory without activations" not in said.out, "of a stand-in"
    assert ("nothing at data/prompts.txt. Give text.prompts=FILE" in missing) == (cfg.text.prompts is not None)
    told = f"potstill convert latents data/pictures-.* {cfg.data.path} --pipeline {cfg.teacher.checkpoint} --captions"
    assert bool(re.search(told, missing)) == bool(cfg.data.path) == cfg.method.needs().data
    assert ("no checkpoint in runs/" in missing) == (cfg.students.start is not None)
    assert "do nothing" not in said.err, "the recipe sets something in vain"
    with pytest.raises(UserError, match=r"(?s)things are missing:.*downloads it from") as refused:
        Job(cfg)
    assert len(str(refused.value).splitlines()) == 1 + len(missing.split("# missing")[1:])
    with pytest.raises(UserError, match="rehearse=true makes nets of EDM's"):
        rehearsal.rehearse(cfg)


if __name__ == "__main__":
    write_snapshot()
