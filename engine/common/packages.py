"""Other people's packages: which versions are here, and what to do without an optional one that settings ask for."""

import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple


class Extra(NamedTuple):
    """An optional package that some settings ask for; potstill's extra has the same name."""

    package: str
    purpose: str  # what asks for it, such as method.lpips
    otherwise: str  # what a user does who does not want it, such as "set method.lpips=0"
    fetch: Callable[[], object] = lambda: None  # loads its weights, and so downloads them where they are not here yet

    def missing(self) -> list[str]:
        """What to tell the user: one sentence where the package is not installed."""
        if installed(self.package):
            return []
        return [f"package {self.package}, for {self.purpose}: pip install 'potstill[{self.package}]', or {self.otherwise}"]


def installed(package: str) -> bool:
    return package in sys.modules or find_spec(package) is not None


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions_of(*packages: str) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    return {package: found for package in packages if (found := _version(package))}
