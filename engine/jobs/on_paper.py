"""A run on paper: its teacher and method on the meta device, with everything about them that can be wrong.

So a bad setting is found now, and not after hours of training the teacher. What lies on disk is opened; of what does not yet,
there is a stand-in of the size that the settings name.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from potstill.engine.common.errors import UserError
from potstill.engine.config.tree import Config
from potstill.engine.data.images import Images
from potstill.engine.jobs import build, preflight
from potstill.engine.jobs.lighter import check_lighten, own_plan
from potstill.engine.jobs.students import classes_without_images, earlier_folder, earlier_weights, partition_of
from potstill.engine.methods.base import Method
from potstill.engine.models.router import Partition
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.training.checkpoint import checkpoints
from potstill.engine.training.ranks import Ranks


class OnPaper(NamedTuple):
    """Nets without numbers, and which student has which classes; None where there is one student."""

    teacher: Denoiser
    method: Method
    partition: Partition | None
    empty: list[int]  # classes that no image shows


def check_on_paper(cfg: Config, images: Images | None, folder: Path, ranks: Ranks) -> OnPaper:
    """The run of these settings on these images, None where there are none or not yet. UserError for what cannot be."""
    check_images(cfg, images, ranks.count)
    teacher = teacher_on_paper(cfg, images, folder, ranks)
    with torch.device("meta"):
        teacher = teacher.to("meta")
        students = cfg.students.net
        start = build.build_net(students, teacher.img_resolution, teacher.img_channels, teacher.label_dim) if students else None
        method = cfg.method.build(teacher, start or teacher)
    check_lighten(method, cfg.skipping)
    preflight.check_optimizers(cfg, method)
    if not cfg.data.path and cfg.method.needs().data:
        raise UserError(f"method {cfg.method.name} looks at real images: set data.path")
    if not cfg.data.path and students:
        raise UserError("students.net is trained on real images first: set data.path")
    known = images is not None or not cfg.data.path  # else which classes there are is not known yet
    partition = partition_of(cfg, teacher.label_dim, images) if known else None
    if (earlier := earlier_folder(cfg, cfg.student or 0)) and checkpoints(earlier / "checkpoints"):
        earlier_weights(method, earlier)
    return OnPaper(teacher, method, partition, classes_without_images(images, teacher.label_dim))


def check_images(cfg: Config, images: Images | None, ranks: int) -> None:
    """UserError where there are too few images for anything."""
    if not cfg.data.path and not cfg.teacher.checkpoint:
        raise UserError("data.path=null wants teacher.checkpoint=FILE.safetensors: a teacher cannot be trained without data")
    if images is not None and len(images) < 2:
        raise UserError(f"{images.name} has 1 image, a run wants at least 2: it ends with a distance between distributions")
    if images is not None and len(images) < ranks:
        raise UserError(f"{ranks} ranks want as many images, {images.name} has {len(images)}: start fewer")


def teacher_on_paper(cfg: Config, images: Images | None, folder: Path, ranks: Ranks) -> Denoiser:
    """The net of the file that is given or that was trained in `folder` before; else a new one, as large as the images."""
    given = cfg.teacher.checkpoint
    file = Path(given).expanduser() if given else folder / "teacher.safetensors"
    if ranks.agree(file.is_file()):
        teacher = build.load_teacher(file, images)
        own_plan(cfg.skipping, teacher)
        build.taught_sampler(file)
        return teacher
    if not given:
        preflight.check_no_plan(cfg)
    size = build.rehearsal_size(cfg) if images is None else (images.resolution, images.channels, images.label_dim)
    with torch.device("meta"):
        return build.build_net(cfg.net, *size)
