"""A net as a function of its weights: gradients, directional derivatives, and Adam's scaling of them.

For methods that judge by what a net *would* learn; nothing here trains it.
"""

import functools
import importlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm
from torch.overrides import TorchFunctionMode

from potstill.engine.nets.conditions import Condition
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.ops import definitions
from potstill.kernels import Estimate

MODES = ("forward", "difference")


class WeightSpace(nn.Module):
    """θ -> g_θ(z; σ, labels), a denoiser's (guided) prediction. Vectors in this space are lists, one tensor per weight."""

    net: Denoiser

    def __init__(self, net: Denoiser, guidance: float = 1.0):
        super().__init__()
        self.net, self.guidance = net.requires_grad_(), guidance
        self.theta = dict(self.named_parameters())

    def estimate(self, z: Tensor, sigma: Tensor, labels: Condition | None) -> Estimate:
        return self.net.estimate(z, sigma, labels, guidance=self.guidance)

    def forward(self, z: Tensor, sigma: Tensor, labels: Condition | None) -> Tensor:
        return self.estimate(z, sigma, labels).denoised()

    def gradient(self, loss: Tensor) -> list[Tensor]:
        """∇_θ loss, zero where the loss does not use a weight. Nothing is left in any `.grad`."""
        return list(torch.autograd.grad(loss, list(self.theta.values()), materialize_grads=True))

    @torch.no_grad()
    def derivative(self, nu: list[Tensor], z: Tensor, sigma: Tensor, labels: Condition | None, mode: str = "forward") -> Tensor:
        """∂g_θ/∂θ · ν [N, C, H, W].

        mode: "forward" differentiates in forward mode; "difference" takes a central difference of relative width 1e-3,
        for nets with parts that have no forward mode: some percent off, and more in bfloat16.
        """
        theta = {name: p.detach() for name, p in self.theta.items()}
        tangent = dict(zip(theta, nu, strict=True))

        def g(theta: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self, theta, (z, sigma, labels))

        if mode == "forward":
            load_forward_rules()
            with sdpa_kernel(SDPBackend.MATH), definitions(), ContiguousGroupNorm():  # what has a forward mode
                return torch.func.jvp(g, (theta,), (tangent,))[1]
        h = 1e-3 * get_total_norm(list(theta.values())) / get_total_norm(nu).clamp(min=1e-30)
        ahead, behind = ({name: p + side * tangent[name] for name, p in theta.items()} for side in (h, -h))
        return (g(ahead) - g(behind)) / (2 * h)


class SecondMoment(nn.Module):
    """v: the running mean of squared gradients, and Adam's scaling of a vector by it, Λ μ = μ / (sqrt(v) + eps)."""

    count: Tensor

    def __init__(self, like: Iterable[Tensor], decay: float, eps: float):
        super().__init__()
        self.v = nn.ParameterList([nn.Parameter(torch.zeros_like(p), requires_grad=False) for p in like])
        self.register_buffer("count", self.v[0].new_zeros(()))
        self.decay, self.eps = decay, eps

    @torch.no_grad()
    def add(self, squares: list[Tensor], times: int = 1) -> None:
        """The square of a gradient, or the mean of those of `times` gradients: a plain mean at first, then an average
        over about 1 / (1 - decay) of them."""
        self.count += times
        share = (times / self.count).clamp(min=1 - self.decay**times)
        for v, square in zip(self.v, squares, strict=True):
            v.lerp_(square, share)

    def scaled(self, mu: list[Tensor]) -> list[Tensor]:
        """Λ μ."""
        return [m / (v.sqrt() + self.eps) for m, v in zip(mu, self.v, strict=True)]


class ContiguousGroupNorm(TorchFunctionMode):
    """PyTorch's forward mode of group_norm takes contiguous images only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


@functools.cache
def load_forward_rules() -> None:
    """What PyTorch does at the first use of forward mode, without its own deprecation warning (2.13)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")
