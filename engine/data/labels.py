"""Class labels: one number an image, from EDM's dataset.json, from the sub-folder it lies in, or from a column beside it.

Labels are used or refused, never silently ignored: `say` takes a note on files and columns that may hold labels and are not read.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from potstill.engine.common.class_names import MOST as MAX_CLASSES  # a one-hot row has this many numbers at most
from potstill.engine.common.class_names import NAMES as CLASS_NAMES
from potstill.engine.common.class_names import plain
from potstill.engine.common.errors import UserError

MANY, FEW = 1000, 100  # of more than MANY classes at least one in FEW has an image, or the numbers are no classes
NAMES = (
    "label", "labels", "cls", "class", "class_label", "class_id", "class_idx", "class_index", "label_id", "label_idx",
    "label_index", "category_id", "target", "targets",
)  # fmt: skip
IGNORE = "--unlabelled (in a run: data.unlabelled=true) ignores labels"
BUCKET = re.compile(r"(?:.*/)?(\d+)/[^/]*?(\d+)\.[^./]+")
BUCKETS = (100, 1000, 10_000)  # files in a folder

Say = Callable[[str], None]


class Labels(NamedTuple):
    of: np.ndarray  # [N] int64, the class of each image
    dim: int  # how many classes there are: the width of a one-hot row
    classes: list[str] | None = None  # their names (`class_names.plain`)


Reader = Callable[[Say], Labels | None]  # the labels of a source, None where it has none; UserError for what is no label


def usual(names: Iterable[str], *more: str) -> list[str]:
    """Those of the names that columns of class labels usually have, and of `more`, the most usual first."""
    order = (*NAMES, *more)
    return sorted((name for name in names if name.lower() in order), key=lambda name: order.index(name.lower()))


def checked(labels: np.ndarray, classes: list[str] | None, names: Sequence[str], where: str) -> Labels:
    """Labels [N] that lie in 0 … dim - 1, where dim is the number of class names or else one above the largest."""
    limit = len(classes) if classes else MAX_CLASSES
    classes = list(map(plain, classes)) if classes else None
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        i = wrong[0]
        raise UserError(f"{where} gives {names[i]} the label {labels[i]}, wanted a class from 0 to {limit - 1}; {IGNORE}")
    return Labels(labels.astype(np.int64), len(classes) if classes else int(labels.max()) + 1, classes)


def from_values(values: Sequence[Any], classes: list[str] | None, names: Sequence[str], where: str) -> Labels:
    """Labels as Python objects, one an image: whole numbers, or a UserError that names the first that is none."""
    for name, label in zip(names, values, strict=True):
        if type(label) is not int or abs(label) > MAX_CLASSES:  # True is an int too
            wanted = f"a class from 0 to {(len(classes) if classes else MAX_CLASSES) - 1}"
            raise UserError(f"{where} gives {name} the label {_short(label)}, wanted {wanted}; {IGNORE}")
    return checked(np.array(values, np.int64), classes, names, where)


def from_keys(given: Mapping[Any, Any], keys: Sequence[Any], classes: list[str] | None, names: Sequence[str], where: str) -> Labels:
    """Labels by keys, one an image. UserError where an image has none."""
    if missing := [name for name, key in zip(names, keys, strict=True) if key not in given]:
        raise UserError(f"{where} has no label for {len(missing):,} of {len(names):,} images: {missing[0]}, …; {IGNORE}")
    return from_values([given[key] for key in keys], classes, names, where)


def from_json(text: bytes, names: Sequence[str], where: str, say: Say) -> Labels | None:
    """EDM's metadata: {"labels": [[name, class], …] or null}; a further key "classes" may name the classes."""
    try:
        metadata = json.loads(text, object_pairs_hook=_once)
        pairs, classes = metadata["labels"], metadata.get("classes")
        if pairs is None:
            return None
        pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
        given = dict(pairs)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{where} is not readable as {{"labels": [[name, class], …]}} ({" ".join(str(error).split()):.100}); {IGNORE}'
        ) from error
    if classes not in (None, []) and not CLASS_NAMES.fits(classes):
        raise UserError(f'{where} has "classes" that are no list of at most {MAX_CLASSES:,} names: mend it, or leave "classes" out')
    if len(given) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise UserError(f"{where} gives {twice} two labels, wanted every image once: remove the other; {IGNORE}")
    labels = from_keys(given, names, classes, names, where)
    if len(given) > len(names):
        say(f"{where} labels {len(given):,} images, {len(names):,} are there")
    return labels


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError for a name that it gives twice, of which json would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r} is there twice")
    return found


def refuse_holes(labels: Labels, where: str) -> None:
    """UserError for numbers that are hardly those of classes: one-hot rows as wide as the largest, and next to no class with an image.

    A part of a data set may lack most of its classes; where their names are given, or a net knows as many, their number is meant.
    """
    found = len(np.unique(labels.of))
    if labels.classes is None and labels.dim > MANY and found * FEW < labels.dim:
        raise UserError(
            f"{where} has labels up to {labels.dim - 1:,} and images of only {found:,} classes: number the classes from 0 on, or, if there are "
            f'{labels.dim:,}, name them in dataset.json ("classes": [name, …]); {IGNORE}'
        )


def from_folders(names: Sequence[str], where: str, say: Say) -> Labels | None:
    """The class is the sub-folder, in sorted order, after those that all images share. None where there is but one."""
    paths = _inner(names)
    if not any(paths):
        return None
    if not all(paths):
        loose, inside = names[[bool(p) for p in paths].index(False)], names[[bool(p) for p in paths].index(True)]
        raise UserError(
            f"{where} has images inside and outside of class folders ({inside}, {loose}), wanted one sub-folder a "
            f"class: sort them; {IGNORE}, as does potstill convert images … --unlabelled"
        )
    classes = sorted({path[0] for path in paths})
    if in_buckets(names):
        say(
            f"{where} looks like one long list of images cut into folders ({names[0]} … {names[-1]}), and its {len(classes):,} "
            f"folders are taken for classes; if they are none: {IGNORE}"
        )
    if len({len(path) for path in paths}) > 1 or len(paths[0]) > 1:
        say(f"{where} has folders within folders; the classes are the outer ones ({', '.join(classes[:3])} …), those within are not")
    number = {name: k for k, name in enumerate(classes)}
    return Labels(np.array([number[path[0]] for path in paths], np.int64), len(classes), list(map(plain, classes)))


def has_class_folders(names: Sequence[str]) -> bool:
    """Could the sub-folders be classes?"""
    paths = _inner(names)
    return bool(paths[0]) and all(paths) and not in_buckets(names)


def in_buckets(names: Sequence[str]) -> bool:
    """Are folders and files numbered through, as EDM's tools do it: 001000/001999.png, 00001/img00001999.png?"""
    found = [BUCKET.fullmatch(name) for name in names]
    if not all(found):
        return False
    numbers = [(int(match[1]), int(match[2])) for match in found if match]
    return any(all(folder in (n // size, n - n % size) for folder, n in numbers) for size in BUCKETS)


def _inner(names: Sequence[str]) -> list[list[str]]:
    """The folders of every image without those that all of them share."""
    paths = [name.split("/")[:-1] for name in names]
    while all(paths) and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]
    return paths


def _short(label: Any) -> str:
    text = repr(label)
    return text if len(text) <= 60 else f"{text[:60]}…"
