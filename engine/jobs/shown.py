"""How the samples of a finished run's nets become pictures, for commands that know its folder only: prompts, and the VAE that decodes."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from potstill.engine.common.checks import BadSetting
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.data.captions import CAPTIONS
from potstill.engine.data.embeddings import Encoder
from potstill.engine.data.pipelines import index_of, parts_of
from potstill.engine.data.prompts import Prompts, TextConfig, open_prompts
from potstill.engine.data.shards import MANIFEST
from potstill.engine.data.vae import VAE
from potstill.engine.jobs.finish import Shown
from potstill.engine.models.opening import Model, settings
from potstill.engine.models.origins import is_pipeline, local_path
from potstill.engine.nets.diffusers import DiffusersDenoiser


def shown_of(source: Path, model: Model, device: torch.device, asked: list[str] | None = None) -> Shown:
    """What the net of `source`, a run folder or a file in one, is told, and how its latents are decoded.

    asked: prompts; None: those of the run. UserError where the run does not name its teacher's pipeline, or prompts that are missing.
    """
    net = model.net
    if asked is not None and not (isinstance(net, DiffusersDenoiser) and net.text):
        raise UserError(f"{model.path} is told no prompts: leave --prompts out")
    if not isinstance(net, DiffusersDenoiser):
        return Shown()
    recipe = settings(source)
    named = (recipe.get("teacher") or {}).get("checkpoint") or net.source
    pipeline = local_path(named) if named else None
    if pipeline is None or not is_pipeline(pipeline):
        if not net.text and net.img_channels in (1, 3):
            return Shown()  # pictures as they are
        raise UserError(
            f"{model.path} wants the pipeline of its teacher, {named or 'which nothing here names'}, for its prompts and VAE, and it is not "
            "there: put it back, or name the run folder instead of a file"
        )
    decode = VAE(pipeline, device).decode if "vae" in parts_of(index_of(pipeline)) else None
    return Shown(_prompts(source, recipe, pipeline, device, asked) if net.text else None, decode)


def _prompts(source: Path, recipe: dict[str, Any], pipeline: Path, device: torch.device, asked: list[str] | None) -> Prompts:
    """Those that are asked for; else those that the run was measured with, from its cache if that is there."""
    text = _text_settings(source, recipe)
    if asked is not None:
        encoder = Encoder(pipeline, device, precision=text.precision, max_length=text.max_length)
        return Prompts(asked, lambda ids: encoder([asked[i] for i in ids]), encoder.null, device)
    run = source if source.is_dir() else source.parent
    cache = Path(text.cache).expanduser() if text.cache else run / "text"
    captions = Path((recipe.get("data") or {}).get("path") or "").expanduser() / CAPTIONS
    apart = cache.with_name(f"{cache.name}-captions")
    if captions.is_file() and (text.prompts is None or apart.is_dir()):
        text.prompts, cache = str(captions), apart if text.prompts else cache
    if text.prompts is None:
        raise UserError(f"{source} does not say which prompts its nets are told: give some with --prompts (potstill sample)")
    text.how = text.how if (cache / MANIFEST).is_file() else "live"
    return open_prompts(text, pipeline, cache, device)


def _text_settings(source: Path, recipe: dict[str, Any]) -> TextConfig:
    given, known = recipe.get("text") or {}, {field.name for field in fields(TextConfig)}
    try:
        return TextConfig(**{name: value for name, value in given.items() if name in known})
    except (BadSetting, TypeError, AttributeError) as error:
        raise Damaged(f"config.yaml of {source} does not hold the settings of a run (text.): restore it") from error
