"""A world small enough to know: a ring of Gaussians in the plane with its exact denoiser, and a net that can learn it.

Images are [N, 2, 1, 1]. Everything has the interface of `engine.nets.denoiser.Denoiser` and runs in the dtype of its
input, so a formula can be checked in float64 (`default_dtype`).
"""

import copy
import functools
import itertools
import random
from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from potstill.engine.diffusion import precond
from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.diffusion.sigmas import edm_weight, karras, karras_at, lognormal
from potstill.engine.methods.base import Batch, Draws, Method, Turn
from potstill.engine.training.optim import OptimConfig
from potstill.engine.training.run import Run, TrainConfig
from potstill.kernels import Estimate


class Toy(nn.Module):
    """What the exact denoiser and the learnt one share: size, call and estimate. A subclass gives raw F or D."""

    shape, img_channels, img_resolution = (2, 1, 1), 2, 1
    text = False
    sigma_min, sigma_max, sigma_data = 0.002, 80.0, 0.5
    knows_steps = False

    def __init__(self, label_dim: int):
        super().__init__()
        self.label_dim, self.conditional, self.guidable = label_dim, bool(label_dim), bool(label_dim)
        self.compute_dtype = torch.float32

    # what a Denoiser of EDM's says of itself

    def coefficients(self, sigma: Tensor) -> precond.Coefficients:
        return precond.edm(sigma, self.sigma_data)

    def level(self, u: Tensor) -> Tensor:
        return karras_at(u)

    def weight(self, sigma: Tensor) -> Tensor:
        return edm_weight(sigma)

    def told(self, sigma: Tensor) -> Tensor:
        return sigma

    def sampling_levels(self, steps: int) -> Tensor:
        return karras(steps)

    def set_dropout(self, p: float) -> None:
        """It has none."""

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, augment_labels=None) -> Tensor:
        """D(x; σ, labels) [N, 2, 1, 1]."""
        raw, x, c = self.raw(x, sigma, class_labels)
        return image(c.c_skip) * x + image(c.c_out) * raw

    def estimate(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, *, guidance: float = 1.0) -> Estimate:
        raw, x, c = self.raw(x, sigma, class_labels)
        if guidance == 1.0:
            return Estimate(raw, x, c.c_skip, c.c_out)
        if class_labels is None:
            raise ValueError(f"guidance {guidance} wants class labels, got none")
        return Estimate(raw, x, c.c_skip, c.c_out, self.raw(x, sigma, torch.zeros_like(class_labels))[0], guidance)

    def estimate_and_features(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, *, guidance: float = 1.0):
        return self.estimate(x, sigma, class_labels, guidance=guidance), self.features(x, sigma, class_labels)

    def logvar(self, sigma: Tensor) -> Tensor | None:
        """It has not learnt any."""

    def raw(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, precond.Coefficients]:
        """F, x and EDM's coefficients."""
        sigma = torch.as_tensor(sigma).to(x.dtype).reshape(-1).expand(len(x))
        if labels is None and self.label_dim:
            labels = x.new_zeros(len(x), self.label_dim)
        c = precond.edm(sigma, self.sigma_data)
        return self.F(x, sigma, labels, c), x, c

    def F(self, x: Tensor, sigma: Tensor, labels: Tensor | None, c: precond.Coefficients) -> Tensor:
        raise NotImplementedError


