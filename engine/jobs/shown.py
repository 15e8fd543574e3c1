"""How the samples of a finished run's nets become pictures, for commands that know its folder only: prompts, and the VAE that decodes."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from potstill.engine.common.checks import BadSetting
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.reading import read_json
from potstill.engine.data.captions import CAPTIONS
from potstill.engine.data.embeddings import Encoder
from potstill.engine.data.pipelines import decodes
from potstill.engine.data.prompts import Prompts, TextConfig, open_prompts
from potstill.engine.data.shards import MANIFEST
from potstill.engine.data.vae import VAE
from potstill.engine.jobs.finish import Shown
from potstill.engine.jobs.inputs import FILE, mark_of
from potstill.engine.models.decoding import CHANNELS, decoder_of
from potstill.engine.models.opening import TEACHER, Model, run_of, settings, teacher_elsewhere
from potstill.engine.models.origins import is_pipeline
from potstill.engine.models.router import Router, one_of
from potstill.engine.nets.diffusers import DiffusersDenoiser


def shown_of(
    source: Path, model: Model, device: torch.device, asked: list[str] | None = None, pipeline: Path | None = None
) -> Shown:  # fmt: skip
    """What the net of `source`, a run folder, a file in one or a pipeline's folder, is told, and how its latents are decoded.

    The net gets the null prompt that its guidance wants. asked: prompts; None: those of the run. pipeline: the teacher's; None: where the
    run or the file says. UserError where that is not there, for prompts that are missing, and for a teacher that was another in the run.
    """
    net = one_of(model.net)
    if not isinstance(net, DiffusersDenoiser):
        for given, option in ((asked, "--prompts"), (pipeline, "--pipeline")):
            if given is not None:
                wants = "is told no prompts" if option == "--prompts" else "is no net of diffusers, and belongs to no pipeline"
                raise UserError(f"{model.path} {wants}: leave {option} out")
        named = (settings(source).get("teacher") or {}).get("vae")
        return Shown(decode=decoder_of(named, model.metadata, device) if net.img_channels == CHANNELS else None)
    if asked is not None and not net.text:
        raise UserError(f"{model.path} is told no prompts: leave --prompts out")
    given, recipe = pipeline, {} if is_pipeline(source) else settings(source)
    if given is None and model.role == TEACHER and is_pipeline(model.path):
        given = model.path
        check_teacher(source, given)
    elsewhere = None if is_pipeline(source) else teacher_elsewhere(source)
    place = given or elsewhere or (Path(net.source) if net.adapters is not None else None)
    if place is None or not is_pipeline(place):
        if not net.text and net.img_channels in (1, 3):
            return Shown()  # pictures as they are
        named = (recipe.get("teacher") or {}).get("checkpoint")
        where = f"{named}, which is not there: put it back" if named else "which nothing beside it names: name the run folder instead"
        parts = "prompts and VAE" if net.text else "VAE"
        raise UserError(f"{model.path} wants the pipeline of its teacher for its {parts}, {where}, or name its folder with --pipeline")
    decode = VAE(place, device).decode if decodes(place) else None
    prompts = _prompts(source, recipe, place, device, asked) if net.text else None
    if prompts is not None and prompts.null is not None and isinstance(model.net, DiffusersDenoiser | Router):
        model.net.null = prompts.null
    return Shown(prompts, decode)


def check_teacher(source: Path, pipeline: Path) -> None:
    """UserError where the run at `source` began with another pipeline in this place."""
    file = run_of(source) / FILE
    if is_pipeline(source) or not is_pipeline(pipeline) or not file.is_file():
        return
    marks = read_json(file, dict, "remove it, and nothing is compared with it")
    before = marks.get("teacher")
    if isinstance(before, dict) and "sha256" in before and before["sha256"] != mark_of(pipeline)["sha256"]:
        raise UserError(
            f"{pipeline} is another pipeline than the one that {source} began with: put that one back, or name its folder with --pipeline"
        )


def _prompts(source: Path, recipe: dict[str, Any], pipeline: Path, device: torch.device, asked: list[str] | None) -> Prompts:
    """Those that are asked for; else those that the run was measured with, from its cache if that is there."""
    text = _text_settings(source, recipe)
    if asked is not None:
        encoder = Encoder(pipeline, device, precision=text.precision, max_length=text.max_length)
        return Prompts(asked, lambda ids: encoder([asked[i] for i in ids]), encoder.null, device)
    run = run_of(source)
    cache = Path(text.cache).expanduser() if text.cache else run / "text"
    beside = Path((recipe.get("data") or {}).get("path") or "").expanduser() / CAPTIONS
    captions = beside if beside.is_file() else run / CAPTIONS
    apart = cache.with_name(f"{cache.name}-captions")
    if captions.is_file() and (text.prompts is None or apart.is_dir()):
        text.prompts, cache = str(captions), apart if text.prompts else cache
    if text.prompts is None:
        more = "; potstill evaluate asks with the captions of --data, of latents that have some" if is_pipeline(source) else ""
        raise UserError(f"{source} does not say which prompts its nets are told: give some with --prompts (potstill sample){more}")
    text.how = text.how if (cache / MANIFEST).is_file() else "live"
    return open_prompts(text, pipeline, cache, device)


def _text_settings(source: Path, recipe: dict[str, Any]) -> TextConfig:
    given, known = recipe.get("text") or {}, {field.name for field in fields(TextConfig)}
    try:
        return TextConfig(**{name: value for name, value in given.items() if name in known})
    except (BadSetting, TypeError, AttributeError) as error:
        raise Damaged(f"config.yaml of {source} does not hold the settings of a run (text.): restore it") from error
