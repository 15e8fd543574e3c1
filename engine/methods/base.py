"""What a method is: its settings, which say what it needs and build it, and its nets with the turns that train them.

A turn is one optimiser step. A method lists its turns in the paper's order; `training/run.py` walks the list and does
everything that is not the paper: backward, clipping, accumulation, optimisers, averaging over GPUs, EMA.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from potstill.engine.common.checks import Unused, finite, one_of
from potstill.engine.common.packages import Extra
from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.diffusion.sigmas import strata
from potstill.engine.nets.conditions import Condition, Text
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.lora import LoraConfig, with_adapters

Logs = dict[str, Tensor]
Net = TypeVar("Net", bound=nn.Module)


class PairsNeeded(NamedTuple):
    """How many pairs of noise and the teacher's sample from it, and Heun's steps for each."""

    number: int
    steps: int


@dataclass(frozen=True)
class Needs:
    """What a method needs beside a teacher. A run looks at it before it builds or trains anything."""

    data: bool = True  # real images? (Classes are drawn from the data set either way.)
    nets: Sequence[str] = ("student",)  # which are trained, each by an optimiser of its own
    classes: bool = False  # a teacher that knows classes?
    pairs: PairsNeeded | None = None
    extras: Sequence[Extra] = ()
    batch_statistics: bool = False  # is any loss a function of a whole micro-batch?
    whole_teacher: bool = False  # does it differentiate the teacher twice or by its weights, which shards do not know?


METHODS: dict[str, type["MethodConfig"]] = {}  # by name; `engine.methods.table` has them all


class MethodConfig:
    """Base of all methods' settings: dataclasses whose first field is `name`, by which METHODS knows them."""

    name: str
    #: Other names that `method=` knows, of files in configs/method/ that set it and other defaults: dmd2 of dmd.
    variants: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        if (other := METHODS.setdefault(cls.name, cls)) is not cls:
            raise TypeError(f"{cls.__qualname__}: wanted a name of its own, got {cls.name!r}, which {other.__qualname__} has")

    def __post_init__(self) -> None:
        """BadSetting for a value that no run can use."""
        one_of(self, "name", (type(self).name, *self.variants))
        finite(self)

    def needs(self) -> Needs:
        """What a run must have for these settings."""
        return Needs()

    def build(self, teacher: Denoiser, start: Denoiser) -> "Method":
        """The method. Its nets start with the teacher's weights, its student with those of `start`, which is often the teacher."""
        raise NotImplementedError(f"{type(self).__name__}.build")

    def unused(self) -> Unused:
        """Settings that do nothing beside the others, and why."""
        return {}


class Pairs(NamedTuple):
    """Noise z [n, C, H, W], the teacher's ODE samples y from it, and their one-hot labels (or None)."""

    z: Tensor
    y: Tensor
    labels: Tensor | None


ALWAYS = (-1.0, math.inf)  # images seen before an iteration: any number


@dataclass(frozen=True)
class Turn:
    """One optimiser step: `loss(shared)` returns a scalar for nets[trains] and what to log (detached by the step), every `every`-th time.

    A loss may return None where this iteration has no use for the turn; that must not depend on the sample.
    """

    trains: str
    loss: Callable[[Any], tuple[Tensor, Logs] | None]
    every: int = 1
    after: int = 0  # the first iteration that takes this turn
    name: str = ""  # among several turns of one net: its gradient's norm is logged under this name, too
    #: It is taken in iterations before which more images than the first and at most as many as the second had been seen.
    seen: tuple[float, float] = ALWAYS

    def counts(self, images: int) -> bool:
        """Is this a part of the run that has this turn, so many images having been seen?"""
        return self.seen[0] < images <= self.seen[1]

    def due(self, step: int, images: int) -> bool:
        """Is it taken in iteration `step`, so many images having been seen before it?"""
        return self.counts(images) and step >= self.after and (step - self.after) % self.every == 0


