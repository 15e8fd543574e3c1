"""In a checkout, `kernels` and `engine` are short names of `potstill.kernels` and `potstill.engine`: one module, two names.

The links in potstill/ point to the folders at the top. Whoever imports one of these by its short name runs its __init__.py,
which asks `share` to put potstill's module in its place; from then on a finder does that for every module below it. So
nothing is loaded, and no op registered, twice.

Hugging Face has a package called `kernels`, too. Where that is installed it stays what `kernels` is, and ours are its guests:
transformers imports from it what it wants, and `from kernels import score_match` works beside that.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec, module_from_spec, spec_from_loader
from types import CodeType, ModuleType


def share(name: str) -> None:
    """Make `name`, a package of a checkout that is being imported by its short name, the module potstill.<name>.

    Where another package of that name is installed, make it that one, with those of our public names that it lacks.
    """
    ours, theirs = import_module(f"potstill.{name}"), _installed(name)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    folders = theirs.submodule_search_locations if theirs else None
    for full in [full for full in sys.modules if full.startswith(f"potstill.{name}.")]:
        short = full.removeprefix("potstill.")
        if PathFinder.find_spec(short, folders or []) is None:  # before anybody asks: importing sets attributes, over functions
            sys.modules[short] = sys.modules[full]
    if theirs is None:
        sys.modules[name] = ours
    else:
        theirs.loader = _Both(theirs, ours.__name__)
        sys.modules[name] = module_from_spec(theirs)
        theirs.loader.exec_module(sys.modules[name])


def _installed(name: str) -> ModuleSpec | None:
    """The package that a distribution of this name has installed, ours never."""
    try:
        return PathFinder.find_spec(name, [str(distribution(name).locate_file(""))])
    except PackageNotFoundError:
        return None


class _Finder(MetaPathFinder):
    """Finds kernels.X and engine.X where potstill.kernels.X and potstill.engine.X are."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(("kernels.", "engine.")):
            return None
        theirs, real = PathFinder.find_spec(name, path), _ours(name)
        if real is None:
            return theirs
        if theirs and theirs.origin != real.origin:
            theirs.loader = _Both(theirs, real.name)
            return theirs
        return spec_from_loader(name, _Alias(real), origin=real.origin, is_package=real.submodule_search_locations is not None)


def _ours(name: str) -> ModuleSpec | None:
    try:
        return find_spec(f"potstill.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("potstill."):
            raise
        return None  # not even what it would be in: kernels.layer.device is theirs


class _Alias(Loader):
    """Gives a module of potstill's for its short name; `python -m` gets its code."""

    def __init__(self, real: ModuleSpec):
        self.real = real

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(self.real.name)

    def get_code(self, name: str) -> CodeType:
        return self.real.loader.get_code(self.real.name)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


class _Both(Loader):
    """Loads a module of theirs and adds what it lacks of the public names in ours."""

    def __init__(self, theirs: ModuleSpec, ours: str):
        assert theirs.loader is not None
        self.loader, self.ours = theirs.loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        for name, value in vars(import_module(self.ours)).items():
            if not name.startswith("_") and not hasattr(module, name):
                setattr(module, name, value)
