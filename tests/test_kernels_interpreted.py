"""The Triton kernels themselves on the CPU: the cases of the other files once more, under TRITON_INTERPRET=1.

Without it those files test what CPU tensors get in daily life, plain PyTorch.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import needs_triton

from potstill.kernels._lib import check_interpreter

HERE = Path(__file__).parent
#: Finite differences through an interpreter take minutes, and the float64 cases hold the kernels to the reference.
LEFT_OUT = "not gradcheck and not divergence and not bad_input and not module"


@needs_triton
@pytest.mark.parametrize(
    "op", ["score_match", "score_implicit", "denoise", "moments", "trajectory", "adversarial", "noising", "mp", "mp_weights"]
)
def test_under_the_interpreter(op):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"test_kernels_{op}.py",
        "-k",
        LEFT_OUT,
        "-m",
        "not gpu",
    ]
    # numpy warns where a GPU would not: the left-out samples are NaN on purpose
    command += ["-W", "ignore::RuntimeWarning"]
    done = subprocess.run(command, cwd=HERE, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize(("triton", "numpy", "works"), [("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True), ("3.6.0", "2.4.0", False)])
def test_a_pair_that_cannot_interpret_is_named(triton, numpy, works):
    if works:
        return check_interpreter(triton, numpy)
    with pytest.raises(ImportError, match=r"wants triton >= 3\.6, got none: pip install triton, or unset TRITON_INTERPRET"):
        check_interpreter(None, numpy)
    with pytest.raises(ImportError, match=r"wants triton >= 3\.7 or numpy < 2\.4, got triton 3\.6\.0 and numpy 2\.4\.0"):
        check_interpreter(triton, numpy)
