"""The command potstill: what it dispatches to, recipes by name from anywhere, and lists that say what the files say."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import yaml

from potstill import __main__, __version__
from potstill.engine import recipes, settings
from potstill.engine.common.errors import UserError
from potstill.engine.config.library import FIELD, RECIPES, file_of, find, groups_of, head_of, names, text_of
from potstill.engine.config.schema import Config, to_yaml
from potstill.engine.config.tree import load
from potstill.engine.methods.table import METHODS

ROOT = Path(__file__).parent.parent


def said(capsys, *arguments: str) -> str:
    """What `potstill ARGUMENTS` prints."""
    __main__.main(list(arguments))
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    """The one line on stderr of `potstill ARGUMENTS`, which ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        __main__.main(list(arguments))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# the command


def test_help_names_every_command_with_a_line_each(capsys):
    lines = said(capsys, "--help").splitlines()
    assert said(capsys).splitlines() == lines
    for name, text in __main__.COMMANDS.items():
        assert f"    {name:10}{text}" in lines
        assert (ROOT / f"engine/{name}.py").exists()
    commands = [path.stem for path in (ROOT / "engine").glob("*.py") if "\ndef main(" in path.read_text()]
    assert set(commands) == set(__main__.COMMANDS)


def test_version(capsys):
    assert said(capsys, "--version") == f"potstill {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "words"), [("trian", "did you mean train?"), ("evalute", "did you mean evaluate?"), ("xyz", "wanted one of recipes, settings, train")]
)  # fmt: skip
def test_a_typo_names_the_nearest_command(capsys, typed, words):
    assert words in refused(capsys, typed)


FLAGS = {
    "train": ["--dry-run"],
    "sample": ["--seeds", "--strip", "--frames", "--labels", "--beside", "--which", "--teacher", "--out", "--plan", "--cache", "--batch", "--device"],
    "evaluate": ["--data", "--features", "--scores", "--prompts", "--resize", "--metrics", "--reference", "--save-reference", "--images", "--seed", "--labels", "--best-of", "--batch", "--device"],
    "compare": ["--methods", "--seconds", "--teacher-seconds", "--points", "--teacher-points", "--features", "--real", "--apart", "--no-apart"],
    "probe": ["--data", "--unlabelled", "--out", "--bins", "--budget", "--images", "--batch", "--seed", "--device"],
    "convert images": ["--resolution", "--fit", "--filter", "--unlabelled", "--max-images", "--skip-corrupt", "--force"],
    "convert edm": ["--net", "--like", "--one-step", "--force"],
    "convert phema": ["--std", "--kimg", "--force"],
    "convert": ["images", "edm", "phema"],
    "export": ["--to", "--out"],
    "recipes": ["--copy"],
    "settings": ["--markdown"],
}  # fmt: skip


@pytest.mark.parametrize("command", FLAGS)
def test_help_of_a_command_is_whole_and_calls_it_by_its_name(capsys, monkeypatch, command):
    asked, print_help = [], ArgumentParser.print_help
    monkeypatch.setattr(ArgumentParser, "print_help", lambda parser: asked.append(parser) or print_help(parser))
    with pytest.raises(SystemExit) as stopped:
        __main__.main([*command.split(), "--help"])
    assert not stopped.value.code
    text = capsys.readouterr().out
    assert text.startswith(f"usage: potstill {command} ")
    assert not re.search(r"engine\.(?!train configs/ffhq64\.yaml)", text), "a stale name"
    assert max(map(len, text.splitlines())) <= 130
    for flag in FLAGS[command]:
        assert flag in text
    (parser,) = asked
    assert [action.dest for action in parser._actions if not action.help] == [], "without a word of help"


def test_every_command_is_covered():
    assert {command.split()[0] for command in FLAGS} == set(__main__.COMMANDS)


