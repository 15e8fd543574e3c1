"""Seconds from a finished teacher to a student at 1.25 times its distance, per method, with and without each switch.

    python -m benches.scripts.time_to_quality configs/fast32.yaml --teacher runs/compare-fast32/teacher.safetensors --seconds 180 \
        --features ResNet20:FILE --out benches/results/DEVICE-DATE -- data.path=FILE.zip

Each switch is a comparison of its own (potstill compare) with the same teacher, seeds and seconds; one that is done is not
repeated. The time reported is that of the first snapshot at or below the bar, so it is at most one interval (seconds/points)
too long; "not reached" where there is none. A switch that this version does not have is said to be unavailable.
--switch NAME=KEY=VALUE[;KEY=VALUE…] adds one (ENV:NAME=VALUE sets an environment variable); --only NAME,NAME chooses.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benches import ROOT
from benches import rows as on_disk
from benches.scripts import sections
from potstill.engine.common.errors import UserError
from potstill.engine.config.library import file_of
from potstill.engine.config.tree import load

FILE = "time_to_quality.json"


@dataclass
class Switch:
    """One change of the recipe: settings and environment, and which methods it is about (all if None)."""

    name: str
    settings: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    methods: list[str] | None = None


SWITCHES = [
    Switch("as the recipe is"),
    Switch("without fused kernels", environment={"POTSTILL_BACKEND": "reference"}),
    Switch("without compile", ["train.compile=off"]),
    Switch("with compile", ["train.compile=net"]),
    Switch("without graphs", ["train.graphs=off"]),
    Switch("with graphs", ["train.graphs=auto"]),
    Switch("without skipping", ["skipping.plan=null"]),
    Switch("GDD: nothing frozen", ["method.freeze=0"], methods=["gdd", "gdd_i"]),
    Switch("GDD-I: frozen", ["method.freeze=1"], methods=["gdd", "gdd_i"]),
]


def main(arguments: list[str]) -> None:
    args = parser().parse_args(arguments)
    chosen = SWITCHES + [switch_from(text) for text in args.switch]
    if args.plan:
        chosen.append(Switch("with skipping", [f"skipping.plan={args.plan}"]))
    if args.only:
        chosen = [s for s in chosen if s.name in args.only.split(",")]
    header, rows = earlier_results(args)
    for switch in chosen:
        rows = [r for r in rows if r["switch"] != switch.name]
        methods = [m for m in args.methods.split(",") if switch.methods is None or m in switch.methods]
        if not methods:
            continue
        if reason := unavailable(args.recipe, switch, args.settings, methods[0]):
            print(f"{switch.name}: {reason}")
            rows += [{"switch": switch.name, "method": m, "unavailable": reason} for m in methods]
            continue
        summary = comparison(args, switch, methods)
        title = args.title or next(iter(summary["floor"]["scores"]))
        now = header_of(summary, title, args.factor)
        if header and header != now:
            sys.exit(f"{args.out / FILE} holds rows of another teacher, data or bar: move it away, or choose another --out")
        header = now
        rows += [row_of(switch.name, name, summary["methods"][name], title, header["bar"]) for name in methods]
        on_disk.write(args.out / FILE, header | {"rows": rows})
    if not header:
        return print("nothing was measured")
    on_disk.write(args.out / FILE, header | {"rows": rows})
    print(sections.time_to_quality(header | {"rows": rows}), end="")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("recipe", type=Path)
    p.add_argument("settings", nargs="*", metavar="key=value", help="after --: settings for all runs, such as data.path=FILE.zip")
    p.add_argument("--teacher", type=Path, required=True, help="the finished teacher, .safetensors")
    p.add_argument("--methods", default="dmd,sim,gdd_i,moment_matching,sfd")
    p.add_argument("--seconds", type=float, default=180.0, help="of training for each method and switch")
    p.add_argument("--points", type=int, default=12, help="snapshots a run: the resolution of the answer")
    p.add_argument("--factor", type=float, default=1.25, help="the bar, as a multiple of the teacher's distance")
    p.add_argument("--features", default="pixels", help="as for potstill compare; the first ones are the bar's")
    p.add_argument("--title", help="the distance the bar is about (default: the first)")
    p.add_argument("--plan", type=Path, help="a layer-skipping plan for this teacher")
    p.add_argument("--switch", action="append", default=[], metavar="NAME=KEY=VALUE")
    p.add_argument("--only", help="names of switches, with commas between them")
    p.add_argument("--work", type=Path, default=Path("runs/time-to-quality"), help="where the runs go")
    p.add_argument("--out", type=Path, required=True, help="where time_to_quality.json goes")
    return p


def switch_from(text: str) -> Switch:
    name, _, changes = text.partition("=")
    parts = changes.split(";")
    environment = dict(part.removeprefix("ENV:").split("=", 1) for part in parts if part.startswith("ENV:"))
    return Switch(name, [part for part in parts if part and not part.startswith("ENV:")], environment)


def earlier_results(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What an earlier call wrote: everything but its rows, and its rows."""
    path = args.out / FILE
    header = json.loads(path.read_text()) if path.exists() else {}
    return header, header.pop("rows", [])


