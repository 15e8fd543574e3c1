"""The snapshots of one of EDM2's trainings: network-snapshot-KIMG-STD.pkl, each the weights averaged by a profile of that width.

A folder has several of them, at several times and of several widths; averages of any other width are mixtures of these.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from potstill.engine.common.errors import UserError, reading
from potstill.engine.formats.edm_pickle import read_net

NAME = re.compile(r"network-snapshot-(\d{7,})-(\d\.\d{3})\.pkl")
STEP = 1024  # images; trainings are counted in whole numbers of so many


class Snapshot(NamedTuple):
    """One file: after how many images, and of which relative width (σ_rel) its average is."""

    images: int
    std: float
    path: Path

    def tensors(self) -> dict[str, Tensor]:
        """Its weights and buffers by name, float32. UserError where it cannot be read, or is refused (`edm_pickle.read_net`)."""
        return {name: t.contiguous() for name, t in read_net(self.path).net.state_dict().items()}


def snapshots_in(folder: Path) -> Iterator[Snapshot]:
    """Those of a folder, by their names, the earliest first; other files are passed over. UserError where there is none."""
    with reading(folder):
        names = sorted(path.name for path in folder.iterdir())
    found = [(int(match[1]), float(match[2]), folder / match[0]) for name in names if (match := NAME.fullmatch(name))]
    if not found:
        raise UserError(
            f"{folder} holds no snapshot of EDM2's: wanted network-snapshot-KIMG-STD.pkl, as network-snapshot-2147483-0.100.pkl"
        )
    for kimg, std, path in sorted(found):
        yield Snapshot(images_at(kimg), std, path)


def images_at(kimg: int) -> int:
    """How many images a training had seen whose file says so many thousands, rounded down."""
    return (1000 * kimg + 999) // STEP * STEP
