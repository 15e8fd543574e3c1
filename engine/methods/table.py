"""METHODS: the settings of every method by its name, which `method=` knows; `settings_of` knows its variants' names, too.

Each file of this folder that has a `MethodConfig` is in it; nothing else has to be told of a new one.
"""

from importlib import import_module
from pkgutil import iter_modules

from potstill.engine import methods
from potstill.engine.methods.base import METHODS, MethodConfig

for found in iter_modules(methods.__path__, f"{methods.__name__}."):
    import_module(found.name)

__all__ = ["METHODS", "settings_of"]


def settings_of(name: str) -> type[MethodConfig] | None:
    """The class of a method's settings, by its name or that of a variant (dmd2 of dmd); None without one."""
    return next((kind for kind in METHODS.values() if name in (kind.name, *kind.variants)), None)
