"""Any recipe takes any method: it runs on the method's own defaults, or one sentence says what stands against it and which recipe to take."""

import re
from itertools import product

import pytest
import yaml

from potstill.engine import train
from potstill.engine.common.errors import UserError
from potstill.engine.config.library import RECIPES, find, groups_of, of_method
from potstill.engine.config.schema import to_yaml
from potstill.engine.config.tree import load
from potstill.engine.jobs.folder import check_settings
from potstill.engine.methods.table import METHODS, settings_of

VARIANTS = sorted(path.stem for path in (RECIPES / "method").glob("*.yaml"))
#: One of every family, of every kind of net, and those that say much of their method.
FAMILIES = ["digits", "digits_gdd", "fast32", "ffhq64", "cifar10_sfd", "imagenet64_moment_matching", "captions_small", "edm2_digits"]
SMALL = ["digits", "digits_gdd", "edm2_digits", "captions"]
#: What no default can mend, by a piece of its sentence.
REFUSED = {
    **{(name, "sida"): "is over before the student begins to learn" for name in SMALL},
    **{(name, "sfd_v"): "method.step_condition=true wants one of EDM's U-Nets" for name in ("edm2_digits", "captions")},
    ("captions", "gdd_i"): "method.freeze = 1 names layers of EDM's U-Nets",
}  # fmt: skip


def own_of(method: str) -> dict:
    return yaml.safe_load((RECIPES / f"method/{method}.yaml").read_text()) | {"name": method}


@pytest.mark.parametrize("recipe", FAMILIES)
def test_another_method_begins_with_its_own_defaults(recipe):
    theirs = load(recipe, [])
    for method in set(VARIANTS) - {groups_of(find(recipe))["method"]}:
        cfg, own = load(recipe, [f"method={method}"]), own_of(method)
        own.pop("defaults")
        assert cfg.method == settings_of(method)(**own), method
        assert set(cfg.train.optim) <= {"student", *cfg.method.needs().nets}
        assert all(cfg.train.optim[net] == theirs.train.optim[net] for net in cfg.train.optim)
        for branch in ("data", "net", "teacher", "students", "eval", "precision"):
            assert getattr(cfg, branch) == getattr(theirs, branch)
        assert cfg.train.kimg == theirs.train.kimg


def test_the_own_method_and_what_is_given_keep_what_the_recipe_says():
    assert load("fast32", ["method=dmd"]) == load("fast32", [])
    assert load("fast32", ["method=dmd2"]).method.fake_per_student == 5
    assert load("fast32", ["method=dmd2", "method.fake_per_student=2"]).method.fake_per_student == 2
    given = load("digits", ["method=gdd", "train.optim.discriminator.lr=3e-4", "train.optim.student.lr=1e-4"]).train.optim
    assert {net: one.lr for net, one in given.items()} == {"student": 1e-4, "discriminator": 3e-4}


@pytest.mark.parametrize(("recipe", "method"), list(product(SMALL, VARIANTS)))
def test_every_pair_of_small_recipe_and_method_works_or_is_one_sentence(recipe, method, tmp_path, capsys):
    if recipe == "captions":
        pytest.importorskip("diffusers")
    arguments = [recipe, f"method={method}", "--dry-run", f"run_dir={tmp_path}/run"]
    arguments += ["method.lpips=0"] if method == "sfd_second" else []  # which is an extra
    better = of_method(find(recipe), method)
    if sentence := REFUSED.get((recipe, method)):
        with pytest.raises(UserError) as refused:
            train.main(arguments)
        assert sentence in str(refused.value)
        assert "\n" not in str(refused.value)
        assert (f"; or take the recipe that is made for it: potstill train {better and better.stem}" in str(refused.value)) == bool(better)
        return
    train.main(arguments)
    said = capsys.readouterr()
    assert re.search(rf"^method={method} ", said.out, re.MULTILINE)
    own = groups_of(find(recipe))["method"]
    made = f"; made for it is: potstill train {better.stem}" if better else ""
    note = f"note: method={method} begins with its own defaults, and takes all else from {recipe}, where it was chosen for {own}{made}\n"
    assert (note if method != own else "") == "".join(line for line in said.err.splitlines(True) if line.startswith("note: method="))


@pytest.mark.parametrize(
    ("recipe", "method", "wanted"),
    [
        ("fast32", "sim", "fast32_sim"),
        ("digits_sim", "dmd", "digits"),
        ("digits_gdd_two", "sim", "digits_sim"),
        ("cifar10_cond_sid", "sim", "cifar10_cond_sim"),
        ("cifar10_cond_sid", "sfd", None),
        ("fast32", "dmd2", None),
    ],
)
def test_the_recipe_that_is_made_for_a_method(recipe, method, wanted):
    found = of_method(find(recipe), method)
    assert (found and found.stem) == wanted


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["method=sin"], f"digits.yaml: there is no method 'sin' to take; did you mean sim or sid? wanted one of {', '.join(VARIANTS)}"),
        (["method=sim", "method=gdd"], "wanted one method, got sim and gdd"),
        (["method=sid", "method.alfa=1"], "digits.yaml: there is no setting 'method.alfa'; did you mean method.alpha?"),
        (["method=sim", "method.sigma=-1"], "method.sigma wants more than 0, got -1.0"),
    ],
)
def test_what_cannot_be_chosen(overrides, sentence):
    with pytest.raises(UserError) as refused:
        load("digits", overrides)
    assert str(refused.value) == sentence


def test_a_recipe_of_ones_own_takes_any_method_and_names_its_sibling(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("defaults: [digits, _self_]\nmethod: {match_index: [200, 600]}\n")
    (tmp_path / "mine_sim.yaml").write_text("defaults: [digits_sim, _self_]\n")
    train.main([f"{tmp_path}/mine.yaml", "method=sim", "--dry-run"])
    assert f"made for it is: potstill train {tmp_path}/mine_sim.yaml" in capsys.readouterr().err
    assert load(tmp_path / "mine.yaml", ["method=sim"]).method.t_max == 0.8
    assert load(tmp_path / "mine.yaml", []).method.match_index == [200, 600]


def test_names_and_nets_of_methods():
    assert set(VARIANTS) == {name for kind in METHODS.values() for name in (kind.name, *kind.variants)}
    assert {name: load("digits", [f"method={name}"]).method.name for name in VARIANTS} == dict(zip(VARIANTS, VARIANTS, strict=True))


def test_a_run_that_began_before_variants_had_names_goes_on(tmp_path):
    now = to_yaml(load("digits", ["method=dmd2"]))
    before = now.replace("  name: dmd2\n", "  name: dmd\n")
    assert before != now
    assert check_settings(before, now, tmp_path) == []
    with pytest.raises(UserError, match=r"method.gan was False, now True"):
        check_settings(before.replace("  gan: true\n", "  gan: false\n"), now, tmp_path)
    with pytest.raises(UserError, match=r"method.name was 'dmd', now 'sim'"):
        check_settings(before, to_yaml(load("digits", ["method=sim"])), tmp_path)
