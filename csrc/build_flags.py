"""How csrc/*.cu are compiled: the flags that setup.py, kernels/aot.py and the tests share. Imports nothing of ours."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

SOURCES = sorted(Path(__file__).parent.glob("*.cu"))

#: Only what PyTorch 2.10 offered, so that one binary loads into every PyTorch since.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def torch_folder() -> Path:
    """Where PyTorch is installed. Found without importing it.

    Raises:
        RuntimeError: it is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("wanted an installed PyTorch, whose headers csrc/ includes, got none")
    return Path(spec.origin).parent


def nvcc_flags() -> list[str]:
    """Everything but architectures, input and output. USE_CUDA shows the stream functions of the stable ABI."""
    headers = ["-isystem", str(torch_folder() / "include")]
    return ["-std=c++20", "-O3", "-DUSE_CUDA", TARGET_VERSION, *headers, "-Xcompiler", "-fPIC"]


def arch_flags(archs: Iterable[int], *, ptx: bool = False) -> list[str]:
    """Machine code for each compute capability (80, 90); `ptx`: for newer ones too, compiled when first loaded."""
    archs = list(archs)
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return flags + ([f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"] if ptx else [])


def ninja_file(output: Path, *, archs: Iterable[int], libraries: Iterable[str]) -> str:
    """The text of a build.ninja that compiles SOURCES with nvcc and links them into `output`."""
    flags = " ".join([*nvcc_flags(), *arch_flags(archs, ptx=True)])
    # The CUDA runtime is linked in: it then does not matter which one PyTorch brought.
    link = " ".join([f"-L{torch_folder() / 'lib'}", *(f"-l{name}" for name in libraries)])
    lines = [
        "rule compile",
        f"  command = nvcc {flags} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = nvcc -shared $in -o $out {link}",
        *(f"build {source.stem}.o: compile {source}" for source in SOURCES),
        f"build {output}: link {' '.join(f'{source.stem}.o' for source in SOURCES)}",
        f"default {output}",
    ]
    return "\n".join(lines) + "\n"
