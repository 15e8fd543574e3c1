"""Readers of what a run leaves and is told: recipes, overrides, checkpoints, summaries, curves, references."""

import dataclasses
import json
import math
import os
import pickle
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from potstill.engine.common.download import digest, fetch
from potstill.engine.config.schema import Config, flat, to_yaml
from potstill.engine.config.tree import load
from potstill.engine.evaluate import teacher_of_summary
from potstill.engine.jobs.folder import check_folder
from potstill.engine.measure.networks import read_state_dict
from potstill.engine.measure.references import read_reference
from potstill.engine.measure.report import write_report
from potstill.engine.training.checkpoint import load_newest, save_checkpoint
from potstill.engine.training.log import MetricsFile
from potstill.engine.training.sharded import SUM
from potstill.engine.training.states import without_tensors, write_state

from .forms import npy_of, pickle_of, zip_of
from .jail import Reader
from .models import RECIPE, SUMMARY
from .mutations import WRONG, YAML, json_of, lines_of, text, yaml_of
from .pictures import _encoded

CURVES = [{"step": k, "kimg": k / 2, "seconds": 1.0 * k, "student/loss": 1 / k, "fd@pixels": 3.0} for k in range(1, 6)]
MINE = "defaults:\n  - digits\n  - _self_\nseed: 3\ntrain:\n  batch: 64\n  kimg: 20\nmethod:\n  sigma: 2.5\nlog:\n  wandb: null\n"
STATE = {
    "nets": {"student": {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(4)}}, "optimizers": {"lr": 1e-3, "m": torch.zeros(3, 4)},
    "ema": {}, "method": {}, "meter": {"counts": {"a": 3}, "sums": {"a": torch.tensor(1.5)}}, "seconds": 1.5, "best": 2.0,
}  # fmt: skip


# Recipes and overrides


def _recipe(folder: Path) -> None:
    (folder / "mine.yaml").write_text(MINE)


def _settings(folder: Path) -> dict[str, Any]:
    return flat(dataclasses.asdict(load(folder / "mine.yaml", [])))


def _false_settings(found: dict[str, Any], right: dict[str, Any], damaged: bool) -> str | None:
    """Any setting may be another, but a number is one, and nothing of the environment is in it."""
    for key, value in found.items():
        if isinstance(value, float) and math.isnan(value):
            return f"{key} is {value}"
        if isinstance(value, str) and value.startswith("/root"):
            return f"{key} tells of the environment"
    return None


def _overrides(folder: Path) -> None:
    (folder / "words.txt").write_text("train.batch=64")


def _overridden(folder: Path) -> dict[str, Any]:
    words = (folder / "words.txt").read_bytes().decode("utf-8", "surrogateescape")
    return flat(dataclasses.asdict(load("digits", [words])))


def words_of(data: bytes) -> st.SearchStrategy[bytes]:
    """key=value with keys of every kind and what their values are not."""
    keys = (
        "train.batch",
        "seed",
        "method.sigma",
        "data.path",
        "train.optim.student.lr",
        "+x.y",
        "~train",
        "method",
        "run_dir",
        "net",
        "++a",
        "eval.n",
        "x@y",
    )
    values = st.sampled_from(WRONG).map(text) | st.sampled_from(YAML) | st.text(max_size=12)
    return st.builds(lambda key, value: f"{key}={value}".encode("utf-8", "surrogatepass"), st.sampled_from(keys), values)


@cache
def _now() -> Config:
    return load("digits", [])


def _config(folder: Path) -> None:
    """The settings that a run began with."""
    (folder / "config.yaml").write_text(to_yaml(_now()))


def _goes_on(folder: Path) -> Any:
    return check_folder(dataclasses.replace(_now(), run_dir=str(folder)))


# Checkpoints


def _checkpoint(folder: Path) -> None:
    save_checkpoint(folder, 7, STATE, 2)


def _sharded(folder: Path) -> None:
    path = folder / "00000007.dcp"
    path.mkdir()
    tensors, rest = without_tensors({"step": 7} | STATE)
    write_state(path / "rest.pt", rest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single process
        save(tensors, storage_writer=FileSystemWriter(str(path)), no_dist=True)
    (path / SUM).write_text(digest(path / ".metadata") + "\n")


def _newest(folder: Path) -> dict[str, Any] | None:
    return load_newest(folder, "cpu")


def _false_state(found: Any, right: Any, damaged: bool) -> str | None:
    return None if _told(found) == _told(right) else "a damaged state"


def _told(state: Any) -> str:
    """A state in words; equal states have the same."""
    if isinstance(state, dict):
        return "{" + ", ".join(f"{key!r}: {_told(value)}" for key, value in state.items()) + "}"
    return f"{state.dtype}{list(state.shape)}{state.tolist()}" if isinstance(state, torch.Tensor) else repr(state)


# Summaries and curves


def _left(folder: Path) -> None:
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in CURVES))
    (folder / "config.yaml").write_text(RECIPE)
    (folder / "samples.png").write_bytes(_encoded(0, "png"))


