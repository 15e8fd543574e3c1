"""Embedded prompts: made by a pipeline's own text encoders, and kept in a folder of shards so that a run needs none.

They are kept in 16 bit, and without the tokens that a mask leaves out. What they were made with is written beside them: a cache of
another encoder, of other prompts or other settings is refused.
"""

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property, wraps
from inspect import signature
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.common.reading import read_json
from potstill.engine.data.captions import hash_of_texts
from potstill.engine.data.pipelines import check_text, hash_of_part, index_of, load_text, parts_of, quietly
from potstill.engine.data.shards import (
    MANIFEST,
    SHARD_BYTES,
    Done,
    Manifest,
    Shards,
    begun,
    is_complete,
    missing_of,
    read_manifest,
    refuse_other,
    write_shard,
    write_shards,
)
from potstill.engine.nets.conditions import Text
from potstill.engine.nets.pipelines import diffusers

PROMPTS = "prompts"
MOST = 100_000  # prompts of a cache; as many of T5's are 100 GB
NULL = "null.safetensors"
LENGTH = "max_sequence_length"  # as pipelines call their number of tokens
#: The most tokens that pipelines of these families take, as their `check_inputs` has it. The others have no bound of their own; attention over
#: more than MOST_TOKENS takes gigabytes for each prompt.
LONGEST = {"StableDiffusion3": 512, "Flux2": 4096, "Flux": 512, "Lumina2": 512, "QwenImage": 1024}
MOST_TOKENS = 4096
PRECISIONS = ("auto", "bf16", "fp32")
STORED = {torch.bfloat16: "bfloat16", torch.float32: "float16"}  # what an encoder computes in, and what is kept of it
OTHER = "name another folder, or remove it to make it anew"
AGAIN = "remove it if it is there, and make the cache again (a run, or potstill convert prompts): only what is missing is made"


class Encoder:
    """The text encoders of a pipeline's folder: prompts -> Text on the device, always of the same length.

    precision: bf16, fp32, or auto (bf16 on a GPU). max_length: tokens of a prompt; None: as many as the pipeline takes by itself.
    """

    def __init__(self, folder: Path, device: torch.device, *, precision: str = "auto", max_length: int | None = None):
        self.dtype = dtype_of(precision, device)
        if max_length is not None:
            _check_length(folder, max_length)
        self.pipe, self.family = load_text(folder, device, self.dtype)
        takes = LENGTH in signature(self.pipe.encode_prompt).parameters
        if max_length is not None:
            self.pipe.encode_prompt = _shortened(self.pipe.encode_prompt, max_length)
        default = signature(self.pipe.__call__).parameters.get(LENGTH)
        self.length = max_length or (default.default if takes and default else 0)  # masks end there, whatever a batch holds
        self.lock = Lock()  # a tokenizer's padding and truncation are set for each call: two threads would have each other's, or an error
        self.told = False  # what the libraries have to say, such as of prompts that are too long

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Text:
        with self.lock, quietly() if self.told else nullcontext():
            text = self.family.encode(self.pipe, list(prompts))
        self.told = True
        return text.filled(self.length)

    @cached_property
    def null(self) -> Text | None:
        """One row; None for families that have no null prompt."""
        with torch.no_grad(), quietly():
            null = self.family.encode_null(self.pipe)
        return null and null.filled(self.length)


def check_encoder(folder: Path, max_length: int | None) -> None:
    """UserError, Damaged for a pipeline whose text encoders or tokenizers are not all there, or whose prompts cannot have that length.

    No weight is read.
    """
    check_text(folder)
    if max_length is not None:
        _check_length(folder, max_length)
    parts = [part for part in parts_of(index_of(folder)) if part.startswith("text_encoder")]
    if len(parts) == 1 and (length := max_length or own_length(index_of(folder)["_class_name"])):
        check_longest(str(folder), places_of(folder / parts[0], folder / "tokenizer"), length)


