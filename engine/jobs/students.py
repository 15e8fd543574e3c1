"""What the settings `students.` mean: which student has which classes, and whose weights it goes on from."""

from pathlib import Path

import numpy as np
import torch

from potstill.engine.common.errors import UserError
from potstill.engine.common.kinds import shown
from potstill.engine.config.schema import Config
from potstill.engine.data.images import Images
from potstill.engine.methods.base import Method
from potstill.engine.methods.msd import make_partition
from potstill.engine.models.partitions import Partition
from potstill.engine.models.router import student_folder
from potstill.engine.models.weights import load_net, read_metadata
from potstill.engine.nets.edm_denoiser import EDMDenoiser
from potstill.engine.nets.guide import preconditioning
from potstill.engine.training.checkpoint import checkpoints, load_newest


def partition_of(cfg: Config, label_dim: int, images: Images | None) -> Partition | None:
    """Which student has which classes; None where there is one student."""
    count, kind = cfg.students.count, cfg.students.partition
    if count == 1:
        return None
    if not label_dim:
        raise UserError(f"students.count = {count} wants a class-conditional teacher, or one of prompts: these are what is shared out")
    features = None
    if kind == "kmeans":
        if images is None or images.labels is None:
            raise UserError("students.partition=kmeans wants labelled data: it clusters the classes' mean images")
        features = class_means(images, label_dim)
    partition = make_partition(kind, label_dim, count, cfg.seed, features)
    without = set(classes_without_images(images, label_dim))
    for student in range(count):
        if without.issuperset(share := partition.classes(student)):
            assert images is not None  # else every class counts as one with images
            raise UserError(
                f"student {student} of {count} has no images: {images.name} has none of {listed(share)}; take fewer students or "
                "another students.partition"
            )
    return partition


def classes_without_images(images: Images | None, label_dim: int) -> list[int]:
    """Which of a net's classes the labelled data show nothing of, ascending."""
    if images is None or images.labels is None:
        return []
    return np.setdiff1d(np.arange(label_dim), images.labels).tolist()


def class_means(images: Images, label_dim: int) -> np.ndarray:
    """The mean image of each class, flattened: [label_dim, C·H·W]. UserError for a class without an image."""
    if without := classes_without_images(images, label_dim):
        raise UserError(
            f"students.partition=kmeans wants images of every class, {images.name} has none of {listed(without)}: take blocks or random"
        )
    assert images.labels is not None
    sums, counts = np.zeros((label_dim, images.channels * images.resolution**2)), np.zeros(label_dim)
    for i, label in enumerate(images.labels):
        row = images.read(i)
        sums[label] += (images.seen(torch.from_numpy(row)).numpy() if images.moments else row).reshape(-1)
        counts[label] += 1
    return sums / counts[:, None]


def listed(classes: list[int]) -> str:
    """Classes in a sentence, the first five of many."""
    more = f" and {len(classes) - 5:,} more" if len(classes) > 5 else ""
    return f"class{'es' * (len(classes) > 1)} {', '.join(map(str, classes[:5]))}{more}"


def earlier_place(cfg: Config, student: int) -> Path | None:
    """The folder with the checkpoints that this student goes on from, or a weight file; None where it starts from the teacher."""
    if not cfg.students.start:
        return None
    place = Path(cfg.students.start).expanduser()
    return student_folder(place, student) if cfg.students.count > 1 and not place.is_file() else place


def is_earlier(place: Path) -> bool:
    """Is there something that a student can go on from?"""
    return place.is_file() or bool(checkpoints(place / "checkpoints"))


def has_begun(cfg: Config, student: int) -> bool:
    """Has this student a checkpoint of its own? Then it wants nothing of the run that it began with."""
    folder = Path(cfg.run_dir or "").expanduser()
    return bool(checkpoints((student_folder(folder, student) if cfg.students.count > 1 else folder) / "checkpoints"))


def check_same_part(place: Path, partition: Partition | None) -> None:
    """UserError where the student of an earlier run had other classes than this one has."""
    file = place / "student.safetensors"
    theirs = read_metadata(file).get("partition") if partition and file.is_file() else None
    if partition and theirs is not None and theirs != partition.hash:
        raise UserError(
            f"students.start: {place} was trained on the classes of another partition ({shown(theirs)}) than students.partition="
            f"{partition.kind} makes here ({partition.hash}): set the one of that run"
        )


def earlier_weights(method: Method, place: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights that the method's nets go on with, by net. UserError unless they fit (`may_be_new` apart).

    Of a run's last checkpoint those of every net, or for a method whose product goes on alone the average of the product (SiD²A); such a
    one takes a student's weight file as well.
    """
    if place.is_file():
        if not method.product_alone:
            raise UserError(f"students.start wants the folder of a run with this method, whose nets all go on, got the file {place}")
        (given, said), ours = load_net(place), method.nets[method.product]
        if said.get("method", "teacher") == "teacher":
            raise UserError(
                f"students.start={place} holds a teacher, wanted a student's, such as potstill convert edm --one-step makes, or a run"
            )
        if (
            isinstance(given, EDMDenoiser)
            and isinstance(ours, EDMDenoiser)
            and (its := preconditioning(given)) != (mine := preconditioning(ours))
        ):
            raise UserError(
                f"students.start: the net in {place} is preconditioned by {its}, the teacher by {mine}: wanted the same of both"
            )
        nets = {method.product: given.state_dict()}
    else:
        state = load_newest(place / "checkpoints", "cpu")
        if state is None:
            raise UserError(f"students.start: no checkpoint in {place / 'checkpoints'}; wanted a finished run of the same shape")
        nets = {method.product: state["ema"]} if method.product_alone else state["nets"]
    names = [method.product] if method.product_alone else list(method.nets)
    for name in names:
        net = method.nets[name]
        theirs = {key: t.shape for key, t in nets.get(name, {}).items()}
        ours = {key: t.shape for key, t in net.state_dict().items() if key in theirs or not key.startswith(method.may_be_new)}
        if other := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
            raise UserError(f"students.start: net {name!r} in {place} is of another shape (first difference: {other[0]})")
    return {name: nets[name] for name in names}
