"""How a pipeline of diffusers comes to the images of our Sampler on our net (`engine.diffusion.sampling`): its scheduler, and its call.

A stock scheduler where there is one, so that the folder holds no code. Of a table from betas this ends at the student's first timestep, so
that a pipeline starts there: EulerDiscrete for noise σ z and for walks, LCM for noise of unit variance and for fresh noise between the
steps. Of a flow it is FlowMatchEuler, whose levels a call may name.

Ours (`standalone/student_scheduler.py`) for what no stock scheduler does: posterior sampling, the analytical first step, flows from σ z below
pure noise, and pipelines that were not made for the net's kind of prediction.

A scheduler cannot store how many steps a call asks for, so `Plan.call` does.
"""

import inspect
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.sampling import ANCESTRAL, ONE_STEP, RENOISE, Sampler, first_state
from potstill.engine.diffusion.solvers import analytic_first_step
from potstill.engine.diffusion.tables import CAP, sigmas_of
from potstill.engine.nets.diffusers import DiffusersDenoiser

EULER = "euler"
SOLVERS = (ONE_STEP, RENOISE, ANCESTRAL, EULER)  # what our scheduler knows


@dataclass
class Plan:
    """scheduler: a class of diffusers, or "" for ours; config: its settings. call: what the pipeline must be called with.

    why: what keeps a stock scheduler from it.
    """

    scheduler: str
    config: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)
    why: str = ""


def plan(net: DiffusersDenoiser, sampler: Sampler, pipeline: Any) -> Plan:
    """How `pipeline`, a class of diffusers, samples this student. UserError for a way that no scheduler here knows."""
    if sampler.solver not in SOLVERS or sampler.churn or sampler.step_condition is not None:
        how = f"{sampler.solver} with churn or a step condition" if sampler.solver in SOLVERS else sampler.solver
        raise UserError(
            f"a diffusers pipeline samples by {', '.join(SOLVERS)}, this student by {how}: export it to safetensors or hub instead"
        )
    sigmas = sampler.levels(net).tolist()
    end = sigmas.pop() if sampler.solver == EULER else 0.0
    why, made = unfit(net, sampler, pipeline, sigmas, end), None
    if not why:
        made = flow_match(net, sampler, sigmas) if net.flow else from_betas(net, sampler, sigmas, end)
        if missing := set(made.call) - set(inspect.signature(pipeline.__call__).parameters):
            why = f"{pipeline.__name__} takes no {missing.pop()}"
    made = made if made and not why else ours(net, sampler, pipeline, sigmas, end, why)
    made.call = {"num_inference_steps": len(sigmas) - sampler.afs} | made.call
    return made


def unfit(net: DiffusersDenoiser, sampler: Sampler, pipeline: Any, sigmas: list[float], end: float) -> str:
    """What keeps a stock scheduler from sampling this student in its pipeline; "" for nothing."""
    prediction, many = net.scheme["prediction"], len(sampler.sigmas) > 1
    if sampler.solver == ANCESTRAL and many:
        return "no scheduler of diffusers samples the posterior"
    if sampler.afs:
        return "no scheduler of diffusers takes an analytical first step"
    if net.flow == ("scale_model_input" in inspect.getsource(pipeline.__call__)):  # as loops over a table ask for, and none over a flow
        return f"{pipeline.__name__} was not made for nets of {prediction} prediction"
    if net.flow:
        if sampler.start == "sigma" and sampler.sigmas[0] < CAP:
            return f"its first noise is σ z with σ = {sampler.sigmas[0]:.4g}, where {pipeline.__name__} begins with z"
        return f"its walk ends at σ = {end:.4g}, where FlowMatchEuler goes on to 0" if end > 0 else ""
    if sampler.start == "sigma" and not hasattr(pipeline, "prepare_latents"):
        return f"{pipeline.__name__} does not scale the first noise"
    if sampler.start == "sigma" and sampler.solver == RENOISE and many:
        return "LCMScheduler begins with noise of unit variance"
    if prediction == "sample" and (sampler.start == "sigma" or sampler.solver == EULER):
        return "EulerDiscreteScheduler knows no sample prediction"
    own = times_of(net, sigmas) + [0.0] * (end > 0)  # where the table says at which level a walk ends
    return "two of its levels have one timestep" if len(set(own)) < len(own) else ""


