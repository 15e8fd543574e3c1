"""LPIPS, the perceptual distance (1801.03924), as an optional extra."""

# lpips is optional.
# pyright: reportMissingImports=false

import torch.nn.functional as F
from torch import Tensor, nn

from potstill.engine.common.errors import UserError
from potstill.engine.common.packages import Extra
from potstill.engine.nets.features import planning, rgb


class LPIPS(nn.Module):
    """Images [N, C, H, W] in [-1, 1], twice -> distances [N]; VGG16, both resized to 224; differentiable in the images."""

    def __init__(self) -> None:
        super().__init__()
        if planning():
            return
        try:
            import lpips
        except ImportError as error:
            raise UserError(f"LPIPS wants the package lpips ({error}): pip install 'potstill[lpips]', or set method.lpips=0") from error
        try:
            self.net = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
        except OSError as error:
            raise UserError(f"LPIPS cannot fetch the weights of VGG16: {error}") from error

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = (F.interpolate(rgb(x), (224, 224), mode="bilinear", align_corners=False) for x in (a, b))
        return self.net(a, b).flatten()


def lpips_extra(purpose: str, otherwise: str) -> Extra:
    """What a setting asks for that wants LPIPS. purpose: which setting; otherwise: what a user does without."""
    return Extra("lpips", purpose, otherwise, LPIPS)
