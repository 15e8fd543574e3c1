"""What a Fréchet distance compares: the raw pixels, or what a network sees.

    pixels                 the pixels themselves, of at most 16x16
    FILE.pt                a TorchScript module of yours, or NVIDIA's Inception, known by its sha256
    inception[:FILE|URL]   the Inception network that FID is defined by (engine.measure.networks)
    dinov2:FILE|URL        DINOv2 ViT-L/14, clip:FILE|URL: CLIP ViT-B/32 (also there); want the extra `timm`

A distance is named after its features ("FD-pixels", "FD-resnet20"); it is called FID only with those very weights.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.engine.common.download import digest
from potstill.engine.common.errors import UserError, what_it_is


class Features(nn.Module):
    """Calls: images [N, C, H, W] uint8 -> [N, num_features] float64.

    `title` names a distance in these features; `sha256` is that of the file they come from, None where there is none;
    `edm2` is what EDM2's references call them, None where they have no name there.
    """

    title: str
    wants_rgb = True  # grey images are repeated to RGB, others refused
    sha256: str | None = None
    edm2: str | None = None
    num_features: int = 0  # 0 until `measure` has seen an image
    width: int | None = None  # what it must be then, for a known network
    device: torch.device = torch.device("cpu")  # of the last images measured

    def measure(self, images: Tensor) -> None:
        """Learn num_features from the first of some images; UserError where the features do not fit them."""
        if self.wants_rgb and images.shape[1] not in (1, 3):
            raise UserError(f"{self.title} wants grey or RGB images, got {images.shape[1]} channels")
        found = self(images[:1])
        if found.ndim != 2 or len(found) != 1:
            raise UserError(f"{self.title} wants to be a map [N, C, H, W] -> [N, D], got {list(found.shape)} for one image")
        self.num_features, self.device = found.shape[1], images.device
        if self.width and self.num_features != self.width:
            raise UserError(f"FID's Inception has {self.width} features, {self.title} has {self.num_features}")

    @torch.no_grad()
    def try_on(self, shape: tuple[int, ...], device: torch.device | str) -> None:
        """Move to the device and `measure` a black image of this shape [C, H, W]."""
        self.to(device).measure(torch.zeros(1, *shape, dtype=torch.uint8, device=device))


class Pixels(Features):
    """The pixels themselves, scaled from 0 … 255 to [-1, 1]: D = C·H·W. Larger images are averaged down to 16x16, since the
    distance wants the eigenvalues of a D x D matrix: a second for 768 numbers, a minute for 3,072, an hour for 12,288."""

    title = "FD-pixels"
    wants_rgb = False
    most = 16

    def forward(self, images: Tensor) -> Tensor:
        x = images.double()
        if max(x.shape[2:]) > self.most:
            x = F.adaptive_avg_pool2d(x, self.most)
        return x.flatten(1) / 127.5 - 1


class Scripted(Features):
    """A TorchScript module that maps RGB images [N, 3, H, W] uint8, 0 … 255, to [N, D]; grey images are repeated to RGB.

    One whose forward has a flag `return_features`, as NVIDIA's metric networks have, is called with it: without it they give
    the probabilities of a softmax, which are refused. Logits cannot be told from features: a classifier should be cut first.

    Such a file holds a program of TorchScript operations: loading and calling it unpickles nothing and runs no Python,
    but those operations can fill memory or open files, so it should come from someone you trust.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.title = f"FD-{path.stem}"
        self.sha256 = digest(path)
        self.script = torchscript(path)
        flagged = any(one.name == "return_features" and "bool" in str(one.type) for one in self.script.forward.schema.arguments)
        self.flags = {"return_features": True} if flagged else {}

    def forward(self, images: Tensor) -> Tensor:
        found = self.script(rgb(images), **self.flags)
        if not isinstance(found, Tensor):
            raise UserError(
                f"{self.title} gives a {type(found).__name__}, wanted one tensor [N, D]: let its forward return the features alone"
            )
        return found.double()

    def measure(self, images: Tensor) -> None:
        try:
            super().measure(images)
            self._check(images)
        except (RuntimeError, torch.jit.Error) as error:
            raise UserError(f"{self.title} does not take images {list(images.shape[1:])}: {_first_line(error)}") from error

    def _check(self, like: Tensor) -> None:
        """UserError if what comes out for two pictures of noise is plainly no features."""
        levels = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (2, *like.shape[1:]), generator=levels, dtype=torch.uint8).to(like.device)
        found = self(noise)
        if not found.isfinite().all():
            raise UserError(f"{self.title} gives numbers that are not finite: wanted a net that takes uint8 images, 0 … 255")
        if len(found) != 2 or torch.equal(found[0], found[1]):
            raise UserError(f"{self.title} gives {list(found.shape)} that do not tell two images apart, wanted [N, D], one row an image")
        if found.shape[1] > 1 and (are_probabilities(found) or are_probabilities(found.exp())):
            raise UserError(
                f"{self.title} gives probabilities of {found.shape[1]} classes, which sum to 1, wanted features: save the net "
                "without its softmax and classifier, or with a flag return_features in its forward"
            )


def are_probabilities(rows: Tensor) -> bool:
    """Do all rows [N, D] hold numbers in [0, 1] that sum to 1, up to the rounding of float16?"""
    return bool((rows >= 0).all()) and bool((rows.sum(1) - 1).abs().max() < 1e-2)


def rgb(images: Tensor) -> Tensor:
    """[N, 1 or 3, H, W] as [N, 3, H, W]."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def torchscript(path: Path) -> torch.jit.ScriptModule:
    """The module in a file written by torch.jit.save, in eval mode on the CPU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.export has no loader for such files
            script = torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        what = what_it_is(path)
        why, instead = (f" ({_first_line(error)})", "") if what == "it is a TorchScript file" else ("", f"; {what}")
        raise UserError(
            f"{path} is no TorchScript file{why}: wanted one written by torch.jit.save, or, of the weights of a known network, "
            f"{', '.join(f'{kind}:FILE' for kind in KINDS)}{instead}"
        ) from None
    if not hasattr(script, "forward"):
        raise UserError(f"{path} is TorchScript without a forward: wanted a net that maps images to features")
    return script


KINDS = ("inception", "dinov2", "clip")  # the networks whose distances have names of their own


def _first_line(error: Exception) -> str:
    """The last of a TorchScript error's lines says what happened; the first, for all others."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error:" in line), lines[0] if lines else type(error).__name__)
