"""Optional packages: what settings ask for, whether it is here, and how to get it or do without."""

import sys
from collections.abc import Callable
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
