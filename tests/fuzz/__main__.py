"""The table of verdicts, and every kind of fault with an example.

PYTHONPATH=tests python -m fuzz [N] [--seed S] [--only WORD] [--out FILE] [--keep DIR]
"""

import argparse
import json
import re
import secrets
import sys
from pathlib import Path
from typing import Any

import torch

from .jail import FAILED, WRONG, Tally, clock, fuzz, table
from .suite import INPUTS, READERS, share

RESULTS = Path("benches/results/cpu-fuzz/readers.json")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("n", nargs="?", type=int, default=INPUTS, help=f"inputs for all readers (default {INPUTS})")
    parser.add_argument("--seed", type=int, help="makes the same inputs again (default: a new one)")
    parser.add_argument("--only", default="", metavar="WORD", help="readers with this in their names")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"what is written (default {RESULTS})")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a folder for an example of every fault")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    chosen = [reader for reader in READERS if args.only in reader.name]
    start, tallies = clock(), []
    for reader in chosen:
        began = clock()
        tallies.append(fuzz(reader, share(reader, args.n), seed))
        spent = clock() - began
        print(f"{reader.name}: {spent:.1f} s, {1e3 * spent / tallies[-1].counts.total():.1f} ms an input", flush=True)
        for place, one in sorted(tallies[-1].faults.items(), key=lambda item: -item[1]["n"]):
            print(f"  {one['n']} x {place} ({one['kind']} in {one['file']}, {one['size']} bytes): {one['said']!r:.120}", flush=True)
        keep(tallies[-1], args.keep)
    print(table(tallies))
    write(args.out, tallies, seed, clock() - start)
    return int(any(tally.counts[WRONG] + tally.counts[FAILED] for tally in tallies))


def keep(tally: Tally, folder: Path | None) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for k, (place, found) in enumerate(tally.faults.items()):
            name = re.sub(r"\W+", "-", f"{tally.reader} {k} {place}")[:120]
            (folder / f"{name}.{found['file'].replace('/', '_')}").write_bytes(found["data"])


def told(one: dict[str, Any]) -> dict[str, Any]:
    """An example without its bytes, and without this machine's paths in what was said."""
    return {key: value for key, value in one.items() if key != "data"} | {"said": re.sub(r"(/[\w.-]+)+/", "…/", one["said"])}


def write(out: Path, tallies: list[Tally], seed: int, seconds: float) -> None:
    """Counts a reader, and faults with the smallest input that shows each."""
    rows = [
        {
            "reader": t.reader, "inputs": t.counts.total(), **dict(sorted(t.counts.items())),
            "faults": [{"what": place} | told(one) for place, one in sorted(t.faults.items())],
        }
        for t in tallies
    ]  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    all_of = {key: sum(row.get(key, 0) for row in rows) for key in ("inputs", "read", "refused", "wrong", "failed")}
    out.write_text(json.dumps({"seed": seed, "seconds": round(seconds), "all": all_of, "readers": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
