"""What DDPM++, NCSN++ and ADM have in common: embed the noise level, encode, decode.

Every U-Net here is called F(x, c_noise, labels, augment_labels) and can stop after its encoder (`features`), which is
where GAN heads listen.
"""

import torch
from torch import Tensor, nn

from potstill.engine.nets.layers import FourierEmbedding, Linear, PositionalEmbedding, UNetBlock
from potstill.engine.nets.ops import laid


def resolutions_of(img_resolution: int, levels: int) -> list[int]:
    """The side of the images at each level of a U-Net. ValueError where a level cannot be half of the one before: the decoder
    doubles, so 7 halved to 4 would come back as 8."""
    if not levels:
        raise ValueError("channel_mult wants at least one level, got none")
    if img_resolution % 2 ** (levels - 1):
        fitting = -(-img_resolution // 2 ** (levels - 1)) * 2 ** (levels - 1)
        fewer = next(n for n in range(levels, 0, -1) if img_resolution % 2 ** (n - 1) == 0)
        raise ValueError(
            f"{img_resolution}x{img_resolution} images cannot be halved {levels - 1} times, as {levels} levels (channel_mult) want: use images of "
            f"{fitting}x{fitting} (potstill convert images --resolution {fitting}), or {fewer} level{'s' * (fewer > 1)}"
        )
    return [img_resolution >> level for level in range(levels)]


def channels_of(layer: nn.Module) -> int:
    """Channels of what a layer of an encoder returns."""
    channels = layer.out_channels
    assert isinstance(channels, int)
    return channels


class UNet(nn.Module):
    """A U-Net over `enc` and `dec`, dictionaries of layers keyed "{H}x{W}_{name}"."""

    enc: nn.ModuleDict
    dec: nn.ModuleDict
    map_noise: PositionalEmbedding | FourierEmbedding
    map_augment: Linear | None
    map_layer0: Linear

    def __init__(self, label_dim: int, label_dropout: float):
        super().__init__()
        self.label_dim, self.label_dropout = label_dim, label_dropout
        self.map_steps: nn.Module | None = None  # engine.nets.steps

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """The conditioning vector [N, emb] of noise level, class and augmentation, in float32."""
        raise NotImplementedError(type(self).__name__)

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """The encoder's outputs that the decoder reads, first to last."""
        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else laid(block(x))
            skips.append(x)
        return skips

    def decode(self, skips: list[Tensor], emb: Tensor) -> Tensor:
        """The image-shaped output from what `encode` returned."""
        raise NotImplementedError(type(self).__name__)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        steps: int | None = None,
    ) -> Tensor:
        emb = self.conditioned(self.embed(c_noise, labels, augment_labels), steps)
        return self.decode(self.encode(laid(x), emb), emb)

    def conditioned(self, emb: Tensor, steps: int | None) -> Tensor:
        """`emb` and, in a net with a step condition, the number of levels beside it: what blocks are called with."""
        if (self.map_steps is None) != (steps is None):
            knows = "does not know" if self.map_steps is None else "wants to know"
            raise ValueError(f"this net {knows} in how many steps it is sampled, got steps={steps}")
        return emb if self.map_steps is None else torch.cat([emb, self.map_steps(steps).expand_as(emb)], 1)

    def features(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """The output of the last encoder block [N, C, h, w]; the decoder does not run."""
        return self.levels(x, c_noise, labels)[-1]

    def levels(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """The last encoder output of every resolution, finest first; the decoder does not run."""
        skips = self.encode(laid(x), self.conditioned(self.embed(c_noise, labels, None), None))
        last = {skip.shape[-1]: skip for skip in skips}
        return list(last.values())

    def kept_labels(self, labels: Tensor | None) -> Tensor:
        """Labels with whole rows zeroed at random during training (label dropout), for guidance."""
        assert labels is not None  # a net with classes is called with labels: a denoiser's are zeros for none
        if not (self.training and self.label_dropout):
            return labels
        return labels * (torch.rand(len(labels), 1, device=labels.device) >= self.label_dropout).to(labels.dtype)
