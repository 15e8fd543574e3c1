"""What a class inherits it replaces only on purpose: by the same kind of thing, called the same way."""

import ast
import importlib
import inspect
import textwrap
from functools import cached_property
from pathlib import Path

import pytest

from potstill import engine, kernels

#: Of torch's own classes: what a subclass is to write, with arguments of its own.
OPEN = {"__init__", "__new__", "__class_getitem__", "forward", "backward", "setup_context", "__torch_dispatch__"}


def classes():
    """Every class written in engine/ and kernels/."""
    found = []
    for package in (engine, kernels):
        folder = Path(package.__file__).parent
        for file in sorted(folder.rglob("[!_]*.py")) + sorted(folder.glob("_[!_]*.py")):
            name = "potstill." + ".".join(file.relative_to(folder.parent).with_suffix("").parts)
            try:
                members = vars(importlib.import_module(name)).values()
            except ModuleNotFoundError as error:
                if error.name == "diffusers":  # which a module is for, and not everybody has
                    continue
                raise
            found += [c for c in members if inspect.isclass(c) and c.__module__ == name]
    return found


def kind(thing):
    thing = thing.__func__ if isinstance(thing, staticmethod | classmethod) else thing
    if isinstance(thing, property | cached_property) or inspect.isdatadescriptor(thing):
        return "property"
    return "class" if inspect.isclass(thing) else "method" if inspect.isroutine(thing) else "value"


def takes_all_of(base, ours, by_name=True):
    """Can `ours` be called wherever `base` can? by_name: also with its arguments named."""
    try:
        base, ours = inspect.signature(base), inspect.signature(ours)
    except (ValueError, TypeError):  # of C, without one
        return True
    kinds = inspect.Parameter
    given = list(ours.parameters.values())
    starred = {p.kind for p in given} & {kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD}
    positional = [p for p in given if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    wanted = [p for p in base.parameters.values() if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    for place, p in enumerate(wanted):
        if p.kind is kinds.KEYWORD_ONLY:
            fits = p.name in ours.parameters or kinds.VAR_KEYWORD in starred
        else:
            named = (
                not by_name
                or place == 0
                or p.kind is kinds.POSITIONAL_ONLY
                or (place < len(positional) and positional[place].name == p.name)
            )
            fits = (place < len(positional) and named) or kinds.VAR_POSITIONAL in starred
        if not fits:
            return False
    known = {p.name for p in wanted}
    free = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    return all(p.default is not kinds.empty or p.kind in free or p.name in known or i < len(wanted) for i, p in enumerate(given))


def inherited(cls, name):
    """What `name` is without this class: (the class it is of, the thing)."""
    return next(((base, vars(base)[name]) for base in cls.__mro__[1:-1] if name in vars(base)), None)


def set_on_instances(cls):
    """Names that the class's own methods assign on self."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # made by namedtuple()
        return set()
    stores = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    return {n.attr for n in stores if isinstance(n.value, ast.Name) and n.value.id == "self"}


def accidents(cls):
    """What it replaces by something else, in words."""
    found = []
    for name, thing in vars(cls).items():
        base = inherited(cls, name)
        if (
            base is None
            or name in OPEN
            or name in ("__doc__", "__module__", "__slots__", "__hash__", "__annotations__", "__match_args__", "__dict__", "__weakref__")
        ):
            continue
        if kind(thing) != kind(base[1]) and base[1] is not None:
            found.append(f"{cls.__qualname__}.{name} is a {kind(thing)}, {base[0].__name__}'s a {kind(base[1])}")
        elif kind(thing) == "method" and not takes_all_of(getattr(base[0], name), getattr(cls, name), not name.startswith("__")):
            found.append(f"{cls.__qualname__}.{name} does not take what {base[0].__name__}'s takes")
    for name in set_on_instances(cls) - {"__dict__"}:
        mine = vars(cls).get(name)
        base = inherited(cls, name) if mine is None else None
        things = [t for t in (mine, base and base[1]) if t is not None]
        settable = [t for t in things if (isinstance(t, property) and t.fset) or kind(t) == "value"]
        if things and not settable:
            found.append(f"{cls.__qualname__} assigns self.{name}, a {kind(things[0])}")
    return found


def test_nothing_is_replaced_by_accident():
    found = classes()
    assert len(found) > 150
    assert [told for cls in found for told in accidents(cls)] == []


class Base:
    rate = 1

    def levels(self, x, sigma, labels=None, *, steps=None): ...

    @property
    def size(self): ...


class Hides(Base):
    def __init__(self):
        self.levels = None


class Takes(Base):
    def levels(self, x, sigma, labels=None, more=1, *, steps=None): ...


class TakesLess(Base):
    def levels(self, x, sigma): ...


class TakesOthers(Base):
    def levels(self, x, level, labels=None, *, steps=None): ...


class WantsMore(Base):
    def levels(self, x, sigma, labels=None, *, steps=None, mode): ...


class OfAnotherKind(Base):
    size = 3

    def rate(self): ...


@pytest.mark.parametrize(
    ("cls", "wanted"),
    [
        (Hides, ["Hides assigns self.levels, a method"]),
        (Takes, []),
        (TakesLess, ["TakesLess.levels does not take what Base's takes"]),
        (TakesOthers, ["TakesOthers.levels does not take what Base's takes"]),
        (WantsMore, ["WantsMore.levels does not take what Base's takes"]),
        (OfAnotherKind, ["OfAnotherKind.size is a value, Base's a property", "OfAnotherKind.rate is a method, Base's a value"]),
    ],
)
def test_accidents_are_seen(cls, wanted):
    assert accidents(cls) == wanted
