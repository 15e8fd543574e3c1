"""docs/ says what the code says: every public name with its shapes, units, errors and source."""

import ast
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

import potstill
from potstill import kernels
from potstill.engine.config import library

ROOT = Path(__file__).parent.parent
LOSSES = [name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))]


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs/pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_that_are_made_are_what_the_sources_say(pages):
    old = [path for path, text in pages.pages().items() if (ROOT / "docs" / path).read_text() != text]
    assert not old, "run python docs/pages.py"


def test_every_method_has_a_page_and_every_recipe_an_entry(pages):
    names = {path.stem for path in (ROOT / "engine/methods").glob("*.py") if "(MethodConfig)" in path.read_text()} - {"base"}
    assert names <= {path.stem for path in (ROOT / "docs/methods").glob("*.md")}
    assert set(re.findall(r"^### (\w+)$", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE)) == set(library.names())
    assert "| [ffhq64](#ffhq64) | `sid` | FID 1.550 | 500 M images | not yet |" in (ROOT / "docs/recipes.md").read_text()
    assert "[ffhq64](../recipes.md#ffhq64)" in (ROOT / "docs/methods/sim.md").read_text()


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 140
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_page_has_everything_public_once(pages):
    told = [name for names in pages.PAGE.values() for name in names]
    assert sorted(told) == sorted(potstill.__all__)
    assert set(kernels.__all__) <= set(potstill.__all__)


def test_what_type_checkers_see_is_what_there_is():
    tree = ast.parse((ROOT / "potstill/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(seen) == sorted(potstill.__all__)
    for name, module in seen.items():
        assert getattr(potstill, name) is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", LOSSES)
def test_an_operation_says_shapes_errors_and_source(name):
    function = getattr(potstill, name)
    text, page = inspect.getdoc(function), sys.modules[function.__module__].__doc__
    assert "[N" in text and "Raises:" in text and "ValueError" in text
    assert "arXiv" in page
    given = list(inspect.signature(function).parameters)
    documented = text.partition("Args:")[2].partition("\n\n")[0]
    assert not [argument for argument in given if argument not in documented], "an argument is not documented"


def test_a_name_that_is_not_there_is_the_usual_error():
    with pytest.raises(AttributeError, match="module 'potstill' has no attribute 'score_mach'"):
        _ = potstill.score_mach
    with pytest.raises(ImportError, match="cannot import name 'score_mach'"):
        exec("from potstill import score_mach")
    assert set(potstill.__all__) <= set(dir(potstill))
