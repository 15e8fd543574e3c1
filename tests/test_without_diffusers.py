"""Without the extra `diffusers`: all else works, and each setting that wants it says in one sentence how it is had.

`without` is an environment that lacks what only that extra brings (constraints.txt), also where it is installed.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_lock import paragraph

ROOT = Path(__file__).parent.parent
PACKAGES = [entry.partition("==")[0] for entry in paragraph("diffusers")]
WANTED = "pip install 'potstill[diffusers]'"
HUB = "teacher.checkpoint=somebody/something"


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A function of code and arguments: what the code prints there, as JSON. It has `command`: the exit code, stdout and stderr of one."""
    folder = tmp_path_factory.mktemp("site-packages")
    hidden = {part for package in PACKAGES for part in parts_of(package)}
    for site in map(Path, sys.path):
        if site.name in ("site-packages", "dist-packages"):
            for entry in site.iterdir():
                if entry.name not in hidden and not (folder / entry.name).exists():
                    (folder / entry.name).symlink_to(entry)

    def printed(code, *arguments, cwd=folder):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT))), "OMP_NUM_THREADS": "1"}
        given = [sys.executable, "-S", "-c", COMMAND + code, *map(str, arguments)]  # -S: no other site-packages
        done = subprocess.run(given, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return printed


def parts_of(package):
    """Names in site-packages."""
    try:
        return {file.parts[0] for file in distribution(package).files or () if file.parts[0] not in ("..", "__pycache__")}
    except PackageNotFoundError:
        return set()


COMMAND = """
import contextlib, io, json, sys

def command(*arguments):
    from potstill.__main__ import main
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(list(arguments))
            code = 0
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            code = repr(error)
    return code, out.getvalue(), err.getvalue()
"""

IMPORTS = """
from importlib import import_module
from pathlib import Path

root = Path(sys.argv[1])
for file in sorted([*(root / "kernels").glob("*.py"), *(root / "engine").glob("**/*.py")]):
    if "standalone" not in file.parts:  # which is for diffusers to import
        import_module("potstill." + ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
print(json.dumps(sorted({name.partition(".")[0] for name, module in sys.modules.items() if module})))
"""


def test_everything_is_imported(without):
    found = without(IMPORTS, ROOT)
    assert "torch" in found and not {"diffusers", "transformers", "peft", "requests", "psutil"} & set(found)


#: A teacher and a student of digits, as small as they are.
TRAINED = """
small = ["net.model_channels=8", "eval.n=256", "train.kimg=0.5", "teacher.train.kimg=0.5", "device=cpu", "run_dir=run"]
given = [["recipes"], ["settings", "train."], ["train", "digits", "--dry-run", *small], ["train", "digits", *small]]
given += [["sample", "run", "--seeds", "0-3", "--out", "grid.png"], ["evaluate", "run"]]
given += [["export", "run", "--to", kind, "--out", kind] for kind in ("safetensors", "diffusers")]
print(json.dumps([(words[0], *command(*words)) for words in given]))
"""


def test_commands_work(without, tmp_path):
    for word, code, out, err in without(TRAINED, cwd=tmp_path):
        assert code == 0 and WANTED not in err, (word, out, err)
    assert (tmp_path / "run/report.html").exists() and (tmp_path / "grid.png").exists()
    assert (tmp_path / "diffusers/model_index.json").exists()


REFUSED = "print(json.dumps([command(*words) for words in json.loads(sys.argv[1])]))"


def test_what_wants_it_is_refused_in_one_sentence(without, tmp_path):
    """Files here are as far as they are looked at; nothing is written."""
    pipeline, weights = tmp_path / "pipeline", tmp_path / "weights.safetensors"
    (pipeline / "transformer").mkdir(parents=True)
    index = {
        "_class_name": "SD3",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (pipeline / "model_index.json").write_text(json.dumps(index))
    save_file({"w": torch.zeros(1)}, pipeline / "transformer/diffusion_pytorch_model.safetensors")
    net = {"class": "SD3Transformer2DModel", "config": {}, "scheme": {"kind": "flow"}, "size": [8, 8], "fixed": {}}
    sampler = {"solver": "euler", "sigmas": [80.0]}
    save_file({"w": torch.zeros(1)}, weights, {"format": "potstill-1", "diffusers": json.dumps(net), "sampler": json.dumps(sampler)})
    (tmp_path / "prompts.txt").write_text("a cat\n")
    before = sorted(tmp_path.rglob("*"))
    given = [
        ["train", "digits", "lora.rank=4"],
        ["train", "digits", "lora.rank=4", "--dry-run"],
        *(["train", "digits", f"teacher.checkpoint={where}"] for where in (pipeline, weights)),
        ["train", "digits", "eval.scores=['clip:FOLDER']"],
        ["train", "digits", HUB],
        ["train", "digits", "text.prompts=prompts.txt", f"teacher.checkpoint={pipeline}"],
        ["convert", "prompts", "prompts.txt", "out", "--pipeline", "pipeline"],
        ["convert", "latents", "digits", "out", "--pipeline", "pipeline"],
        ["sample", "weights.safetensors", "--seeds", "0-3", "--out", "grid.png"],
        ["export", "weights.safetensors", "--to", "diffusers", "--pipeline", "pipeline", "--out", "out"],
    ]
    for words, (code, out, err) in zip(given, without(REFUSED, json.dumps([[*map(str, w)] for w in given]), cwd=tmp_path), strict=True):
        sentences = [line for line in err.splitlines() if WANTED in line]
        assert (code, out, len(sentences)) == (2, "", 1), (words, code, out, err)
        assert err.count("\n") == 1 or words[-1] == HUB, err  # which is not here either: a list of two
    assert sorted(tmp_path.rglob("*")) == before
