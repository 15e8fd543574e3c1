"""Compiles csrc/: for CPUs into potstill/kernels/_cpu.so where a C++ compiler is found, for GPUs into _cuda.so beside it where
nvcc and a PyTorch with CUDA are. What is not there or does not compile is said in one sentence and runs as PyTorch's own
operations, or as Triton. pip shows that sentence with -v. An editable installation compiles into the checkout, where
potstill/kernels is a link to kernels/; a wheel holds what it was built with.

PyTorch is not a build requirement, so it is seen only without build isolation: `pip install -e . --no-build-isolation`.
POTSTILL_CUDA=1 makes a missing _cuda.so an error. POTSTILL_NO_CUDA=1 and POTSTILL_NO_CPU=1 leave one out.
POTSTILL_CUDA_ARCHS ("80 90" by default) lists the compute capabilities.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_flags  # noqa: E402


def why_no_cpu() -> str | None:
    """What is missing for compiling csrc/*.cpp, or None."""
    if os.environ.get("POTSTILL_NO_CPU") == "1":
        return "POTSTILL_NO_CPU=1"
    if shutil.which(build_flags.cpu_compiler().split()[0]) is None:
        return f"no {build_flags.cpu_compiler()} on PATH"
    if build_flags.ninja() is None:
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
    if build_flags.ninja() is None:
        return "no ninja"
    if importlib.util.find_spec("torch") is None:
        return "no PyTorch importable (without --no-build-isolation pip hides an installed one)"
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library it links against is not there
        return f"PyTorch does not import ({build_flags.first_error(str(error))})"
    return None if torch.version.cuda else f"PyTorch {torch.__version__} is without CUDA"


class Part(NamedTuple):
    """A shared library of csrc/: what is missing for compiling it, what happens without it, what else one can do."""

    missing: str | None
    instead: str
    advice: str
    sources: list[Path]


def archs() -> list[int]:
    """The compute capabilities to compile for."""
    given = os.environ.get("POTSTILL_CUDA_ARCHS", "80 90")
    if not re.fullmatch(r"\s*\d+(\s+\d+)*\s*", given):
        raise SystemExit(f'potstill: POTSTILL_CUDA_ARCHS wants compute capabilities such as "80 90", got "{given}".')
    return [int(arch) for arch in given.split()]


def go_without(name: str, why: str, advice: str = "") -> None:
    """Says so in one sentence: an error where POTSTILL_CUDA=1 insists on the CUDA part."""
    if name == "potstill.kernels._cuda" and os.environ.get("POTSTILL_CUDA") == "1":
        raise SystemExit(f"potstill: POTSTILL_CUDA=1 wants {name} compiled, but {why}: nothing is installed.")
    print(f"potstill: {name} is not compiled, {why}; {wanted[name].instead}{advice}.", file=sys.stderr)


def file_of(name: str) -> str:
    """Where a part lies, below the folder of the packages. Of the stable ABI: for every Python, and loaded by PyTorch."""
    return name.replace(".", os.sep) + ".so"


def run_ninja(folder: Path) -> str | None:
    """Why the build.ninja in `folder` fails, or None. What the compilers say is passed on as it comes."""
    program = build_flags.ninja()
    assert program is not None
    try:
        process = subprocess.Popen(
            [program, "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        return f"ninja does not run ({error})"
    said = ""
    with process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            said += line
    return build_flags.what_failed(said) if process.returncode else None


class Build(build_ext):
    """Hands the sources to the compiler through ninja. What does not compile is left out, an earlier build's file with it."""

    def get_ext_filename(self, fullname: str) -> str:
        return file_of(fullname)

    def run(self) -> None:
        self.of_checkout = self.inplace  # setuptools hides it while it compiles
        super().run()

    def build_extensions(self) -> None:
        failed = {extension.name: why for extension in self.extensions if (why := self.compile(extension.name))}
        for name, why in failed.items():
            go_without(name, why, f" ({wanted[name].advice})")
        for name in failed:
            (Path(self.build_lib) / file_of(name)).unlink(missing_ok=True)
            if self.of_checkout:
                (ROOT / file_of(name)).unlink(missing_ok=True)
        self.extensions = [extension for extension in self.extensions if extension.name not in failed]

    def compile(self, name: str) -> str | None:
        """Why this one fails, or None."""
        output = Path(self.get_ext_fullpath(name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        if name == "potstill.kernels._cpu":
            text = build_flags.cpu_ninja_file(output, build_flags.cpu_compiler())
        else:
            text = build_flags.cuda_ninja_file(output, archs=archs())
        (folder / "build.ninja").write_text(text)
        return run_ninja(folder)


class Modules(build_py):
    """Takes away what an earlier build left, or one in the checkout compiled that this one has not the tools for: a wheel would
    take it along, `kernels` and `engine` at its top where that build was of an older potstill, and it would be loaded without a word.
    """

    def run(self) -> None:
        for package in ("potstill", "kernels", "engine"):
            shutil.rmtree(Path(self.build_lib) / package, ignore_errors=True)
        super().run()
        for name, part in wanted.items():
            if part.missing and self.editable_mode:
                (ROOT / file_of(name)).unlink(missing_ok=True)


class Source(sdist):
    """A source distribution holds csrc/ whether or not it can be compiled where it is made, and no tests: setuptools adds
    tests/test*.py, which are nothing without the files beside them."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        sources = {str(file) for file in Path("csrc").iterdir() if file.is_file()}
        packaged = {file for file in files if not file.startswith(f"tests{os.sep}")}
        super().make_release_tree(base_dir, sorted(packaged | sources))


if (ROOT / "potstill" / "kernels").is_file():
    raise SystemExit(
        "potstill: potstill/kernels is a text file and no link, git has made this checkout without symbolic links: "
        "allow them (on Windows: developer mode), then git config core.symlinks true && git checkout -- potstill."
    )

wanted = {
    "potstill.kernels._cpu": Part(
        why_no_cpu(),
        "norms, 3x3 convolutions and AdamEMA on CPUs run as PyTorch's own operations",
        "POTSTILL_NO_CPU=1 leaves it out",
        sorted(Path("csrc").glob("*.cpp")),
    ),
    "potstill.kernels._cuda": Part(
        why_no_cuda(),
        "the kernels run as Triton",
        "POTSTILL_CUDA=1 makes this an error, POTSTILL_NO_CUDA=1 leaves it out",
        sorted(Path("csrc").glob("*.cu")),
    ),
}
if {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv):
    for name, part in wanted.items():
        if part.missing:
            go_without(name, part.missing)

setup(
    ext_modules=[Extension(name, [str(s) for s in part.sources]) for name, part in wanted.items() if not part.missing],
    cmdclass={"build_ext": Build, "build_py": Modules, "sdist": Source},
)
