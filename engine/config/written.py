"""Text settings keep what was written: run_dir=2024_10_01 is a folder's name and `graphs: off` a word, not a number and not a false.

YAML and Hydra's command line take words for numbers, truth values and times of day before they look at the schema. Recipes
are therefore read with every word as text, which the schema then makes into what each setting wants, and the command line's
text settings are quoted in Hydra's own way.
"""

import dataclasses
import io
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from potstill.engine.config.library import file_of, text_of
from potstill.engine.readers.harmless import check_loaded, check_text

OVERRIDE = re.compile(r"(\+{0,2})([^=~@]+)=(.*)", re.DOTALL)


class _Words(yaml.SafeLoader):
    """YAML in which everything but null is text."""


_Words.yaml_implicit_resolvers = {
    first: kept
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, form) for tag, form in resolvers if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")])
}


class Recipes(FileConfigSource):
    """Folders of recipes, of which a file may hold several, read as text: recipes://FOLDER in Hydra's search path."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def is_config(self, config_path: str) -> bool:
        return file_of(self._recipe(config_path)) is not None

    def load_config(self, config_path: str) -> ConfigResult:
        recipe = self._recipe(config_path)
        text = text_of(recipe)
        check_text(text, _Words, recipe.name)
        OmegaConf.load(io.StringIO(text))  # which refuses what is said twice
        words = yaml.load(text, Loader=_Words) or {}
        check_loaded(words, recipe.name)
        config = OmegaConf.create(words)
        return ConfigResult(self.provider, f"{self.scheme()}://{self.path}", config, self._get_header_dict(text))

    def _recipe(self, config_path: str) -> Path:
        return Path(self.path, self._normalize_file_name(config_path))


def as_written(override: str, kind: Callable[[str], Any]) -> str:
    """`key=value` with the value quoted where `kind(key)`, the setting's type, is text or a list of texts.

    null stays what it is, and so does what the user has quoted, or any other kind of override.
    """
    if not (parts := OVERRIDE.fullmatch(override)):
        return override
    plus, key, value = parts.groups()
    wanted = kind(key)
    if is_text(wanted):
        value = _quoted(value)
    elif get_origin(wanted) is list and is_text(get_args(wanted)[0]) and (inner := re.fullmatch(r"\[(.*)\]", value.strip(), re.DOTALL)):
        value = f"[{','.join(map(_quoted, _items(inner[1])))}]"
    return f"{plus}{key}={value}"


def is_text(kind: Any) -> bool:
    """Is this the type of a text, or of a text or null?"""
    return kind is str or (set(get_args(kind)) == {str, type(None)})


@cache
def kinds(schema: type) -> dict[str, Any]:
    """{dotted name: type} of every setting and branch of a tree of dataclasses; * stands for any name of a dictionary."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(schema).items():
        found[name] = kind
        if inner := branch_of(kind):
            place = f"{name}.*" if get_origin(kind) is dict else name
            found |= {f"{place}.{below}": one for below, one in kinds(inner).items()}
    return found


def branch_of(kind: Any) -> type | None:
    """The dataclass below a setting of this type: a dataclass, one or null, or a dictionary of some; None for a value."""
    return next((one for one in (kind, *get_args(kind)) if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


def _items(text: str) -> list[str]:
    """What stands between commas that are not within quotes."""
    return [item.strip() for item in re.findall(r"""(?:"[^"]*"|'[^']*'|[^,])+""", text)]


def _quoted(text: str) -> str:
    """In single quotes, with Hydra's escapes: backslashes count only before a quote."""
    if text in ("", "null") or (len(text) > 1 and text[0] == text[-1] and text[0] in "'\""):
        return text
    return "'" + re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + (r"\'" if m[2] else ""), text) + "'"
