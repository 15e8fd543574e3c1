"""How latents of EDM2's nets are shown: by the VAE whose name or folder is given, or that a weight file names, if it is here.

It is Stable Diffusion's, an AutoencoderKL of diffusers in a folder of its own: config.json and diffusion_pytorch_model.safetensors.
"""

# huggingface_hub is optional.
# pyright: reportMissingImports=false

from pathlib import Path
from typing import Any

import torch

from potstill.engine.common.errors import UserError
from potstill.engine.data.vae import Autoencoder
from potstill.engine.models.generate import Decode
from potstill.engine.models.origins import cached, on_hub
from potstill.engine.nets.edm2_latents import STABILITY, Affine
from potstill.engine.nets.pipelines import diffusers

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
CHANNELS = 4


def decoder_of(name: str | None, metadata: dict[str, Any], device: torch.device) -> Decode | None:
    """Pictures of latents by the VAE of this name or folder, else by that which a weight file's metadata name; None where it is not here."""
    encoder = metadata.get("encoder") or {}
    said = name or encoder.get("vae") or ""
    if not is_vae(said):
        return None
    return Autoencoder(vae_path(said), affine_of(metadata), device).decode


def affine_of(metadata: dict[str, Any]) -> Affine:
    """Between the VAE's latents and the net's, as a weight file says, or else as EDM2's code has it."""
    encoder = metadata.get("encoder") or {}
    return Affine(tuple(encoder["scale"]), tuple(encoder["bias"])) if "scale" in encoder else STABILITY


def first_three(latents: torch.Tensor) -> torch.Tensor:
    """Three channels in the place of pictures, where there is no VAE."""
    return latents[:, :3]


def vae_path(name: str) -> Path:
    """A folder; what is none and looks like a name on the hub lies in the hub's cache, if it does."""
    path = Path(name).expanduser()
    return path if path.exists() or not on_hub(name) else cached(name) or path


def is_vae(name: str) -> bool:
    """Is it here?"""
    return bool(name) and all((vae_path(name) / file).is_file() for file in (CONFIG, WEIGHTS))


def fetch_vae(name: str) -> None:
    """Download it from the hub, these two files alone. UserError where it is not here afterwards."""
    diffusers()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS])
        reason = "nothing came"
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    if not is_vae(name):
        raise UserError(
            f"no folder at {name}, and no VAE of that name came from the hub ({reason}): set teacher.vae=FOLDER, with {CONFIG} and {WEIGHTS}, or to null"
        )
