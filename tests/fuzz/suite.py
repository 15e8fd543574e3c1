"""What all readers are, and what the test suite asks of each."""

from . import models, pictures, runs
from .jail import Reader, fuzz

READERS = [*models.READERS, *runs.READERS, *pictures.READERS]
TOTAL = sum(reader.share for reader in READERS)
INPUTS, SEED = 10_000, 0  # of the test suite


def share(reader: Reader, n: int = INPUTS) -> int:
    """How many of n inputs for all readers are this one's."""
    return max(1, round(n * reader.share / TOTAL))


def assert_clean(reader: Reader) -> None:
    """No fault in this reader's share of the suite's inputs."""
    tally = fuzz(reader, share(reader), SEED)
    told = [f"{one['n']} x {place} ({one['kind']} in {one['file']}): {one['said']}" for place, one in tally.faults.items()]
    assert not told, "\n".join(told)
