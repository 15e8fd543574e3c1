"""What the nets of a run are told beside classes: prompts and captions, embedded; and how their latents are shown as pictures.

prompts: `text.prompts`, or the captions of the data. captions: those of the data, for methods that look at real samples.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.engine.common.errors import UserError
from potstill.engine.config.schema import Config
from potstill.engine.data import scenes
from potstill.engine.data.captions import CAPTIONS, hash_of_texts, read_prompts, write_captions
from potstill.engine.data.embeddings import check_embeddings, check_encoder
from potstill.engine.data.images import Images
from potstill.engine.data.pipelines import decodes
from potstill.engine.data.prompts import Prompts, PromptStream, open_prompts, prepare_prompts
from potstill.engine.data.sampler import Stream
from potstill.engine.data.vae import VAE, check_vae
from potstill.engine.formats.newborn import check_text_encoder
from potstill.engine.jobs.build import encoder_of
from potstill.engine.models.decoding import CHANNELS, affine_of, decoder_of, first_three
from potstill.engine.models.generate import Decode
from potstill.engine.models.opening import device_named
from potstill.engine.models.origins import OWN, is_pipeline, local_path, metadata_of_origin
from potstill.engine.models.weights import read_metadata
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.nets.edm2_latents import STABILITY
from potstill.engine.training.ranks import Ranks

HELD_OUT = "held-out.jsonl"  # in a run folder: the pairs of digits that no picture of `scenes` shows


@dataclass
class Told:
    """Embedded prompts and captions of a run; captions are None where its method looks at no real samples.

    held_out: those that are scored apart (`eval.held_out`), None for none.
    """

    prompts: Prompts
    captions: Prompts | None
    held_out: Prompts | None = None

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
    encoder are none; and for scores of nets that are told no prompts. Nothing is loaded or encoded.
    """
    given = cfg.teacher.checkpoint
    if cfg.data.flips and images is not None and images.source.path == scenes.NAME:
        raise UserError("data.flips mirrors pictures, and captions of scenes say what is left and right: set it to false")
    if given is not None and images is not None and images.latent and is_pipeline(local_path(given)):
        check_vae(images, local_path(given))
    file = local_path(given) if given is not None and images is not None and images.moments else None
    if images is not None and file is not None and file.is_file() and affine_of(read_metadata(file)) != STABILITY:
        raise UserError(f"teacher {given} was trained on latents of another scale than EDM2's, which those of {images.name} have")
    if not teacher.text:
        if cfg.text.prompts is not None:
            raise UserError(f"text.prompts is for teachers that are told prompts, and {given or 'this one'} is not: set it to null")
        if cfg.eval.scores:
            raise UserError(f"eval.scores are of pictures and their prompts, and {given or 'this teacher'} is told none: set it to []")
        return
    if given is None:
        check_newborn(cfg, images)
    elif not is_pipeline(local_path(given)):
        raise UserError(f"teacher {given} is told prompts, and a weight file has no text encoder: name its pipeline as teacher.checkpoint")
    captions = captions_file(images, Path())
    if cfg.text.prompts is None and captions is None:
        raise UserError(
            f"teacher {given} is told prompts: set text.prompts=FILE (.txt with one a line, .jsonl), or data.path to data with captions"
        )
    if cfg.method.needs().data and images is not None and captions is None:
        how = "potstill convert latents SRC OUT --captions FILE" if images.latent else "set data.captions=FILE"
        raise UserError(
            f"method {cfg.method.name} looks at real samples and must be told what they show, and {images.name} has no captions: {how}"
        )
    if cfg.method.needs().pairs:
        raise UserError("method.regression makes pairs for classes, and this teacher is told prompts: set it to 0")
    if is_pipeline(pipeline := text_place(cfg)):
        check_encoder(pipeline, cfg.text.max_length)
    for file, _ in prompt_files(cfg, images, Path()):
        texts_of(file, images, Path())
    if held_out(cfg) and cfg.eval.held_out != scenes.NAME:
        read_prompts(str(cfg.eval.held_out))


def check_newborn(cfg: Config, images: Images | None) -> None:
    """UserError where a teacher that is told prompts cannot be trained here: on latents, for want of captions, or of a text encoder that takes
    them.
    """
    if images is not None and images.latent:
        raise UserError(
            f"{cfg.net.model_type} is trained here on pictures, and {images.name} holds latents: name a pipeline as teacher.checkpoint"
        )
    if images is not None and images.captions is None:
        raise UserError(f"{cfg.net.model_type} is told what its pictures show, and {images.name} has no captions: set data.captions=FILE")
    if not is_pipeline(text_place(cfg)):
        check_text_encoder(encoder_of(cfg), cfg.text.max_length)


def text_place(cfg: Config) -> Path:
    """The folder of the pipeline that embeds prompts: the teacher's, or that of the teacher that is trained here."""
    given = cfg.teacher.checkpoint
    return local_path(given) if given else Path(cfg.run_dir or "").expanduser() / OWN


