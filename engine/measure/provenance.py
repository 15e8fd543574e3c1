"""What a number was measured with: a fingerprint of the real images, and the versions of the tools."""

import hashlib
import platform
from collections.abc import Sequence

import numpy as np
import torch

from potstill.engine.common.versions import versions_of
from potstill.engine.measure.shares import gathered
from potstill.engine.training.ranks import Ranks

PACKAGES = ("potstill", "torch", "torchmetrics", "numpy", "timm", "torch-fidelity")


class Fingerprint:
    """The sha256 of all images' sha256s in their order, each of the bytes [C, H, W] uint8: the same for zip and folder."""

    def __init__(self):
        self.digests: list[bytes] = []

    def add(self, images: Sequence[np.ndarray]) -> None:
        self.digests += [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images]

    def of_all(self, ranks: Ranks, total: int, batch: int, device: torch.device) -> str:
        """In hexadecimal, of all processes' images."""
        mine = torch.tensor([list(d) for d in self.digests], dtype=torch.uint8, device=device).reshape(-1, 32)
        return hashlib.sha256(gathered(ranks, mine, total, batch).cpu().numpy().tobytes()).hexdigest()


def tools() -> dict[str, str]:
    """Versions of what took part, as far as it is installed."""
    return {"python": platform.python_version()} | versions_of(*PACKAGES)
