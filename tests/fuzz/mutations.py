"""Inputs that are nearly right: bytes of a valid file changed anywhere, and trees (JSON, YAML) with a wrong value in one place."""

import copy
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import yaml
from hypothesis import strategies as st

DEEP, BIG, TWICE = "@deep@", "@big@", "@twice@"  # stand in a tree for what json.dumps would not write
OUTSIDE = "outside.safetensors"  # beside the folder of the input: a valid file that no name in it may lead to
MARKER = "executed"  # beside the folder too: comes into being where a program in an input runs
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)

#: Values that belong nowhere, or nearly.
WRONG = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**53 + 1, 2**63, -(2**63), 10**30, 0.5, 1e-320, 1e308, -0.0,
    float("nan"), float("inf"), float("-inf"), "", "0", "nan", "x", "é\u2028", "\x1b[31mred", "a\0b", "\ud800", "line\nline", "x" * 5000,
    f"../{OUTSIDE}", f"student-0/../../{OUTSIDE}", "/etc/hostname", "C:\\x", "..", ".", "~", "con",
    [], {}, [[]], [{}], {"": 0}, [0], [1.5], ["x"], [float("nan")], [-1, -1], [10**30], [2**40] * 4, [1] * 5000, {"x": {"y": []}},
    DEEP, BIG,
)  # fmt: skip


def damaged(data: bytes, other: bytes, dice: random.Random) -> tuple[str, bytes]:
    """What was done, and the bytes after it: one fault, as disks, cables and half copies make them, or an extreme length."""

    def place() -> int:
        """Anywhere, but as often as not near the beginning or the end, where the forms keep their lengths."""
        near = min(512, len(data))
        where = dice.randrange(4)
        return dice.randrange(near) if where == 0 else len(data) - 1 - dice.randrange(near) if where == 1 else dice.randrange(len(data))

    at, n = place(), dice.choice((1, 2, 4, 8, 64, 600))
    kind = dice.choice(("flip", "flip", "bytes", "cut", "insert", "remove", "double", "splice", "length", "length", "zeros"))
    match kind:
        case "flip":
            changed = bytearray(data)
            changed[at] ^= 1 << dice.randrange(8)
        case "bytes":
            changed = data[:at] + dice.randbytes(n) + data[at + n :]
        case "cut":
            changed = data[:at]
        case "insert":
            changed = data[:at] + dice.randbytes(n) + data[at:]
        case "remove":
            changed = data[:at] + data[at + n :]
        case "double":
            changed = data[: at + n] + data[at:]
        case "splice":
            changed = data[:at] + other[min(at, len(other)) :]
        case "length":
            size, order = dice.choice((1, 2, 4, 8)), dice.choice(("little", "big"))
            changed = data[:at] + (dice.choice(EXTREMES) % 256**size).to_bytes(size, order) + data[at + size :]
        case _:
            changed = data[:at] + bytes(min(n, len(data) - at)) + data[at + n :]
    return kind, bytes(changed)


# Trees: what JSON and YAML hold.


def _places(tree: Any, here: tuple = ()) -> Iterator[tuple]:
    yield here
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _places(value, (*here, key))


def _at(tree: Any, place: tuple) -> Any:
    for key in place:
        tree = tree[key]
    return tree


@st.composite
def trees(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one or two wrong things in it: another value or type, a key or item too few, too many or twice."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
        place = draw(st.sampled_from(list(_places(tree))))
        if not place:
            kind = draw(st.sampled_from(("value", "extra", "extra")))
        else:
            kind = draw(st.sampled_from(("value", "value", "value", "value", "remove", "extra", "near", "swap")))
        value = copy.deepcopy(draw(st.one_of(st.sampled_from(WRONG), st.sampled_from(WRONG), ANYTHING)))
        inside = _at(tree, place)
        if kind == "extra" and isinstance(inside, dict):
            inside[draw(st.sampled_from((TWICE, "x", "__class__", "self", "_target_", *map(str, inside))))] = value
        elif kind == "extra" and isinstance(inside, list):
            inside.insert(draw(st.integers(0, len(inside))), value)
        elif not place:
            tree = value
        else:
            parent, key = _at(tree, place[:-1]), place[-1]
            if kind == "remove":
                del parent[key]
            elif kind == "near" and type(inside) in (int, float):
                parent[key] = inside + draw(st.sampled_from((-1, 1, 0.5, 2**16)))
            elif kind == "swap":
                parent[key] = copy.deepcopy(_at(tree, draw(st.sampled_from(list(_places(tree))))))
            else:
                parent[key] = value
    return tree


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def text(tree: Any) -> str:
    """As JSON, NaN and Infinity included; the stand-ins become 100,000 lists in lists, a number of 5,000 digits, a key twice."""
    raw = json.dumps(tree).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).replace(f'"{BIG}"', "9" * 5000)
    return raw.replace(f'"{TWICE}"', next(iter(re.findall(r'"\w+"(?=: )', raw)), '""'))


def json_of(data: bytes) -> st.SearchStrategy[bytes]:
    """A checksum of ours is left out, as a forger would."""
    tree = json.loads(data)
    if isinstance(tree, dict):
        tree.pop("checksum", None)
    return trees(tree).map(lambda one: text(one).encode())


def lines_of(data: bytes) -> st.SearchStrategy[bytes]:
    """Of JSON lines: one of them with something wrong in it."""
    lines = data.splitlines()
    changed = st.integers(0, len(lines) - 1).flatmap(lambda k: json_of(lines[k]).map(lambda line: [*lines[:k], line, *lines[k + 1 :]]))
    return changed.map(lambda found: b"\n".join(found) + b"\n")


#: Nine of nine of nine …: some hundred bytes that are a hundred million words.
BOMB = "[&a0 x, " + ", ".join(f"&a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 9)) + "]"
#: What only YAML and OmegaConf know: programs, bombs of aliases, references to the environment and in circles.
YAML = (
    f"!!python/object/apply:os.system ['touch ../{MARKER}']", f"!!python/object/new:open ['../{MARKER}', 'w']", "!!binary x", "!x y",
    "${oc.env:HOME}", "${seed}", "${run_dir}", "${.x}", "${", "${x:y}", "${oc.decode:'[' }", "&a [*a]", "*nobody", "? x", "1_000", "0x1F",
    "2001-01-01", "1:30", "[" * 3000 + "]" * 3000, BOMB,
)  # fmt: skip


def _yaml(tree: Any) -> bytes:
    raw = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return raw.replace(DEEP, "[" * 3000 + "]" * 3000).replace(BIG, "9" * 5000).encode("utf-8", "surrogatepass")


def yaml_of(data: bytes) -> st.SearchStrategy[bytes]:
    """Trees of YAML, and its own words in the place of a value."""
    tree = yaml.safe_load(data)
    leaves = [place for place in _places(tree) if place]

    def worded(place: tuple, word: str) -> bytes:
        mine = copy.deepcopy(tree)
        _at(mine, place[:-1])[place[-1]] = "@word@"
        return _yaml(mine).replace(b"'@word@'", word.encode()).replace(b"@word@", word.encode())

    return trees(tree).map(_yaml) | st.builds(worded, st.sampled_from(leaves), st.sampled_from(YAML))