ELSEWHERE = """
import sys
from potstill.__main__ import main
for arguments in (["--help"], ["--version"], ["recipes"], ["recipes", "--copy", "digits_sim", "."]):
    main(arguments)
assert not {"torch", "hydra", "numpy"} & set(sys.modules), "brings much"
"""


def test_what_only_lists_loads_no_torch_and_works_in_any_folder(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "digits_sim.yaml").exists()


LEFT = """
from potstill.engine.common.cli import run
run(lambda _: [print("seen", flush=True), input(), print("not seen")])
"""


def test_a_reader_that_leaves_is_no_traceback():
    """potstill settings | head: what is left in the buffer can be written neither at the end of the command nor of Python."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, "-c", LEFT], cwd=ROOT, env=buffered, stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "seen\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_what_a_sentence_quotes_of_a_file_does_not_command_the_terminal(tmp_path, capsys):
    plan = tmp_path / "\x1b[2J\r\u202e.safetensors"
    assert refused(capsys, "sample", str(plan), "--seeds", "0", "--out", "x.png").endswith(r"/\x1b[2J\r\u202e.safetensors")


def test_the_module_and_the_command_are_one(tmp_path):
    """`python -m potstill`, as torchrun and `multiprocessing` start it, from another folder."""
    command = [sys.executable, "-m", "potstill", "recipes", "digits_si"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "digits_sim" in done.stdout


# recipes


def test_a_recipe_is_found_by_name_from_anywhere_and_a_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.yaml").write_text("defaults: [digits_sim]\n")
    assert find("digits") == RECIPES / "digits.yaml"
    assert find("digits.yaml") == Path("digits.yaml")
    assert find(str(tmp_path / "digits.yaml")) == tmp_path / "digits.yaml"
    assert load("digits", []).method.name == "dmd"
    assert load("digits.yaml", []).method.name == "sim"
    assert load("digits", []).run_dir == "runs/digits"
    assert to_yaml(load("ffhq64", [])) == to_yaml(load(ROOT / "configs/ffhq64.yaml", []))


def test_a_file_holds_recipes_whose_names_go_on_from_its_own(tmp_path):
    """Each is found by name, and by a path as if it were a file, also in a folder of the user's."""
    assert file_of(find("digits_sim")) == RECIPES / "digits.yaml"
    assert load(ROOT / "configs/digits_sim.yaml", []).run_dir == "runs/digits_sim"
    (tmp_path / "a.yaml").write_text("defaults: [digits_sim, _self_]\n\n--- # a_short\ndefaults: [a, _self_]\ntrain: {kimg: 3}\n")
    for name, kimg in (("a", 40), ("a_short", 3)):
        cfg = load(tmp_path / f"{name}.yaml", [])
        assert (cfg.run_dir, cfg.method.name, cfg.train.kimg) == (f"runs/{name}", "sim", kimg)
    with pytest.raises(UserError, match=r"no recipe at .*a_long\.yaml"):
        find(tmp_path / "a_long.yaml")
    (tmp_path / "a.yaml").write_text("defaults: [digits_sim, _self_]\n--- # another\ntrain: {kimg: 3}\n")
    with pytest.raises(UserError, match=r"a\.yaml is not readable as YAML: expected a single document"):
        load(tmp_path / "a.yaml", [])


def test_a_recipe_stands_in_one_place():
    assert len(set(names())) == len(names())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("ffhq46", "no recipe called ffhq46: did you mean ffhq64"),
        ("digits_mds", "did you mean digits_msd"),
        ("nonsense", "`potstill recipes` lists ours"),
        ("./digits", "no recipe at ./digits: did you mean digits"),
        ("configs/digit.yaml", "did you mean digits"),
    ],
)
def test_a_name_that_is_not_there_names_the_nearest(tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(words)):
        find(given)


