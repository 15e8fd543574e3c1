"""EDM2's networks (2312.02696): magnitude-preserving U-Nets, and the denoiser around one, which also learns how wrong it is.

Keyword arguments and state_dict keys are EDM2's ("unet.…", "logvar_linear.weight"), so its files load strictly.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from potstill.engine.nets import ops
from potstill.engine.nets.conditions import Condition
from potstill.engine.nets.edm2_layers import Gained, MPBlock, MPConv, MPFourier, MPStyle, force_norms, mp
from potstill.engine.nets.edm_denoiser import EDMDenoiser
from potstill.engine.nets.unet import last_of_each, resolutions_of


class EDM2UNet(Gained):
    """F(x, c_noise, labels). `enc` and `dec`: dictionaries of layers keyed "{H}x{W}_{name}".

    attn_resolutions: sides at which every block attends; the decoder's first block always does. channels_per_head: more than a
    layer's channels means no attention there. clip_act: no activation leaves a block larger than this.
    """

    blocks: dict[str, list[Any]]

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        resample_filter: Sequence[int] = (1, 1),
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
    ):
        if channels_per_head < 1:
            raise ValueError(
                f"channels_per_head wants a number from 1 (more than a layer has: no attention there), got {channels_per_head}"
            )
        if len(resample_filter) % 2:
            raise ValueError(f"resample_filter wants an even number of taps, as doubling and halving do, got {list(resample_filter)}")
        super().__init__("out_gain")
        self.label_dim, self.label_balance, self.concat_balance = label_dim, label_balance, concat_balance
        resolutions, widths = resolutions_of(img_resolution, len(channel_mult)), [model_channels * mult for mult in channel_mult]
        noise_channels = model_channels * channel_mult_noise if channel_mult_noise else widths[0]
        emb_channels = model_channels * channel_mult_emb if channel_mult_emb else max(widths)
        self.map_steps = None  # it has no step condition (engine.nets.steps)
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels, ())
        self.emb_label = MPConv(label_dim, emb_channels, ()) if label_dim else None

        style = MPStyle(
            emb_channels, concat_balance, tuple(resample_filter), channels_per_head, dropout, res_balance, attn_balance, clip_act
        )
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        cout = widths[0]
        for level, (res, width) in enumerate(zip(resolutions, widths, strict=True)):
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = MPConv(img_channels + 1, cout, (3, 3))
            else:
                self.enc[f"{res}x{res}_down"] = MPBlock(cout, cout, style, down=True)
            for index in range(num_blocks):
                cin, cout = cout, width
                self.enc[f"{res}x{res}_block{index}"] = MPBlock(cin, cout, style, attention=res in attn_resolutions)
        skips: list[Any] = [layer.out_channels for layer in self.enc.values()]
        for level, (res, width) in reversed(list(enumerate(zip(resolutions, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = MPBlock(cout, cout, style, decoder=True, attention=True)
                self.dec[f"{res}x{res}_in1"] = MPBlock(cout, cout, style, decoder=True)
            else:
                self.dec[f"{res}x{res}_up"] = MPBlock(cout, cout, style, decoder=True, up=True)
            for index in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), width
                self.dec[f"{res}x{res}_block{index}"] = MPBlock(cin, cout, style, decoder=True, attention=res in attn_resolutions)
        self.out_conv = MPConv(cout, img_channels, (3, 3), gained=True)

    def embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """The conditioning vector [N, emb] of noise level and class, in float32."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None:
            assert labels is not None  # a denoiser's are zeros for none
            emb = mp().mp_sum(emb, self.emb_label(labels * math.sqrt(self.label_dim)), self.label_balance)
        return mp().mp_silu(emb)

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """The encoder's outputs that the decoder reads, first to last."""
        x = ops.in_memory_format(torch.cat([x, torch.ones_like(x[:, :1])], 1))  # a channel of ones, for want of biases
        skips = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("conv") else layer(x, emb)
            skips.append(x)
        return skips

    def decode(self, skips: list[Tensor], emb: Tensor) -> Tensor:
        """The image-shaped output from what `encode` returned."""
        skips = list(skips)
        x = skips[-1]
        for name, block in self.dec.items():
            if "block" not in name:
                x = block(x, emb)
            elif block.joins:
                x = block(x, emb, skips.pop())
            else:
                x = block(mp().mp_cat_silu(x, ops.in_memory_format(skips.pop()), self.concat_balance)[0], emb)
        return self.out_conv(x, self.gain)

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None, steps: int | None = None,
        deepest: bool = False,
    ) -> Any:  # fmt: skip
        """With `deepest` a pair with what the last encoder block returned. augment_labels and steps: of EDM's nets; here there are none."""
        if augment_labels is not None or steps is not None:
            raise ValueError(f"this net knows neither augmentation nor in how many steps it is sampled, got steps={steps}")
        emb = self.embed(c_noise, labels)
        skips = self.encode(x, emb)
        return (self.decode(skips, emb), skips[-1]) if deepest else self.decode(skips, emb)

    def levels(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """The last encoder output of every resolution, finest first; the decoder does not run."""
        return last_of_each(self.encode(x, self.embed(c_noise, labels)))


class EDM2Denoiser(EDMDenoiser):
    """EDM's preconditioning around an `EDM2UNet`, and a head that has learnt the log-variance of D's error at each noise level.

    In training mode a forward first puts every weight's output channels back to unit length, as EDM2's own does ("forced weight
    normalisation"), unless whoever trains it does that (`forces_norms = False`: the engine, before every iteration).
    """

    def __init__(self, unet: EDM2UNet, scheme: dict[str, float], kwargs: dict[str, Any], logvar_channels: int):
        super().__init__(unet, "EDM2Precond", scheme, kwargs)  # pyright: ignore[reportArgumentType]
        self.unet = unet  # EDM2's name
        del self._modules["model"]
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, ())
        self.forces_norms = True

    @property
    def model(self) -> Any:
        return self.unet

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition | None = None, *, return_logvar: bool = False, **how: Any) -> Any:
        """D [N, *shape] float32, and with return_logvar the log-variance beside it, as in EDM2's code [N, 1, 1, 1], or 1 for one sigma."""
        denoised = super().forward(x, sigma, condition, **how)
        if not return_logvar:
            return denoised
        return denoised, self.logvar(sigma.float().to(x.device).reshape(-1)).reshape(-1, 1, 1, 1)

    def logvar(self, sigma: Tensor) -> Tensor:
        if self.training and self.forces_norms:
            force_norms([self.logvar_linear.weight])
        return self.logvar_linear(self.logvar_fourier(self.coefficients(sigma.reshape(-1)).c_noise))[:, 0]

    def weights_of_unit_length(self) -> list[nn.Parameter]:
        return [layer.weight for layer in self.modules() if isinstance(layer, MPConv)]

    def beside(self) -> list[nn.Module]:
        return [self.logvar_linear]

    def _raw(self, x: Tensor, sigma: Tensor, condition: Condition | None, **how: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.training and self.forces_norms:
            force_norms([layer.weight for layer in self.unet.modules() if isinstance(layer, MPConv)])
        return super()._raw(x, sigma, condition, **how)
