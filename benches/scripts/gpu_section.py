"""The README's section on GPUs, from whatever `make gpu` has left: of every device the newest folder, and what is not in it."""

import json
from pathlib import Path
from typing import Any

from benches.scripts.sections import cell, compare, ladder, table

NO_GPU = "Nothing has been measured on a GPU yet.\n"
Rows = list[dict[str, Any]]
#: Tables: group (its file is GROUP.json), title, columns as (head, key, format).
TABLES: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "rates": ("What PyTorch reaches here, the denominators", [("", "case", ""), ("GB/s", "GB/s", ".0f"), ("TFLOP/s", "TFLOP/s", ".0f")]),
    "losses": (
        "Losses, forward and backward in a CUDA graph, against plain PyTorch with the same outputs; share of a copy's bandwidth",
        [("", "case", ""), ("µs", "ours us", ".1f"), ("times as fast", "eager/ours", ".2f"), ("compiled µs", "compiled", ".1f"), ("of copy", "of copy", ".2f"), ("launches, ours / eager", "launches", "")],
    ),
    "norm_silu": (
        "GroupNorm + SiLU, NHWC bfloat16, Triton and CUDA C++, against PyTorch's",
        [("", "case", ""), ("µs", "ours us", ".1f"), ("times as fast", "eager/ours", ".2f"), ("compiled µs", "compiled", ".1f"), ("of copy", "of copy", ".2f"), ("launches, ours / eager", "launches", "")],
    ),
    "optim": (
        "Adam, EMA and bfloat16 shadows in one pass, against loops over parameters, and PyTorch's fused Adam with foreach",
        [("", "case", ""), ("µs", "ours us", ".1f"), ("times as fast as loops", "eager/ours", ".2f"), ("as fused", "formula/ours", ".2f"), ("of copy", "of copy", ".2f"), ("launches, ours / loops", "launches", "")],
    ),
    "edm2": (
        "EDM2's operations, NHWC bfloat16 and float32 weights, against PyTorch's one by one",
        [("", "case", ""), ("µs", "ours us", ".1f"), ("times as fast", "eager/ours", ".2f"), ("compiled µs", "compiled", ".1f"), ("of copy", "of copy", ".2f"), ("launches, ours / eager", "launches", "")],
    ),
    "step": (
        "Whole iterations, FFHQ-64's net, bfloat16: every turn a CUDA graph against eager",
        [("", "case", ""), ("µs", "ours us", ",.0f"), ("eager µs", "eager", ",.0f"), ("times as fast", "eager/ours", ".2f"), ("img/s", "img/s", ".1f"), ("peak GiB, eager", "peak GiB, eager", ".1f"), ("graphs", "peak GiB, graphs", ".1f")],
    ),
    "rehearsal": (
        "Recipes on random weights and images (rehearse=true). The A100's hours are a projection from the chips' peaks",
        [("", "case", ""), ("batch", "batch", ""), ("img/s", "images_per_second", ".0f"), ("MFU", "mfu", ".2f"), ("peak GiB", "peak_memory_gib", ".1f"), ("hours here", "projected_hours", ",.0f"), ("A100-hours, projected", "a100_hours_projected_not_measured", ",.0f"), ("published", "published", ""), ("failed", "failed", "")],
    ),
    "layouts": (
        "The same net by itself: where its weights lie, and cudnn.benchmark",
        [("", "case", ""), ("ms, weights NCHW", "ms, weights NCHW", ".2f"), ("ms, weights NHWC", "ms, weights NHWC", ".2f")],
    ),
    "nsight": (
        "Nsight Compute on single launches",
        [("", "case", ""), ("ns", "ns", ",.0f"), ("% of memory's peak", "% of memory peak", ".0f"), ("% of arithmetic's", "% of arithmetic peak", ".0f"), ("% occupancy", "% occupancy", ".0f"), ("registers", "registers", ".0f")],
    ),
}  # fmt: skip
OTHERS = {
    "profile": "where the time of a step goes",
    "compare": "methods on images",
    "ladder": "the ladder",
    "time_to_quality": "time to quality",
    "scaling": "scaling",
}