@pytest.mark.parametrize("name", names())
def test_every_recipe_says_what_it_promises(name):
    """One form for all: a title, commands, and fields, of which these have something to say; nothing between them is lost."""
    head, lines = head_of(find(name)), text_of(find(name)).partition("\ndefaults:")[0].splitlines()
    assert re.search(r"\(2\d{3}\.\d{5}\b", head.title), "which paper"
    assert f"potstill train {name}" in " ".join(head.commands)
    assert set(head.fields) >= set(recipes.COLUMNS)
    assert all(recipes.in_short(head.fields[field]) for field in recipes.COLUMNS)
    assert max(len(recipes.in_short(head.fields[field])) for field in recipes.COLUMNS) <= 75, "a field's first words stand in a table"
    after = lines[next(i for i, line in enumerate(lines) if line.startswith("#   potstill")) :]
    assert [line for line in after if not line.startswith("#   ") and not FIELD.match(line)] == [], "neither a field nor a field's rest"
    groups = groups_of(find(name)).keys()
    assert groups >= {"data", "method"}
    assert groups & {"net", "teacher"}, "a net of ours, or a pipeline's"


#: Recipe -> its row of benches/results/cpu-captions.
OF_CAPTIONS = {
    "captions": "dmd", "captions_dmd2": "dmd2", "captions_sim": "sim", "captions_gdd": "gdd", "captions_msd": "msd, 2 students",
    "captions_small": "half the blocks",
}  # fmt: skip


def test_what_was_run_by_us_is_what_its_file_says():
    """Distances named in the heads, against benches/results."""
    checked = 0
    for name in names():
        text = head_of(find(name)).fields["Run by us"]
        for title, value, teacher in re.findall(r"FD-(\w+) ([\d.]+)[^(]*\(teacher ([\d.]+)", text):
            folder = ROOT / re.findall(r"benches/results/[\w-]+", text)[0]
            if name.startswith("captions"):
                means = json.loads((folder / "all.json").read_text())["means"]
                row = OF_CAPTIONS[name]
                assert (value, teacher) == (f"{means[row]['fd']:.2f}", f"{means['teacher']['fd']:.2f}"), name
                continue
            run = json.loads((folder / "compare.json").read_text())
            of = name.partition("_")[2] or "dmd"
            for told, one in ((value, run["methods"][of]), (teacher, run["teacher"])):
                assert told == f"{one['scores'][f'FD-{title}']:.{len(told.partition('.')[2])}f}", name
            checked += 1
    assert checked == 11
    demo = json.loads((ROOT / "benches/results/cpu-digits/summary.json").read_text())
    assert head_of(find("digits")).fields["Run by us"].startswith(f"FD-pixels {demo['student']['fd']:.2f}, ")


