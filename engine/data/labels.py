"""Class labels: one number an image, from EDM's dataset.json or from the sub-folder the image lies in."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.errors import UserError

MAX_CLASSES = 100_000  # a one-hot row has this many numbers at most; a larger label is a mistake, not a class


class Labels(NamedTuple):
    of: np.ndarray  # [N] int64, the class of each image
    dim: int  # how many classes there are: the width of a one-hot row
    classes: list[str] | None = None  # their names


def checked(labels: np.ndarray, classes: list[str] | None, names: Sequence[str], where: str) -> Labels:
    """Labels [N] that lie in 0 … dim - 1, where dim is the number of class names or else one above the largest."""
    limit = len(classes) if classes else MAX_CLASSES
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        i = wrong[0]
        raise UserError(f"{where} gives {names[i]} the label {labels[i]}, wanted a class from 0 to {limit - 1}")
    return Labels(labels.astype(np.int64), len(classes) if classes else int(labels.max()) + 1, classes)


def from_json(text: bytes, names: Sequence[str], where: str) -> Labels | None:
    """EDM's metadata: {"labels": [[name, class], …] or null}; a further key "classes" may name the classes."""
    try:
        metadata = json.loads(text)
        pairs, classes = metadata["labels"], metadata.get("classes")
        if pairs is None:
            return None
        given = dict(pairs)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f'{where} is not readable as {{"labels": [[name, class], …]}} ({error!r})') from error
    if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
        raise UserError(f'{where} has "classes" that are no list of names')
    missing = [name for name in names if name not in given]
    if missing:
        raise UserError(f"{where} has no label for {len(missing):,} of {len(names):,} images: {missing[0]}, …")
    for name in names:
        label = given[name]
        if type(label) is not int or abs(label) > MAX_CLASSES:  # True is an int too
            raise UserError(f"{where} gives {name} the label {label!r}, wanted a class from 0 to {MAX_CLASSES - 1}")
    return checked(np.array([given[name] for name in names], np.int64), classes, names, where)


def from_folders(names: Sequence[str], where: str) -> Labels | None:
    """The class is the sub-folder, in sorted order, after those that all images share. None where there is but one."""
    paths = [name.split("/")[:-1] for name in names]
    while all(paths) and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]
    if not any(paths):
        return None
    if not all(paths):
        loose, inside = names[[bool(p) for p in paths].index(False)], names[[bool(p) for p in paths].index(True)]
        raise UserError(
            f"{where} has images inside and outside of class folders ({inside}, {loose}), wanted one sub-folder a "
            "class: sort them, or ignore the folders (python -m engine.convert images … --unlabelled)"
        )
    classes = sorted({path[0] for path in paths})
    number = {name: k for k, name in enumerate(classes)}
    return Labels(np.array([number[path[0]] for path in paths], np.int64), len(classes), classes)
