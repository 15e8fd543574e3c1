"""Which versions of other people's packages are at work."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions_of(*packages: str) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    return {package: found for package in packages if (found := _version(package))}
