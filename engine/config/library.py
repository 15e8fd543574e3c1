"""The recipes that come with potstill: where they lie, found by name or path, and what the head of each says.

A file holds a recipe of its name and, each after a line `--- # NAME`, recipes whose names go on from there: digits.yaml holds
digits and digits_sim. The path of the latter is digits_sim.yaml, as if it were a file. A recipe begins with comments: a title,
the command that runs it, and fields, `Name: text`, that go on in indented lines.
"""

import difflib
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from potstill.engine.common.errors import UserError, reading

RECIPES = Path(__file__).parents[2] / "configs"
MOST_LETTERS = 2**16  # of a file of recipes; our largest has 10,000
FIELD = re.compile(r"# ([A-Z][a-z ]+): (.*)")


def names() -> list[str]:
    """What can be asked for by name, in the order of the alphabet."""
    return sorted(name for file in RECIPES.glob("*.yaml") for name in recipes_in(file))


def recipes_in(file: Path) -> dict[str, str]:
    """The texts of a file's recipes by name, its own first."""
    with reading(file), file.open(encoding="utf-8") as opened:
        try:
            whole = opened.read(MOST_LETTERS + 1)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not readable as text ({error}): wanted a recipe, in UTF-8") from error
    if len(whole) > MOST_LETTERS:
        raise UserError(f"{file} has more than {MOST_LETTERS:,} letters, wanted a recipe")
    first, *others = re.split(rf"^--- # ({re.escape(file.stem)}_\S+)\n", whole, flags=re.MULTILINE)
    texts = {file.stem: first} | dict(zip(others[::2], others[1::2], strict=True))
    return {name: text.strip() + "\n" for name, text in texts.items()}


def file_of(recipe: Path) -> Path | None:
    """The file that holds a recipe: the one at its path, or one beside it whose name is the beginning of its name; None without one."""
    if recipe.is_file():
        return recipe
    words = recipe.stem.split("_")
    shorter = (recipe.with_name("_".join(words[:count]) + recipe.suffix) for count in range(len(words) - 1, 0, -1))
    return next((file for file in shorter if file.is_file() and recipe.stem in recipes_in(file)), None)


def family_of(recipe: Path) -> list[Path]:
    """The recipes in its file or beside it whose names go on from its name: digits_gdd.yaml, digits_sim.yaml, … of digits.yaml."""
    beginning = f"{recipe.stem}_"
    files = {*filter(None, [file_of(recipe)]), *recipe.parent.glob(f"{beginning}*.yaml")}
    return sorted(recipe.with_name(f"{name}.yaml") for file in files for name in recipes_in(file) if name.startswith(beginning))


def of_method(recipe: Path, method: str) -> Path | None:
    """The recipe of the same family that is this method's: digits_sim of digits and sim, or digits_gdd; None without one."""
    whole, cut = recipe.stem, recipe.stem.partition(f"_{groups_of(recipe).get('method')}")[0]
    near = [recipe.with_name(f"{stem}.yaml") for stem in (f"{whole}_{method}", f"{cut}_{method}", cut)]
    return next((one for one in near if one != recipe and file_of(one) and groups_of(one).get("method") == method), None)


def text_of(recipe: Path) -> str:
    """A recipe as it is written. FileNotFoundError without one."""
    if (file := file_of(recipe)) is None:
        raise FileNotFoundError(f"no recipe at {recipe}")
    return recipes_in(file)[recipe.stem]


def find(recipe: str | Path) -> Path:
    """The path of a recipe: digits is one of ours, from anywhere; my/digits or digits.yaml is a path. UserError without one."""
    path = Path(recipe).expanduser()
    by_name = Path(str(recipe)).name == str(recipe) and path.suffix != ".yaml"
    found = RECIPES / f"{path}.yaml" if by_name else path
    if file_of(found):
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
    lines = text_of(recipe).partition("\ndefaults:")[0].splitlines()
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
    """Which data, teacher, net and method a recipe takes: {"data": "cifar10", …}, also from what it builds on."""
    found: dict[str, str] = {}
    for entry in yaml.safe_load(text_of(recipe)).get("defaults", []):
        key, name = next(iter(entry.items())) if isinstance(entry, dict) else ("", entry)
        group = key.removeprefix("override ")
        here = recipe.parent.parent if group.startswith("/") else recipe.parent
        group = group.removeprefix("/")
        if group:
            found[group] = name
        if base := next(filter(file_of, (folder / group / f"{name}.yaml" for folder in (here, RECIPES))), None):
            found |= groups_of(base)
    return found