def taken_apart(turns: Sequence[Turn]) -> bool:
    """Is no iteration one of two of these turns, whatever the batch? Not for none."""
    spans = sorted(turn.seen for turn in turns)
    return bool(spans) and all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def lasting(turns: Sequence[Turn]) -> list[Turn]:
    """Those that are taken at the end of a run, without their beginnings: what most iterations cost."""
    return [replace(turn, seen=ALWAYS) for turn in turns if turn.seen[1] == ALWAYS[1]]


@dataclass(eq=False)
class Draws:
    """Random numbers of one iteration, a function of (seed, iteration, sample index) and of nothing else.

    Every draw is made for the whole global batch and cut to this rank's and micro-batch's samples `window`, so neither
    the number of ranks nor the micro-batch size changes a single number, and a resumed run needs no generator state.
    """

    generator: torch.Generator
    total: int  # samples of the global batch
    window: slice
    host: Any  # a generator on the host: random.Random, or what stands in for it
    classes: Tensor | None = None  # those that labels are drawn from; None: all
    stratified: bool = False

    def normal(self, *shape: int) -> Tensor:
        """Standard normals, [n, *shape] for the n samples of the window."""
        return torch.randn(self.total, *shape, generator=self.generator, device=self.generator.device)[self.window]

    def uniform(self, *shape: int) -> Tensor:
        """Uniform on [0, 1), [n, *shape]."""
        return torch.rand(self.total, *shape, generator=self.generator, device=self.generator.device)[self.window]

    def integers(self, low: int, high: int) -> Tensor:
        """Uniform integers in low … high, both included, [n]."""
        return torch.randint(low, high + 1, (self.total,), generator=self.generator, device=self.generator.device)[self.window]

    def level(self) -> Tensor:
        """Uniform on [0, 1), [n]: where in its law each sample's noise level for the teacher lies.

        Stratified, sample i is drawn from slice `strata(…)[i]` of the batch's equal slices, which is unbiased for a mean
        over the batch, and lets `engine.skipping` know before the draw which samples can have which level.
        """
        return self._stratified()[self.window] if self.stratified else self.uniform()

    def integer_level(self, low: int, high: int) -> Tensor:
        """The same for laws of uniform integers low … high, both included, [n]."""
        return integer_at(self._stratified()[self.window], low, high) if self.stratified else self.integers(low, high)

    def _stratified(self) -> Tensor:
        slices = _slices(self.total, *self.window.indices(self.total), self.generator.device)
        return (slices + torch.rand(self.total, generator=self.generator, device=self.generator.device)) / self.total

    def labels(self, label_dim: int) -> Tensor | None:
        """Uniform classes as one-hot rows [n, label_dim]; only those of the student's share, where it has one. None without classes."""
        if not label_dim:
            return None
        drawn = self.integers(0, (label_dim if self.classes is None else len(self.classes)) - 1)
        drawn = drawn if self.classes is None else self.classes[drawn]
        return torch.zeros(len(drawn), label_dim, device=drawn.device).scatter_(1, drawn[:, None], 1.0)

    def choice(self, options: Sequence[int]) -> int:
        """One of `options`, the same for the whole global batch, known to the host without asking the device."""
        return self.host.choice(options)


@cache
def _slices(total: int, start: int, stop: int, step: int, device: torch.device) -> Tensor:
    """The slices of a batch as a tensor that is copied to the device once."""
    return torch.tensor(strata(total, len(range(start, stop, step)), step), device=device)


def integer_at(u: Tensor, low: int, high: int) -> Tensor:
    """The quantile at u in [0, 1] of uniform integers low … high, int64."""
    return (low + (u * (high - low + 1)).long()).clamp(max=high)


class Batch(NamedTuple):
    """Real images [N, C, H, W] in [-1, 1] (or latents), what they show, and this iteration's randomness.

    labels: one-hot rows [N, label_dim], or embedded captions; None for neither. prompts: of a net that is told prompts, N of them
    for each time that the method asks (`Method.asks`).
    """

    images: Tensor
    labels: Condition | None
    draws: Draws
    prompts: tuple[Text, ...] = ()


