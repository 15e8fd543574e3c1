"""Names of classes: how they are kept, and which classes a user means who writes names or numbers."""

from collections.abc import Sequence
from difflib import get_close_matches

from potstill.engine.common.errors import UserError, harmless
from potstill.engine.common.kinds import Kind, is_list, is_text, shown

MOST = 100_000  # classes; more are a mistake
LONGEST = 200  # characters of a name that are kept
FEW, SHORT = 10, 40  # names in a sentence, and characters of each
NAME, NUMBER = "name:", "number:"  # before what is the one and could be the other
NAMES = Kind(lambda value: is_list(value, is_text, 1, MOST), "a list of the classes' names")


def plain(name: str) -> str:
    r"""A name as it is kept and shown: on one line, with \x1b for an escape and the like, and cut where it is endless."""
    text = harmless(name[: LONGEST + 1]).replace("\n", "\\n").strip()
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def listed(names: Sequence[str]) -> str:
    """The first few, for a sentence."""
    some = ", ".join(name if len(name) <= SHORT else f"{name[: SHORT - 1]}…" for name in names[:FEW])
    return some + f" … and {len(names) - FEW:,} more" * (len(names) > FEW)


def first_unlike(a: Sequence[str], b: Sequence[str]) -> tuple[int, str, str] | None:
    """The first class with two names, and these."""
    return next(((k, one, other) for k, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), None)


def numbers_in(text: str, classes: int, names: Sequence[str] | None) -> list[int]:
    """`0,3,5` or `cats,dogs` as numbers of so many classes; `names`, of all or the first of them, may have commas in them.

    UserError for what is no class, for a name that several have, and for what is the name of one class and the number of another:
    `name:3` and `number:3` say which is meant.
    """
    parts, found = text.split(","), []
    most = 1 + max((name.count(",") for name in names or ()), default=0)
    known = set(names or ())
    while parts:
        lengths = range(min(most, len(parts)), 1, -1)
        n = next((n for n in lengths if ",".join(parts[:n]).strip().removeprefix(NAME) in known), 1)
        found.append(_number(",".join(parts[:n]).strip(), classes, names))
        parts = parts[n:]
    return found


def number_named(name: str, names: Sequence[str] | None) -> int:
    """The class of this name. UserError where none or several have it."""
    if not names:
        raise UserError(f"these classes have no names, got {shown(name)}: give numbers")
    among = [k for k, one in enumerate(names) if one == name]
    if len(among) > 1:
        them = ", ".join(map(str, among[:FEW])) + " …" * (len(among) > FEW)
        raise UserError(f"{shown(name)} is the name of {len(among)} classes ({them}): give the number of one")
    if not among:
        near = get_close_matches(name[:LONGEST], names, 1)
        nearest = f"; the nearest name is {near[0]}" if near else ""
        raise UserError(f"no class is called {shown(name)}{nearest}; there are {listed(names)}")
    return among[0]


def _number(word: str, classes: int, names: Sequence[str] | None) -> int:
    """The class that one word means."""
    named = word != "" and word in (names or ())
    if not named and word.startswith(NAME):
        return number_named(word.removeprefix(NAME), names)
    digits = word if named else word.removeprefix(NUMBER)
    number = int(digits) if digits.isdecimal() and len(digits) < 10 else classes
    if named and names is not None:
        if number < classes and (names.count(word) > 1 or names.index(word) != number):
            raise UserError(f"{word} is the number of a class and the name of another: write {NUMBER}{word}, or {NAME}{word}")
        return number_named(word, names)
    if number < classes:
        return number
    if names and not digits.isdecimal():
        return number_named(word, names)
    raise UserError(f"labels want to be among 0 … {classes - 1}, such as 0,1,2, or all; got {shown(word)}")
