"""One way to tell a user what went wrong: a single line, an exit code, no traceback."""

import sys
from collections.abc import Callable

from bloomft.signals import EXIT_STOPPED, Stopped


class UserError(Exception):
    """A mistake that the user can correct. Its text is one line: what was wrong, where, and what to do."""


def run_command(main: Callable[[list[str]], None]) -> None:
    """Call ``main(sys.argv[1:])`` as the body of a ``python -m bloomft.<command>``.

    Exits with 2 and one line on stderr after a `UserError`, with 75 after a `Stopped`, with 130 after Ctrl-C
    in a command that does not catch it.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(_one_line(stopped), file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
