"""Pictures become latents, once, and latents pictures, for eyes and measures only: no training decodes.

Latents are the mean of the VAE's posterior, not a draw from it, shifted and scaled as the pipeline's denoiser wants them.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.common.writing import whole
from potstill.engine.data.captions import CAPTIONS, write_captions
from potstill.engine.data.images import Images
from potstill.engine.data.latents import LABELS, LATENTS, LatentSource, check_std
from potstill.engine.data.pipelines import hash_of_part, load_autoencoder, load_vae
from potstill.engine.data.progress import in_order
from potstill.engine.data.shards import SHARD_BYTES, Done, Manifest, begun, write_shards
from potstill.engine.nets.edm2_latents import Affine, decoded
from potstill.engine.nets.latents import decode_latents, encode_latents

AT_ONCE = 4  # latents that are decoded together: a VAE of large pictures takes gigabytes for each
VIDEO = "AutoencoderKLWan"  # its denoiser takes videos [N, C, T, H, W]; a picture is one frame


class VAE:
    """A pipeline's VAE: `encode` and `decode`, without gradients and in float32. UserError where the folder has none."""

    def __init__(self, folder: Path, device: torch.device):
        self.device, self.net = device, load_vae(folder, device)
        self.video = type(self.net).__name__ == VIDEO

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents [N, C, h, w] (Wan's [N, C, 1, h, w]) of pictures [N, 3 or 1, H, W] in [-1, 1]."""
        pictures = pictures.expand(-1, 3, -1, -1)
        return encode_latents(self.net, pictures[:, :, None] if self.video else pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [N, 3, H, W], about in [-1, 1], of latents as `encode` makes them."""
        pictures = torch.cat([decode_latents(self.net, some) for some in latents.to(self.device).split(AT_ONCE)])
        return pictures[:, :, 0] if self.video else pictures


class Autoencoder:
    """Stable Diffusion's VAE by itself, for latents of EDM2's nets: `decode`, without gradients and in float32."""

    def __init__(self, folder: Path, affine: Affine, device: torch.device):
        self.device, self.affine, self.net = device, affine, load_autoencoder(folder, device)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [N, 3, 8·h, 8·w], about in [-1, 1], of latents [N, 4, h, w]."""
        return torch.cat([decoded(self.net, some, self.affine) for some in latents.to(self.device).split(AT_ONCE)])


def check_vae(images: Images, pipeline: Path) -> None:
    """UserError for latents that were made by another VAE than this pipeline's, where they say by which."""
    made_by = images.source.vae if isinstance(images.source, LatentSource) else None
    if made_by and made_by != hash_of_part(pipeline, "vae"):
        raise UserError(f"{images.name} holds latents of another VAE than that of {pipeline}: make them anew with potstill convert latents")


def write_latents(
    out: Path,
    images: Images,
    pipeline: Path,
    device: torch.device,
    *,
    captions: Sequence[str] | None = None,
    bits: int = 16,
    batch: int = 8,
) -> Manifest:
    """The latents of all images, with their labels and captions (one an image), in a folder that `open_images` reads.

    bits: 16 or 32 of each number. Called again after it was killed it goes on, and ends with the same bytes. UserError for a folder
    that holds something else, and for latents of an unusual standard deviation.
    """
    if images.latent:
        raise UserError(f"{images.name} holds latents already, wanted pictures")

    def seen(some: Sequence[np.ndarray]) -> Tensor:
        return images.seen(torch.from_numpy(np.stack(some)))

    vae, dtype = VAE(pipeline, device), {16: torch.float16, 32: torch.float32}[bits]
    example = vae.encode(seen([images.read(0)]))
    if images.resolution % example.shape[-1]:
        raise UserError(f"the VAE of {pipeline} makes {example.shape[-1]} of {images.resolution} pixels: wanted a multiple of its factor")
    about = {
        "images": _hash(images.fingerprint()), "vae": hash_of_part(pipeline, "vae"), "dtype": str(dtype).removeprefix("torch."),
        "pixels": list(images.shape), "classes": images.classes, "captions": None if captions is None else _hash(list(captions)),
    }  # fmt: skip
    size = max(1, SHARD_BYTES // (example.numel() * bits // 8))
    manifest = begun(out, Manifest(LATENTS, len(images), size, about), "name another folder, or remove it")
    if captions is not None and not (out / CAPTIONS).exists():
        with whole(out / CAPTIONS) as part:
            write_captions(part, captions)

    def make(rows: range, done: Done) -> dict[str, Tensor]:
        read = in_order(lambda i: images.read(rows[i]), len(rows), None, chunk=batch)
        parts = []
        while some := list(islice(read, batch)):
            parts.append(vae.encode(seen(some)).cpu())
            done(len(some))
        latents = torch.cat(parts)
        if not rows.start:
            check_std(latents, f"{images.name}, made by the VAE of {pipeline},")
        labels = {} if images.labels is None else {LABELS: torch.from_numpy(images.labels[rows.start : rows.stop])}
        return {LATENTS: latents.to(dtype)} | labels

    write_shards(out, manifest, make, f"encoding {images.name}")
    return manifest


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
