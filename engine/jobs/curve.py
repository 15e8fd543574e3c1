"""The distance of a student from the data while it learns, where `train.eval_kimg` asks for none in particular: some eight points.

It is cheap: few images, in their pixels averaged down to 8x8, and from at most some thousand real ones. Real images and the teacher
are measured in the same way, n of them against the same rest, so that all are biased alike; it is no number to be compared elsewhere.
What all of it takes is a share of what the training takes, in evaluations of nets, and a run too short for that has no curve.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.engine.common.errors import UserError
from potstill.engine.common.reading import read_json
from potstill.engine.data.images import Images
from potstill.engine.data.prompts import Prompts
from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.jobs.folder import write_json
from potstill.engine.measure.distances import moments, squared_distance
from potstill.engine.measure.features import Pixels
from potstill.engine.measure.report import LEVELS
from potstill.engine.measure.score import Reference, picture_shape, pictures_of, score
from potstill.engine.models.generate import Decode
from potstill.engine.nets.denoiser import Denoiser

POINTS = 8
LEAST, MOST = 64, 256  # images of a point
REAL = 1024  # images that they are compared with
SHARE = 0.03  # of the evaluations of a run
EACH = 8  # evaluations that an image of training takes: both ways through a student and its fake net, and a teacher


class Small(Pixels):
    """The pixels of at most 8x8."""

    title = "FD-pixels of 8x8"
    most = 8


def size_of(images: Images, decode: Decode | None, kimg: float, student: Sampler, teacher: Sampler) -> int | None:
    """How many images a point has, for a training of this length; None: too few for any, or they are no pictures."""
    affordable = int(SHARE * EACH * 1000 * kimg / (POINTS * student.nfe + teacher.nfe))
    n = min(MOST, affordable, len(images) // 4)
    return n if n >= LEAST and len(picture_shape(images.shape, decode)) == 3 else None


class CurveOf:
    """Distances of n images of nets from these, on this device, `batch` at a time."""

    def __init__(self, images: Images, n: int, batch: int, device: torch.device, prompts: Prompts | None, decode: Decode | None):
        self.images, self.n, self.batch, self.device, self.prompts, self.decode = images, n, min(batch, n), device, prompts, decode
        self.features = Small()

    @property
    def name(self) -> str:
        """Of its metric."""
        return f"fd@{self.n}-8x8"

    @cached_property
    def against(self) -> Reference:
        """Most of some real images, evenly taken from all; its floor is the distance of the n others."""
        total = min(len(self.images), self.n + REAL)
        some = np.arange(total) * len(self.images) // total
        drawn = np.zeros(total, bool)
        drawn[np.arange(self.n) * total // self.n] = True
        apart, rest = (
            moments(pictures_of(self.images, some[which], self.batch, self.device, self.decode), self.features).gaussian("real")
            for which in (drawn, ~drawn)
        )
        kind = f"{self.n} real images against {total - self.n} others"
        return Reference(rest, self.n, squared_distance(rest, apart), kind, self.images.name, total - self.n, "")

    def of(self, net: Denoiser, sampler: Sampler) -> float:
        """Of its images with the first n seeds. The net is in eval mode for that alone."""
        mode = net.training
        how: dict[str, Any] = {"n": self.n, "batch": self.batch, "device": self.device, "prompts": self.prompts, "decode": self.decode}
        found = score(net.eval(), sampler, self.images, self.features, against=self.against, **how)["fd"]
        net.train(mode)
        return found

    def note_levels(self, folder: Path, teacher: Denoiser, sampler: Sampler) -> None:
        """Write down real images' distance and the teacher's, unless it was done before."""
        file = folder / LEVELS
        try:
            known = read_json(file, dict, "") if file.is_file() else {}
        except UserError:
            known = {}
        if self.name not in known:
            write_json(file, {self.name: {"teacher": self.of(teacher, sampler), "floor": self.against.floor}})
