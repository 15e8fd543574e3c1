"""How a recipe and `key=value`s become settings.

A key that does not exist is an error that names the nearest one that does.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from potstill.engine.common.checks import BadSetting
from potstill.engine.common.errors import UserError
from potstill.engine.config.library import RECIPES, find, groups_of, names, of_method
from potstill.engine.config.schema import Config, flat
from potstill.engine.config.written import Recipes, as_written, kinds
from potstill.engine.methods.table import METHODS
from potstill.engine.readers.harmless import check_references

#: Branches that a recipe may leave out, which Hydra's overrides can then not reach into: another net, an optimiser of its own.
ABSENT = re.compile(r"\+{0,2}(students\.net|net\.config|(teacher\.train|students\.tsm|train)\.optim\.[^.=]+)(\.[^=]*=|=\{)")
OPTIMISER = re.compile(r"\+{0,2}train\.optim\.([^.=]+)")
METHOD = re.compile(r"method=(\w+)")  # the choice of one
NOT_IN = re.compile(r"Key '\w+' not in '\w+'\s+full_key: (\S+)")


class _Groups(SearchPathPlugin):
    """Lets a recipe anywhere on disk use our groups (method=…, net=…), and keeps its words as they are written."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for place in search_path.get_path():
            if place.provider == "main" and "://" not in place.path:
                place.path = f"{Recipes.scheme()}://{place.path}"
        search_path.append("potstill", f"{Recipes.scheme()}://{RECIPES}")


for plugin in (_Groups, Recipes):
    Plugins.instance().register(plugin)


def load(recipe: str | Path, overrides: list[str]) -> Config:
    """The settings of a recipe, by name or path, with `key=value` overrides. UserError for whatever does not fit the schema."""
    recipe = find(recipe)
    for override in overrides:
        if "=" not in override:
            raise UserError(f"wanted key=value, got {override!r}; e.g. train.batch=64")
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, node in METHODS.items():
        store.store(group="method", name=f"{name}_schema", node=node)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(recipe.resolve().parent), version_base="1.3"):
        try:
            written = [as_written(one, _kind) for one in overrides]
            within, absent = ([one for one in written if bool(ABSENT.match(one)) is far] for far in (False, True))
            tree, other = _tree(recipe, within)
            OmegaConf.set_struct(tree, False)  # new names among the optimisers; dataclasses stay closed
            tree.merge_with(*map(_nested, absent))
            check_references(OmegaConf.to_container(tree, resolve=False), recipe.name)
            if unknown := list(_unknown(tree)):
                raise UserError(_no_such_setting(unknown[0], recipe, overrides))
            config = OmegaConf.to_object(tree)
        except BadSetting as error:
            raise error.at(_place(tree)) from None
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_sentence(error, recipe, overrides)) from error
        except YAMLError as error:
            raise UserError(f"{recipe} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, Config):
        raise UserError(f"{recipe} is no recipe: its defaults list must begin with 'schema'")
    if type(config.method) not in METHODS.values():
        raise UserError(
            f"method wants one of {', '.join(sorted(p.stem for p in (RECIPES / 'method').glob('*.yaml')))}, got {config.method!r:.60}"
        )
    named = {found[1] for one in absent if (found := OPTIMISER.match(one))}
    for net in set(config.train.optim) - {"student", *config.method.needs().nets} - named if other else ():
        del config.train.optim[net]
    config.run_dir = config.run_dir or f"runs/{recipe.stem}"
    return config


def defaults_under(method: str) -> Config:
    """All settings as they are where nothing is set but the method, once some recipe has been loaded."""
    with initialize_config_dir(str(RECIPES), version_base="1.3"):
        config = OmegaConf.to_object(_composed(RECIPES / "schema.yaml", [f"+method={method}"]))
    assert isinstance(config, Config)
    return config


def other_method(recipe: Path, overrides: list[str]) -> str:
    """The method that an override chooses in place of the recipe's own; "" where none does. UserError for one that there is not."""
    chosen = [found[1] for one in overrides if (found := METHOD.fullmatch(one))]
    if len(chosen) > 1:
        raise UserError(f"wanted one method, got {' and '.join(chosen)}")
    own = groups_of(recipe).get("method") if chosen else None
    if own is None or own == chosen[-1]:
        return ""
    known = sorted({path.stem for folder in (recipe.parent, RECIPES) for path in (folder / "method").glob("*.yaml")})
    if chosen[-1].lower() == "msd":
        raise UserError(
            f"{recipe.name}: MSD is several students of any method: students.count=2 students.partition=blocks, without method=msd"
        )
    if chosen[-1] not in known:
        near = difflib.get_close_matches(chosen[-1].lower(), known, 2, 0.6)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"{recipe.name}: there is no method {chosen[-1]!r} to take; {hint}wanted one of {', '.join(known)}")
    return chosen[-1]


def notes_of_method(recipe: str | Path, overrides: list[str]) -> tuple[str, str]:
    """What to say where the method is not the recipe's own, and the command whose recipe is made for it; "" and "" for neither."""
    recipe = find(recipe)
    if not (method := other_method(recipe, overrides)):
        return "", ""
    own = of_method(recipe, method)
    better = f"potstill train {own.stem if own.parent == RECIPES else own}" if own else ""
    note = f"note: method={method} begins with its own defaults, and takes all else from {recipe.stem}, where it was chosen for {groups_of(recipe)['method']}"
    return f"{note}; made for it is: {better}" if better else note, better


