"""What conftest.py does with tests marked gpu: a warning of a library's cannot fail them, and a rehearsal runs one of each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = """\
import warnings
import pytest

@pytest.mark.gpu
def test_on_a_gpu():
    warnings.warn("a library is old", DeprecationWarning)

def test_on_a_cpu():
    warnings.warn("a library is old", DeprecationWarning)

@pytest.mark.gpu
@pytest.mark.parametrize("number", range(5))
def test_of_many(number):
    assert number == 0
"""


@pytest.fixture
def ran(tmp_path):
    """What pytest says of TESTS under our conftest and settings."""
    (tmp_path / "test_given.py").write_text(TESTS)
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)

    def run(rehearse, *options):
        command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "POTSTILL_REHEARSE": rehearse}
        done = subprocess.run([*command, *options, str(tmp_path / "test_given.py")], env=environment, capture_output=True, text=True)
        return done.stdout

    return run


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["", "in workers"])
def test_a_warning_fails_what_runs_on_a_cpu_and_not_what_a_gpu_was_lent_for(options, ran):
    said = ran("1", *options)
    assert "FAILED" in said and "test_on_a_cpu - DeprecationWarning: a library is old" in said
    assert "1 failed, 2 passed" in said
    assert "rehearsal: 2 of 6 gpu tests, the smallest case of each and every implementation" in said


@pytest.mark.skipif(__import__("torch").cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_they_are_skipped_in_the_open(ran):
    said = ran("", "-rs")
    assert "1 failed, 6 skipped" in said and "needs a CUDA device" in said
