"""One way to tell a user what went wrong: a single line, exit code 2, no traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: what was wrong, where, and what to do."""


def run_command(main: Callable[[list[str]], None]) -> None:
    """Call ``main(sys.argv[1:])`` as the body of a ``python -m bloomft.<command>``.

    Exits with 2 and one line on stderr after a `UserError`, with 130 after Ctrl-C.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