def _tree(recipe: Path, overrides: list[str]) -> tuple[DictConfig, str]:
    """A recipe with overrides, and which other method than its own they choose, "" for none: that one begins with its own defaults, and what
    the recipe says of its own method's settings is left out.
    """
    if not any(map(METHOD.fullmatch, overrides)):
        return _composed(recipe, overrides), ""
    theirs = [one for one in overrides if METHOD.fullmatch(one) or one.lstrip("+").startswith("method.")]
    tree = _composed(recipe, [one for one in overrides if one not in theirs])  # which a recipe that is none does not survive
    if not (method := other_method(recipe, overrides)):
        return _composed(recipe, overrides), ""
    tree.method = _composed(recipe.with_name("schema.yaml"), [f"+{one}" if METHOD.fullmatch(one) else one for one in theirs]).method
    return tree, method


def _composed(recipe: Path, overrides: list[str]) -> DictConfig:
    """What Hydra makes of recipe and overrides. It stumbles over some input in ways of its own, which are the user's to mend too."""
    try:
        return compose(recipe.stem, overrides=overrides)
    except UserError:
        raise
    except MissingConfigException as error:  # an OSError too
        raise UserError(_sentence(error, recipe, overrides)) from error
    except (OSError, ValueError, TypeError, AssertionError, AttributeError, RecursionError) as error:
        given = f" with {' '.join(overrides)}" if overrides else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Hydra cannot compose {recipe}{given}: {reason}; wanted a recipe as in {RECIPES}, and key=value of settings"
        ) from error


def _unknown(tree: DictConfig, path: str = "") -> Iterator[str]:
    """Names within dataclasses that these do not have: `+key=value` can add some."""
    kind = OmegaConf.get_type(tree)
    for name in tree:
        if dataclasses.is_dataclass(kind) and name not in {f.name for f in dataclasses.fields(kind)}:
            yield f"{path}{name}"
        elif not OmegaConf.is_missing(tree, name) and isinstance(tree[name], DictConfig):
            yield from _unknown(tree[name], f"{path}{name}.")


def _place(tree: DictConfig) -> str:
    """The dotted name of the innermost branch whose own check fails."""
    for name in tree:
        branch = tree[name] if not OmegaConf.is_missing(tree, name) else None
        if not isinstance(branch, DictConfig):
            continue
        try:
            OmegaConf.to_object(branch)
        except BadSetting:
            inner = _place(branch)
            return f"{name}.{inner}" if inner else str(name)
    return ""


def _nested(override: str) -> dict[str, Any]:
    """{"a": {"b": value}} of a.b=value."""
    parsed = OverridesParser.create().parse_override(override)
    tree: Any = parsed.value()
    for name in reversed(parsed.key_or_group.split(".")):
        tree = {name: tree}
    return tree


def _kinds() -> Iterator[tuple[str, Any]]:
    """The names and types of all settings, those of every method included."""
    yield from kinds(Config).items()
    for node in METHODS.values():
        yield from ((f"method.{name}", kind) for name, kind in kinds(node).items())


def _kind(key: str) -> Any:
    """The type of a setting; None where there is none of this name."""
    return next((kind for name, kind in _kinds() if fnmatchcase(key, name)), None)


def _sentence(error: Exception, recipe: Path, overrides: list[str]) -> str:
    """What went wrong, from the innermost of Hydra's nested errors."""
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        known = [one for one in error.options or ["schema", *names()] if not one.endswith("_schema")]
        return f"{recipe.name}: there is no {group or 'recipe'} {name!r} to take; {_near(name, known)}"
    if isinstance(error, OverrideParseException):
        return " ".join(str(error).split())
    if isinstance(error, ConfigCompositionException) and (found := NOT_IN.search(str(error))):  # a line of the recipe's own
        return _no_such_setting(found[1], recipe, overrides)
    inner: BaseException = error
    while isinstance(inner.__cause__, HydraException | OmegaConfBaseException):
        inner = inner.__cause__
    key = getattr(inner, "full_key", None)
    message = str(inner).splitlines()[0]
    unknown = isinstance(inner, AttributeError | KeyError) or "not in" in message
    if key and unknown:
        return _no_such_setting(key, recipe, overrides)
    if isinstance(error, ConfigCompositionException) and not key:
        return " ".join(str(error).split())
    return f"{recipe.name}: {key}: {message}" if key else f"{recipe.name}: {message}"


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 2, 0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"wanted one of {', '.join(known)}"


def _no_such_setting(key: str, recipe: Path, overrides: list[str]) -> str:
    try:
        known = list(flat(OmegaConf.to_container(_tree(recipe, [one for one in overrides if METHOD.fullmatch(one)])[0])))
        known += sorted({key.rpartition(".")[0] for key in known} - {""})
    except (HydraException, OmegaConfBaseException, UserError):  # a recipe that does not compose does not say which method's they are
        known = [name for name, _ in _kinds()]
    if key in known:
        return f"{recipe.name} sets {key}, which this method does not have; wanted a recipe of this method (`potstill recipes`), or a copy without it"
    leaf = key.rpartition(".")[2]
    begun = [one for one in known if len(leaf) > 3 and one.rpartition(".")[2].startswith(leaf)]
    near = difflib.get_close_matches(key, known, 1, 0.8) or begun or difflib.get_close_matches(key, known, 1, 0.3)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{recipe.name}: there is no setting {key!r}{hint}"
