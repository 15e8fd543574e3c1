"""Where a teacher comes from: a weight file, or a pipeline of diffusers, which is a folder or USER/NAME on the Hugging Face hub."""

# diffusers and huggingface_hub are optional.
# pyright: reportMissingImports=false

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
from potstill.engine.nets.pipelines import diffusers

INDEX = "model_index.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
    """Download a pipeline from the hub: safetensors and settings, no pickle and no code. UserError, which ends with `how`, without one."""
    library = diffusers()
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        library.DiffusionPipeline.download(name, use_safetensors=True)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"no file or folder at {name}, and no pipeline of that name came from the hub ({reason})" + f". {how}" * bool(how)
        ) from error
    _snapshot.cache_clear()


def fetched(name: str) -> Path:
    """`local_path`, after a download where it has the name of a pipeline on the hub and is not here."""
    if to_come(name):
        fetch(name)
    return local_path(name)


@cache
def _snapshot(name: str) -> Path | None:
    """Where the hub's cache has this pipeline whole; None where it has not. Asks no network."""
    if not installed("huggingface_hub"):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
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
