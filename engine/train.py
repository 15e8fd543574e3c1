"""python -m engine.train RECIPE.yaml [key=value …] [--dry-run]: train a teacher if need be, then distil it.

On several GPUs: torchrun --nproc-per-node 8 -m engine.train RECIPE.yaml [train.parallel=ddp|fsdp] [key=value …].

The same command again goes on where the last one stopped, exactly. Everything is written to run_dir, which is
runs/<name of the recipe> unless it is given.
"""

import argparse
import sys
from pathlib import Path

from potstill.engine.cli import run
from potstill.engine.config import load
from potstill.engine.errors import UserError
from potstill.engine.job import Job
from potstill.engine.rehearsal import dry_run, rehearse
from potstill.engine.training.loop import Interrupted
from potstill.engine.training.ranks import Ranks, meet, one_voice


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m engine.train", description=__doc__)
    parser.add_argument("recipe", type=Path, help="a YAML file, such as configs/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as train.batch=64")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and what is missing; do nothing")
    args = parser.parse_intermixed_args(arguments)
    ranks = meet()
    with one_voice(ranks):
        distil(args.recipe, args.overrides, args.dry_run, ranks)
    ranks.close()


def distil(recipe: Path, overrides: list[str], on_paper: bool, ranks: Ranks) -> None:
    cfg = load(recipe, overrides)
    if ranks.count > 1 and (on_paper or cfg.rehearse):
        raise UserError(f"--dry-run and rehearse=true are for one process, got {ranks.count}: start it without torchrun")
    if on_paper:
        return dry_run(cfg)
    if cfg.rehearse:
        return rehearse(cfg)
    try:
        Job(cfg, ranks=ranks).run()
    except Interrupted as stop:
        if ranks.first:
            print(stop, file=sys.stderr)
        ranks.close()
        sys.exit(128 + stop.signum)


if __name__ == "__main__":
    run(main)
