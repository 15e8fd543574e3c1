"""Rows of a bench on disk the moment they are measured: a process that is killed loses the row it was at and no other.

A results folder holds one JSON file a group, `{"machine": …, "rows": […]}`. A row of the same case replaces the older one.
With PACK=FOLDER in the environment the whole results folder is also packed into one .tar.gz there after every row.
"""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

from benches import harness


def keep(folder: Path, row: dict[str, Any]) -> Path:
    """Write a row ("group", "kind", "case", …) into its group's file, and pack the folder where PACK says so."""
    path = place_of(folder, row["group"], row["kind"])
    rows = [old for old in rows_in(path) if old["case"] != row["case"] or old.get("rung") != row.get("rung")]
    machine = harness.machine(harness.CUDA if row["kind"] == "cuda" else harness.CPU)
    write(path, {"machine": machine, "rows": [*rows, row]})
    pack(folder)
    return path


def place_of(folder: Path, group: str, kind: str) -> Path:
    """GROUP.json; of CPU rows on a machine with a GPU, GROUP-cpu.json."""
    return folder / (f"{group}-cpu.json" if kind == "cpu" and harness.rehearse.THERE else f"{group}.json")


def rows_in(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write(path: Path, value: Any) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(half, path)


def pack(folder: Path) -> None:
    """PACK/<name of the folder>.tar.gz anew, whole or not at all; nothing without PACK."""
    if not (to := os.environ.get("PACK")):
        return
    target = Path(to) / f"{folder.name}.tar.gz"
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_name(f".{target.name}.{os.getpid()}")
    with tarfile.open(half, "w:gz", compresslevel=1) as archive:
        archive.add(folder, folder.name, filter=lambda info: None if Path(info.name).name.startswith(".") else info)
    os.replace(half, target)
