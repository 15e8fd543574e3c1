"""What every block of a teacher does at every noise level, and what leaving it out would cost: the material of a plan.

Per block b and bin k of noise levels (equal in log σ), on noised images y:

    activation   mean |h| of the block's output                                the picture GDD talks about
    share        |h - skip path| / |h|                                         for the record: it ranks blocks wrongly
    taylor       E_v <v, ∂D/∂g_b>²,  output = left-out + g_b (own - left-out)  at g_b = 1: one backward for all blocks
    alone        E|D_b - D|²       D_b: block b left out, its skip path calibrated by a_c s + b_c
    raw          the same without calibration

the last three as shares of E|D - y|². a and b are fitted by least squares on one half of the images. The other half is
halved again: blocks are chosen on the one quarter, and what the plan costs is measured on the other.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill.engine.common.errors import UserError
from potstill.engine.models.weights import weights_hash
from potstill.engine.nets.edm_denoiser import EDMDenoiser
from potstill.engine.skipping.blocks import Skippable, SkippableDenoiser
from potstill.engine.skipping.plan import Plan, corrected_prefixes, free_choice, kl_budget, latency_saved, nested_order, prefixes

LOWEST, HIGHEST = 0.002, 80.0  # noise levels, where the scheme does not say
PROBES = 4  # random directions v per image
Affine = dict[str, dict[str, list[list[float]]]]  # per block "a" and "b", [K, C] each


@dataclass
class Material:
    """Images [N, C, H, W] in [-1, 1] with one-hot labels [N, label_dim] (or None), and how to noise them."""

    images: Tensor
    labels: Tensor | None
    batch: int = 128
    seed: int = 0

    def part(self, start: float, stop: float) -> "Material":
        """The images between two shares of them, with other noise than any other part's."""
        n = len(self.images)
        window = slice(round(start * n), round(stop * n))
        labels = None if self.labels is None else self.labels[window]
        return Material(self.images[window], labels, self.batch, self.seed + round(1000 * start) + 1)

    def noised(self, low: float, high: float) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Batches of x_t, σ [n], y and labels; ln σ is uniform between those of low and high."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + round(1e4 * (20 + math.log(low))))
        for start in range(0, len(self.images), self.batch):
            y = self.images[start : start + self.batch]
            u = torch.rand(len(y), generator=generator).to(y.device)
            sigma = low * (high / low) ** u
            noise = torch.randn(y.shape, generator=generator).to(y.device)
            labels = None if self.labels is None else self.labels[start : start + self.batch]
            yield y + sigma[:, None, None, None] * noise, sigma, y, labels


@dataclass
class ProbeResult:
    """Arrays [B, K] (blocks in the order they run, bins ascending), [B] and [K]; affine: a and b per block, [K, C]."""

    names: list[str]
    edges: list[float]
    loss: np.ndarray  # [K]: E|D - y|² of a sample
    activation: np.ndarray
    share: np.ndarray
    taylor: np.ndarray
    raw: np.ndarray
    alone: np.ndarray
    block_seconds: np.ndarray  # [B]: of a batch
    passed_seconds: np.ndarray  # [B]: of the block left out
    net_seconds: float
    affine: Affine = field(default_factory=dict)

    @property
    def latency(self) -> np.ndarray:
        """What leaving each block out saves, as a share of the net's time [B]."""
        return (self.block_seconds - self.passed_seconds) / self.net_seconds


class Probed(SkippableDenoiser):
    """A frozen view of a denoiser whose blocks can be watched and left out."""

    def __init__(self, net: EDMDenoiser):
        super().__init__(net)
        self.eval().requires_grad_(False)

    def leave_out(self, names: Sequence[str], affine: Affine, k: int, *, calibrated: bool = True) -> None:
        """From now on these blocks are left out; calibrated: by the fit of bin k."""
        for name in names:
            self.parts[name].rows = 0
            if calibrated:
                self.calibrate(name, affine, k)

    def calibrate(self, name: str, affine: Affine, k: int) -> None:
        """The block's left-out output is a_c s + b_c by the fit of bin k."""
        a, b = (torch.tensor(affine[name][part][k], dtype=self.compute_dtype)[None, :, None, None] for part in ("a", "b"))
        device = next(self.parameters()).device
        self.parts[name].scale, self.parts[name].shift = a.to(device), b.to(device)

    def reset(self) -> None:
        """All blocks run again, and nobody watches them."""
        for block in self.parts.values():
            block.watch = block.rows = block.scale = block.shift = None


