"""What several papers share: the one-step generator, noise, and what a teacher must be able to do."""

from torch import Tensor, nn

from potstill.engine.common.errors import UserError
from potstill.engine.methods.base import Draws
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.layers import UNetBlock


def generate(net: Denoiser, draws: Draws, sigma: float, labels: Tensor | None) -> Tensor:
    """x = D(σ z; σ, labels) with z from `draws`: a batch of images [N, C, H, W] from a one-step generator."""
    z = draws.normal(net.img_channels, net.img_resolution, net.img_resolution)
    return net(sigma * z, z.new_full((len(z),), sigma), labels)


def noise_like(x: Tensor, draws: Draws) -> Tensor:
    """Standard normals of x's shape."""
    return draws.normal(*x.shape[1:])


def check_guidance(guidance: float, teacher: Denoiser) -> None:
    """UserError if guidance is asked of a teacher that knows no classes."""
    if guidance != 1 and not teacher.label_dim:
        raise UserError(f"method.guidance = {guidance} wants a class-conditional teacher, got an unconditional one: set it to 1")


def set_dropout(net: nn.Module, p: float) -> None:
    """Dropout of probability p in every block of a net that has any; EDM's files carry their training value."""
    for module in net.modules():
        if isinstance(module, UNetBlock):
            module.dropout = p
