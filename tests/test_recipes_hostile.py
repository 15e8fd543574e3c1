"""Recipes of somebody else's: they run nothing, read nothing but recipes, and fill no memory; what is damaged is one sentence."""

import random
import resource
import sys
from pathlib import Path

import pytest

from potstill.engine.common.errors import UserError
from potstill.engine.config.library import RECIPES, find
from potstill.engine.config.tree import load

HEAD = "defaults: [schema, {method: dmd}, _self_]\n"
BOMB = "net: {channel_mult: &a [1,1,1,1,1,1,1,1], model_type: &b [*a,*a,*a,*a,*a,*a,*a,*a], %s}\n"
LEVELS = ", ".join(f"x{i}: &{b} [{','.join([f'*{a}'] * 8)}]" for i, (a, b) in enumerate(zip("bcdefghijk", "cdefghijkl", strict=True)))


@pytest.fixture
def recipe(tmp_path):
    def made(text):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return made


def refused(path, *overrides):
    with pytest.raises(UserError) as caught:
        load(path, list(overrides))
    sentence = str(caught.value)
    assert sentence and "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + BOMB % LEVELS, "values, 15 deep, wanted at most 5,000 and 32: write it without aliases (*name)"),
        (HEAD + "net: &n {channel_mult: *n}\n", "mine.yaml has an alias within what it stands for, which has no end"),
        (HEAD + "net: {<<: &m [{a: 1}, {b: 2}], " + "<<: [*m], " * 600 + "}\n", "wanted at most 5,000"),
        (HEAD + f"seed: {'[' * 40}{']' * 40}\n", "41 deep, wanted at most"),
        (HEAD + "seed: " + "{a: " * 500, "mine.yaml has branches within branches, wanted at most 32 deep"),
        (HEAD + "#" * 2**16, "mine.yaml has more than 65,536 letters, wanted a recipe"),
        (HEAD.encode() + b"seed: \xff\n", "mine.yaml is not readable as text ('utf-8' codec can't decode byte 0xff"),
        (HEAD + "seed: \0\n", "mine.yaml is not readable as YAML"),
        (HEAD + "null: 3\n", "mine.yaml has a setting without a name in line 2, wanted NAME: value"),
        (HEAD + "[a, b]: 3\n", "mine.yaml has a setting without a name in line 2"),
        (HEAD + "seed: " + "9" * 5000, "Exceeds the limit (4300 digits)"),
        (HEAD + "net: {_target_: os.system, _args_: [exit]}\n", "there is no setting 'net._target_'"),
        (HEAD + "seed: !!python/object/apply:os.system [exit]\n", "mine.yaml is not readable as YAML: could not determine a constructor"),
        (HEAD + "hydra: {searchpath: ['pkg://evil_package']}\n", "mine.yaml sets 'hydra', which is Hydra's own and not the recipe's"),
        (HEAD + "<<: {hydra: {searchpath: ['pkg://evil_package']}}\n", "mine.yaml sets 'hydra'"),
    ],
)
def test_what_a_recipe_may_not_hold(recipe, tmp_path, monkeypatch, text, words):
    (tmp_path / "evil_package").mkdir()
    (tmp_path / "evil_package/__init__.py").write_text("import os; os._exit(7)")
    monkeypatch.syspath_prepend(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert words in refused(recipe(text))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB
    assert "evil_package" not in sys.modules


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:SECRET}",
        "x${oc.env:SECRET,y}",
        "${oc.decode:'${data.how}'}",
        "${now:%Y}",
        "${a}${b}",
        "${${a}}",
        "${",
        "${data.path",
        "${.seed}",
    ],
)
def test_a_recipe_refers_to_its_own_settings_alone(recipe, monkeypatch, value):
    monkeypatch.setenv("SECRET", "hunter2")
    said = f"mine.yaml says {value!r}, wanted a value, or one ${{NAME}} of another setting; only the command line can refer to more"
    for text in (f"{HEAD}run_dir: {value!r}\n", f"defaults: [schema, {{method: {value!r}}}, _self_]\n"):
        assert refused(recipe(text)) == said


def test_references_work_and_those_without_end_are_refused(recipe, monkeypatch):
    assert load(recipe(HEAD + "run_dir: runs/${data.path}\n"), ["data.path=x"]).run_dir == "runs/x"
    monkeypatch.setenv("MINE", "here")
    assert load(recipe(HEAD), ["run_dir=${oc.env:MINE}/${data.path}"]).run_dir == "here/digits"  # of the user's own
    assert "Recursive interpolation" in refused(recipe(HEAD + "run_dir: ${data.how}\ndata: {how: '${run_dir}'}\n"))
    doubling = "".join(f", l{i}: {{x: '${{method.l{i + 1}}}', y: '${{method.l{i + 1}}}'}}" for i in range(40))
    free = f"defaults: [schema, _self_]\nmethod: {{a: 1{doubling}, l40: {{x: 1}}}}\n"  # without a method's schema anything goes there
    assert "wanted the name of a single setting" in refused(recipe(free))
    many = "".join(f", l{i}: '${{seed}}'" for i in range(101))
    assert "refers to other settings 101 times, wanted at most 100" in refused(
        recipe(f"defaults: [schema, _self_]\nmethod: {{a: 1{many}}}\n")
    )


def test_whatever_is_damaged_is_one_sentence(recipe):
    """A recipe of ours with bytes changed or cut off: composed or refused, never another exception."""
    whole, chance, sentences = Path(find("digits")).read_bytes(), random.Random(0), []
    whole = whole.partition(b"\n--- # ")[0].replace(b"digits", b"mine")
    for _ in range(12):
        data = bytearray(whole[: chance.randrange(len(whole))] if chance.random() < 0.2 else whole)
        for _ in range(chance.choice((1, 3, 10))):
            data[chance.randrange(len(data))] = chance.choice(b"\0\xff\t\n[]{}:&*!|>%@`'\"-9$#")
        try:
            load(recipe(bytes(data)), [])
        except UserError as error:
            sentences.append(str(error))
    assert len(sentences) > 5 and "\n" not in "".join(sentences)


def test_our_own_recipes_are_far_from_the_bounds():
    assert max(len(file.read_text()) for file in RECIPES.glob("**/*.yaml")) < 2**14
