"""The step condition of SFD-v (2409.19681): a U-Net is told the number of noise levels it is being sampled with.

The number is embedded as the released code does it, in waves of the kind that the net has for its noise level (NCSN++: at
random frequencies; SongUNet: sine and cosine swapped), and every residual block gets a second linear map of that embedding:
DDPM++ and NCSN++ add it to the noise level's shift, ADM scales and shifts a second time. Both are one modulation in the end,

    shift:            b + b'                                                              SongUNet
    scale and shift:  (h (1 + s) + b) (1 + s') + b' = h (1 + s)(1 + s') + b (1 + s') + b'      DhariwalUNet

so a block does not change: its `affine` does. A net without the condition keeps its state_dict keys, and one with it has
them all and a few more.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.engine.nets.edm_denoiser import EDMDenoiser
from potstill.engine.nets.layers import FourierEmbedding, Init, Linear, PositionalEmbedding, UNetBlock

FREQUENCIES = "model.map_steps.waves.freqs"  # in a weight file: one without is of a potstill that embedded otherwise


class StepEmbedding(nn.Module):
    """The number of levels as a vector [1, emb], float32: sinusoids of the raw integer, then two layers."""

    def __init__(self, waves: nn.Module, swap: bool, channels: int, emb_channels: int, init: Init):
        super().__init__()
        self.waves, self.swap = waves, swap
        self.layer0 = Linear(channels, emb_channels, init=init)
        self.layer1 = Linear(emb_channels, emb_channels, init=init)

    def forward(self, steps: int) -> Tensor:
        number = torch.full((1,), float(steps), device=self.layer0.weight.device)
        cos, sin = self.waves(number).chunk(2, dim=1)
        waves = torch.cat([sin, cos] if self.swap else [cos, sin], 1)
        return F.silu(self.layer1(F.silu(self.layer0(waves))))


class StepAffine(nn.Module):
    """A block's `affine`, with its weights, which also reads the embedded number of levels: [N, 2·emb] -> [N, out]."""

    def __init__(self, affine: Linear, adaptive_scale: bool, init: Init):
        super().__init__()
        self.weight, self.bias, self.adaptive_scale = affine.weight, affine.bias, adaptive_scale
        self.steps = Linear(affine.in_features, affine.out_features, init=init)

    def forward(self, emb: Tensor) -> Tensor:
        emb, steps_emb = emb.chunk(2, dim=1)
        noise, steps = F.linear(emb, self.weight, self.bias), self.steps(steps_emb)
        if not self.adaptive_scale:
            return noise + steps
        (scale, shift), (scale_2, shift_2) = noise.chunk(2, dim=1), steps.chunk(2, dim=1)
        return torch.cat([scale + scale_2 + scale * scale_2, shift * (1 + scale_2) + shift_2], 1)


def add_step_condition(net: EDMDenoiser, *, zero: bool = False) -> EDMDenoiser:
    """The same net, which from now on wants `steps=`; `zero` makes its new maps 0, so that it starts as what it was.

    Released code: Xavier's law and zero biases for SongUNet, ADM's own law for DhariwalUNet, neither of them 0.
    """
    blocks = [block for block in net.model.modules() if isinstance(block, UNetBlock)]
    adm = blocks[0].adaptive_scale
    init = Init("kaiming_uniform", weight=(1 / 3) ** 0.5, bias=(1 / 3) ** 0.5) if adm else Init("xavier_uniform")
    last = Init(init.law, weight=0.0) if zero else init
    channels, emb_channels = net.model.map_layer0.in_features, net.model.map_layer0.out_features
    noise = net.model.map_noise
    fourier = isinstance(noise, FourierEmbedding)
    waves = FourierEmbedding(channels) if fourier else PositionalEmbedding(channels, endpoint=noise.endpoint, stored=True)
    net.model.map_steps = StepEmbedding(waves, not adm, channels, emb_channels, init)
    for block in blocks:
        assert isinstance(block.affine, Linear)  # else the net has a step condition already
        block.affine = StepAffine(block.affine, block.adaptive_scale, last)
    net.kwargs = net.kwargs | {"step_condition": True}
    return net
