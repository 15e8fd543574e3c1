"""What several papers share: the generator of one or few steps, what it is told, noise, and what a teacher must be able to do."""

from typing import Any

import torch
from torch import Tensor

from potstill.engine.common.checks import one_of, wants
from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.sampling import ONE_STEP, RENOISE, STARTS, Sampler, first_state
from potstill.engine.diffusion.sigmas import GRID
from potstill.engine.methods.base import Batch, Draws
from potstill.engine.nets.conditions import Condition
from potstill.engine.nets.denoiser import Denoiser
from potstill.kernels import add_noise


class Generator:
    """x = D(σ z; σ, condition) in one step, or a few: noise again at the next level what came of the last (2405.14867, Sec. 4.4).

    In training a batch stops at one of its steps, drawn for all ranks alike, and only that step is differentiated: what goes into
    it is what the student makes itself, as in sampling (DMD2's backward simulation): at the levels at which the sampler asks it, and,
    where it is trained with dropout, by the net without.

    Args:
        net: whose levels these are.
        sigma: the only level, if `steps` is empty.
        steps: levels by their numbers on the net's grid of 1000, the noisiest first.
        start: one of `sampling.STARTS`.
    """

    def __init__(self, net: Denoiser, sigma: float, steps: list[int], start: str):
        host = {"dtype": torch.float64, "device": "cpu"}  # also where nets are planned on "meta"
        wanted = grid_level(net, torch.tensor(steps, **host)) if steps else torch.tensor([sigma], **host)
        told: list[float] = net.told(wanted).tolist()
        self.sampler = Sampler(RENOISE if len(told) > 1 else ONE_STEP, told, start=start)
        self.sampler.sigmas = self.sigmas = self.sampler.levels(net).tolist()

    def __call__(self, net: Denoiser, draws: Draws, condition: Condition | None, before: Denoiser | None = None) -> Tensor:
        """Images [N, C, H, W] from noise of `draws`. before: the net in eval mode, which takes the steps before the last; None: it has no dropout."""
        z = draws.normal(*net.shape)
        last = draws.choice(range(len(self.sigmas))) if len(self.sigmas) > 1 else 0
        sigma = z.new_full((len(z),), self.sigmas[0])
        x = self.first(net, z, sigma)
        for level in self.sigmas[1 : last + 1]:
            with torch.no_grad():
                clean = (before or net)(x, sigma, condition)
            sigma = z.new_full((len(z),), level)
            x = add_noise(clean, sigma, draws.normal(*net.shape))
        return net(x, sigma, condition)

    def first(self, net: Denoiser, z: Tensor, sigma: Tensor) -> Tensor:
        """The state that z [N, C, H, W] stands for at the first level, sigma [N]."""
        return self.sigmas[0] * z if self.sampler.start == "sigma" else first_state(net, z, sigma, self.sampler.start)


def check_generator(cfg: Any) -> None:
    """BadSetting for `start` and `steps` that no generator has."""
    one_of(cfg, "start", STARTS)
    falling = all(a > b for a, b in zip(cfg.steps, cfg.steps[1:], strict=False))
    good = falling and all(0 <= step < GRID for step in cfg.steps)
    wants(cfg, "steps", good, f"whole numbers of 0 … {GRID - 1}, each less than the one before, or [] for one step at sigma")


def conditions(net: Denoiser, batch: Batch, ask: int = 0) -> Condition | None:
    """What to draw, random: classes, or the prompts that the batch brings for the `ask`-th time an iteration asks. None for neither."""
    return batch.prompts[ask] if net.text else batch.draws.labels(net.label_dim)


def grid_level(net: Denoiser, index: Tensor) -> Tensor:
    """σ of integer indices on a grid of 1000 of the net's own levels, 0 being the smallest (DMD2's time steps)."""
    return net.level(index / (GRID - 1))


def noise_like(x: Tensor, draws: Draws) -> Tensor:
    """Standard normals of x's shape."""
    return draws.normal(*x.shape[1:])


def check_guidance(guidance: float, teacher: Denoiser, name: str = "guidance") -> None:
    """UserError if guidance is asked of a teacher that is told nothing, or never learnt to do without."""
    if guidance == 1 or teacher.guidable:
        return
    got = "an unconditional one" if not teacher.conditional else "one that was never trained without (Flux has its guidance embedded)"
    raise UserError(f"method.{name} = {guidance} wants a teacher that knows classes or prompts, and none of them; got {got}: set it to 1")