def test_the_table_has_every_recipe_and_fits(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    lines = said(capsys, "recipes").splitlines()
    assert max(map(len, lines)) <= 90
    firsts = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert [name for name in names() if name not in firsts] == []
    monkeypatch.setenv("COLUMNS", "200")
    (line,) = [line for line in said(capsys, "recipes", "cifar10_s").splitlines() if line.startswith("cifar10_sid ")]
    assert re.split(r"  +", line) == ["cifar10_sid", "sid", "FID 1.92", "500 M images", "not yet"]


def test_one_recipe_in_full(capsys):
    text = said(capsys, "recipes", "cifar10_sfd_nfe3")
    for line in text_of(find("cifar10_sfd_nfe3")).partition("\ndefaults:")[0].splitlines():
        assert line.removeprefix("# ").removeprefix("#") in text
    assert "# data=cifar10, teacher=cifar10_uncond_vp, net=ddpmpp_cifar10, method=sfd" in text
    resolved = yaml.safe_load(text.partition("\n\n# data=")[2].partition("\n")[2])
    assert resolved["method"]["num_steps"] == [5]
    assert resolved["data"]["path"] == "data/cifar10-32x32.zip"
    assert "did you mean cifar10_sid" in refused(capsys, "recipes", "cifar10_sidd")


def test_a_copy_works_where_it_is_and_is_never_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("ffhq64", "cifar10_sfd_nfe3", "digits_msd", "fast64_sim"):
        assert f"potstill train {name}.yaml" in said(capsys, "recipes", "--copy", name, ".")
        assert to_yaml(load(f"{name}.yaml", [])) == to_yaml(load(name, []))
        assert f"#   potstill train {name}.yaml" in Path(f"{name}.yaml").read_text()
    mine = tmp_path / "ffhq64.yaml"
    mine.write_text("mine")
    assert "ffhq64.yaml exists" in refused(capsys, "recipes", "--copy", "ffhq64", ".")
    assert mine.read_text() == "mine"
    assert "wants a folder that exists, got nowhere" in refused(capsys, "recipes", "--copy", "ffhq64", "nowhere")
    assert "did you mean ffhq64" in refused(capsys, "recipes", "--copy", "ffhq46", ".")


# settings


def tree(config) -> dict[str, object]:
    """{dotted name: value} of a tree of dataclasses, found without engine.settings."""
    found: dict[str, object] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{name}": one for name, one in tree(value).items()}
        else:
            found[field.name] = value
    return found


def test_the_list_has_every_setting_with_its_default():
    listed = [
        s for branch in settings.branches() for s in branch.settings if ".NET." not in s.name and not s.name.startswith("students.net.")
    ]
    for schema in METHODS.values():
        ours = [s for s in listed if not s.name.startswith("method.")]
        (branch,) = [branch for branch in settings.branches() if branch.schema is schema]
        defaults = tree(Config(method=schema()))
        assert sorted(s.name for s in [*ours, *branch.settings]) == sorted([*defaults, "method"])
        for s in [*ours, *branch.settings]:
            if s.name != "method":
                assert yaml.safe_load(s.default) == yaml.safe_load(json.dumps(defaults[s.name])) or s.default == str(defaults[s.name]), s


def test_settings_of_what_may_be_left_out_are_listed():
    listed = {s.name for branch in settings.branches() for s in branch.settings}
    for stage in ("teacher.train", "students.tsm", "train"):
        assert f"{stage}.optim.NET.lr" in listed
    assert {f"students.net.{name}" for name in vars(Config().net)} <= listed


def test_every_setting_says_what_it_does():
    for branch in settings.branches():
        assert branch.about
        assert not branch.about.startswith(f"{branch.schema.__name__}("), "a dataclass without a docstring"
        for s in branch.settings:
            assert len(s.about) > 5, f"{s.name} wants a comment where it is defined"
            assert "engine." not in s.about


@dataclasses.dataclass
class Some:
    a: int = 1  # one thing
    # beside no setting
    b: list[int] = dataclasses.field(
        default_factory=lambda: [1],  # another # thing
    )
    c: str = "# none"


def test_comments_are_read_also_from_a_definition_of_several_lines():
    assert settings.comments_of(Some) == {"a": "one thing", "b": "another # thing", "c": ""}


def test_a_part_of_the_list(capsys):
    lines = [line for line in said(capsys, "settings", "train.optim").splitlines() if line and not line.startswith("#")]
    assert all(line.startswith("train.optim") for line in lines)
    assert any(re.match(r"train\.optim\.NET\.lr=0\.0001 +float +learning rate", line) for line in lines)
    text = said(capsys, "settings", "method.")
    assert "# method=dmd | method=dmd2 (gan=true): " in text
    assert "there is no setting whose name begins with 'trainn'" in refused(capsys, "settings", "trainn")


def test_the_page_is_current_whichever_method_was_imported_first(capsys, monkeypatch):
    monkeypatch.setattr("potstill.engine.settings.METHODS", dict(reversed(METHODS.items())))
    assert (ROOT / "docs/settings.md").read_text() == said(capsys, "settings", "--markdown"), (
        "potstill settings --markdown > docs/settings.md"
    )
