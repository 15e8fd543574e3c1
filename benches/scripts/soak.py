"""Disturb tiny runs of every method in every way that soak_faults.py knows, and compare what comes out with undisturbed ones.

    make soak                                             all faults, MINUTES=20 at most; the same command goes on
    python -m benches.scripts.soak --only checkpoint      those whose name has the word; --list names them
    python -m benches.scripts.soak endurance              does a long run keep its memory, handles, threads and processes?

Verdicts: identical (same metrics to the last digit, same weights, same distances), refused, then identical (exit code 2 and one
sentence; after what it says the run goes on), identical but for lost lines (of metrics.jsonl, where that was damaged), FAIL. A
traceback, a hang, and a process that stays behind are FAIL. Results of other sources than today's are made anew.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from benches import RESULTS, ROOT

LANES = 2
MINUTES = float(os.environ.get("MINUTES") or 20)
LAST = 60.0  # seconds before the end, from which on no fault begins
OUT = RESULTS / "cpu-soak"
WORK = ROOT / "runs/soak"
MOUNTS: list[bool] = []  # of this lane: can it mount disks that nobody else sees?


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="faults", choices=["faults", "endurance"])
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument("--again", action="store_true", help="also those that have a verdict")
    parser.add_argument("--list", action="store_true", help="only name them")
    parser.add_argument("--out", type=Path, default=OUT / "faults.json", help="where the verdicts go, and a table beside it")
    parser.add_argument("--work", type=Path, default=WORK, help="where the runs go; those of faults that failed stay there")
    args = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    if args.what == "endurance":
        from benches.scripts.soak_endurance import endurance

        return endurance(args.work / "endurance", OUT / "endurance.json")
    from benches.scripts.soak_faults import FAULTS

    chosen = in_turn([number for number, fault in enumerate(FAULTS) if args.only in str(fault)], [fault.kind for fault in FAULTS])
    if args.list:
        print(*(FAULTS[number] for number in chosen), sep="\n")
        return 0
    return soak(chosen, args.out, args.work, again=args.again)


def in_turn(numbers: list[int], kinds: list[str]) -> list[int]:
    """One of each kind, then the next of each: a call that is short has seen something of everything."""
    seen: dict[str, int] = {}
    turns = []
    for number in numbers:
        seen[kinds[number]] = turn = seen.get(kinds[number], 0) + 1
        turns.append((turn, number))
    return [number for _, number in sorted(turns)]


def soak(chosen: list[int], out: Path, work: Path, *, again: bool) -> int:
    """Work on the faults that have no verdict yet until the time is over. Returns how many of all have failed."""
    from benches.scripts.soak_faults import FAULTS
    from benches.scripts.soak_runs import preload

    deadline = time.monotonic() + 60 * MINUTES
    source = hash_of_sources()
    rows = {} if not out.exists() else {row["fault"]: row for row in json.loads(out.read_text())["rows"]}
    if out.exists() and json.loads(out.read_text())["source"] != source:
        rows = {}
    left = [number for number in chosen if again or str(FAULTS[number]) not in rows]
    print(f"{len(left)} of {len(chosen)} faults to go, {MINUTES:g} minutes, {LANES} at a time", flush=True)
    preload()
    for row in done_by_lanes(left, work.resolve() / source, deadline):
        rows[row["fault"]] = row
        write(out, source, [rows[str(fault)] for fault in FAULTS if str(fault) in rows])
        detail = f": {row['detail']}" if row["verdict"] == "FAIL" else ""
        print(f"[{len(rows):3}/{len(FAULTS)}] {row['seconds']:5.1f} s  {row['verdict']:9}  {row['fault']}{detail}"[:400], flush=True)
    failed = [name for name, row in rows.items() if row["verdict"] == "FAIL"]
    missing = [number for number in chosen if str(FAULTS[number]) not in rows]
    print(f"{len(rows) - len(failed)} of {len(rows)} are right" + f"; {len(missing)} are left: the same command goes on" * bool(missing))
    return min(len(failed), 100)


def done_by_lanes(left: list[int], work: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """The rows of these faults as they come, from processes that fork the runs."""
    from benches.scripts.soak_faults import FAULTS

    with ProcessPoolExecutor(LANES, multiprocessing.get_context("fork"), initializer=begin) as lanes:
        cases = list(dict.fromkeys(FAULTS[number].case for number in left))
        lanes.submit(in_lane_prepare, work, cases).result()
        for done in [lanes.submit(in_lane_reference, case, work) for case in cases]:
            done.result()
        waiting, running = list(left), set[Future[dict[str, Any]]]()
        while waiting or running:
            while waiting and len(running) < LANES and time.monotonic() < deadline - LAST:
                running.add(lanes.submit(in_lane, waiting.pop(0), work))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (one.result() for one in finished)


def begin() -> None:
    """Of a lane: a place where it can mount what nobody else sees, if this system lets it."""
    import ctypes

    new_mounts = 0x20000
    apart = ctypes.CDLL(None).unshare(new_mounts) == 0
    with suppress(FileNotFoundError):
        apart = apart and subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False).returncode == 0
    MOUNTS.append(apart)


def in_lane_prepare(work: Path, cases: list[Any]) -> None:
    from benches.scripts.soak_runs import prepare

    prepare(work, cases)


def in_lane_reference(case: Any, work: Path) -> None:
    from benches.scripts.soak_runs import reference

    reference(case, work)


def in_lane(number: int, work: Path) -> dict[str, Any]:
    from benches.scripts.soak_faults import FAULTS
    from benches.scripts.soak_judge import judged

    return judged(FAULTS[number], work, number, MOUNTS[0])


def hash_of_sources() -> str:
    """Of everything that verdicts depend on: the product and the soak."""
    digest = hashlib.sha256()
    files = [*(ROOT / "potstill").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml"), *(ROOT / "benches/scripts").glob("soak*.py")]
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def write(out: Path, source: str, rows: list[dict[str, Any]]) -> None:
    """The verdicts, and beside them a table of every kind of fault."""
    import torch

    out.parent.mkdir(parents=True, exist_ok=True)
    header = {"source": source, "versions": {"torch": torch.__version__, "python": sys.version.split()[0]}}
    out.write_text(json.dumps(header | counted(rows) | {"rows": rows}, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(rows))


def counted(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many faults had which verdict: of each kind, and of all."""
    counts = {kind: Counter(row["verdict"] for row in rows if row["kind"] == kind) for kind in dict.fromkeys(row["kind"] for row in rows)}
    return {"counts": counts, "all": Counter(row["verdict"] for row in rows), "faults": len(rows)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: how many faults of each kind had which verdict, and every one that failed."""
    verdicts = list(dict.fromkeys(row["verdict"] for row in sorted(rows, key=lambda row: row["verdict"] == "FAIL")))
    lines = ["| fault | " + " | ".join(verdicts) + " |", "| --- |" + " ---: |" * len(verdicts)]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        counts = [sum(row["kind"] == kind and row["verdict"] == verdict for row in rows) for verdict in verdicts]
        lines.append(f"| {kind} | " + " | ".join(str(count or "") for count in counts) + " |")
    totals = [sum(row["verdict"] == verdict for row in rows) for verdict in verdicts]
    lines.append("| **all** | " + " | ".join(f"**{total}**" for total in totals) + " |")
    failed = [f"- {row['fault']}: {row['detail']}" for row in rows if row["verdict"] == "FAIL"]
    return "\n".join([*lines, "", *failed]).strip() + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