class OneRank:
    """The ranks of a run, as far as a method may know of them; here there is one."""

    count = 1

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over ranks."""


class Method:
    """Base of all methods. Subclasses fill `nets` (what is trained, by name) and `turns` (one iteration)."""

    #: Which of `nets` is what the user came for; its EMA is what is saved and sampled.
    product: ClassVar[str] = "student"

    nets: dict[str, nn.Module]
    turns: Sequence[Turn]
    sampler: Sampler
    #: What a user should read once before it starts: how much is frozen, what num_steps means in evaluations.
    notes: Sequence[str] = ()
    #: What besides the nets must survive a restart: a module's buffers and parameters, which no optimiser touches.
    state: nn.Module = nn.Module()
    #: Given before training to a method that needs them.
    pairs: Pairs | None = None
    #: Given before training where there are images: the mean over pixels of their variance, in [-1, 1] (`methods.vitals`).
    data_variance: float | None = None
    #: Where another run is given to go on from (`students.start`): does the product alone, with the average of its weights, which may
    #: also be a weight file? All other nets then start from the teacher. False: all nets go on.
    product_alone: ClassVar[bool] = False
    #: Beginnings of the names of weights that an earlier stage need not have (`students.start`): they then stay new.
    may_be_new: ClassVar[tuple[str, ...]] = ()
    #: For a method with batch statistics of its own: the ranks, and whether these statistics are over all ranks' samples, and not
    #: over each micro-batch's.
    ranks: OneRank = OneRank()
    together: bool = False

    #: How often an iteration asks what to draw, beside what its real images show (`methods.parts.conditions`).
    asks: ClassVar[int] = 1

    #: Draw the teacher's noise levels stratified (`Draws.level`)?
    stratified: bool = False

    def teacher_level(self, u: Tensor) -> Tensor | None:
        """σ at the quantiles u of the law it asks its teacher at, growing with u; None if it only lets its teacher walk."""
        return None

    def begin(self, batch: Batch) -> Any:
        """What the turns of one iteration share, drawn once. By default the batch itself."""
        return batch

    def after_step(self, name: str) -> None:
        """Called when nets[name] has been updated; for state that follows a net, such as an average of it."""


def copied(net: Denoiser, role: str = "student") -> Denoiser:
    """A trainable net with the same weights: students and fake nets start from their teacher.

    Where the settings `net.lora_of_copies` are for this role (student or fake), the weights are `net`'s own, and adapters train.
    """
    lora: LoraConfig | None = getattr(net, "lora_of_copies", None)
    if lora is not None and lora.trains(role):
        own = frozen(net)
        own.guide = None
        return with_adapters(own, lora)
    own = copy.deepcopy(net)
    own.guide = None
    return (own.float() if getattr(own, "low", None) else own).requires_grad_(True)  # of 16-bit weights what is trained has 32


def modules_of(method: Method) -> list[nn.Module]:
    """Every net a method holds, trained or not, frozen views included."""
    found: dict[int, nn.Module] = {}
    held: list[Any] = list(vars(method).values())
    while held:
        one = held.pop()
        if isinstance(one, nn.Module):
            found[id(one)] = one
            if isinstance(one, Denoiser) and one.guide is not None:
                held.append(one.guide.net)
        elif isinstance(one, list | tuple):
            held += one
        elif isinstance(one, dict):
            held += one.values()
    return list(found.values())


def frozen(net: Net) -> Net:
    """A view of `net` that shares its weights but asks for no weight gradients; always in eval mode.

    Gradients still flow through it to its inputs. An optimiser step on `net` shows in the view at once, since the
    tensors are the same, and no `requires_grad` is ever toggled: compiled regions, CUDA graphs and FSDP2 all dislike that.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in net.parameters()}
    memo |= {id(b): b for b in net.buffers()}
    return copy.deepcopy(net, memo).eval()