def own_length(name: str) -> int:
    """Tokens of a prompt that a pipeline of this class takes by itself; 0: as many as its tokenizer says."""
    default = signature(getattr(diffusers(), name).__call__).parameters.get(LENGTH)
    return default.default if default else 0


def places_of(encoder: Path, words: Path) -> int | None:
    """Tokens that a text encoder has places for; None: it is not bound to places, as T5."""
    config = read_json(encoder / "config.json", dict, AGAIN)
    most = (config.get("text_config") or config).get("max_position_embeddings")
    said = words / "tokenizer_config.json"
    taken = read_json(said, dict, AGAIN).get("model_max_length") if said.is_file() else None
    return min(most, taken if isinstance(taken, int) else most) if isinstance(most, int) else None


def check_longest(what: str, most: int | None, length: int) -> None:
    """UserError for more tokens than there are places."""
    if most is not None and length > most:
        raise UserError(
            f"{what} takes at most {most:,} tokens of a prompt, got {length:,}: set text.max_length (--max-length) to that or less"
        )


def _check_length(folder: Path, length: int) -> None:
    name = index_of(folder)["_class_name"]
    if LENGTH not in signature(getattr(diffusers(), name).encode_prompt).parameters:
        raise UserError(f"the text encoder of {folder} always takes as many tokens as it was trained with: leave text.max_length out")
    check_longest(name, next((most for family, most in LONGEST.items() if name.startswith(family)), MOST_TOKENS), length)


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and device.type == "cuda") else torch.float32


def _shortened(encode_prompt: Any, length: int) -> Any:
    @wraps(encode_prompt)
    def of_length(*arguments: Any, **more: Any) -> Any:
        return encode_prompt(*arguments, **(more | {LENGTH: length}))

    return of_length


def made_of(texts: Sequence[str], pipeline: Path, dtype: torch.dtype, max_length: int | None) -> dict[str, Any]:
    """What embeddings depend on, for JSON. Nothing is loaded."""
    index = index_of(pipeline)
    settings = {
        name: value for name, value in index.items() if name == "_class_name" or not (name.startswith("_") or isinstance(value, list))
    }
    return {
        "prompts": hash_of_texts(texts), "encoder": hash_of_part(pipeline, "text_encoder"),
        "tokenizer": hash_of_part(pipeline, "tokenizer", "processor"), "pipeline": settings, "precision": STORED[dtype],
        "max_length": max_length,
    }  # fmt: skip


def write_embeddings(
    out: Path, texts: Sequence[str], pipeline: Path, device: torch.device, *, precision: str = "auto", max_length: int | None = None,
    batch: int = 32,
) -> Manifest:  # fmt: skip
    """The cache `out` of these prompts, made or completed; where it is whole already no encoder is loaded.

    UserError for a folder that holds something else, for too many prompts, and where the disk has too little room.
    """
    found = check_embeddings(out, texts, pipeline, device, precision=precision, max_length=max_length)
    if found and is_made(out):
        return found
    if found and precision == "auto":
        precision = {"bfloat16": "bf16", "float16": "fp32"}[found.about["precision"]]
    encoder = Encoder(pipeline, device, precision=precision, max_length=max_length)
    size = _bytes_of_one(encoder, texts, batch)
    _check_room(out, texts, size, found)
    about = made_of(texts, pipeline, encoder.dtype, max_length)
    manifest = begun(out, Manifest(PROMPTS, len(texts), max(1, int(SHARD_BYTES / size)), about), OTHER)
    null = encoder.null
    write_shard(out / NULL, _packed(null, encoder.dtype) if null else {"none": torch.zeros(1)}, 1, manifest.tag("null"))

    def make(rows: range, done: Done) -> dict[str, Tensor]:
        parts = []
        for start in range(rows.start, rows.stop, batch):
            some = texts[start : min(start + batch, rows.stop)]
            parts.append(_packed(encoder(some), encoder.dtype))
            done(len(some))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    write_shards(out, manifest, make, "embedding prompts")
    return manifest


def is_made(out: Path) -> bool:
    """Are all files of a cache there, as long as they say?"""
    return (out / MANIFEST).exists() and not missing_of(out, read_manifest(out, PROMPTS, OTHER)) and is_complete(out / NULL)


