"""Discriminators: small heads that judge images by features of a frozen net, or of one that is being trained."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.engine.common.errors import UserError
from potstill.engine.nets import ops
from potstill.engine.nets.conditions import Condition
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.features import Tap
from potstill.engine.nets.layers import in_dtype
from potstill.kernels import Estimate
from potstill.kernels.estimate import accum


class BottleneckHead(nn.Module):
    """One logit per image from the encoder's last feature map: [N, C, h, w] -> [N, 1], in float32.

    DMD2's head (2405.14867, released code): halve to 4x4 by strided convolutions, one more down to 1x1, a linear map;
    GroupNorm and SiLU between. Of a map that is not square the longer side is halved to 4.
    """

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        if any(side & (side - 1) for side in (height, width)) or min(height, width) < max(2, max(height, width) // 4):
            raise UserError(
                f"a GAN head wants a feature map whose sides are powers of two from 2, and at most 4 times one another, got {height}x{width}: "
                "other sizes of samples (teacher.size, or the data's), or method.gan=false"
            )
        layers: list[nn.Module] = []
        while max(height, width) > 4:
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), *_norm_silu(channels)]
            height, width = height // 2, width // 2
        layers += [nn.Conv2d(channels, channels, (height, width)), *_norm_silu(channels), nn.Conv2d(channels, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).flatten(1)


def _norm_silu(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(min(32, channels // 4), channels), nn.SiLU()


class Critic(nn.Module):
    """A denoiser and, on its encoder, a GAN head: what DMD2 calls the fake net. One module, so one optimiser.

    The head is made where the denoiser lies: a frozen view of weights that move later would not follow them.
    """

    def __init__(self, denoiser: Denoiser, with_head: bool):
        super().__init__()
        self.denoiser = denoiser
        device = next(denoiser.parameters()).device
        self.head = BottleneckHead(*denoiser.taps()[-1]).to(device) if with_head else None

    def estimate(self, x: Tensor, sigma: Tensor, condition: Condition | None, *, guidance: float = 1.0) -> Estimate:
        """The denoiser's estimate of the clean image."""
        return self.denoiser.estimate(x, sigma, condition, guidance=guidance)

    def logits(self, x: Tensor, sigma: Tensor, condition: Condition | None) -> Tensor:
        """Real or generated? [N, 1] from noisy images."""
        assert self.head is not None
        return self.head(self.denoiser.features(x, sigma, condition))


class ProjectedDiscriminator(nn.Module):
    """Projected GAN (2111.01007) as in StyleGAN-XL (2202.00273): patch logits from the maps of several feature nets.

    For every feature net a frozen random projector and one trained head per map. With label_dim > 0 a head's logits are
    those for the image's class. Batch statistics are the batch's own, always: real and generated images go in apart.
    """

    def __init__(self, taps: Sequence[Sequence[Tap]], *, width: int = 64, label_dim: int = 0):
        super().__init__()
        self.parts = [pyramids(one) for one in taps]
        flat = [one for parts in self.parts for one in parts]
        self.projectors = nn.ModuleList([Projector(one, width) for one in flat])
        self.heads = nn.ModuleList([nn.ModuleList(_heads(one, width, label_dim)) for one in flat])

    def forward(self, maps: Sequence[Sequence[Tensor]], labels: Tensor | None = None) -> list[Tensor]:
        """Logits [N, L] of every pyramid of every feature net from its maps; labels [N, label_dim] one-hot."""
        logits, flat = [], []
        for parts, one in zip(self.parts, maps, strict=True):
            rest = iter(one)
            flat += [[next(rest) for _ in part] for part in parts]
        for projector, heads, one in zip(self.projectors, self.heads, flat, strict=True):
            assert isinstance(heads, nn.ModuleList)
            projected = projector(one)
            logits.append(torch.cat([h(x.to(accum(x)), labels) for h, x in zip(heads, projected, strict=True)], 1))
        return logits

    def renew_norms(self) -> None:
        """To be called when the heads' weights have changed."""
        for module in self.heads.modules():
            if isinstance(module, SpectralConv2d):
                module.renew()


