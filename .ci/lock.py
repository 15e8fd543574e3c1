"""Writes constraints.txt anew, the lock of everything that `make` installs: `make lock`, a network, half a minute.

    make lock                       # what pyproject.toml asks for now; versions stay where they can
    make lock NEWER="ruff numpy"    # and these as new as the rest allows, NEWER=all everything but PyTorch
    make lock NEWER=torch==2.14.1   # and another PyTorch

uv resolves once for every Python, system and processor, and lists the hashes of all files of a version. PyTorch's builds for Linux
without CUDA are on its own index; where that is out of reach their hashes stay as they were, as long as the version does.

They are a paragraph of their own since pip, once it is told to check hashes, prefers files whose index names a hash: a CPU build in
a folder (PIP_FIND_LINKS) would lose to PyPI's CUDA build, if their hashes stood side by side.
"""

import re
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BUILD = ["setuptools>=77", "ninja>=1.11"]  # what builds our own package and those that come as source

HEAD = """\
# The lock: exact versions of everything that `make` installs, with the hashes of their files for Python 3.11 to 3.14 on Linux,
# macOS and Windows. `make lock` writes it (.ci/lock.py); the Makefile installs it by paragraphs, with pip's --require-hashes: a
# file that is not listed here is refused.
#
# PyPI's PyTorch for Linux is built with CUDA and wants gigabytes of libraries, the last paragraph. A machine without a GPU needs
# none of them: where pip's indexes offer the CPU build, that is taken (export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu).
"""
PARAGRAPHS = {
    "build": "before all else, some of which comes as source",
    "cpu": "PyTorch without CUDA, for Linux, where pip finds one",
    "run": "potstill, its tests and the demo",
    "diffusers": "`make diffusers`, the extra of that name",
    "lint": "`make lint`",
    "docs": "`make docs`",
    "cuda": "what PyPI's PyTorch for Linux asks for besides, and no other",
}


def resolved(lock: str, *options: str, requirements: list[str]) -> str:
    """The lines that pip wants of every package that uv resolves these to; versions are those of `lock` where they can be."""
    with tempfile.TemporaryDirectory() as folder:
        given, got = Path(folder) / "requirements.in", Path(folder) / "requirements.txt"
        given.write_text("\n".join(requirements))
        got.write_text(re.sub(r"( \\)?\n +--hash=\S+", "", lock))  # without hashes, which uv would take for all there are
        command = [sys.executable, "-m", "uv", "pip", "compile", "-q", str(given), "-o", str(got)]
        command += ["--universal", "--python-version", "3.11", "--fork-strategy", "fewest", "--no-config"]
        command += ["--generate-hashes", "--no-header", "--no-annotate", *options]
        subprocess.run(command, cwd=ROOT, check=True)
        return got.read_text()


def packages(text: str) -> dict[str, str]:
    """The entries of a requirements file by what they begin with, a name and a version."""
    return {entry.split()[0]: entry for entry in re.findall(r"^\S+==.*(?:\n .*)*", text, re.MULTILINE)}


def cpu_builds(torch: str, before: dict[str, str]) -> str:
    """The entry of PyTorch's CPU builds of this version. `before` is the present lock."""
    exact = f"torch=={torch}+cpu"
    try:
        text = resolved("", "--no-deps", "--default-index", CPU_INDEX, requirements=[f"{exact}; sys_platform == 'linux'"])
        return packages(text)[exact]
    except subprocess.CalledProcessError:
        if exact not in before:
            sys.exit(f"make lock wants the hashes of {exact} from {CPU_INDEX}, which does not answer.")
        print(f"{CPU_INDEX} does not answer: the hashes of {exact} stay as they were.", file=sys.stderr)
        return before[exact]


def paragraphs(package: str, wanted: dict[str, dict[str, str]]) -> list[str]:
    """Those that a package stands in; `wanted` are the packages of each extra that has one, and of "run", which all begin with."""
    if package.startswith(("setuptools==", "ninja==")):
        return ["build"]
    if package.startswith(("nvidia-", "cuda-")):
        return ["cuda"]
    return ["run"] if package in wanted["run"] else [title for title, packages in wanted.items() if package in packages]


def main(newer: list[str]) -> None:
    before = packages(LOCK.read_text())
    (torch,) = [name for name in newer if name.startswith("torch==")] or [p for p in before if re.fullmatch(r"torch==[\d.]+", p)]
    upgrades = ["--upgrade"] if newer == ["all"] else [word for name in newer for word in ("--upgrade-package", name)]
    sources, extras = ["pyproject.toml", "--extra", "test"], {title: ["--extra", title] for title in ("diffusers", "lint", "docs")}
    text = resolved(LOCK.read_text(), *sources, *chain(*extras.values()), *upgrades, requirements=[torch, *BUILD])
    wanted = {title: packages(resolved(text, *sources, *extra, requirements=[torch])) for title, extra in ({"run": []} | extras).items()}
    homes = {package: paragraphs(package, wanted) for package in packages(text)}
    entries = packages(text) | {(cpu := f"{torch}+cpu"): cpu_builds(torch.partition("==")[2], before)}
    homes[cpu] = ["cpu"]
    text = HEAD
    for title, use in PARAGRAPHS.items():
        text += "\n".join([f"\n# {title}: {use}", *(entry for package, entry in entries.items() if title in homes[package])]) + "\n"
    LOCK.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
