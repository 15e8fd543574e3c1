"""`kernels` is also a package of Hugging Face's: ours must win, and importing it must stay cheap and alone."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_kernels_is_ours():
    import kernels

    assert Path(kernels.__file__).parent == ROOT / "kernels"


def brought(imports: str, before: str, of: set[str]) -> str:
    """Which packages `imports` loads that are not there after `before`."""
    code = f"import sys, {before}; before = set(sys.modules); import {imports}; print(sorted({{m.split('.')[0] for m in set(sys.modules) - before}} & {of}))"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_kernels_bring_nothing_but_torch_and_triton():
    """Somebody who only wants a loss does not load an engine."""
    assert brought("kernels", "torch", {"engine", "numpy", "hydra", "PIL", "scipy", "sklearn"}) == "[]"


def test_a_run_begins_without_what_only_its_end_wants():
    """Plots, Fréchet and kernel distances: seconds of imports, and packages that may be broken where nobody asks for them."""
    assert brought("engine.train", "sys", {"scipy", "torchmetrics", "matplotlib", "sklearn", "tensorboard", "pandas"}) == "[]"
