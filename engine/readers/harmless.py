"""What a recipe may hold, which often is somebody else's: reading it runs nothing, fills no memory and tells nothing of this machine.

A value may stand for another setting, ${data.path}, once; not for what is outside of the recipe, as ${oc.env:NAME} does on the
command line. A `_target_` is a setting like any other, which does not exist: nothing makes objects of what settings name.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from potstill.engine.common.errors import UserError

MOST_NODES = 5_000  # words, lists and branches, counted as often as aliases repeat them; our largest recipe has less than 200
DEEPEST = 32  # branches within branches
MOST_REFERENCES = 100
REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")


def check_text(text: str, loader: type[yaml.SafeLoader], title: str) -> None:
    """UserError for a recipe that grows when it is read, or refers to more than its own settings. YAMLError for what is no YAML."""
    if _nested(text) > 4 * DEEPEST:  # what is less is counted exactly below
        raise UserError(f"{title} has branches within branches, wanted at most {DEEPEST} deep")
    try:
        root = yaml.compose(text, Loader=loader)
    except RecursionError as error:
        raise UserError(f"{title} has branches within branches, wanted at most {DEEPEST} deep") from error
    if root is None:
        return
    words: list[str] = []
    nodes, depth = _measured(root, {}, words, title)
    if nodes > MOST_NODES or depth > DEEPEST:
        raise UserError(
            f"{title} has {nodes:,} values, {depth} deep, wanted at most {MOST_NODES:,} and {DEEPEST}: write it without aliases (*name)"
        )
    references = [word for word in words if "${" in word]
    if odd := [word for word in references if word.count("${") > 1 or not REFERENCE.search(word)]:
        raise UserError(
            f"{title} says {odd[0][:60]!r}, wanted a value, or one ${{NAME}} of another setting; only the command line can refer to more"
        )
    if len(references) > MOST_REFERENCES:
        raise UserError(f"{title} refers to other settings {len(references):,} times, wanted at most {MOST_REFERENCES}")


def check_loaded(recipe: Any, title: str) -> None:
    """UserError for settings of Hydra's own: they say from which packages it imports, and where it writes."""
    if isinstance(recipe, dict) and "hydra" in recipe:
        raise UserError(f"{title} sets 'hydra', which is Hydra's own and not the recipe's: remove it")


def check_references(tree: Any, title: str) -> None:
    """UserError where ${NAME}, in the settings as they are composed, is a branch or a list of more references: they could double for ever."""
    for word in _leaves(tree):
        if isinstance(word, str) and (match := REFERENCE.search(word)):
            target: Any = tree
            for name in match[1].split("."):
                target = target.get(name) if isinstance(target, dict) else None
            if isinstance(target, dict) or (isinstance(target, list) and any("${" in str(one) for one in target)):
                raise UserError(f"{title} says {word[:60]!r}, wanted the name of a single setting")


def _nested(text: str) -> int:
    """How many brackets are open at once, at most: PyYAML takes seconds for thousands, and stands on the stack for each."""
    depth = deepest = 0
    for bracket in re.findall(r"[][{}]", text):
        depth = max(depth + (1 if bracket in "[{" else -1), 0)
        deepest = max(deepest, depth)
    return deepest


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list):
        for one in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(one)
    else:
        yield tree


def _measured(node: yaml.Node, known: dict[int, tuple[int, int] | None], words: list[str], title: str) -> tuple[int, int]:
    """How many nodes there are with all aliases written out, and how deep they lie; `words` takes every text once."""
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise UserError(f"{title} has an alias within what it stands for, which has no end: write it without aliases (*name)")
        return found
    known[id(node)] = None
    if isinstance(node, yaml.ScalarNode):
        words.append(node.value)
        inner = []
    elif isinstance(node, yaml.MappingNode):
        if odd := next((key for key, _ in node.value if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":null")), None):
            raise UserError(f"{title} has a setting without a name in line {odd.start_mark.line + 1}, wanted NAME: value")
        inner = [one for pair in node.value for one in pair]
    else:
        inner = list(node.value)
    below = [_measured(one, known, words, title) for one in inner]
    found = 1 + sum(nodes for nodes, _ in below), 1 + max((depth for _, depth in below), default=0)
    known[id(node)] = found
    return found
