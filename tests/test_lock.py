"""constraints.txt locks what pyproject.toml asks for."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "constraints.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TITLES = ("build", "cpu", "run", "diffusers", "lint", "docs", "cuda")


def paragraph(title: str) -> list[str]:
    """The entries of a paragraph of the lock, hashes included."""
    (text,) = re.findall(rf"^# {title}: .*\n((?:.+\n)*)", LOCK, re.MULTILINE)
    return re.split(r"\n(?=\S)", text.strip())


@pytest.mark.parametrize(
    ("titles", "wanted"),
    [(["build", "run"], PROJECT["dependencies"] + EXTRAS["test"]), (["lint"], EXTRAS["lint"]), (["diffusers"], EXTRAS["diffusers"])],
)
def test_every_requirement_is_locked_at_a_version_that_it_takes(titles, wanted):
    locked = dict(re.match(r"(\S+?)==([^\s;]+)", entry).groups() for title in titles for entry in paragraph(title))
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(locked[requirement.name]), requirement


def test_every_entry_is_exact_and_has_hashes():
    """pip's --require-hashes refuses others, but only when it comes to them."""
    entries = [entry for title in TITLES for entry in paragraph(title)]
    assert len(entries) == len(re.findall(r"^\w", LOCK, re.MULTILINE)) > 60
    for entry in entries:
        assert re.fullmatch(r"[\w-]+==\S+( ; .*)?( \\\n    --hash=sha256:[0-9a-f]{64})+", entry), entry


def test_no_paragraph_but_the_last_brings_cuda():
    """Gigabytes, on machines that have no use for them."""
    assert not [entry for title in TITLES[:-1] for entry in paragraph(title) if entry.startswith(("nvidia", "cuda"))]
    assert len(paragraph("cuda")) > 10
    assert {entry.split()[0] for entry in paragraph("cpu")} == {
        next(e for e in paragraph("run") if e.startswith("torch==")).split()[0] + "+cpu"
    }


def test_the_extra_brings_its_own_alone():
    """What the tests and the demo want stays as it is, PyTorch above all."""
    names = {title: {entry.partition("==")[0] for entry in paragraph(title)} for title in TITLES}
    assert not names["diffusers"] & (names["build"] | names["run"])
    assert {"diffusers", "transformers", "peft", "accelerate", "sentencepiece", "tokenizers"} <= names["diffusers"]
