"""Compiles csrc/ against the headers of the oldest, the pinned and the newest PyTorch: `make csrc-torches`. No GPU needed.

    python csrc/torches.py [oldest] [pinned] [newest] [--newest 2.14.1]

The oldest is pyproject.toml's, the pinned constraints.txt's, the newest what pip's index has. Headers come out of the wheel for
macOS: with the same headers it is the smallest, about 100 MB, and only its include folder is kept, in build/torch-headers, so
that a second run needs no network. Nothing is linked: that takes a PyTorch for this machine, and an installation does it.
Exit code 1: something does not compile, or spills registers. 2: no headers to compile against, or no compiler.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "csrc")]
import build_flags  # noqa: E402

from potstill.kernels import aot  # noqa: E402

KEPT = ROOT / "build" / "torch-headers"
PLATFORM = "macosx_26_0_arm64"  # and every earlier one


class NoHeaders(Exception):
    """Why there is nothing to compile against."""


def oldest() -> str:
    """The lowest version that pyproject.toml takes."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (found,) = [match[1] for need in wanted if (match := re.fullmatch(r"torch>=([\d.]+)", need))]
    return found


def pinned() -> str:
    """The version in constraints.txt."""
    found = re.search(r"^torch==([\d.]+) ", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def newest() -> str:
    """The highest version in pip's index; without a network the highest whose headers are kept."""
    try:
        found = re.match(r"torch \(([\d.]+)", pip("index", "versions", "torch"))
        assert found
        return found[1]
    except NoHeaders:
        versions = sorted(map(number, kept()))
        if not versions or versions[-1] < number(pinned()):
            raise
        found = ".".join(map(str, versions[-1]))
        print(f"pip's index does not answer: torch {found}, the highest in {KEPT}, is taken for the newest", file=sys.stderr)
        return found


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def kept() -> list[str]:
    """The versions whose headers are here."""
    return [folder.name for folder in KEPT.glob("*") if re.fullmatch(r"[\d.]+", folder.name)]


def pip(*words: str) -> str:
    """What pip prints.

    Raises:
        NoHeaders: it refuses, or there is no network.
    """
    command = [sys.executable, "-m", "pip", *words, "--disable-pip-version-check", "--retries", "1", "--timeout", "30"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = r"^(?:ERROR: (?!ResolutionImpossible)(.*)|\s+The user (requested \(constraint\) .*))"
        reasons = re.findall(reason, done.stderr + done.stdout, re.MULTILINE)
        why = "; ".join(error or constraint for error, constraint in reasons) or done.stderr.strip() or "no word why"
        raise NoHeaders(f"pip {words[0]} {words[-1]} failed: {why}")
    return done.stdout


def headers(version: str) -> Path:
    """The include folder of this PyTorch, downloaded where it is not kept.

    Raises:
        NoHeaders: there is none to be had.
    """
    folder = KEPT / version
    if not folder.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as scratch:
            wheel = ["--no-deps", "--only-binary=:all:", "--platform", PLATFORM, "-d", scratch, f"torch=={version}"]
            pip("download", *wheel)
            (archive,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(archive) as opened:
                names = [name for name in opened.namelist() if name.startswith("torch/include/")]
                opened.extractall(scratch, names)
            os.replace(Path(scratch) / "torch", folder)
    return folder / "include"


def compiler_says(command: list[str], folder: str) -> str:
    """Runs a compiler, output to a file in `folder`.

    Raises:
        RuntimeError: the first error it names.
    """
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".o") as output:
        done = subprocess.run([*command, "-o", output.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(build_flags.first_error(done.stdout + done.stderr))
    return done.stderr


def cuda_usages(version: str, source: Path, folder: str) -> list[aot.Usage]:
    """Compiles one .cu, its host side too, against this PyTorch; what its kernels take on each architecture."""
    name = f"torch {version} {source.name}"
    flags = [*build_flags.nvcc_flags(headers(version)), *build_flags.arch_flags(aot.ARCHITECTURES)]
    try:
        said = compiler_says(["nvcc", *flags, "-Xptxas", "-v", "-c", str(source)], folder)
    except RuntimeError as error:
        return [aot.Usage(name, arch, 0, 0, 0, str(error)) for arch in aot.ARCHITECTURES]
    return [usage for arch in aot.ARCHITECTURES for usage in aot.parse_ptxas(of_arch(said, arch), arch, name)]


def of_arch(said: str, arch: int) -> str:
    """The part of ptxas's report that is about this architecture."""
    blocks = re.split(r"(?=Compiling entry function)", said)
    return "".join(block for block in blocks if re.match(rf"Compiling entry function '\w+' for 'sm_{arch}'", block))


def cpu_problems(version: str, object_: str, folder: str) -> list[str]:
    """Compiles one object for CPUs against this PyTorch; what is wrong, if anything."""
    source, more = build_flags.cpu_objects()[object_]
    flags = [*build_flags.cpu_flags(headers(version)), *more.split()]
    try:
        compiler_says([*build_flags.cpu_compiler().split(), *flags, "-c", str(source)], folder)
    except RuntimeError as error:
        return [f"torch {version} {object_}: {error}"]
    return []


def check(versions: list[str], processes: int) -> int:
    """Compiles everything against each version and prints what it takes; how many failed."""
    largest_first = sorted(build_flags.SOURCES, key=lambda source: -source.stat().st_size)
    pairs = [(version, source) for source in largest_first for version in versions]
    objects = [(version, object_) for version in versions for object_ in build_flags.cpu_objects()]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        cuda = [pool.submit(cuda_usages, *pair, folder) for pair in pairs]
        cpu = [pool.submit(cpu_problems, *pair, folder) for pair in objects]
        usages = sorted((usage for future in cuda for usage in future.result()), key=lambda u: versions.index(u.name.split()[1]))
        problems = [problem for future in cpu for problem in future.result()]
    print(aot.table(usages))
    problems += [f"{u.name} for sm_{u.arch}: {u.problem}" for u in usages if u.problem]
    for version in versions:
        of_version = [u for u in usages if u.name.split()[1] == version]
        failed = sum(problem.split()[1] == version for problem in problems)
        most = f"at most {max(u.registers for u in of_version)} registers, {max(u.spilled for u in of_version)} bytes spilled"
        print(
            f"torch {version}: {len(of_version) // len(aot.ARCHITECTURES)} kernels, {most}; {len(build_flags.cpu_objects())} objects for CPUs; {failed} failed"
        )
    for problem in problems:
        print(f"FAILED {problem}")
    return len(problems)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Compiles csrc/ against the headers of several PyTorch versions.")
    choices: dict[str, Callable[[], str]] = {"oldest": oldest, "pinned": pinned, "newest": newest}
    parser.add_argument("which", nargs="*", metavar="oldest|pinned|newest", help="all three by default")
    parser.add_argument("--newest", metavar="VERSION", help="what is taken for the newest, in place of pip's answer")
    given = parser.parse_args(arguments)
    if unknown := set(given.which) - set(choices):
        parser.error(f"wanted oldest, pinned or newest, got {' '.join(sorted(unknown))}")
    for program in ("nvcc", build_flags.cpu_compiler().split()[0]):
        if shutil.which(program) is None:
            print(f"csrc/torches.py wants {program} on PATH, got none", file=sys.stderr)
            return 2
    start = time.perf_counter()
    try:
        asked = [given.newest if which == "newest" and given.newest else choices[which]() for which in given.which or choices]
        versions = sorted(set(asked), key=number)
        for version in versions:
            headers(version)
    except NoHeaders as error:
        print(f"csrc/torches.py wants the headers of PyTorch and has none to compile against: {error}", file=sys.stderr)
        return 2
    fetched = time.perf_counter()
    failed = check(versions, processes=os.cpu_count() or 1)
    print(f"headers in {fetched - start:.0f} s, compiled in {time.perf_counter() - fetched:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
