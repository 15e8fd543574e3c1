"""MSD: multi-student distillation (2410.23274): K one-step students, each for its own share of the classes or prompts.

    stage TSM   μ_φ learns the teacher's score at every noise level, where the student is of another architecture
                L_TSM = λ(σ) |μ_φ(x_σ) - μ_teacher(x_σ)|²,  x_σ noised *real* images (Sec. on teacher score matching)
    stage DM    DMD with every label or prompt drawn from the student's share only; its paired set, if any, stays the whole set
    stage ADM   DMD2 (GAN head on the fake net, diffusion-GAN noise) from the DM student; real images of the share only

DM and ADM are dmd.py itself: a share restricts what `draws`, prompts and data give it (students=K, student=k), and nothing else
changes, so any other method can be split the same way. This file holds what is MSD's own: how classes and prompts are parted, and TSM.

Prompts are parted by their pooled features f [D], and one that was never seen goes by the same rule:

    kmeans      the nearest of K centres
    quadrants   f·v₀ > t₀, and of four students then f·v₁ > t₁ or t₂: v principal components, t₀ the median, t₁ and t₂ those of its halves

Differs from the paper: σ of TSM is half log-normal (EDM's), half uniform on DMD's grid, so that the student's own σ = 80 is
trained (the paper's law is unknown); one TSM net serves all students. The paper parts the prompts of SD 1.5 into four quadrants of
coordinates that it does not name; principal components and medians are our choice, as equal shares are what it asks for (it found
k-means' shares too uneven). Shares of prompts are of equal size among those that the partition was made of, by k-means they are not.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.sampling import heun
from potstill.engine.diffusion.sigmas import lognormal
from potstill.engine.methods.base import Batch, Logs, Method, Turn, frozen
from potstill.engine.methods.parts import grid_level, noise_like
from potstill.engine.models.partitions import KMEANS, QUADRANTS, Partition, PromptPartition
from potstill.engine.nets.denoiser import Denoiser
from potstill.kernels import add_noise, denoise

OF_CLASSES, OF_PROMPTS = ("blocks", "random", KMEANS), (KMEANS, QUADRANTS)
KINDS = (*OF_CLASSES, QUADRANTS)


def check_kind(kind: str, known: Sequence[str]) -> None:
    """UserError for a partition of classes where prompts are shared out, or the other way round."""
    if kind not in known:
        told = "classes" if known == OF_CLASSES else "prompts"
        raise UserError(f"students.partition={kind} does not share out {told}, which this teacher is told: take {' or '.join(known)}")


def make_partition(kind: str, classes: int, count: int, seed: int, features: np.ndarray | None = None) -> Partition:
    """Disjoint shares of equal size (kmeans: near-equal), every class in one.

    blocks: consecutive classes, the paper's choice (WordNet order is semantic). random: a seeded permutation in blocks.
    kmeans: balanced clusters of `features` [classes, D], e.g. each class's mean image.
    """
    check_kind(kind, OF_CLASSES)
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


def part_prompts(kind: str, features: np.ndarray, count: int, seed: int) -> PromptPartition:
    """The partition that the pooled features [N, D] of different prompts make. UserError for a kind that is none of prompts."""
    check_kind(kind, OF_PROMPTS)
    features = features.astype(np.float64)
    vectors, thresholds = (centres(features, count, seed), []) if kind == KMEANS else quadrants(features, count)
    return PromptPartition(kind, torch.from_numpy(vectors), torch.tensor(thresholds, dtype=torch.float64, device="cpu"))


def centres(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Those of k-means, the best of ten starts: [count, D]."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of fewer different features than centres: some share is then empty
        return KMeans(count, n_init=10, random_state=seed % 2**32).fit(features).cluster_centers_  # pyright: ignore[reportArgumentType]


def quadrants(features: np.ndarray, count: int) -> tuple[np.ndarray, list[float]]:
    """One or two principal components [1 or 2, D], the greatest number of each above 0, and the thresholds of two or four equal shares."""
    from scipy.linalg import eigh

    wanted, d = {2: 1, 4: 2}[count], features.shape[1]
    centred = features - features.mean(0)
    _, found = eigh(centred.T @ centred, subset_by_index=[d - wanted, d - 1])
    vectors = found.T[::-1]
    vectors = vectors * np.sign(vectors[np.arange(wanted), abs(vectors).argmax(1)])[:, None]
    along = features @ vectors.T
    thresholds = [between_halves(along[:, 0])]
    if count == 4:
        above = along[:, 0] > thresholds[0]
        thresholds += [between_halves(along[above == half, 1]) for half in (False, True)]
    return vectors, thresholds


def between_halves(values: np.ndarray) -> float:
    """A median that, unless values are equal, is none of them: of an odd number the lower half has one more."""
    if not len(values):
        return 0.0  # a half without prompts
    half = (len(values) + 1) // 2
    return float(np.sort(values)[half - 1 : half + 1].mean())


class TSM(Method):
    """One turn: a student of another shape learns to denoise as the teacher does."""

    def __init__(self, teacher: Denoiser, student: Denoiser):
        self.teacher, self.student = frozen(teacher), student
        self.nets = {"student": student}
        self.turns = (Turn("student", self.loss),)
        self.sampler = heun(student, 18)

    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        """L_TSM."""
        x, labels, draws, prompts = batch
        if labels is None and prompts:  # real images without captions
            labels = prompts[0]
        either, grid = draws.uniform(), grid_level(self.teacher, draws.integers(0, 999))
        sigma = torch.where(either < 0.5, self.teacher.told(lognormal(draws.normal())), grid)
        x_t = add_noise(x, sigma, noise_like(x, draws))
        with torch.no_grad():
            target = self.teacher(x_t, sigma, labels)
        loss, nonfinite = denoise(self.student.estimate(x_t, sigma, labels), target, self.teacher.weight(sigma))
        loss = loss.mean()
        return loss, {"match": loss, "nonfinite": nonfinite}
