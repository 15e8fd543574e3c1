"""How every command ends: 0 when done, 2 with one sentence when the user can mend it, a traceback when it is our fault."""

import sys
from collections.abc import Callable

from potstill.engine.errors import UserError


def run(main: Callable[[list[str]], None]) -> None:
    """Call main(arguments); print a UserError as one line on stderr and exit with 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output (head, less) left
        sys.stderr.close()
        sys.exit(1)