def from_betas(net: DiffusersDenoiser, sampler: Sampler, sigmas: list[float], end: float) -> Plan:
    """A stock scheduler whose table ends at the student's first timestep, and has the student's levels at all of its own."""
    times = [round(time) for time in times_of(net, sigmas)]
    n, first = len(times), times[0]
    levels = sigmas_of(net.scheme)[: first + 1].tolist()
    for time, sigma in zip(times, sigmas, strict=True):
        levels[time] = sigma
    if end > 0:  # a walk's last level takes the place of the table's first, and of others so low: the net is asked at none of them
        levels = [end, *(max(level, end) for level in levels[1:])]
    alphas = [1.0, *(1 / (1 + level**2) for level in levels)]
    betas = [1 - after / before for before, after in pairwise(alphas)]
    # SD's pipelines warn of another offset, and change it. It is used for none of these.
    config = {"num_train_timesteps": first + 1, "trained_betas": betas, "prediction_type": net.scheme["prediction"], "steps_offset": 1}
    if sampler.solver == EULER or sampler.start == "sigma":
        spacing = "trailing" if sampler.start == "sigma" else "leading"  # by which a pipeline scales its first noise, by σ or √(1+σ²)
        config |= {"timestep_spacing": spacing, "final_sigmas_type": "sigma_min" if end > 0 else "zero"}
        return Plan("EulerDiscreteScheduler", config, {"timesteps": times} if sampler.solver == EULER else {})
    config |= {"original_inference_steps": n, "timestep_scaling": 1e6, "clip_sample": False}  # so large that its c_skip is nothing
    even = [(first + 1) // n * i - 1 for i in range(n, 0, -1)]
    return Plan("LCMScheduler", config, {} if times == even else {"timesteps": times})


def flow_match(net: DiffusersDenoiser, sampler: Sampler, sigmas: list[float]) -> Plan:
    """FlowMatchEuler, with the shift that makes even times the student's where there is one, so that fewer calls can be wrong."""
    times = [flow_time(sigma) for sigma in sigmas]
    n = len(times)
    even, shift = [1 - i / n for i in range(n)], 1.0
    if n > 1 and 0 < times[1] < 1:
        found = times[1] * (1 - even[1]) / (even[1] * (1 - times[1]))
        if all(abs(found * u / (1 + (found - 1) * u) - t) < 1e-7 for u, t in zip(even, times, strict=True)):
            times, shift = even, found
    config = {"num_train_timesteps": net.scheme["steps"], "shift": shift, "use_dynamic_shifting": False, "shift_terminal": None}
    config["stochastic_sampling"] = sampler.solver == RENOISE and n > 1
    return Plan("FlowMatchEulerDiscreteScheduler", config, {} if times == [1.0] else {"sigmas": times})


def ours(net: DiffusersDenoiser, sampler: Sampler, pipeline: Any, sigmas: list[float], end: float, why: str) -> Plan:
    """StudentScheduler, which samples as `sampler` does whatever the pipeline was made for."""
    first = first_state(net, torch.ones(1, 1), torch.tensor(sigmas[0]), sampler.start).item()  # x is so many standard normals
    if sampler.afs:
        first, sigmas = analytic_first_step(torch.tensor(first), torch.tensor(sigmas[0]), torch.tensor(sigmas[1])).item(), sigmas[1:]
    first *= net.coefficients(torch.tensor(sigmas[:1])).c_in.item()
    solver = RENOISE if sampler.solver == ONE_STEP else sampler.solver
    config = {"prediction": net.scheme["prediction"], "solver": solver, "sigmas": sigmas, "times": times_of(net, sigmas), "end": end}
    config |= {"first": first, "scale_input": not hasattr(pipeline, "prepare_latents"), "num_train_timesteps": net.scheme["steps"]}
    return Plan("", config, {}, why)


def times_of(net: DiffusersDenoiser, sigmas: list[float]) -> list[float]:
    """What a pipeline's loop tells the net at these levels, in the scheduler's timesteps."""
    return net.time(torch.tensor(sigmas, dtype=torch.float64)).tolist()


def flow_time(sigma: float) -> float:
    """t in [0, 1]; CAP stands for 1."""
    return 1.0 if sigma >= CAP else sigma / (1 + sigma)