def check_embeddings(
    out: Path, texts: Sequence[str], pipeline: Path, device: torch.device, *, precision: str = "auto", max_length: int | None = None
) -> Manifest | None:
    """The manifest of a cache, whole or not; None where there is none. UserError where it is another encoder's, or of other prompts."""
    if not (out / MANIFEST).exists():
        return None
    found = read_manifest(out, PROMPTS, OTHER)
    wanted = made_of(texts, pipeline, dtype_of(precision, device), max_length)
    if precision == "auto":
        wanted["precision"] = found.about.get("precision")
    refuse_other(out, found, len(texts), wanted, OTHER)
    return found


def _bytes_of_one(encoder: Encoder, texts: Sequence[str], batch: int) -> float:
    """Of some of the prompts, evenly taken."""
    n = min(batch, len(texts))
    some = _packed(encoder([texts[i * len(texts) // n] for i in range(n)]), encoder.dtype)
    return sum(t.nbytes for t in some.values()) / n


def _check_room(out: Path, texts: Sequence[str], size: float, found: Manifest | None) -> None:
    """UserError for more prompts than a cache is for, or than there is room for on the disk."""
    n, needed = len(texts), int(size * len(texts))
    what = f"{n:,} prompts are {needed:,} bytes of embeddings"
    live = "take fewer, or give text.how=live to a new run, which encodes them while it needs them"
    if n > MOST:
        raise UserError(f"{what}, and a cache is for at most {MOST:,} prompts: {live}")
    place = out
    while not place.exists():
        place = place.parent
    done = sum(path.stat().st_size for path in out.glob("*.safetensors")) if found else 0
    if needed - done > (free := shutil.disk_usage(place).free):
        raise UserError(f"{what}, and {place} has {free:,} bytes of room: choose another text.cache, or {live}")


def _packed(text: Text, dtype: torch.dtype) -> dict[str, Tensor]:
    """As a shard holds it: 16 bit, and without masked tokens."""
    found = {"embeds": text.embeds, "pooled": text.pooled} | {f"extra.{name}": t for name, t in text.extra.items()}
    tensors = {name: t.cpu() for name, t in found.items() if t is not None}
    for name in ("embeds", "pooled"):
        if name in tensors:
            tensors[name] = tensors[name].to(getattr(torch, STORED[dtype]))
            if not tensors[name].isfinite().all():
                raise UserError(
                    f"the text encoder gives {name} that are no numbers or too large for {STORED[dtype]}: set text.precision=bf16"
                )
    if text.mask is not None:
        mask = text.mask.cpu()
        tensors |= {"mask": mask, "embeds": tensors["embeds"][mask], "embeds.rows": mask.sum(1)}
    return tensors


def _unpacked(rows: Sequence[dict[str, Tensor]]) -> Text:
    tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "embeds"}
    if (mask := tensors.get("mask")) is None:
        embeds = torch.stack([row["embeds"] for row in rows])
    else:
        tokens = torch.cat([row["embeds"] for row in rows])
        embeds = tokens.new_zeros(*mask.shape, tokens.shape[-1])
        embeds[mask] = tokens
    extra = {name.removeprefix("extra."): t for name, t in tensors.items() if name.startswith("extra.")}
    return Text(embeds, mask, tensors.get("pooled"), extra)


class Embeddings:
    """A cache, whose shards are mapped into memory. UserError where it is unfinished or damaged."""

    def __init__(self, folder: Path):
        self.manifest = read_manifest(folder, PROMPTS, OTHER)
        self.shards = Shards.in_folder(folder, self.manifest, AGAIN)
        null = Shards([folder / NULL], [1], [self.manifest.tag("null")], AGAIN).row(0)
        self.null = None if "none" in null else _unpacked([null])

    def __call__(self, ids: Sequence[int]) -> Text:
        """These prompts, in the precision of the cache, on the host."""
        return _unpacked([self.shards.row(i) for i in ids])
