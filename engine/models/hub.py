"""A folder as the Hugging Face hub expects it: model.safetensors, config.json and a model card.

config.json repeats what the weight file says about itself, for people and for the hub's counters; the file decides.
"""

import json
import shutil
from pathlib import Path

from potstill.engine.models.router import MANIFEST
from potstill.engine.models.weights import read_metadata

WEIGHTS = "model.safetensors"


def write_hub(weights: Path, folder: Path) -> None:
    """A student's weight file and its config.json into a folder that exists; of several students, all of theirs."""
    write_config(folder, copy_weights(weights, folder, WEIGHTS))


def copy_weights(weights: Path, folder: Path, name: str) -> Path:
    """Copy a weight file to `name` in a folder; a manifest and all that it names, as they are called. Returns the first weight file."""
    if weights.name != MANIFEST:
        return Path(shutil.copyfile(weights, folder / name))
    files = [entry["file"] for entry in json.loads(weights.read_text(encoding="utf-8"))["students"]]
    for file in [MANIFEST, *files]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(weights.parent / file, folder / file)
    return folder / files[0]


def write_config(folder: Path, weights: Path) -> None:
    """config.json: the metadata of a weight file."""
    text = {"library_name": "potstill", **read_metadata(weights)}
    (folder / "config.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n", encoding="utf-8")