class Mixture(Toy):
    """The exact denoiser of `components` equal Gaussians of standard deviation `std` on a ring; the best teacher there is.

    With label_dim > 0 the components are dealt to that many classes in arcs. Labels of zeros (or None) mean all classes.
    The ring's radius makes the data's standard deviation sigma_data = 0.5.
    """

    def __init__(self, label_dim: int = 0, components: int = 8, std: float = 0.1):
        super().__init__(label_dim)
        assert not label_dim or components % label_dim == 0
        self.std, radius = std, (2 * (self.sigma_data**2 - std**2)) ** 0.5
        angle = torch.arange(components, dtype=torch.float64) * (2 * torch.pi / components)
        self.register_buffer("means", radius * torch.stack([angle.cos(), angle.sin()], 1))  # [K, 2]
        classes = torch.arange(components) // (components // max(label_dim, 1))
        self.register_buffer("members", torch.eye(max(label_dim, 1), dtype=torch.float64)[classes].T)  # [classes, K]

    def log_density(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p(x; σ) [N] of the data under noise σ."""
        logits, variance = self.logits(x.flatten(1), sigma.reshape(-1).expand(len(x)), labels)
        return logits.logsumexp(1) - (2 * torch.pi * variance[:, 0]).log()

    def logits(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """log of weight × exp(-|x - m|² / 2v) [N, K] (weights sum to 1) and the variance v = std² + σ² [N, 1]."""
        variance = (self.std**2 + sigma**2)[:, None]
        members = self.members.to(x.dtype)
        weights = members.sum(0).expand(len(x), -1) if labels is None else labels.to(x.dtype) @ members
        weights = torch.where(weights.sum(1, keepdim=True) == 0, torch.ones_like(weights), weights)
        distance = (x[:, None] - self.means.to(x.dtype)).square().sum(2)
        return (weights / weights.sum(1, keepdim=True)).log() - distance / (2 * variance), variance

    def F(self, x: Tensor, sigma: Tensor, labels: Tensor | None, c: precond.Coefficients) -> Tensor:
        flat = x.flatten(1)
        logits, variance = self.logits(flat, sigma, labels)
        nearest = logits.softmax(1) @ self.means.to(x.dtype)
        share = self.std**2 / variance
        # D = share·x + (1 - share)·nearest, so (D - c_skip·x) / c_out without subtracting large numbers
        raw = (share - c.c_skip[:, None]) * flat + (1 - share) * nearest
        return (raw / c.c_out[:, None]).reshape_as(x)

    def sample_data(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Exact data [n, 2, 1, 1] and one-hot labels [n, label_dim] (or None)."""
        which = torch.randint(len(self.means), (n,), generator=generator)
        x = self.means[which].to(torch.get_default_dtype()) + self.std * torch.randn(n, 2, generator=generator)
        labels = self.members.T[which].to(x.dtype) if self.label_dim else None
        return x[..., None, None], labels


class ToyNet(Toy):
    """An MLP inside EDM's preconditioning. Its last hidden layer is [N, width / 4, 2, 2], what a GAN head looks at."""

    def __init__(self, label_dim: int = 0, width: int = 64):
        super().__init__(label_dim)
        self.width = width
        self.model = MLP(2 + 7 + label_dim, width)

    def F(self, x: Tensor, sigma: Tensor, labels: Tensor | None, c: precond.Coefficients) -> Tensor:
        return self.model.out(self.hidden(x, labels, c)).reshape_as(x)

    def taps(self) -> list[tuple[int, int, int]]:
        return [(self.width // 4, 2, 2)]

    def features(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        sigma = torch.as_tensor(sigma).to(x.dtype).reshape(-1).expand(len(x))
        labels = x.new_zeros(len(x), self.label_dim) if class_labels is None else class_labels
        h = self.hidden(x, labels if self.label_dim else None, precond.edm(sigma, self.sigma_data))
        return h.reshape(len(x), -1, 2, 2)

    def hidden(self, x: Tensor, labels: Tensor | None, c: precond.Coefficients) -> Tensor:
        noise = c.c_noise[:, None]
        waves = [f(k * noise) for k in (1, 2, 4) for f in (torch.sin, torch.cos)]
        inputs = [c.c_in[:, None] * x.flatten(1), noise, *waves] + ([] if labels is None else [labels.to(x.dtype)])
        h = torch.cat(inputs, 1)
        for layer in self.model.enc.values():
            h = layer(h)
        return h


class MLP(nn.Module):
    """Three hidden layers under the names of a U-Net's encoder: the last says its channels and its side (2)."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        sizes = [inputs, width, width, width]
        self.enc = nn.ModuleDict({f"2x2_block{i}": Layer(a, b) for i, (a, b) in enumerate(itertools.pairwise(sizes))})
        self.out = nn.Linear(width, 2)


class Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.out_channels = outputs // 4

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.linear(x))


def image(v: Tensor) -> Tensor:
    """[N] -> [N, 1, 1, 1]."""
    return v[:, None, None, None]


@contextmanager
def default_dtype(dtype: torch.dtype):
    """New tensors, random ones included, are of this dtype: in float64 a formula can be checked to the last digit.

    As a decorator of a test it must stand below the parameters.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def pretrained(teacher: Mixture, width: int = 64) -> ToyNet:
    """A new ToyNet that has learnt the exact denoiser at all noise levels: what students and fake nets start from.

    In the default dtype, and always the same; `apart` moves it away from the teacher.
    """
    with default_dtype(torch.float32):
        net = _pretrained(teacher.label_dim, len(teacher.means), teacher.std, width)
    return copy.deepcopy(net).to(torch.get_default_dtype())


def apart(net: ToyNet, seed: int) -> ToyNet:
    """`net` a little elsewhere, as in the middle of training."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    return net


@functools.cache
def _pretrained(label_dim: int, components: int, std: float, width: int, iterations: int = 1000, batch: int = 512) -> ToyNet:
    """Regression on the exact D: half the levels from EDM's law, half uniform on Karras' map, so that σ = 80 is learnt."""
    teacher, generator = Mixture(label_dim, components, std), torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = ToyNet(label_dim, width)
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3, fused=True)
    for i in range(iterations):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - i / iterations)
        y, labels = teacher.sample_data(batch, generator)
        if labels is not None:  # a tenth without labels, for guidance
            labels = labels * (torch.rand(batch, 1, generator=generator) < 0.9)
        half = batch // 2
        sigma = torch.cat([lognormal(torch.randn(half, generator=generator)), karras_at(torch.rand(half, generator=generator))])
        x_t = y + image(sigma) * torch.randn(y.shape, generator=generator)
        error = net(x_t, sigma, labels) - teacher(x_t, sigma, labels)
        (edm_weight(sigma) * error.square().flatten(1).sum(1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of two samples [N, ...], unbiased; 0 for equal laws."""
    a, b = a.detach().flatten(1).double(), b.detach().flatten(1).double()
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return (2 * torch.cdist(a, b).mean() - within[0] - within[1]).item()


def draws(n: int, seed: int = 0) -> Draws:
    """Randomness of one iteration; the same again for the same seed."""
    return Draws(torch.Generator().manual_seed(seed), n, slice(0, n), random.Random(seed))


def batch_of(data: Mixture, n: int = 16, seed: int = 0) -> Batch:
    """A batch of exact data with its randomness; the same again for the same seed."""
    return Batch(*data.sample_data(n, torch.Generator().manual_seed(seed)), draws(n, seed))


def distance(net: nn.Module, sampler: Sampler, data: Mixture, n: int = 2048) -> float:
    """Energy distance between what `sampler` makes of `net` and the data, jointly with the labels where there are any."""
    y, labels = data.sample_data(n, torch.Generator().manual_seed(7))
    with torch.no_grad():
        x = sampler(net.eval(), labels, draws(n, seed=8))
    if labels is None:
        return energy_distance(x, y)
    return energy_distance(torch.cat([x.flatten(1), labels], 1), torch.cat([y.flatten(1), labels], 1))


def learn(
    method: Method, data: Mixture, iterations: int, *, batch: int = 256, lr: float = 1e-3, clip: float | None = None,
    betas: tuple[float, float] = (0.5, 0.99), schedule: str = "linear", optim: dict[str, OptimConfig] | None = None,
) -> tuple[float, float]:  # fmt: skip
    """Train as the engine does; the energy distances of the product (average of its weights) before and after."""
    one = OptimConfig(lr=lr, clip=clip, betas=[float(b) for b in betas], schedule=schedule)
    cfg = TrainConfig(kimg=iterations * batch / 1000, batch=batch, optim=optim or {"student": one}, ema_ramp_up=0.05)
    run = Run(method, cfg, seed=0, device=torch.device("cpu"))
    before = distance(method.nets[method.product], method.sampler, data)
    method.nets[method.product].train()
    generator = torch.Generator().manual_seed(3)
    for _ in range(iterations):
        run.take(*data.sample_data(batch, generator))
    return before, distance(run.ema.net, method.sampler, data)


def gradients(method: Method, trains: str, batch: Batch) -> dict[str, list[Tensor | None]]:
    """Gradients of every parameter of every net in sight after the turn of net `trains` alone (of earlier turns only the losses are computed).

    Keys: names in `method.nets`, and of the method's other nets (teacher, frozen views) by attribute.
    """
    nets = {name: net for name, net in vars(method).items() if isinstance(net, nn.Module)} | method.nets
    for net in nets.values():
        net.zero_grad(set_to_none=True)
    shared = method.begin(batch)
    for turn in method.turns:
        result = turn.loss(shared)
        if turn.trains == trains and result is not None:
            result[0].backward()
            break
    return {name: [p.grad for p in net.parameters()] for name, net in nets.items()}


def turn_of(method: Method, trains: str) -> Turn:
    return next(turn for turn in method.turns if turn.trains == trains)


def largest(grads: Iterable[Tensor | None]) -> float:
    """The largest absolute entry; 0 where there is no gradient at all."""
    return max((g.abs().max().item() for g in grads if g is not None), default=0.0)


def reached(grads: dict[str, list[Tensor | None]]) -> set[str]:
    """The nets that received any gradient that is not zero."""
    return {name for name, one in grads.items() if largest(one) > 0}
