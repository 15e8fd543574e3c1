"""What of a diffusers pipeline's folder data are made with: its text encoders with their tokenizers, and its VAE; and their hashes.

Only safetensors files and classes of diffusers and transformers themselves are loaded, never what a folder brings along.
"""

# diffusers and transformers are optional.
# pyright: reportMissingImports=false

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from potstill.engine.common.errors import UserError, reading
from potstill.engine.common.reading import read_json
from potstill.engine.nets.families import Family, family_of
from potstill.engine.nets.pipelines import diffusers, quietly

INDEX = "model_index.json"
DENOISERS = ("transformer", "unet")
LIBRARIES = ("diffusers", "transformers")
TEXT = ("text_encoder", "tokenizer", "processor")  # beginnings of the names of the parts that embed prompts
WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors")  # those of variants (fp16) are not loaded
SMALL = (".json", ".txt", ".model", ".jinja")
BLOCK, BLOCKS = 2**16, 256  # bytes, of a weight file of more than so many blocks, that are hashed


def index_of(folder: Path) -> dict[str, Any]:
    """model_index.json. UserError where there is none, or it names a class that is not diffusers' or transformers' own."""
    diffusers()
    if not (folder / INDEX).is_file():
        raise UserError(f"no pipeline at {folder}: wanted a folder with {INDEX}, as diffusers' save_pretrained writes it")
    index = read_json(folder / INDEX, dict, "copy or download it again")
    for name, kind in {"_class_name": ["diffusers", index.get("_class_name")], **parts_of(index)}.items():
        library, word = kind
        if library not in LIBRARIES or not _has(library, word):
            raise UserError(
                f"{folder / INDEX} names {word!r} of {library!r} as {name}, wanted a class of {' or '.join(LIBRARIES)}: newer versions may know it"
            )
    return index


def parts_of(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of every part that is there."""
    parts = {name: kind for name, kind in index.items() if isinstance(kind, list) and len(kind) == 2 and isinstance(kind[1], str)}
    return {name: (kind[0], kind[1]) for name, kind in parts.items() if not name.startswith("_") and kind[0] is not None}


def _has(library: str, word: Any) -> bool:
    with quietly():  # transformers says at an import what it would do with torchvision
        return isinstance(word, str) and isinstance(getattr(_module(library), word, None), type)


def _module(library: str) -> Any:
    if library == "diffusers":
        return diffusers()
    import transformers

    return transformers


def load_text(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Family]:
    """The pipeline with nothing but what embeds prompts, on the device, and how that is done. Of its denoiser there is the config alone.

    UserError where it has no text encoder.
    """
    index = index_of(folder)
    parts = parts_of(index)
    denoiser = next((name for name in DENOISERS if name in parts), None)
    if denoiser is None or not any(name.startswith(TEXT[0]) for name in parts):
        raise UserError(f"{folder} has no text encoder, and so takes no prompts: leave text.prompts out, or name another pipeline")
    family = family_of(parts[denoiser][1])
    others = {name: None for name in index if isinstance(index[name], list) and not name.startswith(("_", *TEXT))}
    kind = getattr(diffusers(), index["_class_name"])
    with quietly(), _loading(folder):
        pipe = kind.from_pretrained(folder, **others, dtype=dtype, use_safetensors=True, local_files_only=True).to(device)
    setattr(pipe, denoiser, SimpleNamespace(config=SimpleNamespace(**read_json(folder / denoiser / "config.json", dict, "copy it again"))))
    return pipe, family


def load_vae(folder: Path, device: torch.device) -> Any:
    """The VAE in float32 (SDXL's overflows in 16 bit), in eval mode."""
    library, name = parts_of(index_of(folder)).get("vae", ("", ""))
    if library != "diffusers":
        raise UserError(f"{folder} has no VAE: its nets work on pixels, which data sets hold as they are")
    with quietly(), _loading(folder / "vae"):
        kind = getattr(diffusers(), name)
        vae = kind.from_pretrained(folder / "vae", dtype=torch.float32, use_safetensors=True, local_files_only=True)
    return vae.to(device).eval().requires_grad_(False)


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """UserError for what diffusers and transformers stumble over."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load {path} ({reason}): wanted a whole pipeline with weights as safetensors") from error


def hash_of_part(folder: Path, *beginnings: str) -> str:
    """SHA-256 over the parts of a pipeline whose names begin so: all that is written beside the weights, and of these evenly taken blocks.

    The same parts give the same hash wherever they lie. Nothing is loaded: 20 GB take a second.
    """
    names = sorted(name for name in parts_of(index_of(folder)) if name.startswith(beginnings))
    digest = hashlib.sha256()
    for part in names:
        with reading(folder / part):
            files = sorted(path for path in (folder / part).iterdir() if path.suffix in SMALL or WEIGHTS.fullmatch(path.name))
            for path in files:
                digest.update(f"{part}/{path.name} {path.stat().st_size}\n".encode())
                for block in _blocks(path):
                    digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        last = max(0, path.stat().st_size - 1) // BLOCK
        for k in range(min(BLOCKS, last + 1)):
            file.seek(BLOCK * (k * last // max(1, min(BLOCKS, last + 1) - 1)))
            yield file.read(BLOCK)
