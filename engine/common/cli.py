"""How every command starts and exits: its parser; code 0 when done, 2 with one sentence for an error that the user can fix.

A signal that ends a command is one line, too, and the code is 128 + its number.
"""

import io
import os
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable

from potstill.engine.common.errors import ADVICE, UserError, harmless, told
from potstill.engine.common.signals import Interrupted


def parser_of(command: str, text: str | None, after: str | None = None) -> ArgumentParser:
    """The parser of `potstill COMMAND`: `text`, a module's docstring, stands in --help as it is written, `after` at its end."""
    return ArgumentParser(prog=f"potstill {command}", description=text, epilog=after, formatter_class=RawDescriptionHelpFormatter)


def run(main: Callable[[list[str]], None], arguments: list[str] | None = None) -> None:
    """Call main(arguments), those of the command line by default; print a UserError as one line on stderr and exit with 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: on Windows a file or pipe may have no σ
    try:
        main(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {harmless(str(error))}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        print("SIGINT: stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output (head, less) left; Python would try to write the rest when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        print(f"error: cannot go on{f' with {error.filename}' * bool(error.filename)}: {told(error)}", file=sys.stderr)
        sys.exit(2)
