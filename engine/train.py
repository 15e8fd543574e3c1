"""Train a teacher if need be, then distil it into a generator of one or a few steps.

    potstill train digits                                    a recipe by name; `potstill recipes` lists them
    potstill train ffhq64 train.batch=256 method.alpha=1     with other settings; `potstill settings` lists them
    potstill train my/recipe.yaml --dry-run                  a recipe of one's own, only checked
    torchrun --nproc-per-node 8 -m potstill train ffhq64     the same run on several GPUs; train.parallel=ddp|fsdp

The same command again goes on where the last one stopped, exactly. Everything is written to run_dir, which is
runs/<name of the recipe> unless it is given. Ctrl-C, SIGTERM, SIGUSR1 and the end of max_hours save first; the exit code is then
128 + the signal's number (142 for max_hours).

In a checkout, python -m engine.train configs/ffhq64.yaml is the same, alone or under torchrun.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from potstill.engine.common.cli import parser_of, run
from potstill.engine.common.errors import UserError
from potstill.engine.common.signals import stoppable
from potstill.engine.config.tree import load, notes_of_method
from potstill.engine.jobs.job import Job
from potstill.engine.jobs.preflight import Missing, check_given_data
from potstill.engine.jobs.rehearsal import dry_run, rehearse
from potstill.engine.training.ranks import Ranks, meet, one_voice


def main(arguments: list[str]) -> None:
    parser = parser_of("train", __doc__)
    parser.add_argument("recipe", help="its name, such as digits, or a path to a .yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings to change, such as train.batch=64")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and what is missing; do nothing")
    args = parser.parse_intermixed_args(arguments)
    ranks = meet()
    with one_voice(ranks):
        distil(args.recipe, args.overrides, args.dry_run, ranks)
    ranks.close()


def distil(recipe: str, overrides: list[str], on_paper: bool, ranks: Ranks) -> None:
    cfg = load(recipe, overrides)
    note, better = notes_of_method(recipe, overrides)
    if ranks.first and note:
        print(note, file=sys.stderr)
    if any(one.startswith("data.path=") for one in overrides):
        check_given_data(cfg)
    if ranks.count > 1 and (on_paper or cfg.rehearse):
        raise UserError(f"--dry-run and rehearse=true are for one process, got {ranks.count}: start it without torchrun")
    if on_paper or cfg.rehearse:
        with naming(better):
            return dry_run(cfg) if on_paper else rehearse(cfg)
    with stoppable(cfg.max_hours):
        with naming(better):
            job = Job(cfg, ranks=ranks)
        job.run()


@contextmanager
def naming(better: str) -> Iterator[None]:
    """Say of what this method cannot have which command has it otherwise."""
    try:
        yield
    except UserError as error:
        if not better or isinstance(error, Missing):
            raise
        raise UserError(f"{error}; or take the recipe that is made for it: {better}") from error


if __name__ == "__main__":
    run(main)
