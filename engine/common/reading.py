"""JSON that a user may have downloaded, edited or half written: bounded, and one sentence where it is something else."""

import json
from pathlib import Path
from typing import Any

from potstill.engine.common.errors import Damaged, reading

MOST_BYTES = 2**26  # of a JSON file; the largest of ours, a plan's, has less than one MiB


def read_json(path: Path, kind: type, advice: str, *, most: int = MOST_BYTES) -> Any:
    """What a JSON file holds, of this kind at the top (dict, list). Damaged, which ends in `advice`, where it is something else."""
    with reading(path), path.open("rb") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise Damaged(f"{path} has more than {most:,} bytes, wanted a JSON file of ours: {advice}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not readable as JSON ({error}): {advice}") from error
    if not isinstance(found, kind):
        raise Damaged(f"{path} holds a {type(found).__name__}, wanted a {kind.__name__}: {advice}")
    return found
