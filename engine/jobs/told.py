"""What the nets of a run are told beside classes: prompts and captions, embedded; and how their latents are shown as pictures.

prompts: `text.prompts`, or the captions of the data. captions: those of the data, for methods that look at real samples.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.engine.common.errors import UserError
from potstill.engine.config.tree import Config
from potstill.engine.data.captions import CAPTIONS, read_prompts
from potstill.engine.data.embeddings import check_embeddings, check_encoder
from potstill.engine.data.images import Images
from potstill.engine.data.pipelines import index_of, parts_of
from potstill.engine.data.prompts import Prompts, PromptStream, open_prompts, prepare_prompts
from potstill.engine.data.sampler import Stream
from potstill.engine.data.vae import VAE, check_vae
from potstill.engine.models.opening import device_named
from potstill.engine.models.origins import is_pipeline, local_path
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.training.ranks import Ranks


@dataclass
class Told:
    """Embedded prompts and captions of a run; captions are None where its method looks at no real samples."""

    prompts: Prompts
    captions: Prompts | None

    def subset(self, prompts: np.ndarray, captions: np.ndarray | None) -> "Told":
        """Only those of these numbers."""
        return Told(self.prompts.subset(prompts), None if captions is None or self.captions is None else self.captions.subset(captions))


class TextStream:
    """Batches with prompts: `at(step)` is (samples, captions' rows or None, prompts); samples as of a `Stream`, or blank ones."""

    def __init__(self, samples: Any, told: Told, *, batch: int, asks: int, seed: int, window: slice):
        self.samples, self.told = samples, told
        self.prompts = PromptStream(told.prompts, batch=batch, asks=asks, seed=seed, window=window)

    def at(self, step: int) -> tuple[Any, ...]:
        samples, _ = self.samples.at(step)
        captions = self.told.captions
        labels = captions.rows(self.samples.indices(step)) if captions is not None and isinstance(self.samples, Stream) else None
        return samples, labels, self.prompts.at(step)


def check_told(cfg: Config, teacher: Denoiser, images: Images | None) -> None:
    """UserError where a teacher of prompts gets none, or a method that looks at real samples no captions; where prompts, captions or text
    encoder are none. Nothing is loaded or encoded.
    """
    given = cfg.teacher.checkpoint
    if given is not None and images is not None and images.latent and is_pipeline(local_path(given)):
        check_vae(images, local_path(given))
    if not teacher.text:
        if cfg.text.prompts is not None:
            raise UserError(f"text.prompts is for teachers that are told prompts, and {given or 'this one'} is not: set it to null")
        return
    assert given is not None
    if not is_pipeline(local_path(given)):
        raise UserError(f"teacher {given} is told prompts, and a weight file has no text encoder: name its pipeline as teacher.checkpoint")
    captions = captions_file(images)
    if cfg.text.prompts is None and captions is None:
        raise UserError(
            f"teacher {given} is told prompts: set text.prompts=FILE (.txt with one a line, .jsonl), or data.path to latents with captions"
        )
    if cfg.method.needs().data and images is not None and captions is None:
        raise UserError(
            f"method {cfg.method.name} looks at real samples and must be told what they show, and {images.name} has no captions: potstill "
            "convert latents SRC OUT --captions FILE"
        )
    if cfg.method.needs().pairs:
        raise UserError("method.regression makes pairs for classes, and this teacher is told prompts: set it to 0")
    if cfg.students.net is not None:
        raise UserError("students of another shape are for teachers of classes, and this one is told prompts: leave students.net out")
    check_encoder(local_path(given), cfg.text.max_length)
    for file, _ in prompt_files(cfg, images, Path()):
        n = len(read_prompts(file))
        if images is not None and file == captions and n != len(images):
            raise UserError(f"{file} has {n:,} captions, wanted one for each of the {len(images):,} latents beside it: put the file back")


def check_caches(cfg: Config, images: Images | None, folder: Path) -> None:
    """UserError where the embeddings of a run are another encoder's, or of other prompts."""
    text, pipeline = cfg.text, local_path(cfg.teacher.checkpoint or "")
    for file, cache in prompt_files(cfg, images, folder) if text.how == "cached" else []:
        texts, device = read_prompts(file), device_named(cfg.device)
        check_embeddings(cache, texts, pipeline, device, precision=text.precision, max_length=text.max_length)


def captions_file(images: Images | None) -> Path | None:
    """The captions beside latents; None where there are none."""
    if images is None or not images.latent:
        return None
    return path if (path := Path(images.source.path) / CAPTIONS).is_file() else None


def prompt_files(cfg: Config, images: Images | None, folder: Path) -> list[tuple[str | Path, Path]]:
    """What the prompts and, where the method looks at real samples that have some of their own, the captions are read from; and their caches."""
    captions = captions_file(images)
    cache = Path(cfg.text.cache).expanduser() if cfg.text.cache else folder / "text"
    files: list[tuple[str | Path, Path]] = [(cfg.text.prompts or captions or "", cache)]
    if cfg.text.prompts and captions is not None and cfg.method.needs().data:
        files.append((captions, cache.with_name(f"{cache.name}-captions")))
    return files


def open_told(cfg: Config, images: Images | None, folder: Path, device: torch.device, ranks: Ranks) -> Told:
    """Everything embedded, on one rank and once, or the text encoder that will do it."""
    pipeline = local_path(cfg.teacher.checkpoint or "")

    def opened(file: str | Path, cache: Path) -> Prompts:
        text = replace(cfg.text, prompts=str(file))
        ranks.on_first(lambda: prepare_prompts(text, pipeline, cache, device))
        return open_prompts(text, pipeline, cache, device)

    prompts, *others = (opened(file, cache) for file, cache in prompt_files(cfg, images, folder))
    looks = cfg.method.needs().data and captions_file(images) is not None
    return Told(prompts, (others or [prompts])[0] if looks else None)


def vae_of(cfg: Config, device: torch.device) -> VAE | None:
    """The VAE of the teacher's pipeline; None where its samples are pictures."""
    path = local_path(cfg.teacher.checkpoint) if cfg.teacher.checkpoint else None
    if path is None or not is_pipeline(path) or "vae" not in parts_of(index_of(path)):
        return None
    return VAE(path, device)
