"""Autoguidance (2406.02507): a denoiser is led away from the errors of a worse one of the same task, a smaller or less trained net.

    D_w = D_guide + w (D - D_guide)

The guide is told the same classes, if it knows any.
"""

from typing import Any

from potstill.engine.common.errors import UserError
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.edm_denoiser import EDMDenoiser


class Guide:
    """Holds the worse net. It is no part of the net that it guides: frozen views of that share it, students lose it, no file has it."""

    def __init__(self, net: Denoiser):
        self.net = net.eval().requires_grad_(False)

    def __deepcopy__(self, memo: Any) -> "Guide":
        return self


def led_by(net: Denoiser, guide: Denoiser, source: str) -> Denoiser:
    """`net`, which from now on is guided by `guide`. UserError where the two are not of one task."""
    if not isinstance(net, EDMDenoiser) or not isinstance(guide, EDMDenoiser):
        raise UserError(
            f"teacher.guide={source} wants two nets of EDM's or EDM2's, got {type(net.model).__name__} led by {type(guide.model).__name__}"
        )
    ours, theirs = (f"samples {list(one.shape)} in {one.label_dim or 'no'} classes" for one in (net, guide))
    if guide.shape != net.shape or guide.label_dim not in (0, net.label_dim):
        raise UserError(f"teacher.guide={source} knows {theirs}, the teacher {ours}: wanted a worse net of the same data")
    if (mine := preconditioning(net)) != (its := preconditioning(guide)):
        raise UserError(f"teacher.guide={source} is preconditioned by {its}, the teacher by {mine}: wanted the same of both")
    net.guide = Guide(guide)
    return net


def preconditioning(net: EDMDenoiser) -> str:
    """What c_skip and c_out follow from."""
    constants = {name: value for name, value in net.scheme.items() if name not in ("sigma_min", "sigma_max")}
    return " ".join([net.precond.replace("EDM2", "EDM"), *(f"{name}={value:g}" for name, value in sorted(constants.items()))])
