"""EDM's denoiser for inference, as diffusers loads it: needs torch and diffusers, and nothing of potstill.

D(x; sigma) = c_skip x + c_out F(c_in x, c_noise, labels) with F a DDPM++, NCSN++ (SongUNet) or ADM (DhariwalUNet) of
arXiv 2206.00364. The names of the weights are EDM's. Apache-2.0; the weights beside this file have their own licence.

diffusers runs this file anew for every pipeline, in the same module: nothing here may ask isinstance of a class of its own.
"""

# diffusers is optional, and untyped.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false

import math
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class Exact(nn.Module):
    """A module whose buffer `exact` stays float32 when the rest is rounded to 16 bits: frequencies and levels are no weights."""

    exact = ""

    def _apply(self, fn, recurse=True):
        before = getattr(self, self.exact, None)
        super()._apply(fn, recurse)
        if before is not None and not before.is_meta:
            after = getattr(self, self.exact)
            if after.dtype != before.dtype:
                setattr(self, self.exact, before.to(after.device))
        return self


class Denoiser(Exact, ModelMixin, ConfigMixin):
    """D(x; sigma, class_labels) for images [N, C, H, W] in [-1, 1]; `net` holds EDM's keyword arguments."""

    exact = "u"
    # With accelerate diffusers rounds on the way in, but for these. Without, it refuses the list and builds everything in 16
    # bits, but for what says float32; then it copies, or, where the first tensor's dtype is the file's, takes all as they are.
    _keep_in_fp32_modules = ["map_noise", "waves", "u"] if find_spec("accelerate") else None
    _supports_param_buffer_assignment = False

    @register_to_config
    def __init__(self, precond: str, net: dict):
        super().__init__()
        net = dict(net)
        self.precond, self.scheme = precond, {k: net.pop(k, v) for k, v in (SCHEME | OWN.get(precond, {})).items()}
        self.img_resolution, self.img_channels = net["img_resolution"], net.pop("img_channels")
        self.label_dim = net.get("label_dim", 0)
        net.pop("use_fp16", None)
        kind = net.pop("model_type", "SongUNet" if precond in ("VPPrecond", "VEPrecond") else "DhariwalUNet")
        out = self.img_channels * (2 if precond == "iDDPMPrecond" else 1)
        self.model = UNet(self.img_channels, out, **UNETS[kind] | net)
        if precond == "iDDPMPrecond":
            self.register_buffer("u", torch.zeros(int(self.scheme["M"]) + 1, dtype=torch.float32))

    def forward(self, x, sigma, class_labels=None, steps=None):
        """D [N, C, H, W] float32. class_labels [N, label_dim]; steps: the number of levels, for nets that want to know it."""
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1).expand(len(x))
        c_skip, c_out, c_in, c_noise = (c[:, None, None, None] for c in self.coefficients(sigma))
        if self.label_dim and class_labels is None:
            class_labels = torch.zeros(len(x), self.label_dim, device=x.device)
        raw = self.model((c_in * x).to(self.dtype), c_noise.flatten(), class_labels, steps)
        return c_skip * x + c_out * raw[:, : self.img_channels].float()

    def round_sigma(self, sigma):
        """The level nearest to sigma > 0 that an iDDPM net knows, as EDM's samplers ask for it; of other nets sigma itself."""
        if self.precond != "iDDPMPrecond" or not sigma > 0:
            return sigma
        return min((level for level in self.u.tolist() if level > 0), key=lambda level: abs(level - sigma))

    def coefficients(self, sigma):
        """c_skip, c_out, c_in, c_noise at sigma [N] (Table 1 of the paper; GDD and ECT: arXiv 2303.01469, App. C)."""
        s, one = self.scheme, torch.ones_like(sigma)
        total = (sigma**2 + s["sigma_data"] ** 2).sqrt()
        if self.precond == "EDMPrecond":
            return (s["sigma_data"] / total) ** 2, sigma * s["sigma_data"] / total, 1 / total, sigma.log() / 4
        if self.precond in ("GDDPrecond", "ECMPrecond"):
            shifted = sigma - (0.002 if self.precond == "GDDPrecond" else s["sigma_min"])
            c_skip = s["sigma_data"] ** 2 / (shifted**2 + s["sigma_data"] ** 2)
            return c_skip, shifted * s["sigma_data"] / total, 1 / total, sigma.log() / 4
        if self.precond == "VEPrecond":
            return one, sigma, one, (0.5 * sigma).log()
        if self.precond == "VPPrecond":
            root = (s["beta_min"] ** 2 + 2 * s["beta_d"] * (1 + sigma**2).log()).sqrt()
            c_noise = (s["M"] - 1) * (root - s["beta_min"]) / s["beta_d"]
        else:
            c_noise = len(self.u) - 2 - (sigma[:, None] - self.u.float()).abs().argmin(1).float()
        return one, -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise


