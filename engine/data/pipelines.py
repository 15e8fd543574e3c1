"""What of a diffusers pipeline's folder data are made with: its text encoders with their tokenizers, and its VAE; and their hashes.

Only safetensors files and classes of diffusers and transformers themselves are loaded, never what a folder brings along.
"""

# diffusers and transformers are optional.
# pyright: reportMissingImports=false

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from potstill.engine.common.errors import Damaged, UserError, reading
from potstill.engine.common.reading import read_json
from potstill.engine.nets.families import Family, family_of
from potstill.engine.nets.parts import check_finite, loaded, stored_in, stumbling
from potstill.engine.nets.pipelines import AGAIN, READ, class_now, diffusers, part_of, quietly

INDEX = "model_index.json"
DENOISERS = ("transformer", "unet")
LIBRARIES = ("diffusers", "transformers")
TEXT = ("text_encoder", "tokenizer", "processor")  # beginnings of the names of the parts that embed prompts
WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors")  # those of variants (fp16) are not loaded
SMALL = (".json", ".txt", ".model", ".jinja")
AUTOENCODER = "AutoencoderKL"
BLOCK, BLOCKS = 2**16, 256  # bytes, of a weight file of more than so many blocks, that are hashed


def index_of(folder: Path) -> dict[str, Any]:
    """model_index.json. UserError where there is none, or it names a class, of a part that is read, which is not diffusers' or transformers' own."""
    diffusers()
    if not (folder / INDEX).is_file():
        raise UserError(f"no pipeline at {folder}: wanted a folder with {INDEX}, as diffusers' save_pretrained writes it")
    index = read_json(folder / INDEX, dict, "copy or download it again")
    read = {name: kind for name, kind in parts_of(index).items() if name.startswith(READ)}
    for name, (library, word) in {"_class_name": ("diffusers", index.get("_class_name")), **read}.items():
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

    UserError, Damaged where it has no text encoder, or one that is not whole.
    """
    check_text(folder)
    index = index_of(folder)
    parts = parts_of(index)
    denoiser = next((name for name in DENOISERS if name in parts), None)
    if denoiser is None or not any(name.startswith(TEXT[0]) for name in parts):
        raise UserError(f"{folder} has no text encoder, and so takes no prompts: leave text.prompts out, or name another pipeline")
    family = family_of(class_now(part_of(folder, denoiser), parts[denoiser][1]))
    others = {name: None for name in index if isinstance(index[name], list) and not name.startswith(("_", *TEXT))}
    kind = getattr(diffusers(), index["_class_name"])
    config = read_json(part_of(folder, denoiser) / "config.json", dict, AGAIN)
    encoders = {part: transformer(folder / part, word, dtype=dtype) for part, (_, word) in parts.items() if part.startswith(TEXT[0])}
    for part, encoder in encoders.items():
        check_finite(encoder, folder / part)
    with quietly(), stumbling(folder, index["_class_name"]):
        pipe = kind.from_pretrained(folder, **(others | encoders), dtype=dtype, use_safetensors=True, local_files_only=True).to(device)
    setattr(pipe, denoiser, SimpleNamespace(config=SimpleNamespace(**config)))
    return pipe, family


def transformer(path: Path, name: str, *, unread: str = "", **how: Any) -> Any:
    """A net of this class, as transformers loads it. Damaged where its files lack some of its weights, or hold others: it would draw these at random.

    unread: how the names of weights begin that nobody reads, and that may be missing.
    """
    how |= {"use_safetensors": True, "local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with quietly(), stumbling(path, name):
        net, told = getattr(_module("transformers"), name).from_pretrained(path, **how)
    missing = sorted(weight for weight in told["missing_keys"] if not unread or not weight.startswith(unread))
    parts = [f"they miss {missing[0]} ({len(missing)} in all)"] if missing else []
    for weight, found, wanted in sorted(told["mismatched_keys"])[:1]:
        parts.append(f"{weight} is {list(found)}, wanted {list(wanted)}")
    if parts:
        raise Damaged(f"the weights in {path} are not those of the {name} of its config.json: {'; '.join(parts)}; {AGAIN}")
    return net


def check_text(folder: Path) -> None:
    """UserError, Damaged where what embeds prompts is not all there: a folder, a file or its end, a tokenizer's words. No weight is read."""
    parts = parts_of(index_of(folder))
    texts = [part for part in parts if part.startswith(TEXT)]
    if not any(part.startswith(TEXT[0]) for part in texts):
        raise UserError(f"{folder} has no text encoder, and so takes no prompts: leave text.prompts out, or name another pipeline")
    for part in texts:
        path = part_of(folder, part)
        if part.startswith(TEXT[0]):
            library, name = parts[part]
            config = read_json(path / "config.json", dict, AGAIN)
            stored_in(path, library)
            if "quantization_config" not in config:  # whose own packages must load it
                transformer(path, name, device_map="meta")
    for part in texts:
        if part.startswith(TEXT[1]):
            _check_tokenizer(folder, part, parts[part][1])


