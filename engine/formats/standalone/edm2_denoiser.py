"""EDM2's denoiser for inference, as diffusers loads it: needs torch and diffusers, and nothing of potstill.

D(x; sigma) = c_skip x + c_out F(c_in x, c_noise, labels) with F a magnitude-preserving U-Net of arXiv 2312.02696. The names of the
weights are EDM2's. Apache-2.0; the weights beside this file have their own licence.

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


def normalized(x, dims):
    """x over its root mean square over `dims`, which 1e-4 is added to."""
    count = math.prod(x.shape[dim] for dim in dims)
    size = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (1e-4 + size / math.sqrt(count)).to(x.dtype)


def mp_silu(x):
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    return torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a, b, t):
    size = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (size * (1 - t) / math.sqrt(a.shape[1])), b * (size * t / math.sqrt(b.shape[1]))], 1)


class MPConv(nn.Module):
    """A convolution or linear map by weights of unit length."""

    def __init__(self, cin, cout, *kernel):
        super().__init__()
        self.out_channels = cout
        self.weight = nn.Parameter(torch.zeros(cout, cin, *kernel))

    def forward(self, x, gain=1.0):
        w = self.weight.float()
        w = (normalized(w, tuple(range(1, w.ndim))) * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class MPFourier(nn.Module):
    """Cosines at stored frequencies and phases, which stay float32 when the rest is rounded: they are no weights."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("phases", torch.zeros(channels, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        before = self.freqs, self.phases
        super()._apply(fn, recurse)
        if not before[0].is_meta and self.freqs.dtype != torch.float32:
            self.freqs, self.phases = (t.to(self.freqs.device) for t in before)
        return self

    def forward(self, x):
        return math.sqrt(2) * (x.float().outer(self.freqs.float()) + self.phases.float()).cos()


