"""What a run was begun with, by content: its data, its teacher, its plan. A path alone does not say that they are still the same.

inputs.json in the run folder holds their marks; a later call with other contents at the same path is refused, since it would be
another run that calls itself the old one.
"""

from pathlib import Path
from typing import Any

from potstill.engine.common.download import digest
from potstill.engine.common.errors import UserError
from potstill.engine.common.reading import read_json
from potstill.engine.config.schema import Config
from potstill.engine.data.captions import file_of, hash_of_texts
from potstill.engine.data.images import Images
from potstill.engine.data.pipelines import TEXT, hash_of_part
from potstill.engine.jobs.folder import write_json
from potstill.engine.jobs.told import captions_file, prompt_files, text_place
from potstill.engine.models.origins import is_pipeline, local_path
from potstill.engine.models.weights import file_hash, weights_hash
from potstill.engine.nets.denoiser import Denoiser

FILE = "inputs.json"
Marks = dict[str, dict[str, Any]]


def marks_of(cfg: Config, images: Images | None, teacher: Denoiser | None, *, text: bool = False) -> Marks:
    """What identifies each input. teacher: None where it is still to be trained; text: is it told prompts?"""
    marks: Marks = {}
    if images is not None:
        marks["data"] = images.fingerprint()
    given = local_path(cfg.teacher.checkpoint) if cfg.teacher.checkpoint else None
    if given is not None and is_pipeline(given):
        marks["teacher"] = mark_of(given)
    elif teacher is not None:
        marks["teacher"] = {"sha256": weights_hash(teacher)}
    if text:
        marks |= text_marks(cfg)
        captions = captions_file(images, Path())
        for name, (file, _) in zip(("file of prompts", "file of captions"), prompt_files(cfg, images, Path()), strict=False):
            ours = file == captions and images is not None and not images.latent
            marks[name] = {"sha256": hash_of_texts(images.captions or []) if ours and images else digest(file_of(file))}
    if cfg.teacher.guide:
        marks["guide"] = {"sha256": file_hash(Path(cfg.teacher.guide).expanduser())}
    if cfg.skipping.plan:
        marks["plan"] = {"sha256": digest(Path(cfg.skipping.plan).expanduser())}
    return marks


def text_marks(cfg: Config) -> Marks:
    """What identifies the text encoder, where it is there."""
    return {"text encoder": {"sha256": hash_of_part(place, *TEXT)}} if is_pipeline(place := text_place(cfg)) else {}


def mark_of(pipeline: Path) -> dict[str, str]:
    """What identifies a teacher that is a pipeline."""
    return {"sha256": hash_of_part(pipeline, "unet", "transformer", "scheduler")}


def check_inputs(folder: Path, marks: Marks) -> None:
    """UserError where an input is another one than when the run began; changes nothing."""
    for name, before in _stored(folder).items():
        now = marks.get(name)
        if now is None or not isinstance(before, dict):
            continue
        changed = [f"{key} was {before[key]}, now {now[key]}" for key in now if key in before and before[key] != now[key]]
        if changed:
            raise UserError(
                f"{folder} was begun with another {name}: {'; '.join(changed)[:200]}. Put the old one back or give a new run_dir=; to go on "
                f"with the new one all the same, remove {folder / FILE}"
            )


def note_inputs(folder: Path, marks: Marks) -> None:
    """Remember them, beside those that are remembered already."""
    before = _stored(folder)
    if before | marks != before:
        write_json(folder / FILE, before | marks)


def _stored(folder: Path) -> Marks:
    path = folder / FILE
    return read_json(path, dict, f"remove it, and {folder} goes on with the data and teacher that are there now") if path.exists() else {}
