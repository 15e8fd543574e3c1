"""Prompts of a run, embedded: from a cache that was made before, or by the text encoder a step ahead; and which of them a step takes.

stream = PromptStream(open_prompts(cfg.text, pipeline, cache, device), batch=64, asks=2)
stream.at(7)                                     # two Texts of 64 rows: a method that asks twice sees others each time
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from potstill.engine.common.checks import Unused, at_least, one_of, wants
from potstill.engine.common.errors import UserError
from potstill.engine.data.captions import read_prompts
from potstill.engine.data.embeddings import PRECISIONS, Embeddings, Encoder, check_embeddings, write_embeddings
from potstill.engine.data.sampler import Order
from potstill.engine.nets.conditions import Text


@dataclass
class TextConfig:
    """The prompts that a teacher of text-to-image is asked with."""

    prompts: str | None = None  # .txt (one a line) | .jsonl (prompt, caption or text) | latents with captions; null: no prompts
    encoder: str | None = None  # of a teacher that is trained here: words | a text encoder's folder, or a pipeline's; null: the teacher's
    how: str = "cached"  # cached (embedded before the training, once) | live (by the text encoder, which stays on the device)
    cache: str | None = None  # folder of the embeddings; null: in the run folder
    max_length: int | None = None  # tokens of a prompt; null: as many as the pipeline takes
    precision: str = "auto"  # of the text encoder: bf16 | fp32 | auto (bf16 on a GPU); a cache keeps 16 bit
    batch: int = 32  # prompts that are embedded at a time for the cache

    def __post_init__(self):
        wants(self, "prompts", self.prompts != "", "a file of prompts, or null for none")
        wants(self, "encoder", self.encoder != "", "words, a folder, or null for words")
        wants(self, "cache", self.cache != "", "a folder, or null")
        one_of(self, "how", ("cached", "live"))
        one_of(self, "precision", PRECISIONS)
        at_least(self, 1, "max_length", "batch")

    def unused(self) -> Unused:
        if self.prompts is None:
            return dict.fromkeys(("how", "cache", "max_length", "precision", "batch"), "text.prompts=null")
        return dict.fromkeys(("cache", "batch"), "text.how=live") if self.how == "live" else {}


class Prompts:
    """N prompts. `null`: the one row that guidance leads away from; None: the family has none.

    texts [N]; embed(ids): those of `index` into all; rows come in `dtype` on the device.
    """

    def __init__(
        self, texts: Sequence[str], embed: Callable[[list[int]], Text], null: Text | None, device: torch.device,
        dtype: torch.dtype = torch.float32, index: np.ndarray | None = None,
    ):  # fmt: skip
        self.texts, self.embed, self.device, self.dtype = texts, embed, device, dtype
        self.null = null and null.to(device, dtype)
        self.index = np.arange(len(texts)) if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    @torch.no_grad()
    def rows(self, indices: Tensor | Sequence[int]) -> Text:
        """The prompts of these numbers 0 … N - 1. Damaged where the cache is."""
        ids = self.index[np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices, np.int64)]
        return self.embed(ids.tolist()).to(self.device, self.dtype)

    def text(self, i: int) -> str:
        return self.texts[int(self.index[i])]

    def subset(self, ids: Sequence[int] | np.ndarray) -> "Prompts":
        """Only those of these numbers: a student's share."""
        if not len(ids):
            raise UserError("no prompts are left, wanted at least one: take fewer students or more prompts")
        return Prompts(self.texts, self.embed, self.null, self.device, self.dtype, self.index[np.asarray(ids, np.int64)])


def prepare_prompts(cfg: TextConfig, pipeline: Path, cache: Path, device: torch.device) -> None:
    """What one process does before all open the prompts: the cache is made or completed."""
    if cfg.how == "cached":
        how = {"precision": cfg.precision, "max_length": cfg.max_length, "batch": cfg.batch}
        write_embeddings(cache, _texts(cfg), pipeline, device, **how)


def open_prompts(cfg: TextConfig, pipeline: Path, cache: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Prompts:
    """The prompts of a run, from `cache` where they are cached. UserError for one that is missing, unfinished or of something else."""
    texts = _texts(cfg)
    if cfg.how == "live":
        encoder = Encoder(pipeline, device, precision=cfg.precision, max_length=cfg.max_length)
        return Prompts(texts, lambda ids: encoder([texts[i] for i in ids]), encoder.null, device, dtype)
    check_embeddings(cache, texts, pipeline, device, precision=cfg.precision, max_length=cfg.max_length)
    found = Embeddings(cache)
    return Prompts(texts, found, found.null, device, dtype)


def _texts(cfg: TextConfig) -> list[str]:
    assert cfg.prompts is not None
    return read_prompts(cfg.prompts)


class PromptStream:
    """`stream.at(s)`: for each of the `asks` of a method in step s its prompts, a Text of this window's rows.

    All asks of all steps take the prompts one after the other in an order that is permuted every epoch, so that each comes once an
    epoch; which they are is a function of (seed, s) alone, as of images. The coming step's are embedded or read meanwhile by a thread.
    batch, window: as of a `Stream`.
    """

    def __init__(self, prompts: Prompts, *, batch: int, asks: int = 1, seed: int = 0, window: slice = slice(None)):
        if batch < 1 or asks < 1 or not len(range(*window.indices(batch))):
            raise ValueError(f"wanted asks and a window of the batch, got {asks}, {window} of {batch}")
        self.prompts, self.batch, self.asks, self.window = prompts, batch, asks, window
        whole = slice(0, asks * batch)
        self._order = Order(len(prompts), batch=asks * batch, seed=seed, flips=False, window=whole, device=torch.device("cpu"))
        self._next: tuple[int, Future[Any]] | None = None
        self._thread = ThreadPoolExecutor(1, "prompts")
        self._side = torch.cuda.Stream(prompts.device) if prompts.device.type == "cuda" else None

    def indices(self, step: int) -> list[Tensor]:
        """Numbers of the prompts, one tensor [n] an ask."""
        return [part[self.window] for part in self._order.at(step)[0].split(self.batch)]

    def at(self, step: int) -> tuple[Text, ...]:
        """An error in the next step's prompts is kept until that step is asked for."""
        if self._next is None or self._next[0] != step:
            self._next = step, self._thread.submit(self._embedded, self.indices(step))
        coming, self._next = self._next[1], None
        texts, done = coming.result()
        self._next = step + 1, self._thread.submit(self._embedded, self.indices(step + 1))
        if done is not None:
            now = torch.cuda.current_stream(self.prompts.device)
            now.wait_event(done)
            for tensor in _pytree.tree_leaves(texts):
                tensor.record_stream(now)
        return texts

    def _embedded(self, indices: list[Tensor]) -> tuple[tuple[Text, ...], Any]:
        """The Texts, and when they are done on the device."""
        with torch.cuda.stream(self._side) if self._side else nullcontext():
            text = self.prompts.rows(torch.cat(indices))
            starts = [sum(map(len, indices[:k])) for k in range(self.asks)]
            texts = tuple(text[start : start + len(part)] for start, part in zip(starts, indices, strict=True))
            return texts, self._side.record_event() if self._side else None

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(cancel_futures=True)
