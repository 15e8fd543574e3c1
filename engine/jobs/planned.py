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
from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.jobs import build, preflight
from potstill.engine.methods.base import Method
from potstill.engine.models.opening import own_sampler
from potstill.engine.models.router import Partition
from potstill.engine.models.weights import read_metadata
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.training.checkpoint import checkpoints
from potstill.engine.training.ranks import Ranks


class Planned(NamedTuple):
    """Nets without numbers, which student has which classes, and the classes that the data show nothing of."""

    teacher: Denoiser
    method: Method
    partition: Partition | None
    without: list[int]


def plan(cfg: Config, images: Images | None, folder: Path, ranks: Ranks) -> Planned:
    """The run of these settings on these images, None where there are none or not yet. UserError for what cannot be."""
    check_images(cfg, images, ranks.count)
    teacher = planned_teacher(cfg, images, folder, ranks)
    with torch.device("meta"):
        teacher = teacher.to("meta")
        students = cfg.students.net
        start = build.build_net(students, teacher.img_resolution, teacher.img_channels, teacher.label_dim) if students else None
        method = build.build_method(cfg.method, teacher, start)
    build.check_lightens(method, cfg.skipping)
    preflight.check_optimizers(cfg, method)
    if not cfg.data.path and method.needs_data:
        raise UserError(f"method {cfg.method.name} looks at real images: set data.path")
    if not cfg.data.path and students:
        raise UserError("students.net is trained on real images first: set data.path")
    known = images is not None or not cfg.data.path  # else which classes there are is not known yet
    partition = build.build_partition(cfg, teacher.label_dim, images) if known else None
    if (begun := preflight.begun_in(cfg)) and checkpoints(begun):
        build.start_of(method, begun.parent)
    return Planned(teacher, method, partition, build.classes_without_images(images, teacher.label_dim))


def check_images(cfg: Config, images: Images | None, ranks: int) -> None:
    """UserError where there are too few images for anything."""
    if not cfg.data.path and not cfg.teacher.checkpoint:
        raise UserError("data.path=null wants teacher.checkpoint=FILE.safetensors: a teacher cannot be trained without data")
    if images is not None and len(images) < 2:
        raise UserError(f"{images.name} has 1 image, a run wants at least 2: it ends with a distance between distributions")
    if images is not None and len(images) < ranks:
        raise UserError(f"{ranks} ranks want as many images, {images.name} has {len(images)}: start fewer")


def planned_teacher(cfg: Config, images: Images | None, folder: Path, ranks: Ranks) -> Denoiser:
    """The net of the file that is given or that was trained in `folder` before; else a new one, as large as the images."""
    given = cfg.teacher.checkpoint
    file = Path(given).expanduser() if given else folder / "teacher.safetensors"
    if ranks.agree(file.is_file()):
        teacher = build.load_teacher(file, images)
        build.check_own_plan(cfg.skipping, teacher)
        taught_sampler(file)
        return teacher
    if not given:
        preflight.check_no_plan(cfg)
    size = build.rehearsal_size(cfg) if images is None else (images.resolution, images.channels, images.label_dim)
    with torch.device("meta"):
        return build.build_net(cfg.net, *size)


def taught_sampler(file: Path) -> Sampler | None:
    """How a teacher is sampled that is a student of an earlier stage; None for one that denoises at every level."""
    own = read_metadata(file)
    return own_sampler(own, file) if own.get("method", "teacher") != "teacher" else None
