"""Deterministic and ancestral solvers with one signature: step(denoise, x, sigma, sigma_next, state) -> x, state.

`denoise(x, σ)` estimates the clean image; x is the state in any float dtype, σ and σ_next are 0-dim tensors. `state` is
what a multistep solver remembers (None at the first step). `solve` walks a schedule with any of them.

Sources: Euler and Heun 2206.00364 (Alg. 1, and Alg. 2 with `churned`), DPM-Solver++ 2211.01095 in its data-prediction multistep form,
iPNDM 2204.13902 (Adams-Bashforth on dx/dσ), ancestral 2006.11239 written for variance-exploding noise.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from potstill.engine.diffusion.tables import CAP

Denoise = Callable[[Tensor, Tensor], Tensor]


class Step(Protocol):
    def __call__(self, denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: Any) -> tuple[Tensor, Any]: ...


def solve(step: Step, denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """x carried from sigmas[0] to sigmas[-1]; the state is kept in float64, the denoiser sees float32."""
    return trajectory(step, denoise, x, sigmas)[-1]


def trajectory(step: Step, denoise: Denoise, x: Tensor, sigmas: Tensor, *, lower_final: bool = False) -> list[Tensor]:
    """The states at every level of `sigmas` ([T]), the first being x itself: T tensors of x's shape, float64.

    `lower_final` ends a multistep DPM-Solver++ with orders 2 and 1, its authors' advice for few steps.
    """
    x, state = x.double(), None
    states = [x]
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        left = len(sigmas) - 1 - i
        one = partial(_dpmpp, order=left) if lower_final and left < ORDERS.get(step, 1) else step
        x, state = one(lambda x, s: denoise(x.float(), s.float()).double(), x, sigma, sigma_next, state)
        states.append(x)
    return states


def slope(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    """dx/dσ = (x - D(x; σ)) / σ of the probability flow ODE."""
    return (x - denoise(x, sigma)) / sigma


def euler(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: None = None) -> tuple[Tensor, None]:
    """First order; one evaluation. Same as DDIM."""
    return x + (sigma_next - sigma) * slope(denoise, x, sigma), None


def analytic_first_step(x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """SFD's AFS (2409.19681): Euler along x / sqrt(1 + σ²), the slope for data of unit variance at 0; no evaluation.

    From x = σ z with a large σ it leads to (σ_next + 1/2σ) z, nearly: the same noise at the next level.
    """
    return x + (sigma_next - sigma) * x / (1 + sigma**2).sqrt()


def heun(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: None = None) -> tuple[Tensor, None]:
    """Second order; two evaluations, one on the step to σ = 0, and on the step from pure noise, which CAP stands for: what the slope changes
    at the far end of a step that is infinitely long is no correction of it.
    """
    d = slope(denoise, x, sigma)
    x_next = x + (sigma_next - sigma) * d
    if sigma_next.item() > 0 and sigma.item() < CAP:  # a schedule lies on the host: no device is asked
        x_next = x + (sigma_next - sigma) * (d + slope(denoise, x_next, sigma_next)) / 2
    return x_next, None


def _dpmpp(
    denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: Any, *, order: int, curvature: float = 1.0
) -> tuple[Tensor, Any]:
    """DPM-Solver++, multistep; one evaluation. A step in λ = -ln σ; the state holds (D, λ) of the last steps, newest first."""
    if sigma_next.item() == sigma.item():  # two levels of a fine schedule are one to a net that knows few
        return x, state
    history = [(denoise(x, sigma), -sigma.log()), *(state or [])][:order]
    if sigma_next.item() == 0:  # λ is infinite there: the limit of the first-order step is D itself
        return history[0][0], history
    h = -sigma_next.log() - history[0][1]
    p1 = torch.expm1(-h)
    x_next = (sigma_next / sigma) * x - p1 * history[0][0]
    if len(history) == 1:
        return x_next, history
    (d_0, l_0), (d_1, l_1) = history[:2]
    r_0 = (l_0 - l_1) / h
    first = (d_0 - d_1) / r_0
    if len(history) == 2:
        return x_next - 0.5 * p1 * first, history
    d_2, l_2 = history[2]
    r_1 = (l_1 - l_2) / h
    second = (d_1 - d_2) / r_1
    e_1 = first + r_0 / (r_0 + r_1) * (first - second)
    e_2 = (first - second) / (r_0 + r_1)
    p2 = p1 / h + 1
    return x_next + p2 * e_1 - curvature * (p2 / h - 0.5) * e_2, history


#: Order two.
dpmpp_2m: Step = partial(_dpmpp, order=2)
#: (3M) as its authors' code and everybody's has it. Its second difference carries half the weight that Taylor's series gives it,
#: so by its order it is a second-order method, with an error about a sixth of `dpmpp_2m`'s (measured in tests/test_solvers.py).
#: SFD's published numbers used it.
dpmpp_3m: Step = partial(_dpmpp, order=3)
#: The same with the full weight: third order, for the same one evaluation. Ours, not published.
dpmpp_3m_taylor: Step = partial(_dpmpp, order=3, curvature=2.0)
ORDERS: dict[Step, int] = {dpmpp_2m: 2, dpmpp_3m: 3, dpmpp_3m_taylor: 3}

_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Adams-Bashforth on the slopes, up to order four; one evaluation. The state holds the last slopes, newest first."""
    if sigma_next.item() == sigma.item():
        return x, state
    slopes = [slope(denoise, x, sigma), *(state or [])][:4]
    weights = _ADAMS_BASHFORTH[len(slopes) - 1]
    return x + (sigma_next - sigma) * sum(w * d for w, d in zip(weights, slopes, strict=True)), slopes