def check_caches(cfg: Config, images: Images | None, folder: Path) -> None:
    """UserError where the embeddings of a run are another encoder's, or of other prompts."""
    text, pipeline = cfg.text, text_place(cfg)
    for file, cache in prompt_files(cfg, images, folder) if text.how == "cached" and is_pipeline(pipeline) else []:
        texts, device = texts_of(file, images, folder), device_named(cfg.device)
        check_embeddings(cache, texts, pipeline, device, precision=text.precision, max_length=text.max_length)


def captions_file(images: Images | None, folder: Path) -> Path | None:
    """Where the captions stand: beside latents, or, of pictures, in the run folder; None where there are none."""
    if images is None or images.captions is None:
        return None
    return Path(images.source.path if images.latent else folder) / CAPTIONS


def texts_of(file: str | Path, images: Images | None, folder: Path) -> list[str]:
    """The prompts in a file, also of one that will stand in the run folder when the run begins."""
    ours = file == captions_file(images, folder)
    return images.captions if ours and images and images.captions else read_prompts(file)


def keep_captions(images: Images | None, folder: Path) -> None:
    """Write the captions of pictures into the run folder, unless they are there."""
    if (file := captions_file(images, folder)) and images and not images.latent and not file.is_file():
        write_captions(file, images.captions or [])


def prompt_files(cfg: Config, images: Images | None, folder: Path) -> list[tuple[str | Path, Path]]:
    """What the prompts and, where the method looks at real samples that have some of their own, the captions are read from; and their caches."""
    captions = captions_file(images, folder)
    cache = Path(cfg.text.cache).expanduser() if cfg.text.cache else folder / "text"
    files: list[tuple[str | Path, Path]] = [(cfg.text.prompts or captions or "", cache)]
    if cfg.text.prompts and captions is not None and looks(cfg):
        files.append((captions, cache.with_name(f"{cache.name}-captions")))
    return files


def open_told(cfg: Config, images: Images | None, folder: Path, device: torch.device, ranks: Ranks) -> Told:
    """Everything embedded, on one rank and once, or the text encoder that will do it."""
    pipeline = text_place(cfg)
    ranks.on_first(lambda: keep_captions(images, folder))

    def opened(file: str | Path, cache: Path) -> Prompts:
        text = replace(cfg.text, prompts=str(file))
        ranks.on_first(lambda: prepare_prompts(text, pipeline, cache, device))
        return open_prompts(text, pipeline, cache, device)

    files = prompt_files(cfg, images, folder)
    prompts, *others = (opened(file, cache) for file, cache in files)
    shows = looks(cfg) and captions_file(images, folder) is not None
    apart = None
    if held_out(cfg):
        ours = cfg.eval.held_out == scenes.NAME
        file = folder / HELD_OUT if ours else str(cfg.eval.held_out)
        if ours and not ranks.agree((folder / HELD_OUT).exists()):
            texts = [scenes.caption_of(scene) for scene in scenes.all_scenes(held_out=True)]
            ranks.on_first(lambda: write_captions(folder / HELD_OUT, texts))
        which = hash_of_texts(read_prompts(file))[:8]  # eval.held_out may change within a run, and runs may share a cache
        apart = opened(file, files[0][1].with_name(f"{files[0][1].name}-held-out-{which}"))
    return Told(prompts, (others or [prompts])[0] if shows else None, apart)


def held_out(cfg: Config) -> bool:
    """Are there prompts that are scored apart?"""
    return bool(cfg.eval.held_out and cfg.eval.scores)


def a_prompt(cfg: Config, images: Images | None) -> str:
    """One of those that nets are measured with: the first."""
    captions = None if images is None or (cfg.text.prompts and not looks(cfg)) else images.captions
    texts = captions or (read_prompts(cfg.text.prompts) if cfg.text.prompts and Path(cfg.text.prompts).expanduser().exists() else [])
    return texts[0] if texts else "a picture"


def looks(cfg: Config) -> bool:
    """Does anything of this run look at real samples, and so at their captions?"""
    return cfg.method.needs().data or cfg.teacher.checkpoint is None or cfg.students.net is not None


def decode_of(cfg: Config, teacher: Denoiser, device: torch.device) -> Decode | None:
    """How the teacher's samples become pictures: by its pipeline's VAE, or by teacher.vae; None where they are some.

    Of latents that nobody decodes three channels are shown. UserError where features of pictures are wanted of them.
    """
    path = local_path(cfg.teacher.checkpoint) if cfg.teacher.checkpoint else None
    if path is not None and is_pipeline(path):
        return VAE(path, device).decode if decodes(path) else None
    if isinstance(teacher, DiffusersDenoiser) or teacher.img_channels in (1, 3):
        return None
    if cfg.teacher.vae is None and cfg.data.path and cfg.eval.features != "pixels":
        raise UserError(
            f"eval.features={cfg.eval.features} is of pictures, and the teacher makes latents that nobody decodes: set teacher.vae, or "
            "eval.features=pixels"
        )
    metadata = metadata_of_origin(path) if path is not None and path.is_file() else {}
    found = decoder_of(cfg.teacher.vae, metadata, device) if cfg.teacher.vae and teacher.img_channels == CHANNELS else None
    return found or first_three
