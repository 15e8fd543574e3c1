"""Compiles csrc/: for CPUs into kernels/_cpu.so where a C++ compiler is found, for GPUs into kernels/_cuda.so where nvcc and
a PyTorch with CUDA are. What is not compiled runs as PyTorch's own operations, or as Triton.

PyTorch is not a build requirement, so it is seen only without build isolation: `pip install -e . --no-build-isolation`.
POTSTILL_CUDA_ARCHS ("80 90" by default) lists the compute capabilities; POTSTILL_NO_CUDA=1 and POTSTILL_NO_CPU=1 leave one out.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_flags  # noqa: E402


def ninja() -> str | None:
    """The program: on PATH, or what the package of that name brought to this Python."""
    if found := shutil.which("ninja"):
        return found
    if importlib.util.find_spec("ninja") is None:
        return None
    from ninja import BIN_DIR

    return shutil.which("ninja", path=BIN_DIR)


def why_no_cpu() -> str | None:
    """What is missing for compiling csrc/*.cpp, or None."""
    if os.environ.get("POTSTILL_NO_CPU") == "1":
        return "POTSTILL_NO_CPU=1"
    if shutil.which(build_flags.cpu_compiler().split()[0]) is None:
        return f"no {build_flags.cpu_compiler()} on PATH"
    if ninja() is None:
        return "no ninja"
    if importlib.util.find_spec("torch") is None:
        return "no PyTorch importable (without --no-build-isolation pip hides an installed one)"
    return None


def why_no_cuda() -> str | None:
    """What is missing for compiling csrc/*.cu, or None."""
    if os.environ.get("POTSTILL_NO_CUDA") == "1":
        return "POTSTILL_NO_CUDA=1"
    if shutil.which("nvcc") is None:
        return "no nvcc on PATH"
    if ninja() is None:
        return "no ninja"
    try:
        import torch
    except ImportError:
        return "no PyTorch importable (without --no-build-isolation pip hides an installed one)"
    return None if torch.version.cuda else f"PyTorch {torch.__version__} is without CUDA"


class Build(build_ext):
    """Hands the sources to the compiler through ninja."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # the stable ABI: for every Python, and loaded by PyTorch

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        if ext.name == "kernels._cpu":
            text = build_flags.cpu_ninja_file(output, build_flags.cpu_compiler())
        else:
            archs = [int(arch) for arch in os.environ.get("POTSTILL_CUDA_ARCHS", "80 90").split()]
            text = build_flags.cuda_ninja_file(output, archs=archs)
        (folder / "build.ninja").write_text(text)
        program = ninja()
        assert program is not None
        done = subprocess.run([program, "-C", str(folder)])
        if done.returncode:
            which = "CPU" if ext.name == "kernels._cpu" else "CUDA"
            raise SystemExit(f"potstill: csrc/ does not compile (above). POTSTILL_NO_{which}=1 installs without that part.")


class Source(sdist):
    """A source distribution holds csrc/ whether or not it can be compiled where it is made."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        sources = {str(file) for file in Path("csrc").iterdir() if file.is_file()}
        super().make_release_tree(base_dir, sorted({*files, *sources}))


wanted = {
    "kernels._cpu": (why_no_cpu(), "norm_silu on CPUs runs as PyTorch's own operations", sorted(Path("csrc").glob("*.cpp"))),
    "kernels._cuda": (why_no_cuda(), "the kernels run as Triton", sorted(Path("csrc").glob("*.cu"))),
}
if {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv):
    for name, (missing, instead, _) in wanted.items():
        if missing:
            print(f"potstill: {name} is not compiled, {missing}; {instead}.", file=sys.stderr)

setup(
    ext_modules=[Extension(name, [str(s) for s in sources]) for name, (missing, _, sources) in wanted.items() if not missing],
    cmdclass={"build_ext": Build, "sdist": Source},
)