def bin_edges(net: EDMDenoiser, bins: int) -> list[float]:
    """bins + 1 noise levels, equal in log σ, over what the teacher was trained for between 0.002 and 80."""
    low, high = max(LOWEST, net.sigma_min), min(HIGHEST, net.sigma_max)
    low, high = min(low, net.round_sigma(low)), max(high, net.round_sigma(high))  # where EDM's sampler asks an iDDPM net
    return np.geomspace(low, high, bins + 1).tolist()


def probe(net: EDMDenoiser, data: Material, bins: int, say: Callable[[str], None] = lambda text: None) -> ProbeResult:
    """Measure a teacher (in eval mode, on the device of the images)."""
    if bins < 1:
        raise UserError(f"wanted at least 1 bin of noise levels, got {bins}")
    if len(data.images) < 4 * bins:
        raise UserError(
            f"{bins} bins of noise levels want at least {4 * bins} images, four for each, got {len(data.images)}: use fewer --bins"
        )
    edges = bin_edges(net, bins)
    probed = Probed(net)
    fit, choose = data.part(0, 0.5), data.part(0.5, 0.75)
    names = list(probed.parts)
    columns: dict[str, list[Any]] = {k: [] for k in ("loss", "activation", "share", "taylor", "raw", "alone")}
    affine: Affine = {name: {"a": [], "b": []} for name in names}
    for k, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        sums = observe(probed, fit, low, high)
        for name, one in sums.items():
            a, b = one.fit()
            affine[name]["a"].append(a.tolist())
            affine[name]["b"].append(b.tolist())
        columns["activation"].append([one.mean_abs() for one in sums.values()])
        columns["share"].append([one.residual_share() for one in sums.values()])
        loss = denoising_loss(net, choose, low, high)
        columns["loss"].append(loss)
        columns["taylor"].append([t / loss for t in taylor(probed, choose, low, high, affine, k)])
        for column, calibrated in (("alone", True), ("raw", False)):
            ways = [partial(probed.leave_out, [name], affine, k, calibrated=calibrated) for name in names]
            far, *_ = sample_deviations(net, probed, choose, low, high, ways)
            columns[column].append([float(one.mean()) / loss for one in far])
        say(f"bin {k + 1} of {bins}: σ {low:.3g} … {high:.3g}, loss per pixel {loss / data.images[0].numel():.3g}")
    arrays = {name: np.array(column).T for name, column in columns.items()}
    block, passed, whole = latencies(probed, data)
    return ProbeResult(names, edges, **arrays, block_seconds=block, passed_seconds=passed, net_seconds=whole, affine=affine)


class BlockSums:
    """Sums over one block's skip path s and output y, in float64."""

    def __init__(self) -> None:
        self.sums: list[Any] = [0.0] * 7
        self.count = 0

    def __call__(self, block: Skippable, s: Tensor, y: Tensor) -> Tensor:
        s64, y64 = s.double(), y.double()
        branch = y64 - block.plain_scale * s64
        new = [s64.sum((0, 2, 3)), y64.sum((0, 2, 3)), (s64 * s64).sum((0, 2, 3)), (s64 * y64).sum((0, 2, 3))]
        new += [y64.abs().sum(), branch.square().sum(), y64.square().sum()]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)]
        self.count += y.numel() // y.shape[1]
        return y

    def fit(self) -> tuple[Tensor, Tensor]:
        """a, b [C]: least squares of y = a s + b, per channel."""
        s, y, ss, sy = (t / self.count for t in self.sums[:4])
        variance = ss - s * s
        a = (sy - s * y) / variance.clamp(min=1e-12 * (1 + ss.max()))
        return a, y - a * s

    def mean_abs(self) -> float:
        return float(self.sums[4]) / (self.count * len(self.sums[0]))

    def residual_share(self) -> float:
        return math.sqrt(float(self.sums[5]) / max(float(self.sums[6]), 1e-300))


