"""Which of several students a class or a prompt belongs to (2410.23274): what routes samples, and how it stands in JSON.

The hash of a partition is stored in every student's weight file: students of different partitions are never put together.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.kinds import TEXT, Kind, check, is_dict, is_list, is_number, is_whole, shown
from potstill.engine.nets.conditions import Text

MOST_CLASSES, MOST_STUDENTS, MOST_NUMBERS = 1_000_000, 4096, 65_536  # a file that names more is none of ours; numbers: of a feature
KMEANS, QUADRANTS = "kmeans", "quadrants"


@dataclass(frozen=True)
class Partition:
    """student_of[c] is the student, 0 … count - 1, that class c belongs to."""

    kind: str
    student_of: tuple[int, ...]

    @property
    def count(self) -> int:
        return max(self.student_of) + 1

    @property
    def hash(self) -> str:
        """Of the assignment itself; how it was found does not matter."""
        return _hash(self.student_of)

    def classes(self, student: int) -> list[int]:
        """The classes of one student, ascending."""
        return [c for c, s in enumerate(self.student_of) if s == student]

    def of(self, labels: Tensor) -> Tensor:
        """The students [N] of one-hot rows [N, classes], on their device."""
        return torch.tensor(self.student_of, device=labels.device)[labels.argmax(1)]

    def described(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": self.kind, "student_of": self.student_of, "hash": self.hash}


@dataclass(frozen=True, eq=False)
class PromptPartition:
    """The student of a prompt by its feature f [D] (`Text.feature`), seen before or not.

    kmeans: that of the nearest of the centres `vectors` [K, D]. quadrants: the bit f·v₀ > t₀ of two students; of four, a second bit
    f·v₁ > t₁ where the first is 0, f·v₁ > t₂ where it is 1. vectors: v [1 or 2, D]; thresholds: t [1 or 3]. Both are float64.
    """

    kind: str
    vectors: Tensor
    thresholds: Tensor

    @property
    def count(self) -> int:
        return len(self.vectors) if self.kind == KMEANS else 2 ** len(self.vectors)

    @property
    def hash(self) -> str:
        return _hash([self.kind, self.vectors.tolist(), self.thresholds.tolist()])

    def of(self, text: Text) -> Tensor:
        """The students [N] of embedded prompts, on their device. UserError for prompts of another text encoder."""
        features = text.feature().double()
        vectors, thresholds = self.vectors.to(features.device), self.thresholds.to(features.device)
        if features.shape[1] != vectors.shape[1]:
            raise UserError(
                f"these students share out prompts by {vectors.shape[1]} numbers of each, got {features.shape[1]}: encode the prompts with the "
                "pipeline of their teacher"
            )
        if self.kind == KMEANS:
            return torch.stack([(features - centre).square().sum(1) for centre in vectors], 1).argmin(1)
        along = [(features * vector).sum(1) for vector in vectors]
        first = (along[0] > thresholds[0]).long()
        return first if len(vectors) == 1 else 2 * first + (along[1] > thresholds[1 + first])

    def described(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": self.kind, "vectors": self.vectors.tolist(), "thresholds": self.thresholds.tolist(), "hash": self.hash}


AnyPartition = Partition | PromptPartition


def partition_in(path: Path, said: Any, advice: str) -> AnyPartition:
    """The partition that a file describes. Damaged, which ends in `advice`, where it is none or contradicts itself."""
    kinds = next((one for one in (CLASSES, PROMPTS) if is_dict(said) and said.keys() >= one.keys()), None)
    if kinds is None:
        raise Damaged(f"{path} lacks its partition, {advice}")
    check(path, said, kinds, advice, inside="partition.")
    if kinds is CLASSES:
        partition = Partition(said["kind"], tuple(said["student_of"]))
    else:
        vectors, thresholds = (torch.tensor(said[name], dtype=torch.float64, device="cpu") for name in ("vectors", "thresholds"))
        partition = PromptPartition(said["kind"], vectors, thresholds)
        if (said["kind"], len(thresholds)) not in ((KMEANS, 0), (QUADRANTS, {1: 1, 2: 3}.get(len(vectors)))):
            raise Damaged(f"{path} contradicts itself: it has {said['kind']} of {len(vectors)} vectors and {len(thresholds)} thresholds")
    if partition.hash != said["hash"]:
        raise Damaged(f"{path} contradicts itself: its partition has hash {partition.hash}, it promises {shown(said['hash'])}")
    return partition


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _each_has_classes(value: Any) -> bool:
    return is_list(value, lambda student: is_whole(student, 0, MOST_STUDENTS - 1), 1, MOST_CLASSES) and len(set(value)) == max(value) + 1


def _vectors(value: Any) -> bool:
    rows = is_list(value, lambda row: is_list(row, is_number, 1, MOST_NUMBERS), 1, MOST_STUDENTS)
    return rows and len(set(map(len, value))) == 1


CLASSES = {"kind": TEXT, "hash": TEXT, "student_of": Kind(_each_has_classes, "each class's student, 0, 1 … without a gap")}
PROMPTS = {
    "kind": Kind(lambda value: value in (KMEANS, QUADRANTS), f"{KMEANS} or {QUADRANTS}"),
    "hash": TEXT,
    "vectors": Kind(_vectors, "lists of as many finite numbers each"),
    "thresholds": Kind(lambda value: is_list(value, is_number, 0, 3), "at most 3 finite numbers"),
}
