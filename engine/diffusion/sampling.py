"""From noise to images with any net: one step, few steps or a whole ODE, described by data that fits in a weight file."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from potstill.engine.common.checks import one_of, wants
from potstill.engine.common.errors import UserError
from potstill.engine.common.kinds import is_list, is_number, is_whole, shown
from potstill.engine.diffusion.precond import Coefficients
from potstill.engine.diffusion.sigmas import karras, with_zero
from potstill.engine.diffusion.solvers import (
    EVALUATIONS,
    SOLVERS,
    Denoise,
    analytic_first_step,
    ancestral,
    churned,
    renoise,
    solve,
    trajectory,
)
from potstill.engine.diffusion.tables import CAP

ONE_STEP, ANCESTRAL, RENOISE = "one_step", "ancestral", "renoise"
JUMPS = (ONE_STEP, ANCESTRAL, RENOISE)  # one evaluation a level; all others are ODE walks
STARTS = ("sigma", "unit")
CHURNED = ("euler", "heun")  # they remember nothing, so noise may come between their steps


class Sampled(Protocol):
    """What images are sampled from: a denoiser, the router of several, or a denoiser some of whose layers are skipped."""

    label_dim: int
    training: bool

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def img_channels(self) -> int: ...

    @property
    def img_resolution(self) -> int: ...

    def __call__(self, x: Tensor, sigma: Tensor, condition: Any = None, **how: Any) -> Tensor: ...

    def coefficients(self, sigma: Tensor) -> Coefficients: ...

    def sampling_levels(self, steps: int) -> Tensor: ...


class SeedNoise:
    """Standard normals with one generator per sample, so that neither the batch nor its size changes an image.

    They are drawn on the CPU and moved: a seed is the same image on every machine (CUDA's generator is another stream).
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.generators, self.device = [torch.Generator().manual_seed(seed) for seed in seeds], device

    def normal(self, *shape: int) -> Tensor:
        """[len(seeds), *shape] on the device; the next numbers of every sample's own stream."""
        return torch.stack([torch.randn(*shape, generator=g, device="cpu") for g in self.generators]).to(self.device)


@dataclass
class Sampler:
    """How a net is sampled.

    solver: "one_step" (x = D(σ z; σ) at the only level), "ancestral" (posterior sampling with fresh noise), "renoise" (fresh
    noise on D, the stochastic sampler of consistency models and DMD2), which both end with D at the last level, or a name of
    `solvers.SOLVERS` (an ODE walk over `sigmas`, whose last level may be 0).

    guidance: of the net, which is then asked for its estimates with and without what it is told; 1 is none.

    start: what comes first: "sigma", x = σ z; "unit", x = z / c_in(σ), so that what enters the net is z.

    Of an ODE walk: `afs` makes the first step without the net (SFD's analytical first step), `lower_order_final` lets
    DPM-Solver++ end with lower orders, and `step_condition` is the number of levels that is told to a net with a step
    condition (`engine.nets.steps`); None for all other nets. `churn` = (S_churn, S_min, S_max, S_noise) makes a walk with
    euler or heun EDM's stochastic sampler.

    `rho` is the exponent of the Karras levels `sigmas`, from which another number of them follows; None: they are no such
    levels.

    A walk goes over the levels nearest to `sigmas` that its net knows (`levels`): the same for all nets but iDDPM's.
    """

    solver: str
    sigmas: list[float]
    afs: bool = False
    lower_order_final: bool = False
    step_condition: int | None = None
    churn: tuple[float, float, float, float] | None = None
    rho: float | None = 7.0
    start: str = "sigma"
    guidance: float = 1.0

    def __post_init__(self):
        one_of(self, "solver", (*JUMPS, *SOLVERS))
        one_of(self, "start", STARTS)
        wants(self, "guidance", is_number(self.guidance), "a finite number")
        least = 2 if self.solver in SOLVERS else 1
        given = list(self.sigmas) if is_list(self.sigmas, lambda s: is_number(s, 0)) else []  # finite, and none of them a text
        falling = given and given[0] > 0 and sorted(given, reverse=True) == given
        fits = len(given) == 1 if self.solver == ONE_STEP else len(given) >= least
        levels = "one noise level" if self.solver == ONE_STEP else f"{least} or more noise levels"
        wants(self, "sigmas", bool(fits and falling), f"{levels}, the first above 0 and none above the one before")
        for name in ("afs", "lower_order_final"):
            wants(self, name, isinstance(getattr(self, name), bool), "true or false")
        wants(self, "step_condition", self.step_condition is None or is_whole(self.step_condition, 2), "a whole number, at least 2")
        wants(self, "rho", self.rho is None or (is_number(self.rho) and self.rho > 0), "a finite number, more than 0")
        if self.afs and self.solver not in SOLVERS:
            raise ValueError(f"afs wants an ODE solver ({', '.join(SOLVERS)}), got {self.solver!r}")
        if self.churn is not None:
            if self.afs or self.step_condition is not None:
                raise ValueError("churn wants neither afs nor a step condition")
            if self.solver not in CHURNED:
                raise ValueError(f"churn wants the solver {' or '.join(CHURNED)}, got {self.solver!r}")
            churn = self.churn  # a list where it comes from a file
            good = is_list(churn, lambda c: is_number(c, 0, math.inf), 4, 4)
            if not good or not churn[1] <= churn[2] or not churn[3] > 0 or math.inf in (churn[0], churn[1], churn[3]):
                raise ValueError(f"churn wants S_churn >= 0, 0 <= S_min <= S_max and S_noise > 0, got {shown(churn)}")
            self.churn = float(churn[0]), float(churn[1]), float(churn[2]), float(churn[3])

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        if self.solver in JUMPS:
            return len(self.sigmas)
        steps = len(self.sigmas) - 1 - self.afs
        walked = list(zip(self.sigmas, self.sigmas[1:], strict=False))[-steps:]
        once = sum(low == 0 or high >= CAP for high, low in walked) if self.solver == "heun" else 0
        return EVALUATIONS[self.solver] * steps - once

    def __call__(self, net: Sampled, labels: Any, noise: Any) -> Tensor:
        """Images [N, C, H, W] float32 from `noise`, anything with `normal(*shape) -> [N, *shape]` (SeedNoise, Draws).

        labels: N rows of what the net is told (one-hot classes, or `nets.conditions.Text`), or None.
        """
        sigmas = self.levels(net)
        x = first_state(net, noise.normal(*net.shape), sigmas[0].float(), self.start)
        ask = self._asking(net, labels)
        if self.solver == ONE_STEP:
            return ask(x, sigmas[0].float())
        normal = lambda: noise.normal(*net.shape)  # noqa: E731
        if self.solver in JUMPS:
            begin_walk(net)
            step = ancestral(normal) if self.solver == ANCESTRAL else renoise(normal)
            x = solve(step, ask, x, sigmas)
            return ask(x.float(), sigmas[-1].float())
        if self.churn:
            step = churned(SOLVERS[self.solver], normal, len(sigmas) - 1, *self.churn, known=partial(nearest_level, net))
            return solve(step, ask, x, sigmas).float()
        return self.states(net, x, labels)[-1].float()

    def levels(self, net: Sampled) -> Tensor:
        """The noise levels at which the net is asked, float64 on the host: `sigmas` [T], or what an iDDPM net knows nearest to
        them, as in EDM's code. A generator in one step is asked at the level that it was trained at.
        """
        walks = self.solver != ONE_STEP
        known = [nearest_level(net, sigma) if walks else sigma for sigma in self.sigmas]
        return torch.tensor(known, dtype=torch.float64, device="cpu")  # also where nets are planned on "meta"

    def states(self, net: Sampled, x: Tensor, labels: Any) -> list[Tensor]:
        """The ODE's states at every level of `sigmas` from x [N, C, H, W] at the first: float64, x itself included."""
        assert self.solver in SOLVERS and not self.churn
        told = {} if self.step_condition is None else {"steps": self.step_condition}
        sigmas, passed = self.levels(net), []
        begin_walk(net)
        if self.afs:
            passed = [x.double()]
            x, sigmas = analytic_first_step(x.double(), sigmas[0], sigmas[1]), sigmas[1:]
        walk = trajectory(SOLVERS[self.solver], self._asking(net, labels, **told), x, sigmas, lower_final=self.lower_order_final)
        return passed + walk

    def _asking(self, net: Any, labels: Any, **told: Any) -> Denoise:
        """(x, σ) -> D, guided or not."""
        if self.guidance == 1.0:
            return lambda x, s: net(x, s, labels, **told)
        return lambda x, s: net.estimate(x, s, labels, guidance=self.guidance, **told).denoised()

    def with_nfe(self, nfe: int) -> "Sampler":
        """The same walk over as many Karras levels between its ends as cost `nfe` evaluations, one a step. UserError where its
        own levels are none, so that others would be a guess.
        """
        assert EVALUATIONS.get(self.solver) == 1 and self.sigmas[-1] > 0
        levels = nfe + 1 + self.afs
        if nfe == self.nfe:
            return self
        own = torch.tensor(self.sigmas, dtype=torch.float64, device="cpu")  # in files that are older than `rho` of another
        if self.rho is None or not torch.allclose(karras(len(own), self.sigmas[-1], self.sigmas[0], self.rho), own, rtol=1e-5, atol=0):
            raise UserError(f"this student's noise levels follow no Karras schedule: it is sampled with NFE {self.nfe} only, got {nfe}")
        sigmas = karras(levels, self.sigmas[-1], self.sigmas[0], self.rho).tolist()
        return replace(self, sigmas=sigmas, step_condition=None if self.step_condition is None else levels)

    def to_dict(self) -> dict[str, Any]:
        """For a weight file: JSON's types. What is usual has no word: older readers know it all."""
        usual = {"churn": None, "rho": 7.0, "start": "sigma", "guidance": 1.0}
        return {key: value for key, value in asdict(self).items() if key not in usual or value != usual[key]}


def first_state(net: Any, z: Tensor, sigma: Tensor, start: str) -> Tensor:
    """x at level sigma (scalar or [N]) from standard normals z [N, …]: one of STARTS."""
    if start == "sigma":
        return z * sigma
    c_in = net.coefficients(sigma.to(z.device).reshape(-1).expand(z.shape[0])).c_in  # a tracer takes len() for a number
    return z / c_in.reshape(-1, *(1,) * (z.ndim - 1))


def nearest_level(net: Any, sigma: float) -> float:
    """σ as `net` knows it (`Denoiser.round_sigma`); 0, where a walk ends, stays."""
    known = getattr(net, "round_sigma", None)
    return sigma if known is None or not sigma > 0 else known(sigma)


def begin_walk(net: Any) -> None:
    """Tell a net that remembers from one evaluation to the next (`engine.skipping`) that what comes is another walk."""
    if (restart := getattr(net, "restart", None)) is not None:
        restart()


def one_step(sigma: float) -> Sampler:
    """x = D(σ z; σ)."""
    return Sampler(ONE_STEP, [float(sigma)])


def ode(solver: str, steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Sampler:
    """`steps` steps of an ODE solver from sigma_max over the Karras levels to 0."""
    return Sampler(solver, with_zero(karras(steps, sigma_min, sigma_max, rho)).tolist())


def heun(net: Sampled, steps: int) -> Sampler:
    """EDM's deterministic sampler of a teacher, over the net's own schedule."""
    return Sampler("heun", with_zero(net.sampling_levels(steps)).tolist())


def few_step(
    num_steps: int, *, afs: bool = True, step_condition: bool = False,
    sigma_min: float = 0.006, sigma_max: float = 80.0, rho: float = 7.0,
) -> Sampler:  # fmt: skip
    """SFD's sampler (2409.19681): Euler over `num_steps` Karras levels, the last of which is the image itself."""
    sigmas = karras(num_steps, sigma_min, sigma_max, rho).tolist()
    return Sampler("euler", sigmas, afs=afs, step_condition=num_steps if step_condition else None, rho=rho)
