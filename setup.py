"""Compiles csrc/ into kernels/_cuda.so where nvcc and a PyTorch with CUDA are found; elsewhere all of it is Python.

PyTorch is not a build requirement, so it is seen only without build isolation: `pip install -e . --no-build-isolation`.
POTSTILL_CUDA_ARCHS ("80 90" by default) lists the compute capabilities; POTSTILL_NO_CUDA=1 asks for pure Python.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_flags  # noqa: E402


def why_not() -> str | None:
    """What is missing for compiling csrc/, or None."""
    if os.environ.get("POTSTILL_NO_CUDA") == "1":
        return "POTSTILL_NO_CUDA=1"
    for tool in ("nvcc", "ninja"):
        if shutil.which(tool) is None:
            return f"no {tool} on PATH"
    try:
        import torch
    except ImportError:
        return "no PyTorch importable (without --no-build-isolation pip hides an installed one)"
    return None if torch.version.cuda else f"PyTorch {torch.__version__} is without CUDA"


class BuildCuda(build_ext):
    """Hands the sources to nvcc through ninja."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # the stable ABI: for every Python, and loaded by PyTorch

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        archs = [int(arch) for arch in os.environ.get("POTSTILL_CUDA_ARCHS", "80 90").split()]
        text = build_flags.ninja_file(output, archs=archs, libraries=["torch_cpu", "torch_cuda", "c10"])
        (folder / "build.ninja").write_text(text)
        subprocess.run(["ninja", "-C", str(folder)], check=True)


missing = why_not()
if missing and {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv):
    print(f"potstill: csrc/ is not compiled, {missing}; the kernels run as Triton.", file=sys.stderr)

sources = [str(source.relative_to(ROOT)) for source in build_flags.SOURCES]
setup(
    ext_modules=[] if missing else [Extension("kernels._cuda", sources=sources)],
    cmdclass={"build_ext": BuildCuda},
)
