"""What a run was given that is not a default, and the comment beside every setting in its dataclass, which is what it does."""

import ast
import dataclasses
import inspect
import io
import json
import tokenize
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

SAID_APART = ("data.how", "teacher.how", "method.name")  # how to get what is missing; the method


class Chosen(NamedTuple):
    """A setting that is not its default. name: dotted, as on the command line; about: what it does."""

    name: str
    value: Any
    about: str


def chosen(tree: Any, bare: Any, place: str = "") -> Iterator[Chosen]:
    """The settings of a dataclass and those below it that are not as in `bare`, the defaults; and the name of the method, if it has one."""
    comments = comments_of(type(tree))
    for field in dataclasses.fields(tree):
        value, default, name = getattr(tree, field.name), getattr(bare, field.name), f"{place}{field.name}"
        if name == "method":
            yield Chosen(name, value.name, comments[name])
        if dataclasses.is_dataclass(value):
            yield from chosen(value, default or type(value)(), f"{name}.")
        elif isinstance(value, dict) and all(dataclasses.is_dataclass(one) for one in value.values()):
            for key, one in value.items():
                yield from chosen(one, default.get(key, type(one)()), f"{name}.{key}.")
        elif value != default and name not in SAID_APART:
            yield Chosen(name, value, comments.get(field.name, ""))


def as_lines(settings: list[Chosen]) -> list[str]:
    """`name=value` as on the command line, and what each does, in columns."""
    texts = [f"{one.name}={written(one.value)}" for one in settings]
    width = min(max(map(len, texts), default=0), 60)
    return [f"{text:{width}}  {one.about}".rstrip() for text, one in zip(texts, settings, strict=True)]


def written(value: Any) -> str:
    """A value as a command line can have it: null, true, 0.5, [1,2], {a:1}."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(one)}' for key, one in value.items())}}}"
    if isinstance(value, float) and float(short := f"{value:.10g}") == value:
        return short
    return value if isinstance(value, str) and value else json.dumps(value)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; dataclasses.MISSING without one."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@cache
def comments_of(schema: type) -> dict[str, str]:
    """{name: comment} of the fields of a dataclass: what stands on the lines of each one's definition."""
    source = inspect.getsource(schema)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found, (definition,) = {}, ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[ast.unparse(node.target)] = " ".join(comments[line] for line in lines if line in comments)
    return found
