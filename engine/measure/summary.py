"""summary.json, what a finished run has measured: the numbers and texts in it that others read."""

from pathlib import Path
from typing import Any

from potstill.engine.common.kinds import DICT, NUMBER, Kind, check, count, is_dict, is_text, number, numbers, optional
from potstill.engine.common.reading import read_json

FILE = "summary.json"
ADVICE = "repeat the training command to renew it"
SHARE = number(0, 1)
TEXT = Kind(lambda value: is_text(value) and value.isprintable() and len(value) <= 1000, "a line of text")
NUMBERS = Kind(lambda value: is_dict(value) and all(TEXT.fits(k) and NUMBER.fits(v) for k, v in value.items()), "numbers by name")
LEVELS = numbers(1, 0)
NEAR = Kind(
    lambda value: (
        is_dict(value) and count(1).fits(value.get("images")) and all(LEVELS.fits(value.get(name)) for name in ("student", "real"))
    ),
    "images, student and real of nearest neighbours",
)
SCORE: dict[str, Kind] = {
    "fd": NUMBER, "kid": NUMBER, "precision": SHARE, "recall": SHARE, "nfe": count(0), "n": count(0), "best_of": count(1),
    "features": TEXT, "num_features": count(1), "seeds": TEXT, "data": TEXT, "warning": TEXT, "features_sha256": optional(TEXT), "reference_sha256": optional(TEXT),
    "reference_images": optional(count(0)), "scores": NUMBERS, "neighbours": NEAR, "classes": NUMBERS,
}  # fmt: skip
PARTS: dict[str, dict[str, Kind]] = {"student": SCORE, "teacher": SCORE, "real": SCORE, "floor": {"fd": optional(NUMBER)}}
EACH = {"seconds": number(0), "images_seen": count(0), "versions": TEXT}  # of all that stands in these
TOP = {name: optional(DICT) for name in (*PARTS, *EACH)} | {"device": TEXT, "precision": TEXT, "seed": count(0)}
TOP["images_seen"] = Kind(lambda value: TOP["seconds"].fits(value) or count(0).fits(value), "names and values, or one whole number")


def read_summary(run: Path) -> dict[str, Any] | None:
    """summary.json of a run folder; None where there is none: the run is not finished. Damaged where it is not what a run writes."""
    path = run / FILE
    if not path.is_file():
        return None
    found = read_json(path, dict, ADVICE)
    check(path, found, TOP, ADVICE)
    for name, kinds in PARTS.items():
        check(path, found.get(name) or {}, kinds, ADVICE, inside=f"{name}.")
    for name, kind in EACH.items():
        part = part if is_dict(part := found.get(name)) else {}
        check(path, part, dict.fromkeys(part, kind), ADVICE, inside=f"{name}.")
    return found
