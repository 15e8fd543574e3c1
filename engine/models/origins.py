"""Where a teacher comes from: a weight file, or a pipeline of diffusers, which is a folder or USER/NAME on the Hugging Face hub."""

# diffusers and huggingface_hub are optional.
# pyright: reportMissingImports=false

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from potstill.engine.common.errors import UserError
from potstill.engine.common.packages import installed
from potstill.engine.models.weights import load_net, read_metadata
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.nets.lora import merged
from potstill.engine.nets.parts import LOADED, wanted_files
from potstill.engine.nets.pipelines import READ, diffusers, place_of

INDEX = "model_index.json"
OWN = "pipeline"  # in a run folder: that of a teacher of text to image that was trained there
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SETTINGS = {"Scheduler": ("scheduler_config.json",), "Processor": ("processor_config.json", "preprocessor_config.json")}  # one of these
WORDS = (["tokenizer.json"], ["vocab.json", "merges.txt"], ["*.model"], ["vocab.txt"])  # of a tokenizer: all of one of these


def local_path(name: str) -> Path:
    """A teacher's file or folder; what is neither and looks like a name on the hub is its snapshot in the hub's cache, if it has one."""
    path = Path(name).expanduser()
    return path if path.exists() or not on_hub(name) else _snapshot(name) or path


def on_hub(name: str) -> bool:
    """Can this be a name on the hub?"""
    return HUB_ID.fullmatch(name) is not None and not name.endswith(".safetensors")


def is_there(name: str) -> bool:
    """Is there a weight file, or a pipeline?"""
    path = local_path(name)
    return path.is_file() or is_pipeline(path)


def to_come(name: str) -> bool:
    """Is it the name of a pipeline on the hub that is not here?"""
    return on_hub(name) and not is_there(name)


def is_pipeline(path: Path) -> bool:
    return (path / INDEX).is_file()


def fetch(name: str, how: str = "") -> None:
    """Download a pipeline from the hub, or what a download that was interrupted has left out: safetensors and settings, no pickle and no
    code. UserError, which ends with `how`, where it is not here whole afterwards.
    """
    library = diffusers()
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        library.DiffusionPipeline.download(name, use_safetensors=True)
        _snapshot.cache_clear()
        reason = ""
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError, *_broken_lines()) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    if not reason and _snapshot(name):
        return
    advice, begun = f". {how}" * bool(how), cached(name)
    if begun is None:
        raise UserError(
            f"no file or folder at {name}, and no pipeline of that name came from the hub ({reason or 'nothing came'})" + advice
        )
    raise UserError(
        f"{name} is not whole in the hub's cache, where {begun} lacks {lacking(begun) or 'nothing'}, and the rest did not come from the hub "
        f"({reason or 'which has no more, or cannot be reached'}): run this again where it can be reached" + advice
    )


def _broken_lines() -> tuple[type[Exception], ...]:
    """What newer versions of the hub's package raise where a connection breaks; older ones raise OSErrors."""
    if not installed("httpx"):
        return ()
    import httpx

    return (httpx.HTTPError,)


def fetched(name: str) -> Path:
    """`local_path`, after a download where it has the name of a pipeline on the hub and is not here."""
    if to_come(name):
        fetch(name)
    return local_path(name)


@cache
def _snapshot(name: str) -> Path | None:
    """Where the hub's cache has this pipeline whole; None where it has not, also where a download was interrupted. Asks no network."""
    found = cached(name)
    return found if found is not None and lacking(found) is None else None


def cached(name: str) -> Path | None:
    """Where the hub's cache has anything of this name; None where it has not."""
    if not installed("huggingface_hub"):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def lacking(folder: Path) -> str | None:
    """The first file that a pipeline lacks of what is read of it, weights with all their shards; None where it is whole."""
    index = _json(folder / INDEX)
    if not isinstance(index, dict):
        return INDEX
    read = {name: kind for name, kind in index.items() if name.startswith(READ) and isinstance(kind, list) and len(kind) == 2}
    parts = {name: kind for name, kind in read.items() if all(isinstance(word, str) for word in kind) and kind[0] in LOADED}
    missing = {name: _lacking_of_part(place_of(folder, name), *kind) for name, kind in parts.items()}
    return next((f"{name}/{file}" for name, file in missing.items() if file), None)


def _lacking_of_part(part: Path, library: str, kind: str) -> str | None:
    """kind: its class, whose name tells what is in it."""
    if "Tokenizer" in kind:
        words = any(all(list(part.glob(file)) for file in files) for files in WORDS)
        return "tokenizer_config.json" if not (part / "tokenizer_config.json").is_file() else None if words else WORDS[0][0]
    files = next((files for end, files in SETTINGS.items() if kind.endswith(end)), None)
    if files is not None:
        return None if any((part / file).is_file() for file in files) else files[0]
    if not (part / "config.json").is_file():
        return "config.json"
    return next((file.name for file in wanted_files(part, library) if not file.is_file()), None)


def _json(path: Path) -> Any:
    """What a file says; None where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def load_origin(
    path: Path, *, dtype: torch.dtype | None = None, size: tuple[int, ...] | None = None, guidance: float | None = None,
    planned: bool = False,
) -> Denoiser:  # fmt: skip
    """The denoiser of a weight file or pipeline, in eval mode. Of a pipeline: its weights in `dtype` (None: float32), samples of
    `size` and the `guidance` that is embedded (None: what it says itself); `planned`, it has no numbers.
    """
    if not is_pipeline(path):
        net = load_net(path)[0]
        if net.adapters is not None:  # a student as a teacher is a net like any other
            net = merged(net)
            net.source = str(path.resolve())
        return net
    fixed = None if guidance is None else {"guidance": guidance}
    net = DiffusersDenoiser.from_folder(path, dtype=dtype, size=size, fixed=fixed, planned=planned)
    net.source = str(path.resolve())
    return net


def metadata_of_origin(path: Path) -> dict[str, Any]:
    """What a weight file says about itself; a pipeline says nothing that a run wants to know."""
    return {} if is_pipeline(path) else read_metadata(path)
