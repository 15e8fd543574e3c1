"""SFD and SFD-v: a few Euler steps learn to arrive where a fine ODE solver does (2409.19681).

A grid of N + 1 = num_steps noise levels t_0 … t_N is all the student D_η will ever see. The teacher's solver walks the same
levels with K - 1 more between any two, and its states at the student's levels are the targets y_1 … y_N. From x_0 = t_0 ε
the student walks on its own states, one optimiser step each, so that late steps learn to mend the errors of early ones:

    x_{i+1} = x_i + (t_{i+1} - t_i) (x_i - D_η(x_i; t_i)) / t_i        L_i = |x_{i+1} - y_{i+1}|_1         Alg. 1
    x_{i+1} is detached and taken from before the update; no gradient crosses steps

With AFS the first step costs no evaluation and trains nothing, x_1 = x_0 + (t_1 - t_0) x_0 / sqrt(1 + t_0²): num_steps 4 is
NFE 2. SFD-v draws num_steps anew for every iteration and tells it to the net (`step_condition`). The second stage makes NFE 1
of a student: the teacher is then the student of num_steps 7, walked as it was trained (solver euler, with AFS).
Data-free: noise and random classes are all it needs. Metric, K, s_min, solver: the released code's choices.

Differs from the paper: no dynamic thresholding of the teacher's images (written in the released code, but never active in
its default precision). Steps are at most max(num_steps) - 1 turns, of which an iteration takes as many as its draw has.
LPIPS is that of the package `lpips`; the released code has a variant of its own (average pooling, images not shifted to [0, 1]).
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from potstill.engine.common.checks import Unused, above, at_least, one_of, wants
from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.sampling import Sampler, few_step
from potstill.engine.diffusion.sigmas import karras
from potstill.engine.diffusion.solvers import EVALUATIONS, analytic_first_step
from potstill.engine.methods.base import Batch, Logs, Method, MethodConfig, Needs, Turn, copied, frozen
from potstill.engine.methods.parts import check_guidance, conditions
from potstill.engine.methods.vitals import variance
from potstill.engine.nets.conditions import Condition
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.edm2 import EDM2Denoiser
from potstill.engine.nets.edm_denoiser import EDMDenoiser
from potstill.engine.nets.features import LPIPS, lpips_extra
from potstill.engine.nets.steps import add_step_condition
from potstill.kernels import trajectory


@dataclass
class SFDConfig(MethodConfig):
    """Defaults: SFD for two evaluations (released code)."""

    name: str = "sfd"  # set by method=…
    variants = ("sfd_v", "sfd_second")
    num_steps: list[int] = field(default_factory=lambda: [4])  # noise levels, N + 1; several: SFD-v draws one an iteration
    sample_num_steps: int | None = None  # of SFD-v, how its samples are drawn meanwhile; null: the last of num_steps
    K: int = 4  # teacher steps per student step
    solver: str = "dpmpp_3m"  # the teacher's ODE solver; euler in the second stage
    afs: bool = True  # the student's first step without an evaluation (analytical first step)
    teacher_afs: bool = False  # the teacher's first step likewise: true in the second stage
    guidance: float = 1.0  # of the teacher's walk, which the student then makes without; 1 is none. Ours: the paper has none
    sigma_min: float = 0.006  # instead of EDM's 0.002; of teacher and student
    sigma_max: float = 80.0  # where sampling starts
    rho: float = 7.0  # of Karras' levels
    metric: str = "l1"  # distance of the student's state from the teacher's: l1 | l2 | huber
    huber_c: float = 0.03  # of huber; not known from the paper
    lpips: float = 0.0  # its weight beside the metric, per pixel, in the last step; 1 in the second stage. The extra `lpips`
    step_condition: bool = False  # tell the student num_steps: true for SFD-v
    zero_init: bool = False  # start the step condition at nothing, so that the student starts as the teacher; released: random

    def __post_init__(self):
        super().__post_init__()
        least = 2 + self.afs
        levels = f"at least {least} noise levels{' (AFS makes the first step)' * self.afs}"
        wants(self, "num_steps", bool(self.num_steps) and min(self.num_steps) >= least, levels)
        wants(self, "sample_num_steps", self.sample_num_steps is None or self.sample_num_steps >= least, levels)
        at_least(self, 1, "K")
        one_of(self, "solver", EVALUATIONS)
        one_of(self, "metric", ("l1", "l2", "huber"))
        above(self, 0, "sigma_min", "rho", "huber_c", "guidance")
        wants(self, "sigma_max", self.sigma_max > self.sigma_min, f"more than sigma_min = {self.sigma_min}")
        at_least(self, 0, "lpips")

    def needs(self) -> Needs:
        return Needs(
            data=False, classes=self.guidance != 1, extras=[lpips_extra("method.lpips", "set method.lpips=0")] if self.lpips else []
        )

    def build(self, teacher: Denoiser, start: Denoiser) -> "SFD":
        return SFD(self, teacher, student=copied(start))

    def unused(self) -> Unused:
        return ({} if self.metric == "huber" else {"huber_c": f"method.metric={self.metric}"}) | (
            {} if self.step_condition else {"zero_init": "method.step_condition=false"}
        )


@dataclass
class Walk:
    """One iteration's trajectory: levels t, the teacher's states at them, and where the student stands."""

    x: Tensor  # [N, C, H, W]
    t: list[float]
    targets: list[Tensor]
    labels: Condition | None
    told: dict[str, int]  # the step condition, for nets that have one


class SFD(Method):
    """One turn per student step, all of the same net."""

    def __init__(self, cfg: SFDConfig, teacher: Denoiser, student: Denoiser):
        check_guidance(cfg.guidance, teacher)
        self.cfg, self.teacher = cfg, frozen(teacher)
        if cfg.step_condition and not student.knows_steps:
            if not isinstance(student, EDMDenoiser) or isinstance(student, EDM2Denoiser):
                raise UserError("method.step_condition=true wants one of EDM's U-Nets, which a condition can be added to: set it to false")
            add_step_condition(student, zero=cfg.zero_init)
        self.student = student
        self.nets = {"student": student}
        self.lpips = LPIPS().to(next(student.parameters()).device) if cfg.lpips else None
        steps = range(int(cfg.afs), max(cfg.num_steps) - 1)
        self.turns = tuple(Turn("student", partial(self.step_loss, i), name=f"step{i}" * (len(steps) > 1)) for i in steps)
        self.sampler = self.student_sampler(cfg.sample_num_steps or cfg.num_steps[-1])
        self.walks = {n: (self.student_sampler(n), self.teacher_sampler(n)) for n in cfg.num_steps}
        self.levels = {n: mine.levels(self.teacher).tolist() for n, (mine, _) in self.walks.items()}
        nfe = {n: student.nfe for n, (student, _) in self.walks.items()}
        self.notes = [f"num_steps {n}{' with AFS' * cfg.afs} is NFE {nfe[n]}" for n in cfg.num_steps]

    def student_sampler(self, num_steps: int) -> Sampler:
        """Euler over num_steps levels."""
        cfg = self.cfg
        sampler = few_step(
            num_steps, afs=cfg.afs, step_condition=self.student.knows_steps,
            sigma_min=cfg.sigma_min, sigma_max=cfg.sigma_max, rho=cfg.rho,
        )  # fmt: skip
        taught = sampler.levels(self.teacher)  # a student that does not round as its teacher does is told the levels themselves
        return sampler if taught.equal(sampler.levels(self.student)) else replace(sampler, sigmas=taught.tolist())

    def teacher_sampler(self, num_steps: int) -> Sampler:
        """The teacher's solver over the same levels and K - 1 between any two."""
        cfg = self.cfg
        levels = cfg.K * (num_steps - 1) + 1
        return Sampler(
            cfg.solver,
            karras(levels, cfg.sigma_min, cfg.sigma_max, cfg.rho).tolist(),
            afs=cfg.teacher_afs,
            lower_order_final=True,
            step_condition=levels if self.teacher.knows_steps else None,
            guidance=cfg.guidance,
        )

    def begin(self, batch: Batch) -> Walk:
        """The noise, the teacher's whole walk from it, and the student's first step if that is free."""
        net, num_steps = self.student, batch.draws.choice(self.cfg.num_steps)
        t, teachers = self.levels[num_steps], self.walks[num_steps][1]
        x = t[0] * batch.draws.normal(*net.shape)
        labels = conditions(net, batch)
        with torch.no_grad():
            states = teachers.states(self.teacher, x, labels)
        targets = [state.to(x.dtype) for state in states[:: self.cfg.K]]
        if self.cfg.afs:
            x = analytic_first_step(x, *torch.tensor(t[:2], dtype=torch.float64))
        return Walk(x, t, targets, labels, {"steps": num_steps} if net.knows_steps else {})

    def step_loss(self, i: int, it: Walk) -> tuple[Tensor, Logs] | None:
        """Step i of the student, from level t_i to t_{i+1}; None where this iteration's walk is shorter."""
        if i + 1 >= len(it.t):
            return None
        t, t_next = it.x.new_full((), it.t[i]), it.x.new_full((), it.t[i + 1])
        estimate = self.student.estimate(it.x, t, it.labels, **it.told)
        (loss, nonfinite), x_next = trajectory(
            it.x, estimate, t, t_next, it.targets[i + 1], metric=self.cfg.metric, c=self.cfg.huber_c, reduction="sum"
        )
        loss, numel = loss.mean(), it.x[0].numel()
        logs = {f"step{i}": loss / numel, "nonfinite": nonfinite}
        if self.lpips is not None and i + 2 == len(it.t):
            image = it.x + (t_next - t) / t * (it.x - estimate.denoised())
            logs["lpips"] = self.lpips(image, it.targets[-1]).mean()
            loss = loss + self.cfg.lpips * numel * logs["lpips"]
        it.x = x_next
        if i + 2 == len(it.t):
            logs |= variance(x_next, self.data_variance)
        return loss, logs
