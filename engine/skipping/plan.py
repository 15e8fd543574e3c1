"""Which blocks of a teacher are left out at which noise level: one nested order, of which every bin takes a prefix.

Errors of left-out blocks nearly add up, so the plan is a knapsack: save as much latency as possible while every bin's
excess denoising loss E|D_skip - D|² / E|D - y|² stays within its budget. Nested prefixes cost a little of that, and
buy static shapes: sort a batch by how much it leaves out, and every block runs on the first so many samples of it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from operator import lt
from pathlib import Path
from typing import Any

import numpy as np

from potstill.engine.common.checks import Unused, above, at_least, finite, wants
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.kinds import DICT, NUMBER, TEXT, Kind, check, count, is_dict, is_list, is_number, is_text, is_whole, shown
from potstill.engine.common.reading import read_json
from potstill.engine.common.writing import whole
from potstill.engine.models.weights import same_weights, weights_hash
from potstill.engine.nets.edm_denoiser import EDMDenoiser
from potstill.engine.skipping.blocks import blocks_of

FORMAT = "potstill-plan-1"
AGAIN = "make it again with potstill probe"
OPTIONAL = {"affine", "report"}  # of a plan file
KINDS = {
    "teacher": TEXT, "resolution": count(1, 8192), "order": Kind(lambda value: is_list(value, is_text, 0, 10_000), "a list of blocks"),
    "edges": Kind(lambda value: is_list(value, lambda v: is_number(v, 0), 2) and all(map(lt, value, value[1:])), "ascending, finite noise levels"),
    "prefix": Kind(lambda value: is_list(value, lambda v: is_whole(v, 0), 1), "a list of whole numbers from 0"),
    "budget": NUMBER, "affine": DICT, "report": DICT,
}  # fmt: skip
BUDGET, HARDEST = 0.005, 0.02  # of a bin's denoising loss: the default, and the most that a plan may cost


@dataclass
class SkippingConfig:
    """Leave out what the teacher does not need at a noise level; off by default."""

    plan: str | None = None  # a file that `potstill probe` made for this very teacher; null: none
    cache: int = 1  # of a teacher's walk (SFD): deep features are computed at every cache-th evaluation only; 1: always
    anneal: float = 0.2  # share of the training, its last, with the full teacher
    guard_iterations: int = 500  # between comparisons with the full teacher; 0: none
    cosine: float = 0.99  # least cosine of the student's gradients with and without; below, the plan shrinks
    norm: float = 0.05  # most relative difference of their norms

    def __post_init__(self):
        finite(self)
        at_least(self, 1, "cache")
        wants(self, "anneal", 0 <= self.anneal <= 1, "a share of the training in [0, 1]")
        at_least(self, 0, "guard_iterations")
        wants(self, "cosine", -1 <= self.cosine <= 1, "a cosine in [-1, 1]")
        above(self, 0, "norm")

    def unused(self) -> Unused:
        idle: Unused = {}
        if not (self.plan or self.cache > 1):
            idle = dict.fromkeys(("anneal", "guard_iterations", "cosine", "norm"), "neither skipping.plan nor skipping.cache")
        return idle if self.guard_iterations else idle | dict.fromkeys(("cosine", "norm"), "skipping.guard_iterations=0")


@dataclass
class Plan:
    """edges: K + 1 noise levels, ascending; order: blocks, the most dispensable first; prefix: how many of them bin k leaves out.

    affine: per block that any bin leaves out, a [K, C] and b [K, C] as lists. report: what the probe measured, for people.
    """

    teacher: str  # weights_hash
    resolution: int
    edges: list[float]
    order: list[str]
    prefix: list[int]
    budget: float
    affine: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def bins(self) -> int:
        return len(self.prefix)

    @property
    def empty(self) -> bool:
        return not any(self.prefix)

    def bin_of(self, sigma: float) -> int | None:
        """The bin of a noise level; None outside of all, where the full teacher runs."""
        if not self.edges[0] <= sigma <= self.edges[-1]:
            return None
        return min(int(np.searchsorted(self.edges, sigma, side="right")) - 1, self.bins - 1)

    def bins_between(self, low: float, high: float) -> list[int | None]:
        """All bins that noise levels in [low, high] can be in, with None for outside; rounding of the levels included."""
        low, high = low * (1 - 1e-5), high * (1 + 1e-5)
        inside = [k for k in range(self.bins) if self.edges[k] <= high and low <= self.edges[k + 1]]
        outside = low < self.edges[0] or high > self.edges[-1]
        return [*inside, *([None] if outside else [])]

    def left_out(self, bin: int | None) -> int:
        """How many blocks, from the front of `order`."""
        return 0 if bin is None else self.prefix[bin]

    def shrunk(self) -> "Plan":
        """A quarter less in every bin, and at least one block less."""
        return replace(self, prefix=[p * 3 // 4 for p in self.prefix])


def save_plan(path: Path, plan: Plan) -> None:
    """As JSON with its checksum, atomically."""
    content = {"format": FORMAT} | asdict(plan)
    with whole(path) as part:
        part.write_text(json.dumps(content | {"checksum": checksum(content)}) + "\n", encoding="utf-8")


def checksum(content: dict[str, Any]) -> str:
    """SHA-256 of what a plan file says, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_plan(path: Path) -> Plan:
    """A plan file. UserError if there is none, Damaged if it is not what potstill probe wrote. One of an earlier version has no checksum."""
    if not path.is_file():
        raise UserError(f"no plan at {path}: potstill probe TEACHER.safetensors --data DATA --out {path} makes one")
    found = read_json(path, dict, AGAIN)
    promised = found.pop("checksum", None)
    wanted = {"format", *(field.name for field in fields(Plan))}
    odd = sorted(wanted - OPTIONAL - found.keys()) + sorted(found.keys() - wanted)
    if odd or found["format"] != FORMAT:
        what = f"{shown(odd[0])} is {'missing' if odd[0] in wanted else 'not known'}" if odd else f"its format is {shown(found['format'])}"
        raise Damaged(f"{path} is not a plan of potstill probe ({what}): {AGAIN}")
    check(path, found, KINDS, AGAIN)
    prefix, edges, order, affine = found["prefix"], found["edges"], found["order"], found.get("affine", {})
    if len(edges) != len(prefix) + 1 or len(set(order)) < len(order) or max(prefix) > len(order) or not affine.keys() <= set(order):
        raise Damaged(f"{path} contradicts itself (bins, edges, prefixes, blocks): {AGAIN}")
    for name, one in affine.items():
        if not _calibrates(one, len(prefix)):
            raise Damaged(
                f"{path} has an affine of {shown(name)} that is not finite numbers a and b, [{len(prefix)}, channels] each: {AGAIN}"
            )
    check_budget(found["budget"])
    if promised is not None and promised != checksum(found):
        raise Damaged(f"{path} is damaged (its checksum differs): copy it again, or {AGAIN}")
    del found["format"]
    return Plan(**found)


