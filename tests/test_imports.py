"""One import name, `potstill`, and its short names in a checkout; importing a loss stays cheap and alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: A package `kernels` as Hugging Face's is one: it imports its own parts by absolute names, and one of them has a name of ours.
THEIRS = {
    "kernels/__init__.py": "from kernels.load import get_kernel\n__version__ = '0.17'\n__all__ = ['get_kernel']\n",
    "kernels/load.py": "from kernels.compat import has_torch\ndef get_kernel(): return has_torch\n",
    "kernels/compat.py": "has_torch = True\n__all__ = ['has_torch']\n",
    "kernels-0.17.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17\n",
}


def run(code: str, *, path: list[Path] | None = None, cwd: Path = ROOT) -> str:
    """What `code` prints in an interpreter of its own that is started in `cwd`, with `path` on PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path or []))}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def brought(imports: str, before: str, of: set[str]) -> str:
    """Which packages `imports` loads that are not there after `before`."""
    return run(
        f"import sys, {before}; before = set(sys.modules); {imports}; print(sorted({{m.split('.')[0] for m in set(sys.modules) - before}} & {of}))"
    )


def test_kernels_bring_nothing_but_torch_and_triton():
    """Somebody who only wants a loss does not load an engine."""
    assert brought("from potstill import score_match", "torch", {"numpy", "hydra", "PIL", "scipy", "sklearn"}) == "[]"
    assert run("import sys; from potstill import score_match; print([m for m in sys.modules if 'engine' in m and 'potstill' in m])") == "[]"


def test_the_name_alone_brings_nothing():
    assert brought("import potstill", "sys", {"torch", "triton", "numpy"}) == "[]"


def test_commands_begin_without_the_libraries_of_pipelines():
    """Seconds each."""
    extra = {"diffusers", "transformers", "peft", "accelerate", "tokenizers", "huggingface_hub"}
    imports = "import potstill, potstill.__main__ as entry; entry.main(['--help'])"
    assert (
        run(f"import sys; {imports}; print(sorted({{m.split('.')[0] for m in sys.modules}} & {extra | {'torch'}}))").splitlines()[-1]
        == "[]"
    )
    imports = "import potstill.__main__ as entry, importlib; [importlib.import_module(f'potstill.engine.{c}') for c in entry.COMMANDS]"
    assert brought(imports, "torch", extra) == "[]"


def test_a_run_begins_without_what_only_its_end_wants():
    """Plots, Fréchet and kernel distances: seconds of imports, and packages that may be broken where nobody asks for them."""
    assert (
        brought("import potstill.engine.train", "sys", {"scipy", "torchmetrics", "matplotlib", "sklearn", "tensorboard", "pandas"}) == "[]"
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "potstill.invalid"])
def test_a_test_that_reaches_for_the_network_fails(host):
    """See conftest.py, which sees this process only: what tests start is tried in a machine without a network (.ci/run)."""
    with pytest.raises(pytest.fail.Exception, match=f"this one for {host}"):
        socket.create_connection((host, 80), timeout=1)


SAME = """
import sys
dotted = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("kernels", "engine")}
wrong = [name for name in dotted if name not in SKIP and dotted[name] is not sys.modules.get(f"potstill.{name}")]
files = [module.__file__ for name, module in sys.modules.items() if name.startswith("potstill") and getattr(module, "__file__", None)]
assert not wrong, wrong
assert len(set(files)) == len(files), "a file was loaded twice"
print(len(dotted))
"""


@pytest.mark.parametrize(
    "first", ["kernels", "kernels.compat", "kernels.score_match", "potstill", "engine.config.tree", "engine", "potstill.kernels.aot"]
)
def test_short_names_are_the_same_modules(first):
    """Whatever is imported first, and by whichever name. Registering an op twice would be an error of PyTorch's."""
    code = f"""
import {first}
import kernels, engine.models.student, potstill, potstill.kernels.score_match, kernels.denoise, kernels.modules, engine.nets.ops
from kernels.compat import variational_score_distillation_loss
from kernels import score_match, denoise
assert callable(kernels.score_match) and callable(potstill.kernels.denoise)
assert score_match is potstill.score_match and engine.models.student.Student is potstill.Student
assert score_match.__module__ == "potstill.kernels.score_match" and engine.models.student.Student.__module__ == "potstill.engine.models.student"
SKIP = ()
"""
    assert int(run(code + SAME)) > 30


def test_python_m_takes_the_short_name_and_a_name_it_does_not_know_is_the_usual_error():
    done = subprocess.run([sys.executable, "-m", "engine.sample", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    done = subprocess.run([sys.executable, "-m", "engine.trian"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "No module named engine.trian" in done.stderr


def test_pickled_names_do_not_depend_on_the_import():
    made = run("import pickle, engine.config.schema; print(pickle.dumps(engine.config.schema.DataConfig()).hex())")
    assert (
        run(f"import pickle; print(type(pickle.loads(bytes.fromhex('{made}'))).__module__)", path=[ROOT]) == "potstill.engine.config.schema"
    )


@pytest.fixture
def theirs(tmp_path):
    for name, text in THEIRS.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return tmp_path


@pytest.mark.parametrize("first", ["kernels", "potstill.kernels", "kernels.compat", "kernels.load"])
def test_another_kernels_stays_itself_with_ours_as_guests(theirs, first):
    """In a checkout whose environment has Hugging Face's package: transformers' imports and ours both work."""
    code = f"""
import {first}
from kernels import get_kernel, score_match
import kernels.compat, kernels.load, kernels.score_match, kernels.noising, potstill
from kernels.compat import has_torch, variational_score_distillation_loss
assert kernels.__version__ == "0.17" and kernels.get_kernel is get_kernel and get_kernel() is True
assert score_match is potstill.score_match is kernels.score_match
assert kernels.noising is potstill.kernels.noising
assert variational_score_distillation_loss is potstill.kernels.compat.variational_score_distillation_loss
SKIP = ("kernels", "kernels.load", "kernels.compat")
"""
    assert int(run(code + SAME, path=[theirs])) > 20


def test_another_kernels_alone_is_untouched_outside_the_checkout(theirs, tmp_path):
    code = "import kernels, potstill.kernels; print(kernels.get_kernel(), hasattr(kernels, 'score_match'))"
    assert run(code, path=[theirs, ROOT], cwd=tmp_path) == "True False"
