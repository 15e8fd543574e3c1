"""The recipes that come with potstill: where they lie, found by name or path, and what the head of each says.

A recipe begins with comments: a title, the command that runs it, and fields, `Name: text`, that go on in indented lines.
"""

import difflib
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from potstill.engine.common.errors import UserError

RECIPES = Path(__file__).parents[2] / "configs"
FIELD = re.compile(r"# ([A-Z][a-z ]+): (.*)")


def names() -> list[str]:
    """What can be asked for by name, in the order of the alphabet."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find(recipe: str | Path) -> Path:
    """The file of a recipe: digits is one of ours, from anywhere; my/digits or digits.yaml is a path. UserError without one."""
    path = Path(recipe).expanduser()
    by_name = Path(str(recipe)).name == str(recipe) and path.suffix != ".yaml"
    found = RECIPES / f"{path}.yaml" if by_name else path
    if found.is_file():
        return found
    near = difflib.get_close_matches(path.stem, names(), 3, 0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "`potstill recipes` lists ours; a path ends in .yaml"
    raise UserError(f"no recipe {'called' if by_name else 'at'} {recipe}: {hint}")


class Head(NamedTuple):
    """The comments that a recipe begins with, parsed: title, commands and {"Published": text, …}; `text` has them all."""

    title: str
    commands: list[str]
    fields: dict[str, str]
    text: str


def head_of(recipe: Path) -> Head:
    """What a recipe says of itself."""
    lines = recipe.read_text(encoding="utf-8").partition("\ndefaults:")[0].splitlines()
    text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)
    fields: dict[str, str] = {}
    title, commands, last = "", [], ""
    for line in lines:
        if match := FIELD.match(line):
            last, fields[match[1]] = match[1], match[2]
        elif line.startswith("#   potstill "):
            commands.append(line[1:].strip())
        elif last:
            fields[last] += " " + line.lstrip("# ")
        else:
            title = f"{title} {line.lstrip('# ')}".strip()
    return Head(title, commands, fields, text)


def groups_of(recipe: Path) -> dict[str, str]:
    """Which data, teacher, net and method a recipe takes: {"data": "cifar10", …}, also from the recipe that it builds on."""
    found: dict[str, str] = {}
    for entry in yaml.safe_load(recipe.read_text(encoding="utf-8"))["defaults"]:
        if isinstance(entry, dict):
            found |= entry
        elif entry not in ("schema", "_self_"):
            beside = recipe.with_name(f"{entry}.yaml")
            found |= groups_of(beside if beside.is_file() else RECIPES / f"{entry}.yaml")
    return found