def _calibrates(one: Any, bins: int) -> bool:
    """Are these the scales a and shifts b [K, C] of one block?"""
    if (
        not is_dict(one)
        or one.keys() != {"a", "b"}
        or not all(is_list(rows, lambda row: is_list(row, is_number, 1), bins, bins) for rows in one.values())
    ):
        return False
    return len({len(row) for rows in one.values() for row in rows}) == 1


def check_plan(plan: Plan, net: EDMDenoiser, source: str) -> None:
    """UserError if the plan was not made for this very net."""
    if plan.resolution != net.img_resolution:
        raise UserError(
            f"{source} is for {plan.resolution}x{plan.resolution} images, the teacher makes {net.img_resolution}x{net.img_resolution}: probe this teacher"
        )
    if not same_weights(plan.teacher, net):
        raise UserError(
            f"{source} is for another teacher (weights {plan.teacher[:12]}, these are {weights_hash(net)[:12]}): probe this one with potstill probe"
        )
    blocks = blocks_of(net.model)
    if unknown := set(plan.order) - blocks.keys():
        raise UserError(f"{source} names blocks that the teacher lacks, such as {min(unknown)}: probe this teacher")
    for name, one in plan.affine.items():
        if (wide := len(one["a"][0])) != blocks[name].out_channels:
            raise UserError(
                f"{source} calibrates {name} with {wide} channels, the teacher's has {blocks[name].out_channels}: probe this teacher"
            )


