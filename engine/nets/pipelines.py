"""What a folder of a diffusers pipeline says about its denoiser: the class, where its folder is, and the scheme it was trained by."""

# diffusers and transformers are optional.
# pyright: reportMissingImports=false

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.kinds import is_list, is_whole, shown
from potstill.engine.common.packages import installed
from potstill.engine.common.reading import read_json
from potstill.engine.diffusion.tables import scheme_of
from potstill.engine.nets.families import family_of

AGAIN = "download the model whole again"
#: How the names of the parts begin that anything here reads; others, such as a safety checker, are copied into exports and no more.
READ = ("unet", "transformer", "scheduler", "vae", "text_encoder", "tokenizer", "processor")
SIDES = (
    "_sides"  # in config.json of what is trained here: height and width, which a class may take for one number; diffusers passes over it
)
LEGACY = "Transformer2DModel"  # as older files call two of today's classes, told apart by norm_type
NOW = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


def diffusers() -> Any:
    """The library. UserError where it is not installed, or lacks what its pipelines want."""
    for package in ("diffusers", "transformers"):
        if not installed(package):
            raise UserError(f"package {package}, for pipelines of diffusers and their nets: pip install 'potstill[diffusers]'")
    import diffusers

    return diffusers


@contextmanager
def quietly() -> Iterator[None]:
    """Without the libraries' bars for each part, and without their notes, which come again with every batch."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    loggings = of_diffusers, of_transformers
    before = [(one, one.get_verbosity(), one.is_progress_bar_enabled()) for one in loggings]
    for one in loggings:
        one.set_verbosity_error()
        one.disable_progress_bar()
    try:
        yield
    finally:
        for one, verbosity, bar in before:
            one.set_verbosity(verbosity)
            if bar:
                one.enable_progress_bar()


def denoiser_in(folder: Path) -> tuple[str, Path, dict[str, Any]]:
    """The denoiser's class, its own folder, and its scheme. UserError where any is missing or not known."""
    diffusers()
    index = _json(folder / "model_index.json")
    found = [part for part in ("unet", "transformer") if _class_in(index, part)]
    scheduler = _class_in(index, "scheduler")
    if not found or not scheduler:
        named = ", ".join(part for part in index if _class_in(index, part)) or "nothing"
        raise UserError(
            f"{folder} wants a unet or transformer and a scheduler in its model_index.json, got {named}: choose another pipeline"
        )
    part = found[0]
    if _class_in(index, f"{part}_2"):
        raise UserError(f"{folder} has two denoisers, {part} and {part}_2, each for half of the noise levels: choose a pipeline of one")
    path = part_of(folder, part)
    name = class_now(path, str(_class_in(index, part)))
    family_of(name)
    return name, path, scheme_of(scheduler, _settings(scheduler, part_of(folder, "scheduler")))


def sides_in(path: Path) -> tuple[int, ...] | None:
    """Height and width that the folder of a denoiser says its samples have; None where it leaves that to the class. Damaged for others."""
    found = read_json(path / "config.json", dict, AGAIN).get(SIDES)
    if found is not None and not is_list(found, lambda side: is_whole(side, 1, 2**20), 2, 3):
        raise Damaged(f"{path / 'config.json'} has {SIDES} = {shown(found)}, wanted height and width: {AGAIN}")
    return None if found is None else tuple(found)


def class_now(path: Path, name: str) -> str:
    """What diffusers calls the class `name` of the denoiser in the folder `path` today."""
    if name != LEGACY:
        return name
    return NOW.get(str(read_json(path / "config.json", dict, AGAIN).get("norm_type")), name)


def part_of(folder: Path, part: str) -> Path:
    """The folder of a part that model_index.json names. UserError where it is not there."""
    if not (path := place_of(folder, part)).is_dir():
        raise UserError(f"no {part}/ in {folder}, though its model_index.json names it: {AGAIN}")
    return path


def place_of(folder: Path, part: str) -> Path:
    """Where it should be. The first pipelines, of a U-Net and a scheduler, lie in one folder, as of google/ddpm-cat-256."""
    flat = {"unet": "config.json", "scheduler": "scheduler_config.json"}.get(part)
    return folder if flat and not (folder / part).is_dir() and (folder / flat).is_file() else folder / part


def _settings(scheduler: str, folder: Path) -> Mapping[str, Any]:
    """A scheduler's settings, with its class's defaults for those that the file leaves out."""
    kind = getattr(diffusers(), scheduler, None)
    if kind is None:
        return {}
    try:
        return kind.from_pretrained(folder, local_files_only=True).config
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"{folder} cannot be read as {scheduler}: {' '.join(str(error).split()):.300}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.parent} is no folder of a diffusers pipeline: {path.name} cannot be read ({error})") from error
    if not isinstance(read, dict):
        raise UserError(f"{path} holds no settings of a pipeline: wanted those that diffusers writes")
    return read


def _class_in(index: Mapping[str, Any], part: str) -> str | None:
    """The class that model_index.json names for a part; None for none."""
    named = index.get(part)
    return named[1] if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str) else None
