"""Frozen feature nets: what a projected discriminator looks at instead of pixels.

    teacher[:SIGMA]      the encoder of the diffusion teacher at noise level SIGMA, at all its resolutions; nothing to download
    timm:NAME            a network pretrained on ImageNet, by its timm name; wants the extra `timm`
    torchscript:FILE     a module of yours: RGB images [N, 3, H, W] in [-1, 1] -> a tuple of maps, finest first

Every net maps images [N, C, H, W] in [-1, 1] to maps [N, c_k, h_k, h_k], each half as wide as the one before. Gradients flow
through to the images, never into a feature net.
"""

# timm and lpips are optional.
# pyright: reportMissingImports=false

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.engine.common.errors import UserError, what_it_is
from potstill.engine.common.packages import Extra
from potstill.engine.nets.denoiser import Denoiser

TEACHER_SIGMA = 0.2  # a choice: noise a tenth of the images' power, so the encoder still sees everything but the finest detail
# What GDD's nets look like inside, so that a run can be planned where they are not installed: (channels, side).
KNOWN = {
    "vgg16_bn.tv_in1k": ((128, 112), (256, 56), (512, 28), (512, 14)),
    "tf_efficientnet_lite0.in1k": ((24, 56), (40, 28), (112, 14), (320, 7)),
    "deit_base_distilled_patch16_224.fb_in1k": ((96, 56), (192, 28), (384, 14), (768, 7)),
}


class Tap(NamedTuple):
    """One feature map: channels and side, of one that is not square the shorter."""

    channels: int
    side: int


