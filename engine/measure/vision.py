"""DINOv2 and CLIP as features, through timm: distances that a discriminator trained on ImageNet features cannot flatter.

    dinov2   ViT-L/14, its class token, 1024 features: FD-DINOv2 (2306.04675)
    clip     OpenAI's ViT-B/32, its image embedding, 512 features: CLIP-FID (2203.06026)

Weights are timm's .safetensors. Images are enlarged to 224 pixels by PyTorch's bicubic filter with antialiasing, as in
EDM2's code; clean-fid, where CLIP-FID comes from, resizes in Pillow, which rounds to 8 bits in between.
"""

# timm is optional.
# pyright: reportMissingImports=false

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from potstill.engine.common.download import digest, file_at
from potstill.engine.common.errors import UserError, what_it_is
from potstill.engine.measure.features import Features, rgb

SIDE = 224


class Network(NamedTuple):
    title: str
    timm: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    url: str
    edm2: str | None = None  # its entry in EDM2's references


NETWORKS = {
    "dinov2": Network(
        "FD-DINOv2", "vit_large_patch14_dinov2", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
        "https://huggingface.co/timm/vit_large_patch14_dinov2.lvd142m/resolve/main/model.safetensors",
        "fd_dinov2",
    ),
    "clip": Network(
        "CLIP-FID", "vit_base_patch32_clip_quickgelu_224.openai",
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711),
        "https://huggingface.co/timm/vit_base_patch32_clip_224.openai/resolve/main/model.safetensors",
    ),
}  # fmt: skip


class Vision(Features):
    """A vision transformer of timm's on RGB images [N, 3, H, W] uint8; grey ones are repeated to RGB."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, path: Path):
        super().__init__()
        self.title, self.sha256, self.edm2 = network.title, digest(path), network.edm2
        self.net = _built(network)
        try:
            weights = load_file(path)
            if "pos_embed" in weights:
                weights["pos_embed"] = resampled(weights["pos_embed"], self.net.pos_embed.shape[1])
            self.net.load_state_dict(weights)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(
                f"{path} holds no weights of timm's {network.timm} ({type(error).__name__}): wanted {network.url}; {what_it_is(path)}"
            ) from error
        self.net.eval()
        self.register_buffer("mean", torch.tensor(network.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(network.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = rgb(images).float() / 255
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True)
        return self.net((x - self.mean) / self.std).double()


def load_vision(kind: str, where: str, command: str) -> Vision:
    """`kind` of NETWORKS with the weights of a file or an address."""
    return Vision(NETWORKS[kind], file_at(where, command=command))


def resampled(embedding: Tensor, tokens: int) -> Tensor:
    """Position embeddings [1, 1 + s², C] for another number of tokens, as DINOv2's own code resamples them.

    Bicubic, without antialiasing, by the factor (s' + 0.1) / s; timm's own way differs, and its features would, too.
    """
    if embedding.shape[1] == tokens:
        return embedding
    first, rest = embedding[:, :1], embedding[:, 1:]
    old, new = round(rest.shape[1] ** 0.5), round((tokens - 1) ** 0.5)
    square = rest.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    square = F.interpolate(square, scale_factor=((new + 0.1) / old,) * 2, mode="bicubic")
    return torch.cat([first, square.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(first)], 1)


def _built(network: Network) -> Any:
    """timm's module; of which class, depends on timm's version."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{network.title} wants timm ({error}): pip install 'potstill[timm]'") from error
    sized: dict[str, Any] = {"img_size": SIDE, "num_classes": 0} if "dinov2" in network.timm else {}
    return timm.create_model(network.timm, pretrained=False, **sized)
