"""The ``bloomft`` command: ``bloomft train CONFIG`` is ``python -m bloomft.train CONFIG``, and so on."""

import difflib
from collections.abc import Sequence

from bloomft import __version__
from bloomft.command_line import COMMANDS, call_command, run_command
from bloomft.errors import UserError
from bloomft.process import share_cores
from bloomft.run.signals import watch_signals


def main(arguments: Sequence[str]) -> None:
    """COMMAND and its arguments; ``--help`` lists the commands, ``--version`` prints the version."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        print("usage: bloomft COMMAND ...\n")
        for command, meaning in COMMANDS.items():
            print(f"  {command:10}{meaning}")
        print("\nbloomft COMMAND --help: arguments and examples; bloomft --version: the version")
        print("\nto begin with:")
        print("\n  bloomft demo\n  bloomft train configs/bloom-560m.yaml 'data.filenames=texts/*.md'")
        return
    if name == "--version":
        print(f"bloomft {__version__}")
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"bloomft: no command {name!r:.80}; {hint}")
    # before torch is imported, which takes seconds and reads what share_cores sets
    if name == "train":
        watch_signals()
    share_cores()
    call_command(name, rest)


def run() -> None:
    """The entry point of the installed ``bloomft``."""
    run_command(main)


if __name__ == "__main__":
    run()