@torch.no_grad()
def observe(probed: Probed, data: Material, low: float, high: float) -> dict[str, BlockSums]:
    """What every block does in a bin."""
    sums = {name: BlockSums() for name in probed.parts}
    for name, block in probed.parts.items():
        block.watch = sums[name]
    for x_t, sigma, _, labels in data.noised(low, high):
        probed(x_t, sigma, labels)
    probed.reset()
    return sums


@torch.no_grad()
def denoising_loss(net: EDMDenoiser, data: Material, low: float, high: float) -> float:
    """E|D - y|² of a sample."""
    total = sum(float((net(x_t, sigma, labels) - y).double().square().sum()) for x_t, sigma, y, labels in data.noised(low, high))
    return total / len(data.images)


def taylor(probed: Probed, data: Material, low: float, high: float, affine: Affine, k: int) -> list[float]:
    """E_v <v, ∂D/∂g_b>² per block: what leaving it out does to D, to first order and squared, without leaving it out."""
    blocks, squares = probed.parts, torch.zeros(len(probed.parts), dtype=torch.float64)
    generator = torch.Generator().manual_seed(data.seed)
    for x_t, sigma, _, labels in data.noised(low, high):
        gates = {name: torch.ones(len(x_t), 1, 1, 1, device=x_t.device, requires_grad=True) for name in blocks}
        for name, block in blocks.items():
            probed.calibrate(name, affine, k)
            block.watch = lambda block, s, y, g=gates[name]: torch.lerp(block.calibrated(s), y, g.to(y.dtype))
        d = probed(x_t, sigma, labels)
        for probe in range(PROBES):
            v = torch.randint(0, 2, d.shape, generator=generator).to(d) * 2 - 1
            slopes = torch.autograd.grad((v * d).sum(), list(gates.values()), retain_graph=probe + 1 < PROBES)
            squares += torch.stack([slope.double().square().sum() for slope in slopes]).cpu()
    probed.reset()
    return (squares / (PROBES * len(data.images))).tolist()


