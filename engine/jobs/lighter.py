"""A method's teacher that leaves out layers (`engine.skipping`): whether it can, and how it comes to."""

from collections.abc import Callable
from pathlib import Path

import torch

from potstill.engine.common.errors import UserError
from potstill.engine.methods.base import Method
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.skipping.apply import Guard, Skipping
from potstill.engine.skipping.plan import Plan, SkippingConfig, check_plan, load_plan


def lighten(method: Method, cfg: SkippingConfig, say: Callable[[str], None]) -> Guard | None:
    """Let the method's teacher leave out layers as cfg says; returns the guard for its run, or None where nothing is asked.

    UserError if the method has no teacher for that, or the plan is another teacher's.
    """
    walks = check_lighten(method, cfg)
    if not cfg.plan and cfg.cache == 1:
        return None
    teacher: Denoiser = method.teacher  # pyright: ignore[reportAttributeAccessIssue]  # check_lighten has found it
    plan = own_plan(cfg, teacher)
    if (plan is None or plan.empty) and cfg.cache == 1:
        say(f"skipping: {cfg.plan} leaves out nothing, so the teacher stays as it is")
        return None
    light = Skipping(teacher, plan, None if walks else method.teacher_level, cfg.cache)
    method.teacher = light  # pyright: ignore[reportAttributeAccessIssue]
    method.stratified = not walks
    return Guard(light, cfg, say)


def check_lighten(method: Method, cfg: SkippingConfig) -> bool:
    """Does this method let its teacher walk? UserError if `cfg` asks for what its teacher cannot do."""
    name = type(method).__name__
    if (cfg.plan or cfg.cache > 1) and not isinstance(getattr(method, "teacher", None), Denoiser):
        raise UserError(
            f"skipping is for methods that ask a teacher for denoised images, and {name} does not: unset skipping.plan and skipping.cache"
        )
    walks = method.teacher_level(torch.zeros(1)) is None
    if cfg.cache > 1 and not walks:
        raise UserError(f"skipping.cache is for teachers that walk (method sfd), and {name} asks for single noise levels: set it to 1")
    return walks


def own_plan(cfg: SkippingConfig, teacher: Denoiser) -> Plan | None:
    """The plan that cfg names, which must be this teacher's; None for none."""
    if not cfg.plan:
        return None
    plan = load_plan(Path(cfg.plan).expanduser())
    check_plan(plan, teacher, cfg.plan)
    return plan
