"""Noise levels of diffusers' schedulers, from their settings alone: a table of σ that follows from betas, or flow matching's shift.

A **scheme** is the part of a scheduler's settings that says what a net was trained on: plain numbers and names, as JSON has them.

    {"prediction": "epsilon" | "v_prediction" | "sample", "steps": 1000, "betas": {…}}   x_t = √ᾱ x₀ + √(1-ᾱ) n, σ = √((1-ᾱ)/ᾱ)
    {"prediction": "flow", "steps": 1000, "shift": 3.0 | {…}}                            x_t = (1-t) x₀ + t n,     σ = t/(1-t)

In σ a flow's shift of time is a factor: t -> s·t/(1 + (s-1)·t) is σ -> s·σ, and a "dynamic" one by µ has s = e^µ. A logit-normal law
of t, with mean m and deviation d, is a log-normal one of σ with the same m and d.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from potstill.engine.common.errors import UserError

CAP = 1e5  # σ where a table or a flow ends in pure noise; the error of D is about 1/σ, and more would lose digits of x in float32

FLOW = "flow_prediction"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")

#: Schedulers whose nets know levels by their index in a table from betas; with `use_flow_sigmas` some are for flows.
TABLES = """
DDIM DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverSDE DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete
HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete PNDM SASolver TCD UniPCMultistep
"""
FLOWS = "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM"


def scheme_of(scheduler: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The scheme of a scheduler by its class and settings. UserError for one whose levels are not known."""
    kind, steps = scheduler.removesuffix("Scheduler"), config.get("num_train_timesteps", 1000)
    prediction = config.get("prediction_type") or "epsilon"
    table = kind in TABLES.split() and config.get("timestep_type") != "continuous"
    if (kind in FLOWS.split() and not config.get("invert_sigmas")) or (table and (config.get("use_flow_sigmas") or prediction == FLOW)):
        shift: Any = config.get("flow_shift" if table else "shift", 1.0)
        if config.get("use_dynamic_shifting"):
            shift = {name: config[name] for name in DYNAMIC if config.get(name) is not None}
        return {"prediction": "flow", "steps": steps, "shift": shift}
    if not table or prediction not in PREDICTIONS:
        raise UserError(
            f"the noise levels of {scheduler} with prediction_type {prediction!r} are not known: wanted a table from betas or flow matching, "
            f"as of {', '.join([*TABLES.split(), *FLOWS.split()])}; save the folder with the scheduler that the net was trained for"
        )
    names = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
    betas = {name: config[name] for name in names if config.get(name) is not None}
    if "trained_betas" in betas:
        betas["trained_betas"] = [float(beta) for beta in betas["trained_betas"]]
    return {"prediction": prediction, "steps": steps, "betas": betas}


def sigmas_of(scheme: Mapping[str, Any]) -> Tensor:
    """σ at each of a table's timesteps, float32 [steps], the smallest first and none above CAP. UserError for unknown betas.

    All of it in float32, as in the code that such nets were trained with: at the clean end 1 - ᾱ has lost digits there, and σ
    differs by up to 3e-4 from the exact one.
    """
    alpha_bar = (1 - betas_of(scheme["steps"], **scheme["betas"])).cumprod(0)
    if scheme["betas"].get("rescale_betas_zero_snr"):  # 2305.08891, Alg. 1: √ᾱ shifted and scaled to end in 0
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return ((1 - alpha_bar) / alpha_bar).sqrt().clamp(max=CAP)


def betas_of(
    steps: int,
    beta_schedule: str = "linear",
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    trained_betas: list[float] | None = None,
    rescale_betas_zero_snr: bool = False,
) -> Tensor:
    """The variances that each step adds, float32 [steps], before a rescaling to zero signal at the end."""
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # also where a net is built on the meta device
    if trained_betas is not None:
        return torch.tensor(trained_betas, **kind)
    match beta_schedule:
        case "linear":
            return torch.linspace(beta_start, beta_end, steps, **kind)
        case "scaled_linear":
            return torch.linspace(beta_start**0.5, beta_end**0.5, steps, **kind) ** 2
        case "squaredcos_cap_v2":
            alpha_bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
            return torch.tensor([min(1 - b / a, 0.999) for a, b in zip(alpha_bar, alpha_bar[1:], strict=False)], **kind)
    raise UserError(f"beta_schedule {beta_schedule!r} is not known: wanted linear, scaled_linear, squaredcos_cap_v2 or trained_betas")


def shift_of(scheme: Mapping[str, Any], tokens: int) -> float:
    """The factor s of a flow's levels for images of so many tokens: the net's own sampling walks over s·t/(1-t) of even t."""
    shift = scheme["shift"]
    if not isinstance(shift, Mapping):
        return float(shift)
    low, high = shift.get("base_image_seq_len", 256), shift.get("max_image_seq_len", 4096)
    slope = (shift.get("max_shift", 1.15) - shift.get("base_shift", 0.5)) / (high - low)
    mu = shift.get("base_shift", 0.5) + slope * (tokens - low)
    return mu if shift.get("time_shift_type") == "linear" else math.exp(mu)


def flux2_mu(tokens: int, steps: int) -> float:
    """FLUX.2's µ: fitted by its authors at 10 and 200 steps, as lines in the number of tokens, and linear in the steps between them."""
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return many if tokens > 4300 else many + (many - few) / 190 * (steps - 200)


def flow_level(t: Tensor) -> Tensor:
    """σ = t/(1-t) of times t in [0, 1], at most CAP."""
    return (t / (1 - t)).clamp(max=CAP)