class Block(nn.Module):
    """Residual block of encoder or decoder with optional resampling and self-attention."""

    def __init__(self, cin, cout, emb, net, decoder=False, mode="", attention=False):
        super().__init__()
        self.out_channels, self.decoder, self.mode, self.net = cout, decoder, mode, net
        self.heads = cout // net["channels_per_head"] if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv_res0 = MPConv(cin if decoder else cout, cout, 3, 3)
        self.emb_linear = MPConv(emb, cout)
        self.conv_res1 = MPConv(cout, cout, 3, 3)
        self.conv_skip = MPConv(cin, cout, 1, 1) if cin != cout else None
        if self.heads:
            self.attn_qkv, self.attn_proj = MPConv(cout, 3 * cout, 1, 1), MPConv(cout, cout, 1, 1)

    def forward(self, x, emb):
        x = self.resampled(x)
        if not self.decoder:
            x = normalized(x if self.conv_skip is None else self.conv_skip(x), (1,))
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, gain=self.emb_gain.float()) + 1
        y = self.conv_res1(mp_silu(y * scale[:, :, None, None].to(y.dtype)))
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.net["res_balance"])
        if self.heads:
            n, c, height, width = x.shape
            qkv = normalized(self.attn_qkv(x).reshape(n, self.heads, c // self.heads, 3, height * width), (2,))
            q, k, v = (one.transpose(-2, -1) for one in qkv.unbind(3))
            a = F.scaled_dot_product_attention(q, k, v).transpose(-2, -1).reshape(x.shape)
            x = mp_sum(x, self.attn_proj(a), self.net["attn_balance"])
        most = self.net["clip_act"]
        return x if most is None else x.clamp(-most, most)

    def resampled(self, x):
        if not self.mode:
            return x
        f = torch.tensor(self.net["resample_filter"], dtype=x.dtype, device=x.device)
        f, pad = (f.outer(f) / f.sum() ** 2).expand(x.shape[1], 1, -1, -1), (len(f) - 1) // 2
        resample = F.conv2d if self.mode == "down" else F.conv_transpose2d
        return resample(x, f if self.mode == "down" else 4 * f, stride=2, padding=pad, groups=x.shape[1])


class UNet(nn.Module):
    """F(x, c_noise, labels)."""

    def __init__(self, channels, net):
        super().__init__()
        self.net = net
        widths = [net["model_channels"] * mult for mult in net["channel_mult"]]
        noise = net["model_channels"] * net["channel_mult_noise"] if net["channel_mult_noise"] else widths[0]
        emb = net["model_channels"] * net["channel_mult_emb"] if net["channel_mult_emb"] else max(widths)
        self.out_gain = nn.Parameter(torch.zeros(()))
        self.emb_fourier, self.emb_noise = MPFourier(noise), MPConv(noise, emb)
        self.emb_label = MPConv(net["label_dim"], emb) if net["label_dim"] else None
        self.enc, self.dec, cout = nn.ModuleDict(), nn.ModuleDict(), widths[0]
        sides = [net["img_resolution"] >> level for level in range(len(widths))]
        for level, (side, width) in enumerate(zip(sides, widths)):  # noqa: B905  (of one length)
            key = f"{side}x{side}"
            if level == 0:
                self.enc[f"{key}_conv"] = MPConv(channels + 1, cout, 3, 3)
            else:
                self.enc[f"{key}_down"] = Block(cout, cout, emb, net, mode="down")
            for i in range(net["num_blocks"]):
                self.enc[f"{key}_block{i}"] = Block(cout, width, emb, net, attention=side in net["attn_resolutions"])
                cout = width
        skips = [layer.out_channels for layer in self.enc.values()]
        for level in reversed(range(len(widths))):
            key, width = f"{sides[level]}x{sides[level]}", widths[level]
            if level == len(widths) - 1:
                self.dec[f"{key}_in0"] = Block(cout, cout, emb, net, True, attention=True)
                self.dec[f"{key}_in1"] = Block(cout, cout, emb, net, True)
            else:
                self.dec[f"{key}_up"] = Block(cout, cout, emb, net, True, mode="up")
            for i in range(net["num_blocks"] + 1):
                attention = sides[level] in net["attn_resolutions"]
                self.dec[f"{key}_block{i}"] = Block(cout + skips.pop(), width, emb, net, True, attention=attention)
                cout = width
        self.out_conv = MPConv(cout, channels, 3, 3)

    def forward(self, x, c_noise, labels):
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None:
            emb = mp_sum(emb, self.emb_label(labels.float() * math.sqrt(self.net["label_dim"])), self.net["label_balance"])
        emb, x, skips = mp_silu(emb), torch.cat([x, torch.ones_like(x[:, :1])], 1), []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("conv") else layer(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(mp_cat(x, skips.pop(), self.net["concat_balance"]) if "block" in name else x, emb)
        return self.out_conv(x, gain=self.out_gain.float())


DEFAULTS = {
    "label_dim": 0, "model_channels": 192, "channel_mult": (1, 2, 3, 4), "channel_mult_noise": None, "channel_mult_emb": None,
    "num_blocks": 3, "attn_resolutions": (16, 8), "label_balance": 0.5, "concat_balance": 0.5, "resample_filter": (1, 1),
    "channels_per_head": 64, "res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256.0,
}  # fmt: skip


class Denoiser(ModelMixin, ConfigMixin):
    """D(x; sigma, class_labels) for samples [N, C, H, W]; `net` holds EDM2's keyword arguments."""

    # With accelerate diffusers rounds on the way in, but for these (see denoiser.py of EDM's nets).
    _keep_in_fp32_modules = ["emb_fourier", "logvar_fourier"] if find_spec("accelerate") else None
    _supports_param_buffer_assignment = False

    @register_to_config
    def __init__(self, precond: str, net: dict):
        super().__init__()
        net = DEFAULTS | net
        self.sigma_data = net.get("sigma_data", 0.5)
        self.img_resolution, self.img_channels, self.label_dim = net["img_resolution"], net["img_channels"], net["label_dim"]
        self.unet = UNet(self.img_channels, net)
        channels = net.get("logvar_channels", 128)
        self.logvar_fourier, self.logvar_linear = MPFourier(channels), MPConv(channels, 1)  # a loss weight, kept with the others

    def forward(self, x, sigma, class_labels=None, steps=None):
        """D [N, C, H, W] float32. class_labels [N, label_dim]; steps: of EDM's nets."""
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1).expand(len(x))
        c_skip, c_out, c_in, c_noise = (c[:, None, None, None] for c in self.coefficients(sigma))
        if self.label_dim and class_labels is None:
            class_labels = torch.zeros(len(x), self.label_dim, device=x.device)
        raw = self.unet((c_in * x).to(self.dtype), c_noise.flatten(), class_labels)
        return c_skip * x + c_out * raw.float()

    def round_sigma(self, sigma):
        """The net knows every level."""
        return sigma

    def coefficients(self, sigma):
        """c_skip, c_out, c_in, c_noise at sigma [N]."""
        total = (sigma**2 + self.sigma_data**2).sqrt()
        return (self.sigma_data / total) ** 2, sigma * self.sigma_data / total, 1 / total, sigma.log() / 4
