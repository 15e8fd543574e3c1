"""What a Fréchet distance compares: the raw pixels, or what a network in a TorchScript file sees.

A distance is named after its features ("FD-pixels", "FD-resnet20"); it is called FID only with the Inception network that
FID is defined by, which none of these is.
"""

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import UserError


class Features(nn.Module):
    """Calls: images [N, C, H, W] uint8 -> [N, num_features] float64.

    `title` names a distance in these features; `sha256` is that of the file they come from, None where there is none.
    """

    title: str
    sha256: str | None = None
    num_features: int = 0  # 0 until `measure` has seen an image

    def measure(self, images: Tensor) -> None:
        """Learn num_features from the first of some images; UserError where the features do not fit them."""
        found = self(images[:1])
        if found.ndim != 2 or len(found) != 1:
            raise UserError(
                f"{self.title} wants to be a map [N, C, H, W] -> [N, D], got {list(found.shape)} for one image"
            )
        self.num_features = found.shape[1]


class Pixels(Features):
    """The pixels themselves, scaled from 0 … 255 to [-1, 1]: D = C·H·W."""

    title = "FD-pixels"

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double() / 127.5 - 1


class Scripted(Features):
    """A TorchScript module that maps RGB images [N, 3, H, W] uint8 to [N, D]; grey images are repeated to RGB.

    Such a file holds a program of TorchScript operations: loading and calling it unpickles nothing and runs no Python,
    but those operations can fill memory or open files, so it should come from someone you trust.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.title = f"FD-{path.stem}"
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch.export has no loader for such files
                self.script = torch.jit.load(path, map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{path} is no TorchScript file ({_first_line(error)}): wanted one written by torch.jit.save"
            ) from None

    def forward(self, images: Tensor) -> Tensor:
        return self.script(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images).double()

    def measure(self, images: Tensor) -> None:
        if images.shape[1] not in (1, 3):
            raise UserError(f"{self.title} wants grey or RGB images, got {images.shape[1]} channels")
        try:
            super().measure(images)
        except RuntimeError as error:
            raise UserError(
                f"{self.title} does not take images {list(images.shape[1:])}: {_first_line(error)}"
            ) from error


def load_features(name: str) -> Features:
    """`pixels`, or the path of a TorchScript file. UserError for anything else."""
    if name == "pixels":
        return Pixels()
    path = Path(name)
    if not path.is_file():
        raise UserError(f"no features {name!r}: wanted pixels or the path of a TorchScript file")
    return Scripted(path)


def _first_line(error: Exception) -> str:
    """The last of a TorchScript error's lines says what happened; the first, for all others."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error:" in line), lines[0] if lines else type(error).__name__)
