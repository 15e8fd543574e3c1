"""Several students, each for its own classes or prompts, as one net: the router of multi-student distillation (2410.23274).

A partition gives every class or prompt to one student. Its hash is stored in every student's weight file and in the manifest that
names them; students of different partitions are never put together.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from potstill.engine.common.download import digest
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.kinds import is_dict, is_list, is_text, shown
from potstill.engine.common.reading import read_json
from potstill.engine.common.writing import whole
from potstill.engine.diffusion.precond import Coefficients
from potstill.engine.models.partitions import MOST_STUDENTS, AnyPartition, partition_in
from potstill.engine.models.weights import file_hash, load_net, read_metadata
from potstill.engine.nets.conditions import Condition, Text, expanded
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.kernels import Estimate

MANIFEST = "manifest.json"
ADVICE = f"so it is no manifest of students of ours: wanted the {MANIFEST} of a run or an export"


class Router(nn.Module):
    """Sends every sample of a batch to the student of its class or prompt; called and sampled like the one net it stands for."""

    def __init__(self, students: Sequence[Denoiser], partition: AnyPartition):
        super().__init__()
        self.students, self.partition = nn.ModuleList(students), partition
        first = students[0]
        self.shape, self.img_channels, self.img_resolution, self.label_dim, self.text = (
            first.shape, first.img_channels, first.img_resolution, first.label_dim, first.text
        )  # fmt: skip
        self.sigma_min, self.sigma_max = first.sigma_min, first.sigma_max

    @property
    def first(self) -> Denoiser:
        """The students have the levels of one teacher, and so of any of them."""
        first = self.students[0]
        assert isinstance(first, Denoiser)
        return first

    @property
    def null(self) -> Text | None:
        """The null prompt of all students, one row; None where they have none."""
        return self.first.null if isinstance(self.first, DiffusersDenoiser) else None

    @null.setter
    def null(self, text: Text) -> None:
        for student in self.students:
            assert isinstance(student, DiffusersDenoiser)
            student.null = text

    def round_sigma(self, sigma: float) -> float:
        return self.first.round_sigma(sigma)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return self.first.coefficients(sigma)

    def sampling_levels(self, steps: int) -> Tensor:
        return self.first.sampling_levels(steps)

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition | None = None, **how: Any) -> Tensor:
        """D of each sample by its own student: [N, C, H, W] float32."""
        return self._asked(lambda student, *own: student(*own, **how), x, sigma, condition)

    def estimate(self, x: Tensor, sigma: Tensor, condition: Condition | None = None, *, guidance: float = 1.0, **how: Any) -> Estimate:
        """The same with guidance, of which each student has its own; D is formed already."""
        return Estimate(self._asked(lambda student, *own: student.estimate(*own, guidance=guidance, **how).denoised(), x, sigma, condition))

    def _asked(self, ask: Callable[..., Tensor], x: Tensor, sigma: Tensor, condition: Condition | None) -> Tensor:
        """`ask(student, x, sigma, condition)` of every student for its own rows, put together: [N, C, H, W] float32."""
        condition = self._told(condition, len(x))
        student_of: Tensor = self.partition.of(condition)  # pyright: ignore[reportArgumentType]
        each = sigma if sigma.ndim == 0 else sigma.to(x.device).expand(len(x))
        out = torch.empty_like(x, dtype=torch.float32)
        for k, student in enumerate(self.students):
            rows = (student_of == k).nonzero()[:, 0]
            if len(rows):
                out[rows] = ask(student, x[rows], each if each.ndim == 0 else each[rows], condition[rows])
        return out

    def _told(self, condition: Condition | None, n: int) -> Condition:
        """n rows, by which samples are routed; where none are given, of the null prompt."""
        condition = self.null if condition is None and self.text else condition
        if condition is None:
            what = "prompts, or a null prompt" if self.text else "class labels"
            raise ValueError(f"a router wants {what}: they say which student to ask")
        return condition if len(condition) == n else expanded(condition, n)


def one_of(net: Denoiser | Router) -> Denoiser:
    """The net itself, or the first of several, which are all of one kind."""
    return net.first if isinstance(net, Router) else net


def student_folder(run: Path, k: int) -> Path:
    return run / f"student-{k}"


def student_name(k: int) -> str:
    """A student's weight file as a manifest names it, in the folder that the manifest is in."""
    return f"{student_folder(Path(), k)}/student.safetensors"


def write_manifest(run: Path, partition: AnyPartition) -> None:
    """The one file that names all students of a run. Every student's weight file must carry the partition's hash."""
    names = [student_name(k) for k in range(partition.count)]
    text = {
        "partition": partition.described(),
        "students": [{"file": name, "sha256": file_hash(run / name)} for name in names],
    }
    with whole(run / MANIFEST) as part:
        part.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


class Manifest(NamedTuple):
    """What a manifest says: which student has which classes or prompts; the weight files and their hashes, one a student."""

    partition: AnyPartition
    files: list[Path]
    hashes: list[str]


def read_manifest(manifest: Path) -> Manifest:
    """A manifest, nothing of whose files is read yet. Damaged if it is none; it may name no file but a run's own students beside it."""
    text = read_json(manifest, dict, ADVICE)
    students = text.get("students")
    if not is_list(students, _names_a_file, 1, MOST_STUDENTS):
        raise Damaged(f"{manifest} lacks the file and sha256 of each student, {ADVICE}")
    partition = partition_in(manifest, text.get("partition"), ADVICE)
    if len(students) != partition.count:
        raise Damaged(f"{manifest} contradicts itself: it names {len(students)} files for {partition.count} students")
    homes = manifest.parent.resolve(), manifest.resolve().parent  # the second: where the hub's cache keeps what its links lead to
    for k, one in enumerate(students):
        if one["file"] != student_name(k):
            raise Damaged(
                f"{manifest} names {shown(one['file'])} for student {k}, wanted {student_name(k)}: no other file is read or written"
            )
        if not any((manifest.parent / one["file"]).resolve().is_relative_to(home) for home in homes):
            raise UserError(f"{manifest.parent / one['file']} is a link out of the folder of its manifest: copy the file itself there")
    return Manifest(partition, [manifest.parent / one["file"] for one in students], [one["sha256"] for one in students])


def _names_a_file(value: Any) -> bool:
    return is_dict(value) and is_text(value.get("file")) and is_text(value.get("sha256"))


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
