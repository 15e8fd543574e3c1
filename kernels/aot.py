"""Compile every kernel for sm_80 and sm_90 without a GPU: `python -m kernels.aot`. Spilled registers are a failure.

kernels/_aot.py lists the kernels in their shipped configurations. Triton compiles them here as it would on the device;
registers, shared memory and spills are read from the result with the cuobjdump of the triton package.
Where nvcc and the sources are present, csrc/*.cu are compiled too and ptxas reports the same numbers.
"""

import argparse
import importlib.util
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from potstill.kernels._aot import AotCase, cases
from potstill.kernels._triton import INSTALLED, triton

ARCHITECTURES = (80, 90)  # A100, and H100/H200
CSRC = Path(__file__).resolve().parent.parent / "csrc"


class Usage(NamedTuple):
    """The registers and shared memory of one kernel on one architecture. `problem` is empty, or the reason why it failed."""

    name: str
    arch: int
    registers: int
    shared: int  # bytes
    spilled: int  # bytes of registers kept in memory
    problem: str = ""


def tool(name: str) -> str:
    """A program of the CUDA toolkit that the triton package brings: cuobjdump, ptxas."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compile_case(case: AotCase, arch: int) -> dict[str, Any]:
    """PTX and machine code of a case."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(case.kernel, case.signature, case.constexprs, case.attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": case.num_warps, "maxnreg": case.maxnreg}).asm


def usage(case: AotCase, arch: int) -> Usage:
    """Compile a case and read what it takes."""
    try:
        code = compile_case(case, arch)
    except Exception as error:  # whatever the compiler raises is this case's result, and the others still run
        return Usage(case.name, arch, 0, 0, 0, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "a.cubin"
        cubin.write_bytes(code["cubin"])
        dump = _run(tool("cuobjdump"), "--dump-resource-usage", str(cubin))
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", dump)}
        # Local memory is spills or arrays, such as those of the cosine of a large angle: ptxas tells them apart.
        spilled = _spills(code["ptx"], Path(folder)) if numbers["STACK"] + numbers["LOCAL"] else 0
    problem = f"{spilled} bytes spilled" if spilled else ""
    return Usage(case.name, arch, numbers["REG"], numbers["SHARED"], spilled, problem)


def _spills(ptx: str, folder: Path) -> int:
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target
    (folder / "a.ptx").write_text(ptx)
    report = _run(tool("ptxas"), "-v", f"--gpu-name={target[1]}", str(folder / "a.ptx"), "-o", str(folder / "b.cubin"))
    return max(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _usage_of(job: tuple[str, int]) -> Usage:
    name, arch = job
    return usage(_cases_by_name()[name], arch)


@cache
def _cases_by_name() -> dict[str, AotCase]:
    return {case.name: case for case in cases()}


def _own_cache(folder: str) -> None:
    """Each process compiles into its own empty cache: what is reported was compiled now, and nobody else writes there."""
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)


def triton_usages(names: list[str], processes: int) -> Iterator[Usage]:
    """These cases on all architectures, compiled by this many fresh processes: a compiler does not survive a fork well."""
    jobs = [(name, arch) for name in names for arch in ARCHITECTURES]
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, spawn.Pool(processes, _own_cache, (folder,)) as pool:
        yield from pool.imap(_usage_of, jobs)


def parse_ptxas(output: str, arch: int, prefix: str) -> list[Usage]:
    """What `nvcc -Xptxas -v` says of each kernel."""
    usages = []
    for block in output.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", block)
        registers, shared = re.search(r"Used (\d+) registers", block), re.search(r"(\d+) bytes smem", block)
        assert name and registers, block
        of_kernel = re.split(r"Function properties for (?!\w*_kernel)", block)[0]  # and not of what it calls
        stack = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", of_kernel)]
        assert stack, block
        spilled = max(stack)
        problem = f"{spilled} bytes spilled" if spilled else ""
        smem = int(shared[1]) if shared else 0
        usages.append(Usage(f"{prefix}: {_readable(name[1])}", arch, int(registers[1]), smem, spilled, problem))
    return usages


def _readable(mangled: str) -> str:
    """`update_kernel<bfloat16, float>` out of a mangled name."""
    found = re.search(r"\d\d?([a-z_]+_kernel)(?:I(.*?)E+v?P)?", mangled)
    if found is None:
        return mangled
    words = {"f": "float", "Lb1": "true", "Lb0": "false", "BFloat16": "bfloat16", "Half": "half"}
    arguments = re.findall(r"BFloat16|Half|Li\d+|Lb[01]|S\d?_|(?<![a-z\d])f", (found[2] or "").replace("N3c10", ""))
    spelled: list[str] = []
    for a in arguments:
        spelled.append(words.get(a, a[2:] if a.startswith("Li") else spelled[0] if spelled else a))
    return f"{found[1]}<{', '.join(spelled)}>" if spelled else found[1]


def nvcc(source: Path, arch: int, cubin: Path) -> str:
    """Compile the device side of one .cu for one architecture; what ptxas has to say.

    Raises:
        RuntimeError: it does not compile.
    """
    command = ["nvcc", *_build_flags().nvcc_flags(), f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", str(source)]
    done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc, {source.name}, sm_{arch}: {done.stderr.strip().splitlines()[-1]}")
    return done.stderr


def _build_flags() -> ModuleType:
    """csrc/build_flags.py, which setup.py uses as well; it is no part of the installed package."""
    spec = importlib.util.spec_from_file_location("build_flags", CSRC / "build_flags.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc_usages(source: Path, arch: int) -> list[Usage]:
    """Compile one .cu for one architecture and read what its kernels take."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return parse_ptxas(nvcc(source, arch, Path(folder) / "a.cubin"), arch, source.name)
        except RuntimeError as error:
            return [Usage(source.name, arch, 0, 0, 0, str(error))]


def table(usages: list[Usage]) -> str:
    width = max(len(u.name) for u in usages)
    lines = [f"{'kernel':{width}}  arch  registers  shared  spilled"]
    for u in usages:
        numbers = f"{u.registers:8}  {u.shared:6}  {u.spilled:7}"
        lines.append(f"{u.name:{width}}  sm_{u.arch}  {numbers}  {u.problem}".rstrip())
    return "\n".join(lines)


def main(processes: int = 2) -> int:
    if not INSTALLED:
        print("error: kernels.aot wants triton >= 3.6, which compiles the kernels, got none: pip install triton", file=sys.stderr)
        return 2
    start = time.perf_counter()
    usages = list(triton_usages([case.name for case in cases()], processes))
    sources = sorted(CSRC.glob("*.cu"))
    if shutil.which("nvcc") and sources:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            for found in pool.starmap(nvcc_usages, [(s, a) for s in sources for a in ARCHITECTURES]):
                usages += found
    print(table(usages))
    if not shutil.which("nvcc"):
        print("csrc/*.cu not checked: no nvcc on PATH")
    elif not sources:
        print(f"csrc/*.cu not checked: no sources in {CSRC}")
    failed = [u for u in usages if u.problem]
    for u in failed:  # once more at the end, where a log is cut last
        print(f"FAILED {u.name} for sm_{u.arch}: {u.problem}")
    print(f"{len(usages)} compiled in {time.perf_counter() - start:.0f} s, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__).parse_args()
    sys.exit(main())