def unavailable(recipe: Path, switch: Switch, settings: list[str], method: str) -> str | None:
    """Why a switch cannot be tried: this version has no such setting, or its backend does nothing here."""
    try:
        load(recipe_of(recipe, method), [*settings, *switch.settings])
    except UserError as error:
        return str(error)
    import torch

    if "POTSTILL_BACKEND" in switch.environment and not torch.cuda.is_available():
        return "a CPU always takes the reference, so POTSTILL_BACKEND changes nothing"
    return None


def recipe_of(recipe: Path, method: str) -> Path:
    """The sibling recipe of a method, the recipe itself where it has none."""
    sibling = recipe.with_name(f"{recipe.stem}_{method}.yaml")
    return sibling if file_of(sibling) else recipe


def comparison(args: argparse.Namespace, switch: Switch, methods: list[str]) -> dict[str, Any]:
    """The summary of potstill compare with this switch, run if it has not been."""
    folder = args.work / "".join(c if c.isalnum() else "-" for c in switch.name)
    command = [
        sys.executable,
        "-m",
        "potstill",
        "compare",
        str(args.recipe),
        "--methods",
        ",".join(methods),
        "--seconds",
        f"{args.seconds:g}",
    ]
    command += ["--points", str(args.points), "--features", args.features, f"run_dir={folder}", f"teacher.checkpoint={args.teacher}"]
    done = subprocess.run([*command, *args.settings, *switch.settings], cwd=ROOT, env=os.environ | switch.environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads((folder / "summary.json").read_text())


def header_of(summary: dict[str, Any], title: str, factor: float) -> dict[str, Any]:
    teacher = summary["teacher"]["scores"][title]
    keys = ("recipe", "data", "n", "reference_images", "seconds_each", "points", "device", "precision", "versions")
    floor = summary["floor"]["scores"][title]
    return {"title": title, "factor": factor, "teacher": teacher, "bar": factor * teacher, "floor": floor} | {k: summary[k] for k in keys}


def row_of(switch: str, method: str, found: dict[str, Any], title: str, bar: float) -> dict[str, Any]:
    """The first moment at or below the bar, if there is one; how near it came, and where it started."""
    start = next((p["scores"][title] for p in found["curve"] if p["images"] == 0), None)
    trained = [p for p in found["curve"] if p["images"] > 0]
    hit = next((p for p in trained if p["scores"][title] <= bar), None)
    return {
        "switch": switch, "method": method, "seconds": hit and hit["seconds"], "images": hit and hit["images"],
        "start": start, "best": min(p["scores"][title] for p in trained), "trained": trained[-1]["seconds"],
        "images_per_second": found["images_per_second"], "peak_memory_gib": found["peak_memory_gib"],
    }  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
