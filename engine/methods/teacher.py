"""Training a teacher: EDM's weighted denoising loss (2206.00364, Eq. 5 and 8).

L = E λ(σ) ||D(y + σ n; σ) - y||²,   ln σ ~ N(P_mean, P_std²),   λ = (σ² + σ_d²) / (σ σ_d)²

A net that learns the log-variance v(σ) of its own error (EDM2, 2312.02696, Eq. 21) has L / e^v + v, so that all levels weigh the same.

Of a flow the same loss is flow matching's, |v - (n - y)|², with t = σ/(1+σ) logit-normal (2403.03206). A net that is told prompts
forgets some of them, so that guidance knows what it draws when it is told nothing (2207.12598).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree

from potstill.engine.common.checks import above, at_least, finite, probability
from potstill.engine.diffusion.sampling import heun
from potstill.engine.diffusion.sigmas import lognormal
from potstill.engine.methods.base import Batch, Draws, Logs, Method, Turn
from potstill.engine.nets.conditions import Text
from potstill.engine.nets.denoiser import Denoiser
from potstill.kernels import add_noise, denoise


@dataclass
class EDMLoss:
    """The teacher's own training: EDM (2206.00364), Table 1."""

    P_mean: float = -1.2  # mean of ln σ in training
    P_std: float = 1.2  # standard deviation of ln σ
    prompt_dropout: float = 0.1  # probability that a prompt is not told, for guidance; of classes it is net.label_dropout
    sampling_steps: int = 18  # of Heun's method when the teacher is sampled; 18, EDM's for CIFAR-10, are 35 evaluations

    def __post_init__(self):
        finite(self)
        above(self, 0, "P_std")
        probability(self, "prompt_dropout")
        at_least(self, 1, "sampling_steps")


class Teacher(Method):
    """One turn: denoise real images."""

    product = "teacher"

    def __init__(self, cfg: EDMLoss, teacher: Denoiser):
        self.cfg, self.net = cfg, teacher
        self.nets = {"teacher": teacher}
        self.turns = (Turn("teacher", self.loss),)
        self.sampler = heun(teacher, cfg.sampling_steps)

    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        y, labels, draws, *_ = batch
        if isinstance(labels, Text):
            labels = self.forgetful(labels, draws)
        sigma = self.net.told(lognormal(draws.normal(), self.cfg.P_mean, self.cfg.P_std))
        x_t = add_noise(y, sigma, draws.normal(*y.shape[1:]))
        estimate = self.net.estimate(x_t, sigma, labels)
        losses, nonfinite = denoise(estimate, y, self.net.weight(sigma))
        loss = losses.mean()
        logs = {"denoise": loss, "nonfinite": nonfinite}
        if (v := self.net.logvar(sigma)) is not None:
            loss = (losses / v.exp() + v).mean()
            logs["uncertainty"] = loss
        return loss, logs

    def forgetful(self, prompts: Text, draws: Draws) -> Text:
        """Some of the prompts replaced by the null prompt."""
        null = self.net.unconditional(prompts)
        forgotten = draws.uniform() < self.cfg.prompt_dropout
        leaves, form = _pytree.tree_flatten(prompts)
        none, _ = _pytree.tree_flatten(null.filled(prompts.embeds.shape[1]) if isinstance(null, Text) else null)
        mixed = [torch.where(forgotten.view(-1, *[1] * (a.ndim - 1)), b.to(a.dtype), a) for a, b in zip(leaves, none, strict=True)]
        return _pytree.tree_unflatten(mixed, form)
