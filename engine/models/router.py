"""Several students, each for its own classes, as one net: the router of multi-student distillation (2410.23274).

A partition gives every class to one student. Its hash is stored in every student's weight file and in the manifest that
names them; students of different partitions are never put together.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from potstill.engine.common.download import digest
from potstill.engine.common.errors import UserError
from potstill.engine.common.writing import whole
from potstill.engine.models.weights import file_hash, load_net
from potstill.engine.nets.denoiser import Denoiser

MANIFEST = "manifest.json"


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
        return hashlib.sha256(json.dumps(self.student_of).encode()).hexdigest()[:16]

    def classes(self, student: int) -> list[int]:
        """The classes of one student, ascending."""
        return [c for c, s in enumerate(self.student_of) if s == student]


class Router(nn.Module):
    """Sends every sample of a batch to the student of its class; called and sampled like the one net it stands for."""

    def __init__(self, students: Sequence[Denoiser], partition: Partition):
        super().__init__()
        self.students, self.partition = nn.ModuleList(students), partition
        first = students[0]
        self.img_channels, self.img_resolution, self.label_dim = first.img_channels, first.img_resolution, first.label_dim
        self.sigma_min, self.sigma_max = first.sigma_min, first.sigma_max

    def round_sigma(self, sigma: float) -> float:
        """As `Denoiser.round_sigma`: the students have the levels of one teacher."""
        first = self.students[0]
        assert isinstance(first, Denoiser)
        return first.round_sigma(sigma)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """D of each sample by its own student: [N, C, H, W] float32."""
        if class_labels is None:
            raise ValueError("a router wants class labels: they say which student to ask")
        student_of = torch.tensor(self.partition.student_of, device=x.device)[class_labels.argmax(1)]
        sigma, out = sigma.expand(len(x)), torch.empty_like(x, dtype=torch.float32)
        for k, student in enumerate(self.students):
            rows = (student_of == k).nonzero()[:, 0]
            if len(rows):
                out[rows] = student(x[rows], sigma[rows], class_labels[rows])
        return out


def student_folder(run: Path, k: int) -> Path:
    return run / f"student-{k}"


def write_manifest(run: Path, partition: Partition) -> None:
    """The one file that names all students of a run. Every student's weight file must carry the partition's hash."""
    files = [student_folder(run, k) / "student.safetensors" for k in range(partition.count)]
    text = {
        "partition": {"kind": partition.kind, "student_of": partition.student_of, "hash": partition.hash},
        "students": [{"file": str(f.relative_to(run)), "sha256": file_hash(f)} for f in files],
    }
    with whole(run / MANIFEST) as part:
        part.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def load_router(manifest: Path) -> tuple[Router, dict[str, Any]]:
    """The students a manifest names, as one net in eval mode, and the metadata of the first.

    UserError if a file is missing, is not the one the manifest was written for, or belongs to another partition.
    """
    try:
        text = json.loads(manifest.read_text(encoding="utf-8"))
        partition = Partition(text["partition"]["kind"], tuple(text["partition"]["student_of"]))
        listed, promised = [(one["file"], one["sha256"]) for one in text["students"]], text["partition"]["hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest} is no manifest of students ({error!r}): wanted the {MANIFEST} of a run or an export") from error
    if partition.hash != promised or len(listed) != partition.count:
        raise UserError(f"{manifest} contradicts itself: its classes have hash {partition.hash}, it promises {promised}")
    students, metas = [], []
    for k, (name, sha256) in enumerate(listed):
        file = manifest.parent / name
        net, meta = load_net(file)
        if meta.get("partition") != partition.hash or meta.get("student") != k:
            raise UserError(
                f"{file} is student {meta.get('student')} of partition {meta.get('partition')}, "
                f"{manifest} wants student {k} of {partition.hash}: students of different partitions do not mix"
            )
        if sha256 not in (file_hash(file), digest(file)):  # an earlier potstill took all of the file for the tensors in it
            raise UserError(f"{file} has changed since {manifest} was written: repeat the training command to renew it")
        students.append(net)
        metas.append(meta)
    return Router(students, partition).eval(), metas[0]
