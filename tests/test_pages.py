"""Every block of code in README.md and docs/ is tried, as it stands.

Pages of RUN are lived through: their lines run one after the other in one folder, which has the checkout's files and nothing else; what
makes it affordable is SHORT, which is added to every training that is not a dry run. On all other pages, which want weights,
pictures or machines that are not here, every line is parsed: the command's own parser takes its words, and its recipe its settings.
"""

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from potstill.__main__ import main
from potstill.engine.config.library import find
from potstill.engine.config.tree import load

ROOT = Path(__file__).parent.parent
PAGES = {
    str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
RUN = ["README.md", "docs/start.md", "docs/kernels.md", "docs/exporting.md", "docs/methods/index.md"] + [
    n for n in PAGES if "/examples/" in n
]
SHORT = ["train.kimg=0.2", "teacher.train.kimg=0.2", "eval.n=128"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PARSED = {  # lines of RUN that are parsed all the same, by their beginnings: why
    "potstill train ffhq64 rehearse=true": "a net of 62 million parameters on a CPU",
    "potstill train fast64": "a net of 19 million parameters on a CPU",
    "potstill compare": "seven trainings",
    "potstill train digits_msd": "two students",
    ". .venv/bin/activate": "where the test runs there may be another environment",
}
REFUSED = {"potstill train ffhq64 --dry-run": "teachers/edm-ffhq-64x64-uncond-vp.safetensors"}  # exit code 2, and what the line names
ELSEWHERE = {  # Python that wants what is not here: what tries the same
    "docs/api.md": "signatures; tests/test_docs.py makes them anew",
    "docs/adding_a_method.md": "tests/test_methods.py makes a method of it",
    "docs/text_to_image.md": "tests/test_pipeline_export.py runs the same call of a card",
}


class Parsed(Exception):
    """The words of a command were taken."""


@pytest.fixture
def checkout(tmp_path):
    """An empty folder but for what a checkout has."""
    for name in ("benches", "configs", "docs", "engine", "kernels", "potstill", "csrc", "tests", "Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def blocks(page):
    return [(language, code) for language, code in BLOCK.findall(PAGES[page].read_text()) if language in ("sh", "python", "diff")]


def commands(code):
    """The commands of a block, without comments; one that goes on behind a backslash is one."""
    lines = re.sub(r"\\\n\s*", "", code).splitlines()
    return [line for line in (re.sub(r"(^|\s)#( .*|$)", "", line).strip() for line in lines) if line]


@pytest.mark.parametrize("page", [page for page in RUN if any(language != "diff" for language, _ in blocks(page))])
def test_a_page_is_lived_through(page, checkout, monkeypatch, capfd):
    if "plain_pipeline" in page:
        pytest.importorskip("diffusers")
    monkeypatch.chdir(checkout)
    if page != "docs/examples/own_photos.md":  # which makes its own
        photos(checkout / "PHOTOS")
    for language, code in blocks(page):
        if language == "python":
            ran(code)
        for command in commands(code) if language == "sh" else []:
            if command.startswith("potstill") and not command.startswith(tuple(PARSED)):
                refused = next((said for begin, said in REFUSED.items() if command.startswith(begin)), None)
                code, told = called(shlex.split(command)[1:], capfd)
                assert code == (2 if refused else 0) and (refused or "") in told, f"{command}\n\n{told[-3000:]}"
            else:
                check(command)


def ran(code):
    """In a process of its own, as whoever pastes it; the checkout is where `potstill` comes from."""
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, f"{code}\n\n{done.stdout[-3000:]}"


def called(words, capfd):
    """The exit code of `potstill WORDS`, in this process, and what it says; a training that is not a dry run is short."""
    short = SHORT if words[0] == "train" and "--dry-run" not in words else []
    capfd.readouterr()
    try:
        main([*words, *short])
        code = 0
    except SystemExit as stop:
        code = stop.code
    said = capfd.readouterr()
    return code, said.out + said.err


def photos(folder):
    """Three classes of ten pictures of 40x48 noise, as whoever has some."""
    folder.mkdir()
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for name in ("cats", "dogs", "owls"):
        (folder / name).mkdir()
        for i in range(10):
            Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / name / f"{i}.png")


@pytest.mark.parametrize("page", [page for page in PAGES if page not in RUN])
def test_every_line_of_a_page_is_taken(page):
    for language, code in blocks(page):
        if language == "python" and page not in ELSEWHERE:
            exec(compile(code, page, "exec"), {})
        for command in commands(code) if language == "sh" else []:
            check(command)


@pytest.mark.parametrize("page", PAGES)
def test_what_stands_after_a_plus_can_be_imported(page):
    for code in (code for language, code in blocks(page) if language == "diff"):
        exec("\n".join(line[1:].strip() for line in code.splitlines() if line.startswith("+")), {})


def check(command):
    """Does the command exist, and take these words?"""
    if command.startswith(". "):
        return
    words = shlex.split(re.sub(r"\$(\(.*?\)|\w+)", "2", command.replace("…", "")))  # what a shell would put there
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    if words[0] in ("torchrun", "srun"):
        words = words[words.index("-m") + 1 :]
    if words[0] == "python":
        assert importlib.util.find_spec(words[2]) is not None if words[1] == "-m" else (ROOT / words[1]).exists(), command
        return
    assert words[0] == "potstill", f"nothing here knows the command {command}"
    taken(words[1:])


def taken(words):
    """The parser of the command takes the words, and its recipe the settings."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            whole = getattr(argparse.ArgumentParser, name)

            def parsed(parser, given=None, namespace=None, whole=whole):
                found.update(vars(whole(parser, given, namespace)))
                raise Parsed

            patch.setattr(argparse.ArgumentParser, name, parsed)
        with pytest.raises(Parsed):
            import_module(f"potstill.engine.{words[0]}").main(words[1:])
    if words[0] in ("train", "compare"):
        load(find(found["recipe"]), found["overrides"])


def test_a_line_that_is_wrong_is_found():
    for line in ("potstill train digits train.kimgs=1", "potstill sample runs/digits --sseeds 3", "potstill train digitz", "make dmo"):
        with pytest.raises((Exception, SystemExit)):
            check(line)