class FeatureNet(nn.Module):
    """images, labels (and standard normals of the images' shape, for nets that want noisy images) -> maps as in `taps`."""

    taps: Sequence[Tap]

    @property
    def drawn(self) -> nn.Module:
        """What of it was drawn at random and so belongs into a checkpoint."""
        return nn.Module()

    def forward(self, images: Tensor, labels: Tensor | None = None, noise: Tensor | None = None) -> list[Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has a shape and cannot be called")


class OnlyShape(FeatureNet):
    """The shape of a feature net, for counting parameters without it."""

    def __init__(self, taps: Sequence[tuple[int, int]]):
        super().__init__()
        self.taps = [Tap(*tap) for tap in taps]


class TeacherEncoder(FeatureNet):
    """The last map of every resolution in a denoiser's encoder: at 64 pixels 64, 32, 16 and 8, of 8x8 digits 8 and 4.

    The encoder is told the noise level sigma; the images get that noise only where `noise` is given (diffusion GAN).
    """

    def __init__(self, net: Denoiser, sigma: float):
        super().__init__()
        if not 0 < sigma < math.inf:
            raise UserError(f"teacher features want a noise level above 0, got teacher:{sigma:g}")
        self.net, self.sigma = net, sigma
        self.taps = [Tap(channels, min(sides)) for channels, *sides in net.taps()]

    def forward(self, images: Tensor, labels: Tensor | None = None, noise: Tensor | None = None) -> list[Tensor]:
        x = images if noise is None else images + self.sigma * noise
        return self.net.levels(x, x.new_full((len(x),), self.sigma), labels)


class ImageNet(FeatureNet):
    """A timm network in evaluation mode: images resized to 224, normalised as it was trained, tapped at four depths."""

    side = 224
    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, taps: Sequence[Tap], mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.body, self.taps = body, taps
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    @property
    def drawn(self) -> nn.Module:
        return self.body.readouts if isinstance(self.body, TransformerTaps) else nn.Module()

    def forward(self, images: Tensor, labels: Tensor | None = None, noise: Tensor | None = None) -> list[Tensor]:
        dtype = next(self.body.parameters()).dtype
        x = ((rgb(images) + 1) / 2 - self.mean) / self.std
        x = F.interpolate(x.to(dtype), (self.side, self.side), mode="bilinear", align_corners=False)
        return list(self.body(x.contiguous(memory_format=torch.channels_last) if dtype is torch.bfloat16 else x))


class TransformerTaps(nn.Module):
    """A vision transformer of timm's as a pyramid: four of its blocks, read out by frozen random layers to sides 56, 28, 14 and 7."""

    body: Any  # what timm has there depends on its version

    def __init__(self, body: Any, channels: Sequence[int] = (96, 192, 384, 768)):
        super().__init__()
        self.body, width, depth = body, body.embed_dim, len(body.blocks)
        self.blocks = [depth * (k + 1) // 4 - 1 for k in range(4)]  # 2, 5, 8 and 11 of twelve
        a, b, c, d = channels
        readouts = [
            nn.Sequential(nn.Conv2d(width, a, 1), nn.ConvTranspose2d(a, a, 4, stride=4)),
            nn.Sequential(nn.Conv2d(width, b, 1), nn.ConvTranspose2d(b, b, 2, stride=2)),
            nn.Conv2d(width, c, 1),
            nn.Sequential(nn.Conv2d(width, d, 1), nn.Conv2d(d, d, 3, stride=2, padding=1)),
        ]
        self.readouts = nn.ModuleList(readouts)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.body.forward_intermediates(x, indices=self.blocks, norm=False, intermediates_only=True)
        return [readout(one) for readout, one in zip(self.readouts, maps, strict=True)]


class Scripted(FeatureNet):
    """A TorchScript module that returns a tuple of maps; it resizes and normalises as it likes."""

    def __init__(self, path: Path, resolution: int):
        super().__init__()
        if not path.is_file():
            raise UserError(f"no feature net at {path}: method.features wants torchscript:FILE, timm:NAME or teacher")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch.export has no loader for such files
                self.script = torch.jit.load(path, map_location="cpu").eval()
            with torch.no_grad():
                maps = self.script(torch.zeros(1, 3, resolution, resolution, device="cpu"))
        except (RuntimeError, ValueError, AttributeError, torch.jit.Error) as error:  # AttributeError: it has no forward
            what = what_it_is(path)
            why = _last_line(error) if what == "it is a TorchScript file" else f"wanted one written by torch.jit.save; {what}"
            raise UserError(f"{path} is no TorchScript net for {resolution}x{resolution} images: {why}") from None
        square = isinstance(maps, tuple | list) and all(isinstance(m, Tensor) and m.ndim == 4 and m.shape[2] == m.shape[3] for m in maps)
        if not square or not maps:
            raise UserError(f"{path} wants to return a tuple of square maps [N, C, h, h], finest first")
        self.taps = [Tap(m.shape[1], m.shape[2]) for m in maps]

    def forward(self, images: Tensor, labels: Tensor | None = None, noise: Tensor | None = None) -> list[Tensor]:
        return list(self.script(rgb(images)))


def load_feature_net(name: str, teacher: Denoiser, *, dtype: torch.dtype = torch.float32) -> FeatureNet:
    """The feature net of that name on the teacher's device, frozen, in eval mode, computing in `dtype`.

    `teacher` is a frozen view. Where torch makes meta tensors (a plan of a run) nothing is loaded that can be known
    without. UserError for an unknown name, and with the extra to install for what cannot be imported.
    """
    kind, _, rest = name.partition(":")
    match kind:
        case "teacher":
            teacher.compute_dtype = dtype
            try:
                sigma = float(rest or TEACHER_SIGMA)
            except ValueError:
                raise UserError(f"teacher features want a number, as in teacher:0.2, got {name}") from None
            net: FeatureNet = TeacherEncoder(teacher, sigma)
        case "torchscript" if rest:
            net = Scripted(Path(rest), teacher.img_resolution)
        case "timm" if rest:
            net = load_timm(rest, dtype)
        case _:
            raise UserError(f"method.features wants teacher, teacher:SIGMA, timm:NAME or torchscript:FILE, got {name!r}")
    return net.to(next(teacher.parameters()).device).requires_grad_(False).eval()


def load_timm(name: str, dtype: torch.dtype) -> FeatureNet:
    """timm's network of that name with its weights, which are downloaded at first. UserError where there is none."""
    if planning() and name in KNOWN:
        return OnlyShape(KNOWN[name])
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"feature net timm:{name} wants the package timm ({error}): pip install 'potstill[timm]', or use method.features=[teacher]"
        ) from error
    transformer = name.startswith(("deit", "vit"))
    kwargs: dict[str, Any] = {} if transformer else {"features_only": True, "out_indices": (1, 2, 3, 4)}
    try:
        body: Any = timm.create_model(name, pretrained=not planning(), **kwargs)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"timm has no weights for feature net timm:{name}: {_last_line(error)}") from error
    cfg = body.pretrained_cfg
    body = TransformerTaps(body) if transformer else body
    body = body.to(dtype, memory_format=torch.channels_last).eval()
    with torch.no_grad():
        shapes = [m.shape for m in body(torch.zeros(1, 3, ImageNet.side, ImageNet.side, dtype=dtype))]
    return ImageNet(body, [Tap(s[1], s[2]) for s in shapes], cfg["mean"], cfg["std"])


def timm_extras(names: Sequence[str]) -> list[Extra]:
    """What these feature nets want of timm: nothing, or the package with their weights."""
    wanted = [name for name in names if name.startswith("timm:")]

    def fetch() -> None:
        for name in wanted:
            load_timm(name.removeprefix("timm:"), torch.float32)

    return [Extra("timm", ", ".join(wanted), "use method.features=[teacher]", fetch)] if wanted else []


class LPIPS(nn.Module):
    """LPIPS, the perceptual distance (1801.03924): images [N, C, H, W] in [-1, 1], twice -> distances [N].

    VGG16, both resized to 224; differentiable in the images.
    """

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


def planning() -> bool:
    """Is torch making meta tensors, so that sizes are wanted but nothing is going to be computed?"""
    return torch.empty(0).is_meta


def rgb(images: Tensor) -> Tensor:
    """Grey images repeated to three channels; others as they are."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _last_line(error: Exception) -> str:
    """Where TorchScript says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
