"""How csrc/ is compiled: what setup.py, kernels/aot.py and the tests share. Imports nothing of ours."""

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = sorted(HERE.glob("*.cu"))
CPU_SOURCES, LOOPS = sorted(HERE.glob("*_cpu.cpp")), sorted(HERE.glob("*_loops.cpp"))

#: Only what PyTorch 2.10 offered, so that one binary loads into every PyTorch since.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020a000000000000"

_AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512vl"
#: Instructions that the loops for CPUs are compiled for, each a table in their header; the machine's own are chosen at run time.
LEVELS = {"any": ""}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"avx2": "-mavx2 -mfma", "avx512": _AVX512, "avx512_bf16": f"{_AVX512} -mavx512bf16"}


def ninja() -> str | None:
    """The program: on PATH, or what the package of that name brought to this Python."""
    if found := shutil.which("ninja"):
        return found
    if importlib.util.find_spec("ninja") is None:
        return None
    from ninja import BIN_DIR

    return shutil.which("ninja", path=BIN_DIR)


def torch_folder() -> Path:
    """Where PyTorch is installed. Found without importing it.

    Raises:
        RuntimeError: it is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("wanted an installed PyTorch, whose headers csrc/ includes, got none")
    return Path(spec.origin).parent


def nvcc_flags(headers: Path | None = None) -> list[str]:
    """Everything but architectures, input and output. USE_CUDA shows the stream functions of the stable ABI.

    `headers` is the include folder of a PyTorch, by default of the installed one.
    """
    return ["-std=c++20", "-O3", "-DUSE_CUDA", TARGET_VERSION, *_include(headers), "-Xcompiler", "-fPIC"]


def cpu_flags(headers: Path | None = None) -> list[str]:
    """The same for the C++ compiler."""
    # psabi: vectors are never passed between files. uninitialized: GCC 12 finds it in its own header of intrinsics.
    warnings = "-Wall -Wextra -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized"
    # A square root that sets errno for a negative number is no vector's.
    return ["-std=c++20", "-O3", "-fno-math-errno", "-fPIC", *warnings.split(), TARGET_VERSION, *_include(headers)]


def _include(headers: Path | None) -> list[str]:
    return ["-isystem", str(headers or torch_folder() / "include")]


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


def cpu_objects() -> dict[str, tuple[Path, str]]:
    """What each object for CPUs is compiled from, and its own flags: the ops once, the loops once for each of LEVELS."""
    levels = [(name, f"-DLEVEL=LEVEL_{name} {more}") for name, more in LEVELS.items()]
    objects = {f"{source.stem}_{name}.o": (source, more) for source in LOOPS for name, more in levels}
    return objects | {f"{source.stem}.o": (source, "") for source in CPU_SOURCES}


def cpu_ninja_file(output: Path, compiler: str) -> str:
    """The same as cuda_ninja_file for CPUs, with a C++ compiler."""
    shared = "-bundle -undefined dynamic_lookup" if platform.system() == "Darwin" else "-shared"
    compile_, link = f"{compiler} {' '.join(cpu_flags())}", f"{compiler} {shared}"
    return _ninja_file(compile_, link, cpu_objects(), output, ["torch_cpu", "c10"])


def cpu_compiler() -> str:
    """The C++ compiler: CXX in the environment, or c++."""
    return os.environ.get("CXX") or "c++"


def _ninja_file(compile_: str, link: str, objects: dict[str, tuple[Path, str]], output: Path, libraries: Iterable[str]) -> str:
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


def first_error(said: str) -> str:
    """The line of a compiler's or linker's output that says what is wrong first."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"\berror\b|not found|cannot find|undefined|fatal", line, re.IGNORECASE)]
    return (named or lines or ["no word why"])[0]


def what_failed(ninja_said: str) -> str:
    """What ninja could not make, and its first error: "csrc/adam_ema.cu does not compile (…)", "the link fails (…)"."""
    block = r"^FAILED: .*\n(.*)\n((?s:.*?))(?=^\[\d+/\d+\] |^FAILED: |^ninja: |\Z)"  # the command, what it said
    failed = re.search(block, ninja_said, re.MULTILINE)
    if failed is None:
        return f"ninja fails ({first_error(ninja_said)})"
    command, said = failed.groups()
    source = re.search(r" -c (\S+) -o ", command)
    what = f"csrc/{Path(source[1]).name} does not compile" if source else "the link fails"
    return f"{what} ({first_error(said)})"
