"""Scenes: pictures of one or two handwritten digits, each with a caption, made of scikit-learn's digits.

A picture is 8 high and 16 wide, two cells of 8x8, left and right. A digit may be faint. "a faint seven on the left",
"a three and a faint seven": 440 captions. Of 20 of the 100 ordered pairs of digits no picture is made, so that one can
ask for what was never seen: HELD_OUT. Pictures and tests have no digit in common.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

NAME = "scenes"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBER, SIDE = 12_000, 8  # pictures; pixels along a cell
FAINT = 0.45  # brightness of a faint digit
TRAIN = 1400  # of the 1,797 digits; the others are for tests
ALONE, OF_FAINT = 0.25, 0.25  # shares: of draws with one digit, of faint digits


class Cell(NamedTuple):
    digit: int  # -1: empty
    faint: bool = False


EMPTY = Cell(-1)
Scene = tuple[Cell, Cell]  # left, right


def caption_of(scene: Scene) -> str:
    left, right = scene
    if EMPTY in scene:
        return f"{_told(left if right == EMPTY else right)} on the {'left' if right == EMPTY else 'right'}"
    return f"{_told(left)} and {_told(right)}"


def _told(cell: Cell) -> str:
    """a seven, an eight, a faint eight."""
    return f"a{'n' * (not cell.faint and cell.digit == 8)}{' faint' * cell.faint} {WORDS[cell.digit]}"


def all_scenes(*, held_out: bool | None = None) -> list[Scene]:
    """All of them in a fixed order; only those of which no pictures are made (True), or the others (False)."""
    cells = [Cell(digit, faint) for digit in range(10) for faint in (False, True)]
    scenes: list[Scene] = [one for cell in cells for one in ((cell, EMPTY), (EMPTY, cell))]
    scenes += [(left, right) for left in cells for right in cells]
    return [scene for scene in scenes if held_out in (None, is_held_out(scene))]


def is_held_out(scene: Scene) -> bool:
    """Is this one of the pairs of which no picture is made? Every digit is in four of them, twice on each side."""
    left, right = scene
    return EMPTY not in scene and (3 * left.digit + right.digit) % 5 == 0


@cache
def scene_of() -> dict[str, Scene]:
    """What each caption says."""
    return {caption_of(scene): scene for scene in all_scenes()}


def digits(*, tests: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Digits [n, 8, 8] in 0 … 1, and which they are [n]: those that pictures are made of, or those for tests."""
    from sklearn.datasets import load_digits  # takes a second to import; other data do without

    values, digit = load_digits(return_X_y=True)
    order = np.argsort(np.random.Philox(0).random_raw(len(digit)), kind="stable")
    chosen = order[TRAIN:] if tests else order[:TRAIN]
    return values[chosen].reshape(-1, SIDE, SIDE) / 16, digit[chosen]


def pictures_of(scenes: list[Scene], *, tests: bool = False, seed: int = 0) -> np.ndarray:
    """One picture of each, uint8 [N, 1, 8, 16], of digits drawn at random; `tests`: of those that no picture of the set shows."""
    values, digit = digits(tests=tests)
    of_digit = [values[digit == k] for k in range(10)]
    bits = np.random.Philox(seed).random_raw((len(scenes), 2))
    pictures = np.zeros((len(scenes), 1, SIDE, 2 * SIDE))
    for picture, scene, draws in zip(pictures, scenes, bits, strict=True):
        for side, (cell, draw) in enumerate(zip(scene, draws, strict=True)):
            if cell != EMPTY:
                choice = of_digit[cell.digit][int(draw % len(of_digit[cell.digit]))]
                picture[0, :, side * SIDE : (side + 1) * SIDE] = choice * (FAINT if cell.faint else 1)
    return np.rint(255 * pictures).astype(np.uint8)


def drawn_scenes(n: int = NUMBER, *, seed: int = 1) -> list[Scene]:
    """What the pictures of the set show: 29 % one digit (of held-out pairs another draw is made), every digit as often as any other."""
    uniform = np.random.Generator(np.random.Philox(seed)).random
    found: list[Scene] = []
    while len(found) < n:
        alone, left, right, *faint = uniform(5)
        cells = [Cell(int(10 * u), bool(f < OF_FAINT)) for u, f in zip((left, right), faint, strict=True)]
        scene = (cells[0], EMPTY) if alone < ALONE / 2 else (EMPTY, cells[1]) if alone < ALONE else (cells[0], cells[1])
        found += [scene] * (not is_held_out(scene))
    return found
