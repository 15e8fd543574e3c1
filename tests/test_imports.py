"""`kernels` is also a package of Hugging Face's: ours must win, and importing it must stay cheap and alone."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_kernels_is_ours():
    import kernels

    assert Path(kernels.__file__).parent == ROOT / "kernels"


def test_kernels_bring_nothing_but_torch_and_triton():
    """Somebody who only wants a loss does not load an engine."""
    code = (
        "import sys, torch; before = set(sys.modules); import kernels;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} & {'engine','numpy','hydra','PIL','scipy','sklearn'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_begins_without_what_only_its_end_wants():
    """Plots, Fréchet and kernel distances: seconds of imports, and packages that may be broken where nobody asks for them."""
    code = (
        "import sys, engine.train, engine.rehearsal;"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'scipy', 'torchmetrics', 'matplotlib', 'sklearn', 'tensorboard', 'pandas'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
