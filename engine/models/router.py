"""Several students, each for its own classes, as one net: the router of multi-student distillation (2410.23274).

A partition gives every class to one student. Its hash is stored in every student's weight file and in the manifest that
names them; students of different partitions are never put together.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from potstill.engine.common.download import digest
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.kinds import TEXT, Kind, check, is_dict, is_list, is_text, is_whole, shown
from potstill.engine.common.reading import read_json
from potstill.engine.common.writing import whole
from potstill.engine.diffusion.precond import Coefficients
from potstill.engine.models.weights import file_hash, load_net, read_metadata
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.diffusers import DiffusersDenoiser

MANIFEST = "manifest.json"
MOST_CLASSES, MOST_STUDENTS = 1_000_000, 4096  # a manifest that names more is none of ours
ADVICE = f"so it is no manifest of students of ours: wanted the {MANIFEST} of a run or an export"


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
        self.shape, self.img_channels, self.img_resolution, self.label_dim = (
            first.shape, first.img_channels, first.img_resolution, first.label_dim
        )  # fmt: skip
        self.sigma_min, self.sigma_max = first.sigma_min, first.sigma_max

    @property
    def first(self) -> Denoiser:
        """The students have the levels of one teacher, and so of any of them."""
        first = self.students[0]
        assert isinstance(first, Denoiser)
        return first

    def round_sigma(self, sigma: float) -> float:
        return self.first.round_sigma(sigma)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return self.first.coefficients(sigma)

    def sampling_levels(self, steps: int) -> Tensor:
        return self.first.sampling_levels(steps)

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


def student_name(k: int) -> str:
    """A student's weight file as a manifest names it, in the folder that the manifest is in."""
    return f"{student_folder(Path(), k)}/student.safetensors"


def write_manifest(run: Path, partition: Partition) -> None:
    """The one file that names all students of a run. Every student's weight file must carry the partition's hash."""
    names = [student_name(k) for k in range(partition.count)]
    text = {
        "partition": {"kind": partition.kind, "student_of": partition.student_of, "hash": partition.hash},
        "students": [{"file": name, "sha256": file_hash(run / name)} for name in names],
    }
    with whole(run / MANIFEST) as part:
        part.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


class Manifest(NamedTuple):
    """What a manifest says: which student has which classes; the weight files and their hashes, one a student."""

    partition: Partition
    files: list[Path]
    hashes: list[str]


def read_manifest(manifest: Path) -> Manifest:
    """A manifest, nothing of whose files is read yet. Damaged if it is none; it may name no file but a run's own students beside it."""
    text = read_json(manifest, dict, ADVICE)
    said, students = text.get("partition"), text.get("students")
    if not (is_dict(said) and said.keys() >= PARTITION.keys() and is_list(students, _names_a_file, 1, MOST_STUDENTS)):
        raise Damaged(f"{manifest} lacks its partition, or the file and sha256 of each student, {ADVICE}")
    check(manifest, said, PARTITION, ADVICE, inside="partition.")
    partition = Partition(said["kind"], tuple(said["student_of"]))
    if partition.hash != said["hash"] or len(students) != partition.count:
        raise Damaged(
            f"{manifest} contradicts itself: its classes have hash {partition.hash}, it promises {shown(said['hash'])}; "
            f"it names {len(students)} files for {partition.count} students"
        )
    homes = manifest.parent.resolve(), manifest.resolve().parent  # the second: where the hub's cache keeps what its links lead to
    for k, one in enumerate(students):
        if one["file"] != student_name(k):
            raise Damaged(
                f"{manifest} names {shown(one['file'])} for student {k}, wanted {student_name(k)}: no other file is read or written"
            )
        if not any((manifest.parent / one["file"]).resolve().is_relative_to(home) for home in homes):
            raise UserError(f"{manifest.parent / one['file']} is a link out of the folder of its manifest: copy the file itself there")
    return Manifest(partition, [manifest.parent / one["file"] for one in students], [one["sha256"] for one in students])


def _each_has_classes(value: Any) -> bool:
    return is_list(value, lambda student: is_whole(student, 0, MOST_STUDENTS - 1), 1, MOST_CLASSES) and len(set(value)) == max(value) + 1


def _names_a_file(value: Any) -> bool:
    return is_dict(value) and is_text(value.get("file")) and is_text(value.get("sha256"))


PARTITION = {"kind": TEXT, "hash": TEXT, "student_of": Kind(_each_has_classes, "each class's student, 0, 1 … without a gap")}


def load_router(manifest: Path, base: Path | None = None) -> tuple[Router, dict[str, Any]]:
    """The students a manifest names, as one net in eval mode, and the metadata of the first. base: as of `load_net`.

    UserError if a file is missing, is not the one the manifest was written for, or belongs to another partition.
    """
    partition, files, hashes = read_manifest(manifest)
    students, metas, sizes = [], [], []
    for k, (file, sha256) in enumerate(zip(files, hashes, strict=True)):
        meta = read_metadata(file)
        if meta.get("partition") != partition.hash or meta.get("student") != k:
            raise UserError(
                f"{file} is student {meta.get('student')} of partition {shown(meta.get('partition'))}, "
                f"{manifest} wants student {k} of {partition.hash}: students of different partitions do not mix"
            )
        if sha256 != file_hash(file) and sha256 != digest(file):  # an earlier potstill took all of the file for the tensors in it
            raise UserError(f"{file} has changed since {manifest} was written: repeat the training command to renew it")
        net, meta = load_net(file, base)
        sizes.append((net.name if isinstance(net, DiffusersDenoiser) else net.precond, net.img_channels, net.img_resolution, net.label_dim))
        if sizes[k] != sizes[0]:
            raise Damaged(
                f"{file} is a net of {sizes[k]}, student 0 is one of {sizes[0]} (class, channels, resolution, classes): they do not mix"
            )
        students.append(net)
        metas.append(meta)
    return Router(students, partition).eval(), metas[0]