SCHEME = {
    "sigma_min": 0.0, "sigma_max": math.inf, "sigma_data": 0.5, "beta_d": 19.9, "beta_min": 0.1, "M": 1000,
    "epsilon_t": 1e-5, "C_1": 0.001, "C_2": 0.008,
}  # fmt: skip
UNETS = {
    "SongUNet": {"adm": False, "model_channels": 128, "channel_mult": (1, 2, 2, 2), "num_blocks": 4, "attn_resolutions": (16,)},
    "DhariwalUNet": {"adm": True, "model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3, "attn_resolutions": (32, 16, 8)},
}
OWN = {"ECMPrecond": {"sigma_min": 0.003}}


class Conv(nn.Module):
    """A convolution (kernel 3 or 1, or 0 for none) after doubling or halving the resolution; `fused`: before halving."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    resample_filter: torch.Tensor

    def __init__(self, cin, cout, kernel, up=False, down=False, taps=(1, 1), fused=False):
        super().__init__()
        self.out_channels, self.up, self.down, self.fused = cout, up, down, fused
        self.weight = self.bias = None
        if kernel:
            self.weight = nn.Parameter(torch.zeros(cout, cin, kernel, kernel))
            self.bias = nn.Parameter(torch.zeros(cout))
        f = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("resample_filter", f.outer(f)[None, None] / f.sum() ** 2 if up or down else None)

    def forward(self, x):
        kernel = 0 if self.weight is None else self.weight.shape[-1]
        if not (self.up or self.down):
            assert self.weight is not None
            return F.conv2d(x, self.weight, self.bias, padding=kernel // 2)
        taps = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        pad = (taps.shape[-1] - 1) // 2
        if self.fused:  # only ever with down: one padding for both, and the bias last
            assert self.weight is not None and self.bias is not None
            x = F.conv2d(x, self.weight, padding=kernel // 2 + pad)
            return (
                F.conv2d(x, self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1), groups=x.shape[1], stride=2)
                + (self.bias[:, None, None])
            )
        if self.up:
            x = F.conv_transpose2d(x, taps * 4, groups=x.shape[1], stride=2, padding=pad)
        else:
            x = F.conv2d(x, taps, groups=x.shape[1], stride=2, padding=pad)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=kernel // 2)


def norm(channels, eps):
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


class Waves(Exact):
    """cos and sin of a number: at geometric frequencies, or at those stored with the weights; `fourier`: in turns, and random."""

    exact = "freqs"
    freqs: torch.Tensor | None

    def __init__(self, channels, endpoint=False, fourier=False, stored=False):
        super().__init__()
        self.count, self.last, self.turn = channels // 2, channels // 2 - int(endpoint), 2 * math.pi if fourier else 1
        self.register_buffer("freqs", torch.zeros(channels // 2, dtype=torch.float32) if fourier or stored else None)

    def forward(self, x):
        exponents = torch.arange(self.count, dtype=torch.float32, device=x.device) / self.last
        angles = x.float().outer((1 / 10000) ** exponents if self.freqs is None else self.turn * self.freqs.float())
        return torch.cat([angles.cos(), angles.sin()], 1)


class Steps(nn.Module):
    """The embedded number of noise levels (arXiv 2409.19681)."""

    def __init__(self, channels, emb, fourier, swap):
        super().__init__()
        self.waves, self.swap = Waves(channels, fourier=fourier, stored=True), swap
        self.layer0, self.layer1 = nn.Linear(channels, emb), nn.Linear(emb, emb)

    def forward(self, steps):
        cos, sin = self.waves(torch.full((1,), float(steps), device=self.layer0.weight.device)).chunk(2, dim=1)
        waves = torch.cat([sin, cos] if self.swap else [cos, sin], 1).to(self.layer0.weight.dtype)
        return F.silu(self.layer1(F.silu(self.layer0(waves))))


class StepAffine(nn.Linear):
    """A block's affine map that also reads the number of noise levels."""

    def __init__(self, emb, out, adm):
        super().__init__(emb, out)
        self.steps, self.adm = nn.Linear(emb, out), adm

    def forward(self, emb):
        noise, steps = emb.chunk(2, dim=1)
        noise, steps = super().forward(noise), self.steps(steps)
        if not self.adm:
            return noise + steps
        (scale, shift), (scale_2, shift_2) = noise.chunk(2, dim=1), steps.chunk(2, dim=1)
        return torch.cat([scale + scale_2 + scale * scale_2, shift * (1 + scale_2) + shift_2], 1)


class Block(nn.Module):
    """Residual block with optional resampling and self-attention."""

    def __init__(self, cin, cout, style, up=False, down=False, attention=False):
        super().__init__()
        emb, taps, self.adm, steps = style
        eps, project = 1e-5 if self.adm else 1e-6, not self.adm
        resample = {"up": up, "down": down, "taps": taps}
        self.in_channels, self.out_channels, self.scale = cin, cout, 1.0 if self.adm else math.sqrt(0.5)
        self.norm0, self.conv0 = norm(cin, eps), Conv(cin, cout, 3, **resample)
        affine = cout * (2 if self.adm else 1)
        self.affine = StepAffine(emb, affine, self.adm) if steps else nn.Linear(emb, affine)
        self.norm1, self.conv1, self.skip = norm(cout, eps), Conv(cout, cout, 3), None
        if cout != cin or up or down:
            self.skip = Conv(cin, cout, 1 if project or cout != cin else 0, **resample)
        self.heads = 0 if not attention else cout // 64 if self.adm else 1
        if attention:
            self.norm2, self.qkv, self.proj = norm(cout, eps), Conv(cout, cout * 3, 1), Conv(cout, cout, 1)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = params.chunk(2, dim=1)
            h = F.silu(self.norm1(h) * (scale + 1) + shift)
        else:
            h = F.silu(self.norm1(h + params))
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * self.scale
        return (self.attention(x) + x) * self.scale if self.heads else x

    def attention(self, x):
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).permute(0, 2, 3, 1).reshape(n, height * width, self.heads, c // self.heads, 3)
        a = F.scaled_dot_product_attention(*qkv.transpose(1, 2).unbind(-1))
        return self.proj(a.transpose(1, 2).reshape(n, height, width, c).permute(0, 3, 1, 2))


class UNet(nn.Module):
    """DDPM++ and NCSN++, or ADM (`adm`)."""

    def __init__(
        self, cin, cout, adm, img_resolution, model_channels, channel_mult, num_blocks, attn_resolutions, label_dim=0, augment_dim=0,
        channel_mult_emb=4, dropout=0.1, label_dropout=0, embedding_type="positional", channel_mult_noise=1, encoder_type="standard",
        decoder_type="standard", resample_filter=(1, 1), step_condition=False,
    ):  # fmt: skip
        super().__init__()
        emb, noise, taps = model_channels * channel_mult_emb, model_channels * channel_mult_noise, tuple(resample_filter)
        fourier, eps, style = embedding_type == "fourier", 1e-5 if adm else 1e-6, (emb, taps, adm, step_condition)
        self.adm, self.map_noise = adm, Waves(noise, endpoint=not adm, fourier=fourier)
        self.map_label = nn.Linear(label_dim, emb if adm else noise, bias=not adm) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise, emb), nn.Linear(emb, emb)
        self.map_steps = Steps(noise, emb, fourier, not adm) if step_condition else None
        self.enc, self.dec, widths, aux, last = nn.ModuleDict(), nn.ModuleDict(), [], cin, len(channel_mult) - 1
        c = model_channels * (channel_mult[0] if adm else 1)
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            self.enc[f"{res}x{res}_{'down' if level else 'conv'}"] = Block(c, c, style, down=True) if level else Conv(cin, c, 3)
            if level and encoder_type == "skip":
                self.enc[f"{res}x{res}_aux_down"] = Conv(aux, aux, 0, down=True, taps=taps)
                self.enc[f"{res}x{res}_aux_skip"] = Conv(aux, c, 1)
            if level and encoder_type == "residual":
                self.enc[f"{res}x{res}_aux_residual"] = Conv(aux, c, 3, down=True, taps=taps, fused=True)
                aux = c
            widths.append(c)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = Block(c, model_channels * mult, style, attention=res in attn_resolutions)
                c = model_channels * mult
                widths.append(c)
        for level in range(last, -1, -1):
            res, wide = img_resolution >> level, model_channels * channel_mult[level]
            if level == last:
                self.dec[f"{res}x{res}_in0"] = Block(c, c, style, attention=True)
                self.dec[f"{res}x{res}_in1"] = Block(c, c, style)
            else:
                self.dec[f"{res}x{res}_up"] = Block(c, c, style, up=True)
            for i in range(num_blocks + 1):
                attention = res in attn_resolutions and (adm or i == num_blocks)
                self.dec[f"{res}x{res}_block{i}"] = Block(c + widths.pop(), wide, style, attention=attention)
                c = wide
            if not adm and (decoder_type == "skip" or level == 0):
                if decoder_type == "skip" and level < last:
                    self.dec[f"{res}x{res}_aux_up"] = Conv(cout, cout, 0, up=True, taps=taps)
                self.dec[f"{res}x{res}_aux_norm"], self.dec[f"{res}x{res}_aux_conv"] = norm(c, eps), Conv(c, cout, 3)
        if adm:
            self.out_norm, self.out_conv = norm(c, eps), Conv(c, cout, 3)

    def embedding(self, c_noise, labels, steps, dtype):
        """Of noise level, class and number of levels: what the blocks' affine maps read."""
        cos, sin = self.map_noise(c_noise).chunk(2, dim=1)
        emb = torch.cat([cos, sin] if self.adm else [sin, cos], 1).to(dtype)
        if self.map_label is not None and not self.adm:
            emb = emb + self.map_label(labels.to(dtype) * math.sqrt(labels.shape[1]))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and self.adm:
            emb = emb + self.map_label(labels.to(dtype))
        emb = F.silu(emb)
        return emb if self.map_steps is None else torch.cat([emb, self.map_steps(steps).expand_as(emb)], 1)

    def forward(self, x, c_noise, labels, steps):
        emb = self.embedding(c_noise, labels, steps, x.dtype)
        skips, aux = [], x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                aux = layer(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) / math.sqrt(2)
            else:
                x = layer(x, emb) if hasattr(layer, "affine") else layer(x)
                skips.append(x)
        out = None
        for name, layer in self.dec.items():
            if "aux_up" in name:
                out = layer(out)
            elif "aux_norm" in name:
                normed = layer(x)
            elif "aux_conv" in name:
                new = layer(F.silu(normed))
                out = new if out is None else out + new
            else:
                x = layer(x if x.shape[1] == layer.in_channels else torch.cat([x, skips.pop()], 1), emb)
        return self.out_conv(F.silu(self.out_norm(x))) if self.adm else out
