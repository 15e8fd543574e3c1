"""potstill: distil diffusion models into one-step generators."""

import sys
from difflib import get_close_matches
from importlib import import_module

from potstill import __version__
from potstill.engine.common.cli import run
from potstill.engine.common.errors import UserError

#: Every command is the module of its name in potstill.engine, which is loaded when it is asked for: most bring PyTorch.
COMMANDS = {
    "recipes": "list the recipes that come with potstill, show one, copy one out",
    "settings": "list every setting of a recipe: type, default, what it does",
    "train": "train a teacher if need be, then distil it",
    "sample": "make images with a student or a teacher",
    "evaluate": "measure a student and its teacher: FID and other distances",
    "compare": "one teacher, every method, one clock",
    "probe": "find out which layers a teacher can do without",
    "convert": "pictures to data sets, other people's weights to weight files",
    "export": "a student for other programs: hub, diffusers, ONNX",
}

HELP = """\
usage: potstill COMMAND …

Distil diffusion models into one-step generators.

{commands}

`potstill COMMAND --help` says more of each; `potstill --version`. To begin with: potstill train digits"""


def main(arguments: list[str] | None = None) -> None:
    """The command `potstill`; `python -m potstill` is the same."""
    given = sys.argv[1:] if arguments is None else arguments
    run(dispatch, given)


def dispatch(arguments: list[str]) -> None:
    """Call the command that the first argument names with the others."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help", "help"):
        return print(HELP.format(commands="\n".join(f"    {name:10}{text}" for name, text in COMMANDS.items())))
    if name in ("-V", "--version"):
        return print(f"potstill {__version__}")
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"wanted one of {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {name!r}: {hint}")
    import_module(f"potstill.engine.{name}").main(rest)


if __name__ == "__main__":
    main()