class Projector(nn.Module):
    """Mixes a net's maps over channels (CCM) and, from the coarsest up, over scales (CSM), by frozen random 1x1 convolutions.

    Maps [N, c_k, h_k, h_k] -> [N, C_k, 2 h_k, 2 h_k] with C = width·(1, 1, 2, 4), in the dtype of the maps.
    """

    def __init__(self, taps: Sequence[Tap], width: int):
        super().__init__()
        if not taps or any(a.side != 2 * b.side for a, b in zip(taps, taps[1:], strict=False)):
            raise UserError(f"a projector wants maps of halving sides, got {', '.join(str(t.side) for t in taps) or 'none'}")
        self.ccm = nn.ModuleList([nn.Conv2d(tap.channels, width << k, 1) for k, tap in enumerate(taps)])
        self.csm = nn.ModuleList([nn.Conv2d(width << k, projected(k, width), 1) for k in range(len(taps))])
        self.requires_grad_(False)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        out, x = [], None
        for ccm, csm, one in reversed(list(zip(self.ccm, self.csm, maps, strict=True))):
            mixed = _conv(ccm, one)
            x = mixed if x is None else x + mixed
            x = _conv(csm, F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
            out.append(x)
        return out[::-1]


def pyramids(taps: Sequence[Tap]) -> list[list[Tap]]:
    """A net's maps; those of a transformer, which are all of one size, each by itself."""
    if len(taps) > 1 and len({tap.side for tap in taps}) == 1:
        return [[tap] for tap in taps]
    return [list(taps)]


def projected(level: int, width: int) -> int:
    """Channels of a projector's map: the coarser maps hand over half of theirs."""
    return width << max(level - 1, 0)


def _conv(conv: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    weight, bias = (in_dtype(t, x.dtype) for t in (conv.weight, conv.bias))
    return ops.convolution(x, weight, bias, frozen=not (conv.weight.requires_grad or conv.bias.requires_grad))


def _heads(taps: Sequence[Tap], width: int, label_dim: int) -> list["PatchHead"]:
    """Level k of L halves its map L - k times, less where the map is small: 4 pixels must be left."""
    if taps[-1].side < 2:
        raise UserError(f"a projected discriminator wants maps of side 2 or more, got {taps[-1].side}: leave the coarsest out")
    fits = [int(math.log2(2 * tap.side / 4)) for tap in taps]
    downs = [min(len(taps) - k, fit) for k, fit in enumerate(fits)]
    return [PatchHead(projected(k, width), width << k, down, label_dim) for k, down in enumerate(downs)]


class PatchHead(nn.Module):
    """One logit per patch: [N, C, h, w] -> [N, L]; `downs` strided convolutions that double the channels, then a 4x4 one.

    A map too small to be halved gets a convolution that keeps its size: without any the head would be linear.
    """

    def __init__(self, channels: int, wide: int, downs: int, label_dim: int, class_channels: int = 64):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(max(downs, 1)):
            norm = nn.BatchNorm2d(wide, track_running_stats=False)  # so that eval mode changes nothing
            how = {"kernel_size": 4, "stride": 2} if downs else {"kernel_size": 3}
            layers += [SpectralConv2d(channels, wide, padding=1, **how), norm, nn.LeakyReLU(0.2)]
            channels, wide = wide, 2 * wide
        self.layers = nn.Sequential(*layers, SpectralConv2d(channels, class_channels if label_dim else 1, 4, bias=False))
        self.classes = ClassVector(label_dim, class_channels) if label_dim else None

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        patches = self.layers(x).flatten(2)
        if self.classes is None:
            return patches.flatten(1)
        assert labels is not None
        vector = self.classes(labels)
        return (patches * vector[:, :, None]).sum(1) / math.sqrt(vector.shape[1])


class ClassVector(nn.Module):
    """What a head holds its patches against: one-hot labels -> a learnt table of 320 numbers a class -> [N, channels].

    StyleGAN-XL fills the table with mean ImageNet features of EfficientNet-lite0; ours starts from standard normals.
    """

    def __init__(self, label_dim: int, channels: int, width: int = 320):
        super().__init__()
        self.table = nn.Parameter(torch.randn(label_dim, width))
        self.weight, self.bias = nn.Parameter(torch.randn(channels, width)), nn.Parameter(torch.zeros(channels))

    def forward(self, labels: Tensor) -> Tensor:
        gain = 1 / math.sqrt(self.weight.shape[1])  # equalised learning rate
        return math.sqrt(2) * F.leaky_relu(F.linear(labels.to(self.table.dtype) @ self.table, gain * self.weight, self.bias), 0.2)


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight, as a matrix, has largest singular value 1 (1802.05957).

    `renew` takes one power iteration, to be called once an update; torch's takes one every forward, so that micro-batches
    and ranks would change the numbers. Frozen views of it share u and v.
    """

    u: Tensor
    v: Tensor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        matrix = self.weight.flatten(1)
        self.register_buffer("u", F.normalize(torch.randn(len(matrix)), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(matrix.shape[1]), dim=0))
        for _ in range(0 if self.weight.is_meta else 15):  # on paper it would take seconds, for nothing
            self.renew()

    @torch.no_grad()
    def renew(self) -> None:
        matrix = self.weight.detach().flatten(1)
        self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        sigma = self.u @ (self.weight.flatten(1) @ self.v)
        return F.conv2d(x, self.weight / sigma, self.bias, self.stride, self.padding)