def check_budget(budget: float) -> None:
    if not 0 < budget <= HARDEST:
        raise UserError(f"the budget of excess denoising loss wants to be above 0 and at most {HARDEST}, got {budget}")


def prefixes(order: Sequence[int], error: np.ndarray, budget: float) -> list[int]:
    """How far every bin gets in `order` while its errors [B, K], added up, stay within the budget: [K]."""
    running = np.cumsum(error[list(order)], axis=0)
    return [int(n) for n in (running <= budget).sum(0)]


def latency_saved(order: Sequence[int], error: np.ndarray, latency: np.ndarray, budget: float) -> float:
    """The latency [B] that these prefixes save, mean over bins."""
    steps = np.concatenate([[0.0], np.cumsum(latency[list(order)])])
    return float(np.mean([steps[p] for p in prefixes(order, error, budget)]))


def nested_order(error: np.ndarray, latency: np.ndarray, budget: float) -> list[int]:
    """One order for all bins whose prefixes save the most: by error per latency, then moved about while that helps.

    error [B, K]: of leaving out block b alone in bin k; latency [B]: what that saves. Blocks that save nothing are not in it.
    """
    useful = [b for b in range(len(latency)) if latency[b] > 0]
    if not useful:
        return []
    score = np.log(np.maximum(error, 1e-12)).mean(1) - np.log(np.maximum(latency, 1e-12))
    starts = [sorted(useful, key=lambda b: score[b])]
    starts += [sorted(useful, key=lambda b, k=k: error[b, k] / latency[b]) for k in range(error.shape[1])]
    return max((_climb(start, error, latency, budget) for start in starts), key=lambda o: latency_saved(o, error, latency, budget))


def _climb(order: list[int], error: np.ndarray, latency: np.ndarray, budget: float, sweeps: int = 3) -> list[int]:
    """Hill climbing: take one block out and put it where the saving is largest."""
    best, value = order, latency_saved(order, error, latency, budget)
    for _ in range(sweeps):
        before = value
        for b in order:
            rest = [other for other in best if other != b]
            for at in range(len(best)):
                moved = [*rest[:at], b, *rest[at:]]
                if (now := latency_saved(moved, error, latency, budget)) > value + 1e-15:
                    best, value = moved, now
        if value == before:
            break
    return best


def free_choice(error: np.ndarray, latency: np.ndarray, budget: float) -> float:
    """What could be saved if every bin chose its own blocks (greedy by error per latency, what fits): mean over bins."""
    total = 0.0
    for k in range(error.shape[1]):
        spent = 0.0
        for b in sorted(range(len(latency)), key=lambda b, k=k: error[b, k] / max(latency[b], 1e-12)):
            if latency[b] > 0 and spent + error[b, k] <= budget:
                spent, total = spent + error[b, k], total + latency[b]
    return float(total / error.shape[1])


def corrected_prefixes(prefix: list[int], longest: int, excess: Callable[[int, int], float], budget: float) -> list[int]:
    """Prefixes whose real cost is within the budget: `excess(k, p)` of leaving out the first p blocks together in bin k."""
    found = []
    for k, p in enumerate(prefix):
        start = p
        while p and excess(k, p) > budget:
            p -= 1
        while start <= p < longest and excess(k, p + 1) <= budget:
            p += 1
        found.append(p)
    return found


def kl_budget(edges: Sequence[float], scaled: Sequence[float]) -> float:
    """Σ_k Δln σ · E|D_skip - D|²/σ²: an upper bound of KL(teacher || skipping teacher), in nats per image (Girsanov, σ(t) = t)."""
    widths = [math.log(b / a) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return float(sum(w * s for w, s in zip(widths, scaled, strict=True)))
