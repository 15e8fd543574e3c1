"""The run folder and its config.yaml: a run is only ever continued with the settings it began with."""

import errno
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import SafeLoader, YAMLError

from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.writing import whole
from potstill.engine.config.schema import Config, flat, to_yaml
from potstill.engine.methods.table import settings_of
from potstill.engine.readers.harmless import check_text
from potstill.engine.training.optim import OptimConfig

# Settings that may change when a run is continued; all others would make the new part disagree with the old.
FREE = (
    "run_dir",
    "log.",
    "eval.",
    "data.workers",
    "data.how",
    "teacher.how",
    "text.cache",
    "text.batch",
    "device",
    "student",
    "cudnn_benchmark",
    "deterministic",
    "max_hours",
)
OPTIMISER = re.compile(r"(.+\.optim\.[^.]+)\.[^.]+")  # of one net, and a setting of it
FREE_OF_STAGE = ("kimg", "keep", "grid_kimg", "eval_kimg", "checkpoint_kimg", "phema_kimg", "on_nonfinite", "micro_batch", "parallel")


def check_folder(cfg: Config) -> list[str]:
    """What to say of a run folder with other settings that may change. UserError unless it can be made, or goes on with these; changes nothing."""
    folder = Path(cfg.run_dir or "").expanduser()
    nearest = folder
    try:
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        before = stored.read_text(encoding="utf-8", errors="replace") if (stored := folder / "config.yaml").exists() else None
        return [] if before in (None, text := to_yaml(cfg)) else check_settings(before, text, folder)
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


def check_settings(before: str, now: str, folder: Path) -> list[str]:
    """What to say of settings that differ between two files of them. UserError for those that may not."""
    tree = _tree(before, folder)
    unset: Any = OmegaConf.to_container(OmegaConf.structured(Config))  # what a run did that began before a setting was there
    if (method := settings_of(OmegaConf.select(tree, "method.name", default=""))) is not None:
        unset["method"] = OmegaConf.to_container(OmegaConf.structured(method))
    old, new = (flat(OmegaConf.to_container(one)) for one in (tree, OmegaConf.create(now)))
    nets = {found[1] for found in map(OPTIMISER.fullmatch, old) if found}
    unset = flat(unset) | {f"{net}.{name}": value for net in nets for name, value in asdict(OptimConfig()).items()}
    for key, value in unset.items():
        old.setdefault(key, value)
    if method is not None and settings_of(new["method.name"]) is method:
        old["method.name"] = new["method.name"]  # a variant's name says nothing that its other settings do not
    for key in old | new:
        if old.get(key) != new.get(key) and not _free(key):
            raise UserError(
                f"{folder} holds a run with other settings: {key} was {old.get(key)!r}, now {new.get(key)!r}; "
                f"give a new run_dir=, or remove {folder} to start over"
            )
    lengths = [key for key in new if key.endswith(".kimg") and old.get(key) != new[key] and _spread(key, new)]
    return [
        f"note: {key} was {old.get(key)}, now {new[key]}: what is spread over the whole length (a learning rate's schedule, the last part "
        "without skipping) follows the new one from here on, so this is not the run that began with it"
        for key in lengths
    ]


def _tree(text: str, folder: Path) -> Any:
    """The settings in config.yaml. Damaged where they are not all there."""
    file, advice = folder / "config.yaml", "restore it, or remove it alone if the settings of this command are those the run began with"
    try:
        check_text(text, SafeLoader, str(file))
        tree = OmegaConf.create(text)
        if isinstance(tree, DictConfig) and tree.keys() >= {"seed", "method", "train"}:
            OmegaConf.to_container(tree, resolve=True)
            return tree
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise Damaged(f"{file} is not readable as YAML ({str(error).splitlines()[0]}): {advice}") from error
    raise Damaged(f"{file} is damaged, it does not hold the settings of a run: {advice}")


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def _spread(key: str, settings: dict[str, Any]) -> bool:
    """Does anything stretch over this length?"""
    stage = key.removesuffix(".kimg")
    scheduled = any(k.startswith(f"{stage}.optim.") and k.endswith(".schedule") and v != "constant" for k, v in settings.items())
    return scheduled or bool(
        stage == "train" and settings["skipping.anneal"] and (settings["skipping.plan"] or settings["skipping.cache"] > 1)
    )


def _free(key: str) -> bool:
    free = any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)
    return free or ".fsdp." in key or key.rpartition(".")[2] in FREE_OF_STAGE
