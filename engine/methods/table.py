"""METHODS: the settings of every method by its name, which `method=` knows.

Each file of this folder that has a `MethodConfig` is in it; nothing else has to be told of a new one.
"""

from importlib import import_module
from pkgutil import iter_modules

from potstill.engine import methods
from potstill.engine.methods.base import METHODS

for found in iter_modules(methods.__path__, f"{methods.__name__}."):
    import_module(found.name)

__all__ = ["METHODS"]
