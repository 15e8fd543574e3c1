"""MSD: multi-student distillation (2410.23274): K one-step students, each for its own share of the classes.

    stage TSM   μ_φ learns the teacher's score at every noise level, where the student is of another architecture
                L_TSM = λ(σ) |μ_φ(x_σ) - μ_teacher(x_σ)|²,  x_σ noised *real* images (Sec. on teacher score matching)
    stage DM    DMD with every label drawn from the student's share only; its paired set, if any, stays the whole set
    stage ADM   DMD2 (GAN head on the fake net, diffusion-GAN noise) from the DM student; real images of the share only

DM and ADM are dmd.py itself: a share restricts what `draws` and the data give it (students=K, student=k), and nothing else
changes, so any other method can be split the same way. This file holds what is MSD's own: how classes are parted, and TSM.

Differs from the paper: σ of TSM is half log-normal (EDM's), half uniform on DMD's grid, so that the student's own σ = 80 is
trained (the paper's law is unknown); one TSM net serves all students. Partitions of prompts are left out with the text models.
"""

import numpy as np
import torch
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.sampling import heun
from potstill.engine.diffusion.sigmas import lognormal
from potstill.engine.methods.base import Batch, Logs, Method, Turn, frozen
from potstill.engine.methods.parts import grid_level, noise_like
from potstill.engine.models.router import Partition
from potstill.engine.nets.denoiser import Denoiser
from potstill.kernels import add_noise, denoise

KINDS = ("blocks", "random", "kmeans")


def make_partition(kind: str, classes: int, count: int, seed: int, features: np.ndarray | None = None) -> Partition:
    """Disjoint shares of equal size (kmeans: near-equal), every class in one.

    blocks: consecutive classes, the paper's choice (WordNet order is semantic). random: a seeded permutation in blocks.
    kmeans: balanced clusters of `features` [classes, D], e.g. each class's mean image.
    """
    if kind not in KINDS:
        raise UserError(f"partition wants one of {', '.join(KINDS)}, got {kind!r}")
    if count < 1 or classes < 1 or classes % count:
        raise UserError(f"students={count} does not divide the {classes} classes: shares must be of equal size")
    rng, size = np.random.default_rng(seed), classes // count
    order = np.arange(classes)
    if kind == "random":
        order = rng.permutation(classes)
    if kind == "kmeans":
        assert features is not None and len(features) == classes
        order = np.concatenate(balanced_clusters(features, count, rng))
    student_of = np.empty(classes, dtype=int)
    student_of[order] = np.arange(classes) // size
    return Partition(kind, tuple(int(s) for s in student_of))


def balanced_clusters(features: np.ndarray, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """k-means whose clusters all have len(features) / count members: assignment by linear_sum_assignment, 50 rounds at most."""
    from scipy.optimize import linear_sum_assignment

    size = len(features) // count
    centres = features[rng.choice(len(features), count, replace=False)]
    assigned = np.zeros(0)
    for _ in range(50):
        cost = ((features[:, None] - centres[None]) ** 2).sum(2)
        rows, seats = linear_sum_assignment(np.repeat(cost, size, axis=1))
        now = (seats // size)[np.argsort(rows)]
        if np.array_equal(now, assigned):
            break
        assigned = now
        centres = np.stack([features[assigned == k].mean(0) for k in range(count)])
    return [np.flatnonzero(assigned == k) for k in range(count)]


class TSM(Method):
    """One turn: a student of another shape learns to denoise as the teacher does."""

    def __init__(self, teacher: Denoiser, student: Denoiser):
        self.teacher, self.student = frozen(teacher), student
        self.nets = {"student": student}
        self.turns = (Turn("student", self.loss),)
        self.sampler = heun(student, 18)

    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        """L_TSM."""
        x, labels, draws, *_ = batch
        either, grid = draws.uniform(), grid_level(self.teacher, draws.integers(0, 999))
        sigma = torch.where(either < 0.5, self.teacher.told(lognormal(draws.normal())), grid)
        x_t = add_noise(x, sigma, noise_like(x, draws))
        with torch.no_grad():
            target = self.teacher(x_t, sigma, labels)
        loss, nonfinite = denoise(self.student.estimate(x_t, sigma, labels), target, self.teacher.weight(sigma))
        loss = loss.mean()
        return loss, {"match": loss, "nonfinite": nonfinite}