def tokenizer(path: Path, name: str) -> Any:
    """A tokenizer of this class. UserError without its files: it would be loaded all the same, and know no words."""
    kind = getattr(_module("transformers"), name)
    read_json(path / "tokenizer_config.json", dict, AGAIN)
    whole = "tokenizer.json" if issubclass(kind, _module("transformers").PreTrainedTokenizerFast) else None  # which some do not name
    one = kind.vocab_files_names.get("tokenizer_file", whole)  # has all in it
    several = [file for file in kind.vocab_files_names.values() if file != one]
    if not (one and (path / one).is_file()) and (missing := [file for file in several or [one] if not (path / file).is_file()]):
        raise UserError(f"{path} has no {missing[0]}, the words of a {name}: {AGAIN}")
    with quietly(), stumbling(path, name):
        return kind.from_pretrained(path, local_files_only=True)


def _check_tokenizer(folder: Path, part: str, name: str) -> None:
    """UserError where it has no words, or makes more tokens of a prompt than its encoder takes."""
    path = folder / part
    if not hasattr(getattr(_module("transformers"), name), "vocab_files_names"):  # a processor
        return
    length = tokenizer(path, name).model_max_length
    encoder = folder / part.replace(TEXT[1], TEXT[0])
    if name.startswith("CLIP") and encoder.is_dir():  # whose prompts all have that length
        most = read_json(encoder / "config.json", dict, AGAIN).get("max_position_embeddings", 77)
        if length > most:
            raise UserError(f"the tokenizer in {path} makes {length:,} tokens of a prompt, and {encoder} takes at most {most}: {AGAIN}")


def load_vae(folder: Path, device: torch.device) -> Any:
    """The VAE in float32 (SDXL's overflows in 16 bit), in eval mode."""
    library, name = parts_of(index_of(folder)).get("vae", ("", ""))
    if library != "diffusers":
        raise UserError(f"{folder} has no VAE: its nets work on pixels, which data sets hold as they are")
    vae = loaded(getattr(diffusers(), name), part_of(folder, "vae"), torch.float32)
    return vae.to(device).eval().requires_grad_(False)


def load_autoencoder(folder: Path, device: torch.device) -> Any:
    """An AutoencoderKL that lies in a folder of its own, or in that of a pipeline; as `load_vae`."""
    if (folder / INDEX).is_file():
        return load_vae(folder, device)
    library, config = diffusers(), read_json(folder / "config.json", dict, AGAIN)
    if config.get("_class_name") != AUTOENCODER:
        raise UserError(
            f"{folder} holds {config.get('_class_name')!r:.60}, wanted diffusers' {AUTOENCODER}, such as stabilityai/sd-vae-ft-mse"
        )
    return loaded(library.AutoencoderKL, folder, torch.float32).to(device).eval().requires_grad_(False)


def decodes(folder: Path) -> bool:
    """Are the samples of its net latents, which its VAE decodes? Some have no VAE, or one that hands pictures on (`formats.newborn.passing`)."""
    if "vae" not in (parts := parts_of(index_of(folder))):
        return False
    if parts["vae"][1] != "AutoencoderTiny":
        return True
    config = read_json(part_of(folder, "vae") / "config.json", dict, AGAIN)
    return config.get("num_decoder_blocks") != [0]


def hash_of_part(folder: Path, *beginnings: str) -> str:
    """SHA-256 over the parts of a pipeline whose names begin so: all that is written beside the weights, and of these evenly taken blocks.

    The same parts give the same hash wherever they lie. Nothing is loaded: 20 GB take a second.
    """
    names = sorted(name for name in parts_of(index_of(folder)) if name.startswith(beginnings))
    digest = hashlib.sha256()
    for part in names:
        with reading(place := part_of(folder, part)):
            files = sorted(path for path in place.iterdir() if path.suffix in SMALL or WEIGHTS.fullmatch(path.name))
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