def section(results: Path) -> tuple[str, list[Any]]:
    """Text and sources; where there is no result of a GPU, the sentence that says so."""
    text, sources = "", []
    for folder in newest(results):
        machine = machine_of(folder)
        found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        sources += [machine, *found.values()]
        text += f"**{machine['device']}** ({', '.join(f'{key} {machine[key]}' for key in ('driver', 'cuda', 'torch', 'triton', 'python', 'commit', 'date') if machine.get(key))}).\n\n"
        text += tests(found.get("steps", {"steps": {}})["steps"])
        for group, (title, columns) in TABLES.items():
            if rows := found.get(group, {}).get("rows"):
                text += f"{title}:\n\n{table(cells(rows, columns))}\n"
        if rows := found.get("profile", {}).get("rows"):
            text += f"{shares(rows)}\n"
        for name, write in (("compare", compare), ("ladder", ladder)):
            if name in found:
                text += f"{write(found[name])}\n"
        missing = [name for name in (*TABLES, *OTHERS) if name not in found]
        text += f"Not measured there: {', '.join(title_of(name) for name in missing)}.\n\n" if missing else ""
    return text.removesuffix("\n") or NO_GPU, sources


def newest(results: Path) -> list[Path]:
    """Of every device its last folder: they are named DEVICE-YYYY-MM-DD."""
    found: dict[str, Path] = {}
    for path in sorted(results.glob("*"), key=lambda path: path.name[-10:]):
        known = (*TABLES, *OTHERS, "steps")
        if path.is_dir() and not path.name.startswith("cpu-") and any((path / f"{name}.json").exists() for name in known):
            found[path.name[:-11]] = path
    return list(found.values())


def machine_of(folder: Path) -> dict[str, Any]:
    """What the numbers were measured on: of the first file that says it."""
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text())
        if machine := one.get("machine"):
            return machine
        if "device" in one:
            return {"device": one["device"], **one.get("versions", {})}
    return {"device": folder.name}


def tests(steps: dict[str, Any]) -> str:
    """What the tests on the GPU said, beside which every number here stands, and which other steps did not end well."""
    said = [f"{name}: {record['last_line'].strip('= ')}" for name, record in steps.items() if name.endswith(" right")]
    text = f"Tests there: {'; '.join(said)}.\n\n" if said else ""
    bad = [f"{name} (exit code {record['code']})" for name, record in steps.items() if record["code"] and not name.endswith(" right")]
    return text + (f"Not whole: {', '.join(bad)}.\n\n" if bad else "")


def cells(rows: Rows, columns: list[tuple[str, str, str]]) -> list[list[str]]:
    """Head and rows, without columns that are empty everywhere."""
    used = [(head, key, form) for head, key, form in columns if any(row.get(key) not in (None, "") for row in rows)]
    body = [[cell(row.get(key), form) for _, key, form in used] for row in rows]
    return [[head for head, _, _ in used], *body]


def shares(rows: Rows) -> str:
    """Kinds of kernels as shares of a step's time; `no kernel` is what launches cost."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["kinds"]))
    body = [
        [row["case"], f"{row['seconds_per_iteration']:.4f}", f"{row['busy']:.2f}", *(cell(row["kinds"].get(kind), ".3f") for kind in kinds)]
        for row in rows
    ]
    return f"Where the time of an iteration goes, as shares of it:\n\n{table([['', 'seconds', 'GPU busy', *kinds], *body])}"


def title_of(name: str) -> str:
    return OTHERS.get(name) or {"rehearsal": "recipes", "optim": "optimiser", "edm2": "EDM2's operations", "step": "whole iterations"}.get(
        name, name
    )
