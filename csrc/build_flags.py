"""How csrc/ is compiled: what setup.py, kernels/aot.py and the tests share. Imports nothing of ours."""

import importlib.util
import os
import platform
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = sorted(HERE.glob("*.cu"))
CPU_SOURCE, LOOPS = HERE / "norm_silu_cpu.cpp", HERE / "norm_silu_loops.cpp"

#: Only what PyTorch 2.10 offered, so that one binary loads into every PyTorch since.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020a000000000000"

_AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512vl"
#: Instructions that the loops for CPUs are compiled for, each a table in norm_silu_loops.h; the machine's own are chosen at run time.
LEVELS = {"any": ""}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"avx2": "-mavx2 -mfma", "avx512": _AVX512, "avx512_bf16": f"{_AVX512} -mavx512bf16"}


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


def cuda_ninja_file(output: Path, *, archs: Iterable[int]) -> str:
    """The text of a build.ninja that compiles SOURCES with nvcc and links them into `output`."""
    flags = " ".join([*nvcc_flags(), *arch_flags(archs, ptx=True)])
    # The CUDA runtime is linked in: it then does not matter which one PyTorch brought.
    objects = {f"{source.stem}.o": (source, "") for source in SOURCES}
    return _ninja_file(f"nvcc {flags}", "nvcc -shared", objects, output, ["torch_cpu", "torch_cuda", "c10"])


def cpu_ninja_file(output: Path, compiler: str) -> str:
    """The same for CPUs, with a C++ compiler: the ops once, the loops once for each of LEVELS."""
    # psabi: vectors are never passed between files. uninitialized: GCC 12 finds it in its own header of intrinsics.
    warnings = "-Wall -Wextra -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized"
    flags = f"-std=c++20 -O3 -fPIC {warnings} {TARGET_VERSION} -isystem {torch_folder() / 'include'}"
    objects = {f"loops_{name}.o": (LOOPS, f"-DLEVEL=LEVEL_{name} {more}") for name, more in LEVELS.items()}
    objects[f"{CPU_SOURCE.stem}.o"] = (CPU_SOURCE, "")
    shared = "-bundle -undefined dynamic_lookup" if platform.system() == "Darwin" else "-shared"
    return _ninja_file(f"{compiler} {flags}", f"{compiler} {shared}", objects, output, ["torch_cpu", "c10"])


def cpu_compiler() -> str:
    """The C++ compiler: CXX in the environment, or c++."""
    return os.environ.get("CXX", "c++")


def _ninja_file(
    compile_: str, link: str, objects: dict[str, tuple[Path, str]], output: Path, libraries: Iterable[str]
) -> str:
    search = " ".join([f"-L{torch_folder() / 'lib'}", *(f"-l{name}" for name in libraries)])
    lines = [
        "rule compile",
        f"  command = {compile_} $more -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link} $in -o $out {search}",
    ]
    for name, (source, more) in objects.items():
        lines += [f"build {name}: compile {source}", f"  more = {more}"]
    return "\n".join([*lines, f"build {output}: link {' '.join(objects)}", f"default {output}"]) + "\n"
