"""The run folder and its config.yaml: a run is only ever continued with the settings it began with."""

import errno
import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from potstill.engine.common.errors import UserError
from potstill.engine.common.writing import whole
from potstill.engine.config.tree import Config, differences, to_yaml

# Settings that may change when a run is continued; all others would make the new part disagree with the old.
FREE = ("run_dir", "log.", "eval.", "data.workers", "data.how", "teacher.how", "device", "student", "cudnn_benchmark", "deterministic")
FREE_OF_STAGE = ("kimg", "keep", "grid_kimg", "eval_kimg", "checkpoint_kimg", "micro_batch", "parallel")


def check_folder(cfg: Config) -> None:
    """UserError unless the run folder can be made, or holds a run with these settings; changes nothing."""
    folder = Path(cfg.run_dir or "").expanduser()
    nearest = folder
    try:
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        before = stored.read_text(encoding="utf-8") if (stored := folder / "config.yaml").exists() else None
        if before not in (None, text := to_yaml(cfg)):
            check_settings(before, text, folder)
    except OSError as error:
        raise _unwritable(folder, error) from error


def prepare(cfg: Config) -> Path:
    """The run folder with config.yaml in it. Refuses to go on with other settings than the run began with."""
    check_folder(cfg)
    folder = Path(cfg.run_dir or "").expanduser()
    try:
        write_atomically(folder / "config.yaml", to_yaml(cfg))
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to run folder {folder} ({error.strerror}): choose another with run_dir=")


def check_settings(before: str, now: str, folder: Path) -> None:
    """UserError where a setting differs between two files of settings that may not."""
    unset = OmegaConf.to_container(OmegaConf.structured(Config))  # what a run did that began before a setting was there
    old, new = OmegaConf.merge(unset, OmegaConf.create(before)), OmegaConf.create(now)
    assert isinstance(old, DictConfig) and isinstance(new, DictConfig)
    changed = [k for k in differences(old, new) if not _free(k) and k.rpartition(".")[2] not in FREE_OF_STAGE]
    if changed:
        key = changed[0]
        raise UserError(
            f"{folder} holds a run with other settings: {key} was {OmegaConf.select(old, key)!r}, now {OmegaConf.select(new, key)!r}; "
            f"give a new run_dir=, or remove {folder} to start over"
        )


def write_atomically(path: Path, text: str) -> None:
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def _free(key: str) -> bool:
    return ".fsdp." in key or any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)
