"""python -m engine.train RECIPE.yaml [key=value …] [--dry-run]: train a teacher if need be, then distil it.

The same command again goes on where the last one stopped, exactly. Everything is written to run_dir, which is
runs/<name of the recipe> unless it is given.
"""

import argparse
import sys
from pathlib import Path

from engine.cli import run
from engine.config import load
from engine.job import Job
from engine.rehearsal import dry_run, rehearse
from engine.training.loop import Interrupted


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m engine.train", description=__doc__)
    parser.add_argument("recipe", type=Path, help="a YAML file, such as configs/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as train.batch=64")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and what is missing; do nothing")
    args = parser.parse_intermixed_args(arguments)
    cfg = load(args.recipe, args.overrides)
    if args.dry_run:
        return dry_run(cfg)
    if cfg.rehearse:
        return rehearse(cfg)
    try:
        Job(cfg).run()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)


if __name__ == "__main__":
    run(main)