@torch.no_grad()
def sample_deviations(
    net: EDMDenoiser, probed: Probed, data: Material, low: float, high: float, ways: Sequence[Callable[[], None]]
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """Per way to leave blocks out |D_skip - D|² and |D_skip - y|² of every sample; then |D - y|² and σ. float64."""
    far: list[list[Tensor]] = [[] for _ in ways]
    lossy: list[list[Tensor]] = [[] for _ in ways]
    losses, levels = [], []
    size = lambda t: t.double().square().flatten(1).sum(1).cpu()  # noqa: E731
    for x_t, sigma, y, labels in data.noised(low, high):
        d = net(x_t, sigma, labels)
        losses.append(size(d - y))
        levels.append(sigma.double().cpu())
        for i, leave_out in enumerate(ways):
            leave_out()
            d_skip = probed(x_t, sigma, labels)
            probed.reset()
            far[i].append(size(d_skip - d))
            lossy[i].append(size(d_skip - y))
    joined = lambda parts: [torch.cat(p).numpy() for p in parts]  # noqa: E731
    loss, level = joined([losses, levels])
    return joined(far), joined(lossy), loss, level


@torch.no_grad()
def latencies(probed: Probed, data: Material, rounds: int = 15) -> tuple[np.ndarray, np.ndarray, float]:
    """Seconds per batch of every block run and left out (calibrated) [B], and of the whole net; medians of interleaved rounds."""
    x_t, sigma, _, labels = next(data.noised(0.5, 1.0))
    inputs: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, _: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        inputs[name] = args

    hooks = [block.register_forward_pre_hook(partial(keep, name)) for name, block in probed.parts.items()]
    probed(x_t, sigma, labels)
    for hook in hooks:
        hook.remove()
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in probed.parts}
    whole = []
    for _ in range(rounds + 2):  # the first two do not count
        whole.append(timed(lambda: probed(x_t, sigma, labels), x_t.device))
        for name, block in probed.parts.items():
            block.scale = torch.ones(1, block.out_channels, 1, 1, device=x_t.device, dtype=probed.compute_dtype)
            block.shift = torch.zeros_like(block.scale)
            for rows, record in zip((None, 0), seconds[name], strict=True):
                block.rows = rows
                record.append(timed(lambda: block(*inputs[name]), x_t.device))
            block.rows = None
    probed.reset()
    run, passed = (np.array([statistics.median(pair[i][2:]) for pair in seconds.values()]) for i in (0, 1))
    return run, passed, statistics.median(whole[2:])


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call; on a GPU by events, behind enough work that launching it does not count."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def make_plan(net: EDMDenoiser, data: Material, result: ProbeResult, budget: float, tried: Callable[[], None] = lambda: None) -> Plan:
    """The plan that saves the most within `budget` per bin, verified with all its blocks left out together on held-out images.

    tried: called after every such trial.
    """
    latency = result.latency
    order = nested_order(result.alone, latency, budget)
    probed = Probed(net)
    choose, held = data.part(0.5, 0.75), data.part(0.75, 1)
    named = [result.names[b] for b in order]

    def trial(images: Material, k: int, p: int) -> dict[str, float]:
        found = joint(net, probed, images, result, named[:p], k)
        tried()
        return found

    first = corrected_prefixes(prefixes(order, result.alone, budget), len(order), lambda k, p: trial(choose, k, p)["excess"], budget)
    prefix = corrected_prefixes(first, 0, lambda k, p: trial(held, k, p)["excess"], budget)
    measured = [trial(held, k, p) for k, p in enumerate(prefix)]
    for k, (p, one) in enumerate(zip(prefix, measured, strict=True)):
        one["summed"] = float(result.alone[order[:p], k].sum())
        one["latency_saved"] = float(latency[order[:p]].sum())
    affine = {name: result.affine[name] for name in named[: max(prefix, default=0)]}
    report = {
        "bins": measured,
        "latency_saved": float(np.mean([one["latency_saved"] for one in measured])),
        "latency_saved_by_free_choice": free_choice(result.alone, latency, budget),
        "latency_saved_by_sums": latency_saved(order, result.alone, latency, budget) if order else 0.0,
        "kl_nats": kl_budget(result.edges, [one["kl_slope"] for one in measured]),
        "held_out_images": len(held.images),
    }
    rounded = {
        name: {part: [[float(f"{v:.7g}") for v in row] for row in rows] for part, rows in one.items()} for name, one in affine.items()
    }
    return Plan(weights_hash(net), net.img_resolution, result.edges, named, prefix, budget, rounded, report)


def joint(net: EDMDenoiser, probed: Probed, data: Material, result: ProbeResult, names: list[str], k: int) -> dict[str, float]:
    """What leaving these blocks out together costs in bin k.

    deviation: E|D_skip - D|² over the loss; rise: of the denoising loss itself, signed; excess: the larger of the two.
    """
    low, high = result.edges[k], result.edges[k + 1]
    way = partial(probed.leave_out, names, result.affine, k)
    (far,), (lossy,), loss, sigma = sample_deviations(net, probed, data, low, high, [way])
    mean = float(loss.mean())
    deviation, rise = float(far.mean()) / mean, float(lossy.mean()) / mean - 1
    return {
        "excess": max(deviation, rise),
        "deviation": deviation,
        "rise": rise,
        "worst_95": float(np.quantile(far, 0.95)) / mean,
        "kl_slope": float((far / sigma**2).mean()),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation (no ties)."""
    first, second = (np.argsort(np.argsort(v)).astype(float) for v in (a, b))
    return float(np.corrcoef(first, second)[0, 1])