def ancestral(normal: Callable[[], Tensor]) -> Step:
    """Posterior sampling q(x_s | x_t, D) with fresh `normal()` of x's shape; one evaluation (2406.04103, Alg. 1)."""

    def step(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: None = None) -> tuple[Tensor, None]:
        return posterior(denoise(x, sigma), x, sigma, sigma_next, normal()), None

    return step


def renoise(normal: Callable[[], Tensor]) -> Step:
    """Fresh `normal()` on the clean image; one evaluation (2303.01469, Alg. 1; DMD2, 2405.14867, Sec. 4.4; LCM's scheduler)."""

    def step(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: None = None) -> tuple[Tensor, None]:
        return denoise(x, sigma) + sigma_next * normal(), None

    return step


def churned(
    step: Step, normal: Callable[[], Tensor], steps: int, s_churn: float, s_min: float, s_max: float, s_noise: float,
    *, known: Callable[[float], float] = lambda sigma: sigma,
) -> Step:  # fmt: skip
    """EDM's stochastic sampler (2206.00364, Alg. 2): before a step from σ in [s_min, s_max], noise lifts x to σ(1 + γ).

    γ = min(s_churn / steps, √2 - 1); the noise that is added has the standard deviation s_noise·sqrt(σ̂² - σ²). `step` is a
    one-step solver (euler, heun), `normal()` gives standard normals of x's shape, `steps` is N, the number of steps; σ̂ is the
    level nearest to σ(1 + γ) that the net has, `known(σ(1 + γ))`.
    """
    gamma = min(s_churn / steps, 2**0.5 - 1)

    def lifted(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: None = None) -> tuple[Tensor, None]:
        if gamma > 0 and s_min <= sigma <= s_max:
            higher = torch.full_like(sigma, known((sigma * (1 + gamma)).item()))
            x, sigma = x + (higher**2 - sigma**2).sqrt() * s_noise * normal(), higher
        return step(denoise, x, sigma, sigma_next, state)

    return lifted


def posterior(clean: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> Tensor:
    """A draw from q(x_s | x_t, clean): (1 - r)·clean + r·x_t + σ_s·sqrt(1 - r)·noise, r = σ_s² / σ_t²."""
    r = (sigma_next / sigma) ** 2
    return (1 - r) * clean + r * x + sigma_next * (1 - r).clamp(min=0).sqrt() * noise


SOLVERS: dict[str, Step] = {
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_3m_taylor": dpmpp_3m_taylor,
    "ipndm": ipndm,
}
EVALUATIONS = {name: 2 if name == "heun" else 1 for name in SOLVERS}
