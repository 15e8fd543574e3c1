"""A teacher that leaves out what its plan says, with static shapes, and the guard that compares it with the full one.

Noise levels are drawn stratified: sample i of a micro-batch always comes from the same slice of their law (`Draws`), so
which bin it can be in is known on the host before it is drawn. The batch is put in the order of how much is left out, and
every block runs on the first so many samples of it: shapes never change, nothing waits for the device. A slice that
reaches over two bins leaves out what both allow. Backward follows, since the graph has only what was run.

Walks (SFD's teacher) have one level for the whole batch: blocks run or not. Between adjacent evaluations of a walk
everything below the finest resolution can be remembered instead (`cache`; DeepCache, 2312.00858).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.sigmas import digit_reversal
from potstill.engine.nets.conditions import Condition
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.edm_denoiser import EDMDenoiser
from potstill.engine.nets.layers import ResidualBlock
from potstill.engine.nets.unet import UNet
from potstill.engine.skipping.blocks import SkippableDenoiser
from potstill.engine.skipping.plan import Plan, SkippingConfig
from potstill.kernels import Estimate

Levels = Callable[[Tensor], Tensor | None]  # Method.teacher_level: u in [0, 1] -> σ, the quantiles of the law it asks its teacher at


class Schedule(NamedTuple):
    """For one batch size: the order to run samples in and back (None: as they come), and rows and calibration per block."""

    order: Tensor | None
    back: Tensor | None
    blocks: dict[str, tuple[int | None, Tensor | None, Tensor | None]]


class Skipping(SkippableDenoiser):
    """`net` by a plan; the same interface, weights shared. For teachers only.

    levels: the law of σ where a method asks with one σ per sample [N]; None for methods that only walk. `active = False`
    is the full teacher, bit for bit.
    """

    def __init__(self, net: EDMDenoiser, plan: Plan | None, levels: Levels | None = None, cache: int = 1):
        super().__init__(net)
        self.law, self.cache, self.active = levels, cache, True
        self.memory = Memory()
        if cache > 1:
            remember(self.model, net.img_resolution, self.memory)
        self.repeats, self.evaluations = 1, 0
        self.set_plan(plan)

    def set_plan(self, plan: Plan | None) -> None:
        """Follow another plan from now on. None: leave out nothing."""
        self.plan = plan
        self.schedules: dict[Any, Schedule | None] = {}
        device = next(self.parameters()).device
        self.calibration = {
            name: (torch.tensor(found["a"], device=device), torch.tensor(found["b"], device=device))
            for name, found in (plan.affine if plan else {}).items()
        }

    def restart(self) -> None:
        """A new walk begins: nothing is remembered of the last."""
        self.evaluations = 0

    def levels(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> list[Tensor]:
        """Of the full net: a plan says what D may do without. What a walk remembers is overwritten, so a new one begins."""
        self.memory.reuse = False
        self.follow(None)
        self.restart()
        return super().levels(x, sigma, condition)

    def estimate(self, x: Tensor, sigma: Tensor, condition: Condition | None = None, *, guidance: float = 1.0, **how: Any) -> Estimate:
        self.repeats = 1 if guidance == 1.0 or self.guide is not None else 2  # guided by itself, a batch is the samples twice
        try:
            return super().estimate(x, sigma, condition, guidance=guidance, **how)
        finally:
            self.repeats = 1

    def estimate_and_features(
        self, x: Tensor, sigma: Tensor, condition: Condition | None = None, *, guidance: float = 1.0
    ) -> tuple[Estimate, Tensor]:
        """In two forwards: the estimate is by the plan, the features are the full net's."""
        return Denoiser.estimate_and_features(self, x, sigma, condition, guidance=guidance)

    def _raw(
        self, x: Tensor, sigma: Tensor, condition: Condition | None, *, augment_labels: Tensor | None = None, steps: int | None = None,
        seen: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        assert seen is None  # features are the full net's
        self.memory.reuse = self.active and self.cache > 1 and sigma.ndim == 0 and self.remembers(x)
        schedule = self.schedule(sigma, len(x)) if self.active else None
        self.follow(schedule)
        if schedule is None or schedule.order is None:
            return super()._raw(x, sigma, condition, augment_labels=augment_labels, steps=steps)
        x, c = x.float(), self.coefficients(self._sigmas(sigma, x))
        order, labels = schedule.order, self._labels(condition, x)
        labels = None if labels is None else labels[order]
        raw = self.model(self._input(x, c)[order], c.c_noise[order], labels, augment_labels, steps)[schedule.back]
        return raw[:, : self.img_channels], x, c.c_skip, c.c_out

    def remembers(self, x: Tensor) -> bool:
        """Is this an evaluation that takes its deep features from the last full one? Counts evaluations of a walk."""
        if self.memory.shape != x.shape:
            self.evaluations, self.memory.shape = 0, x.shape
        self.evaluations += 1
        return (self.evaluations - 1) % self.cache != 0

    def follow(self, schedule: Schedule | None) -> None:
        for name, block in self.parts.items():
            block.rows, block.scale, block.shift = (None, None, None) if schedule is None else schedule.blocks[name]

    def schedule(self, sigma: Tensor, n: int) -> Schedule | None:
        """What to run; None: everything."""
        if self.plan is None or self.plan.empty:
            return None
        if sigma.ndim and self.law is None:
            raise ValueError("wanted one noise level for the batch, got one per sample and no law of them")
        key: Any = (n, self.repeats) if sigma.ndim else self.plan.bin_of(float(sigma))  # walks keep their levels on the host
        if key not in self.schedules:
            self.schedules[key] = self._schedule_of(self.bins_of_samples(n) if sigma.ndim else [key])
        return self.schedules[key]

    def bins_of_samples(self, n: int) -> list[int | None]:
        """Per sample of a batch as methods draw it, the bin whose prefix it takes: of those its slice touches, the shortest."""
        assert self.plan is not None and self.law is not None and n % self.repeats == 0
        m = n // self.repeats
        levels = self.law(torch.arange(m + 1, dtype=torch.float64) / m)
        assert levels is not None
        edges = levels.tolist()
        chosen = []
        for slice_ in digit_reversal(m):
            touched = self.plan.bins_between(edges[slice_], edges[slice_ + 1])
            chosen.append(min(touched, key=self.plan.left_out))
        return chosen * self.repeats

    def _schedule_of(self, bins: list[int | None]) -> Schedule | None:
        """bins: of every sample, or the one of the whole batch in a walk. None: everything runs."""
        assert self.plan is not None
        left_out = [self.plan.left_out(k) for k in bins]
        if not any(left_out):
            return None
        device = next(self.parameters()).device
        order = sorted(range(len(bins)), key=lambda i: left_out[i])  # stable
        rows = {name: sum(p <= at for p in left_out) for at, name in enumerate(self.plan.order)}
        blocks = {}
        for name in self.parts:
            run = rows.get(name, len(bins))
            if run == len(bins):
                blocks[name] = (None, None, None)
                continue
            passing = [k for k in (bins[i] for i in order[run:]) if k is not None]
            a = b = None  # where nothing was fitted
            if name in self.calibration:
                chosen = passing[:1] if len(set(passing)) == 1 else passing  # one row where all are of one bin
                a, b = (table[chosen][:, :, None, None].to(self.compute_dtype) for table in self.calibration[name])
            blocks[name] = (run, a, b)
        if order == sorted(order):
            return Schedule(None, None, blocks)
        back = torch.tensor(order, device=device).argsort()
        return Schedule(torch.tensor(order, device=device), back, blocks)


class Memory:
    """What all remembered layers of a net share: whether this evaluation reuses, and for which shape it may."""

    def __init__(self) -> None:
        self.reuse = False
        self.shape: torch.Size | None = None


class Remembered(nn.Module):
    """A layer whose output is kept and given again while `memory.reuse`; of one that nothing fresh reads, only the shape."""

    def __init__(self, layer: nn.Module, memory: Memory, needed: bool):
        nn.Module.__init__(self)
        self.layer, self.memory, self.needed = layer, memory, needed
        self.output: Tensor | None = None
        if isinstance(layer, ResidualBlock):
            self.in_channels, self.out_channels = layer.in_channels, layer.out_channels

    def forward(self, *inputs: Tensor, **options: bool) -> Tensor:
        if self.memory.reuse:
            assert self.output is not None
            return self.output
        y = self.layer(*inputs, **options)
        self.output = y.detach() if self.needed else y.new_zeros(()).expand(y.shape)
        return y


class RememberedBlock(Remembered, ResidualBlock):
    """The same for a residual block, which is called with the embedding."""


def remember(model: UNet, resolution: int, memory: Memory) -> None:
    """Wrap all layers below the finest resolution, and the block that leads up to it, whose output is what is reused."""
    top = f"{resolution}x{resolution}_"
    for part in (model.enc, model.dec):
        for name, layer in part.items():
            if name.startswith(top) and name != f"{top}up":
                continue
            needed = part is model.dec and (name == f"{top}up" or "aux_conv" in name or "aux_up" in name)
            kind = RememberedBlock if isinstance(layer, ResidualBlock) else Remembered
            part[name] = kind(layer, memory, needed)
    if f"{top}up" not in model.dec:
        raise UserError(
            "skipping.cache wants a teacher of several resolutions: in one of a single resolution there is nothing deep to remember"
        )


class Guard:
    """Watches over a skipping teacher: compares gradients now and then, shrinks the plan, and ends with the full teacher."""

    def __init__(self, net: Skipping, cfg: SkippingConfig, say: Callable[[str], None]):
        self.net, self.cfg, self.say = net, cfg, say
        self.shrunk = 0
        self.begun = net.plan, net.cache

    def before(self, step: int, total: int, gradient: Callable[[], Tensor]) -> dict[str, Tensor]:
        """To be called before iteration `step` of `total`. `gradient()`: the student's, of this iteration, as one vector.

        Waits for the device, in the iterations that compare only: a plan is a matter of shapes.
        """
        active = step < round((1 - self.cfg.anneal) * total) and self.lightens
        if self.net.active and not active and self.lightens:
            self.say(f"from iteration {step} on the teacher is the full one (skipping.anneal={self.cfg.anneal})")
        self.net.active = active
        every = self.cfg.guard_iterations
        if not active or not every or step == 0 or step % every:  # at 0 student, fake net and teacher are one: no gradient
            return {}
        light = gradient().double()
        self.net.active = False
        full = gradient().double()
        self.net.active = True
        cosine = torch.nn.functional.cosine_similarity(light, full, 0)
        norm = light.norm() / full.norm()
        if not (float(cosine) >= self.cfg.cosine and abs(float(norm) - 1) <= self.cfg.norm):
            self.shrink(step, float(cosine), float(norm))
        return {"skipping/cosine": cosine, "skipping/norm": norm, "skipping/left_out": cosine.new_tensor(self.left_out)}

    @property
    def state(self) -> tuple[bool, int]:
        """Changes whenever the teacher leaves out something else."""
        return self.net.active, self.shrunk

    @property
    def lightens(self) -> bool:
        return self.net.cache > 1 or self.left_out > 0

    @property
    def left_out(self) -> int:
        """Blocks left out, added up over bins."""
        return sum(self.net.plan.prefix) if self.net.plan else 0

    def shrink(self, step: int, cosine: float, norm: float) -> None:
        self.apply_shrinks(1)
        what = f"the plan leaves out {self.left_out} blocks over all bins" if self.net.plan else ""
        what += f"{' and ' * bool(what)}cache is {self.net.cache}" if self.cfg.cache > 1 else ""
        self.say(
            f"iteration {step}: with the light teacher the student's gradient has cosine {cosine:.4f} and norm ratio "
            f"{norm:.3f} with the full one's (wanted {self.cfg.cosine}, 1 ± {self.cfg.norm}); from now on {what}"
        )

    def apply_shrinks(self, count: int) -> None:
        for _ in range(count):
            if self.net.plan:
                self.net.set_plan(self.net.plan.shrunk())
            self.net.cache = max(1, self.net.cache - 1)
        self.shrunk += count

    def state_dict(self) -> dict[str, int]:
        return {"shrunk": self.shrunk}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Shrink as often as that run had, from what this one began with: it may have shrunk more often and be going back."""
        plan, self.net.cache = self.begun
        self.net.set_plan(plan)
        self.shrunk = 0
        self.apply_shrinks(state["shrunk"])
