"""Every setting of a recipe: its name on the command line, type, default and what it does.

    potstill settings                  all of them
    potstill settings train.           those that begin so; method. has every method's under the names of its recipes
    potstill settings --markdown       all of them as docs/settings.md has them

Any of them can be given as key=value to `potstill train` and `potstill compare`, or stand in a recipe. null is none; lists are
[1,2]. What is said here stands beside each setting in the source.
"""

import dataclasses
import inspect
import json
from collections.abc import Iterator
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING

from potstill.engine.common.cli import parser_of, run
from potstill.engine.common.errors import UserError
from potstill.engine.config.chosen import comments_of, default_of, written
from potstill.engine.config.library import RECIPES
from potstill.engine.config.schema import Config
from potstill.engine.config.written import branch_of
from potstill.engine.methods.table import METHODS

SHOWN = str.maketrans({"<": "&lt;", "|": "\\|"})  # else Markdown takes them for a tag, and for the end of a table's cell
NET = "NET"  # stands for the name of a net that an optimiser is of: teacher, student, fake, discriminator
HEAD = """\
# Settings

Written by `potstill settings --markdown > docs/settings.md` from the comments beside each setting in the source; without `--markdown` the
same is a list for a terminal, and `potstill settings train.` a part of it.

    potstill train digits train.batch=128 method.sigma=10

Each can be given as `key=value` to `potstill train` and `potstill compare`, or stand in a recipe. Types are YAML's: `null` is none, lists are
`[1,2]`. A recipe's own values come before these defaults: `potstill train NAME --dry-run` prints what holds. NET is the name of a net that
is trained: teacher, student, fake, discriminator."""


class Setting(NamedTuple):
    """One line of the list. name: dotted; kind and default: as they are written in a recipe; about: what it does."""

    name: str
    kind: str
    default: str
    about: str


class Branch(NamedTuple):
    """The settings of one dataclass at one place in the tree. title: where; about: what the dataclass says of itself."""

    title: str
    schema: type
    about: str
    settings: list[Setting]


def main(arguments: list[str]) -> None:
    parser = parser_of("settings", __doc__)
    parser.add_argument("prefix", nargs="?", default="", help="only those whose name begins so, such as train. or method.")
    parser.add_argument("--markdown", action="store_true", help="as a page")
    args = parser.parse_args(arguments)
    found = [branch._replace(settings=[s for s in branch.settings if s.name.startswith(args.prefix)]) for branch in branches()]
    if not any(branch.settings for branch in found):
        raise UserError(f"there is no setting whose name begins with {args.prefix!r}: `potstill settings` lists them")
    print((page if args.markdown else listing)([branch for branch in found if branch.settings]))


def branches() -> list[Branch]:
    """The whole tree: the top, its branches, and for `method` every method's."""
    found = list(_branches(Config, "", "the whole run"))
    at = next(i for i, branch in enumerate(found) if branch.title.startswith("students"))
    methods = [branch for name, schema in sorted(METHODS.items()) for branch in _branches(schema, "method.", " | ".join(_recipes_of(name)))]
    return found[:at] + methods + found[at:]


def _branches(schema: type, prefix: str, title: str) -> Iterator[Branch]:
    """A dataclass's own settings, then those of the dataclasses below it."""
    hints, comments = get_type_hints(schema), comments_of(schema)
    own, below = [], []
    for field in dataclasses.fields(schema):
        name, kind = f"{prefix}{field.name}", hints[field.name]
        inner = branch_of(kind)
        if inner is None or get_origin(kind) in (dict, Union, UnionType):
            own.append(Setting(name, _kind(kind), _default(field), comments.get(field.name, "")))
        if inner is not None:
            below.append((inner, f"{name}.{NET}." if get_origin(kind) is dict else f"{name}."))
    yield Branch(title, schema, " ".join((inspect.getdoc(schema) or "").split()), own)
    for inner, place in below:
        yield from _branches(inner, place, place.rstrip("."))


def _kind(kind: Any) -> str:
    """A type in words: "list of int or null"."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_kind(one) for one in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {_kind(get_args(kind)[0])}"
    if get_origin(kind) is dict or dataclasses.is_dataclass(kind):
        return "see below"
    return {int: "int", float: "float", str: "text", bool: "true or false", type(None): "null", Any: "see below"}[kind]


def _default(field: dataclasses.Field[Any]) -> str:
    value = default_of(field)
    return "" if value in (MISSING, dataclasses.MISSING) else written(value)


def _recipes_of(schema: str) -> list[str]:
    """What can follow method= to have this dataclass, with what it sets: "dmd2 (gan=true)"."""
    found = []
    for path in sorted((RECIPES / "method").glob("*.yaml")):
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        if tree.pop("defaults") == [f"{schema}_schema"]:
            tree.pop("name", None)
            sets = ", ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in tree.items())
            found.append(f"method={path.stem}" + (f" ({sets})" if sets else ""))
    return found


def listing(found: list[Branch]) -> str:
    """For a terminal: a line each."""
    lines: list[str] = []
    for branch in found:
        width = max(len(s.name) + len(s.default) for s in branch.settings) + 1
        kinds = max(len(s.kind) for s in branch.settings)
        lines += ["", f"# {branch.title}" + (f": {branch.about}" if branch.about else "")]
        lines += [f"{f'{s.name}={s.default}':{width}}  {s.kind:{kinds}}  {s.about}".rstrip() for s in branch.settings]
    return "\n".join(lines[1:])


def page(found: list[Branch]) -> str:
    """For the docs: a table for each dataclass, once, with all the places where it stands."""
    lines = [HEAD]
    for schema in dict.fromkeys(branch.schema for branch in found):
        same = [branch for branch in found if branch.schema is schema]
        lines += ["", table(same[0], f"## {', '.join(branch.title for branch in same)}")]
    return "\n".join(lines)


def table(branch: Branch, heading: str) -> str:
    """One dataclass in Markdown."""
    lines = [heading, "", *([branch.about, ""] if branch.about else []), "| setting | type | default | |", "| --- | --- | --- | --- |"]
    lines += [f"| `{s.name}` | {s.kind} | {s.default and f'`{s.default}`'} | {s.about.translate(SHOWN)} |" for s in branch.settings]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