def _report(folder: Path) -> str:
    page = write_report(folder).read_text(encoding="utf-8")
    (folder / "report.html").unlink()
    return page


def _false_page(found: str, right: str, damaged: bool) -> str | None:
    drawn = found.partition("<pre")[0]
    return "a page that runs a script" if "<script" in drawn else None


def _resumed(folder: Path) -> str:
    text = (folder / "metrics.jsonl").read_bytes()
    MetricsFile(folder / "metrics.jsonl", 3)
    found = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    (folder / "metrics.jsonl").write_bytes(text)
    return found


def _false_metrics(found: str, right: str, damaged: bool) -> str | None:
    return None if len(found.splitlines()) <= len(CURVES) + 1 else "lines that were not there"


def _known(folder: Path) -> Any:
    return teacher_of_summary(
        folder,
        {k: SUMMARY["student"].get(k) for k in ("features", "n", "seeds", "data")}
        | dict.fromkeys(("features_sha256", "labels", "reference_sha256")),
    )


# References and features


def _gaussian(folder: Path) -> None:
    np.savez(folder / "ref.npz", mu=np.arange(4.0), sigma=np.eye(4) * 2)


def _edm2(folder: Path) -> None:
    entry = {"mu": np.arange(4.0), "sigma": np.eye(4) * 2}
    (folder / "ref.pkl").write_bytes(pickle.dumps({"num_images": 10, "fid": entry, "fd_dinov2": entry}, protocol=4))


def _reference(name: str) -> Callable[[Path], Any]:
    return lambda folder: read_reference(folder / name, "fid")


def _false_gaussian(found: Any, right: Any, damaged: bool) -> str | None:
    mean, covariance = found
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        return "a reference that is not finite"
    same = torch.equal(mean, right[0]) and torch.equal(covariance, right[1])
    return None if same or not damaged else "a damaged reference"


def _unlike_any(found: Any, right: Any, damaged: bool) -> str | None:
    """EDM2's pickles have no checksums: only what is no number can be known."""
    return "a reference that is not finite" if not (found[0].isfinite().all() and found[1].isfinite().all()) else None


def _weights(folder: Path) -> None:
    torch.save({"a.weight": torch.ones(3, 4), "a.bias": torch.zeros(3)}, folder / "net.pth")


def _state(folder: Path) -> dict[str, Any]:
    return read_state_dict(folder / "net.pth")


def _anything(found: Any, right: Any, damaged: bool) -> None:
    return None


# Downloads: what lies in the cache, and the note of its sha256 that its first use has left


def _cached(folder: Path) -> None:
    place = folder / "x.example/net.pkl"
    place.parent.mkdir()
    place.write_bytes(bytes(range(256)))
    _fetched(folder)


def _fetched(folder: Path) -> bytes:
    with patch.dict(os.environ, {"POTSTILL_CACHE": str(folder)}):
        return fetch("https://x.example/net.pkl", command="again").read_bytes()


def _false_download(found: bytes, right: bytes, damaged: bool) -> str | None:
    return None if found == right else "a damaged download"


CACHED = {"x.example/net.pkl": None, "x.example/net.pkl.sha256": None}
SHARDS = {f"00000007.dcp/{file}": None for file in ("rest.pt", "__0_0.distcp", SUM)} | {"00000007.dcp/.metadata": pickle_of}
METRICS = {"metrics.jsonl": lines_of}
READERS = [
    Reader("recipe", _recipe, _settings, {"mine.yaml": yaml_of}, _false_settings, 20, both=0.3),
    Reader("overrides", _overrides, _overridden, {"words.txt": words_of}, _false_settings, 12, both=0.1),
    Reader("config.yaml, going on", _config, _goes_on, {"config.yaml": yaml_of}, _anything, 10),
    Reader("checkpoint", _checkpoint, _newest, {"00000007.pt": None}, _false_state, 900),
    Reader("checkpoint, sharded", _sharded, _newest, SHARDS, _false_state, 600),
    Reader("report", _left, _report, {"summary.json": json_of, **METRICS, "samples.png": None, "config.yaml": None}, _false_page, 150),
    Reader("metrics, going on", _left, _resumed, METRICS, _false_metrics, 400),
    Reader("summary, evaluated", _left, _known, {"summary.json": json_of}, _anything, 300),
    Reader("reference", _gaussian, _reference("ref.npz"), {"ref.npz": zip_of(npy_of)}, _false_gaussian, 600),
    Reader("reference, EDM2's", _edm2, _reference("ref.pkl"), {"ref.pkl": pickle_of}, _unlike_any, 600),
    Reader("download", _cached, _fetched, CACHED, _false_download, 200),
    Reader("features", _weights, _state, {"net.pth": None}, _anything, 300),
]  # fmt: skip
