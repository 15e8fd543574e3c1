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
    if weights.name == MANIFEST:
        first = copy_students(weights, folder)
        return write_config(folder, first)
    shutil.copyfile(weights, folder / WEIGHTS)
    write_config(folder, folder / WEIGHTS)


def write_safetensors(weights: Path, folder: Path) -> None:
    """The weight file as it is, under its own name; of several students all, and the manifest that names them."""
    if weights.name == MANIFEST:
        copy_students(weights, folder)
    else:
        shutil.copyfile(weights, folder / "student.safetensors")


def copy_students(manifest: Path, folder: Path) -> Path:
    """Copy a manifest and the files it names. Returns the first of the copies."""
    files = [entry["file"] for entry in json.loads(manifest.read_text(encoding="utf-8"))["students"]]
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(manifest.parent / file, folder / file)
    shutil.copyfile(manifest, folder / MANIFEST)
    return folder / files[0]


def write_config(folder: Path, weights: Path) -> None:
    """config.json: the metadata of a weight file."""
    text = {"library_name": "potstill", **read_metadata(weights)}
    (folder / "config.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n", encoding="utf-8")
