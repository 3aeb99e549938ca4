"""What the commands share: their names, options, overrides and exit statuses."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from bloomft.config.keys import Config
from bloomft.config.loading import load_config
from bloomft.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, LostProcessError, Stopped, UserError

# Each is a module of this package with a function main(arguments).
COMMANDS = {
    "train": "fine-tune BLOOM with LoRA, or resume a stopped run",
    "export": "turn a checkpoint into a merged model or a PEFT adapter",
    "generate": "generate text with the base, a checkpoint or an exported model",
    "cache": "list what is cached, tokens and the embedded base, or remove it",
    "demo": "the whole workflow on a small embedded model, in a minute or two",
}

_ABOUT_OVERRIDES = (
    "key=value changes a key of the configuration, for instance train.batch_size=4;",
    "python -m bloomft.config lists them all.\n",
)


def call_command(name: str, arguments: Sequence[str]) -> None:
    """What ``python -m bloomft.<name> *arguments`` does, in this process; ``name`` is one of `COMMANDS`."""
    importlib.import_module(f"bloomft.{name}").main(arguments)


def run_command(main: Callable[[list[str]], None]) -> None:
    """Call ``main(sys.argv[1:])`` as the body of a program.

    Exits with 2 and one line on stderr after a `UserError`, with 1 and one line after a `LostProcessError`,
    with 75 after a `Stopped`, with 130 after Ctrl-C in a command that does not catch it.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except LostProcessError as error:
        print(_one_line(error), file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except Stopped as stopped:
        print(_one_line(stopped), file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def program_name(command: str) -> str:
    """How ``command`` was called: as ``bloomft train``, or as a module of Python."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py" and called.parent.name == "bloomft":
        return f"python -m bloomft {command}"
    return f"bloomft {command}" if called.stem == "bloomft" else f"python -m bloomft.{command}"


class CommandParser(argparse.ArgumentParser):
    """The parser of one of `COMMANDS`, whose errors are `UserError`s.

    Args:
        usage: what follows the program's name; about: what the command does, in lines of at most 80 columns.
        examples: arguments, each with what they do.
    """

    def __init__(self, command: str, usage: str, about: str, examples: dict[str, str]) -> None:
        name = program_name(command)
        lines = [
            f"  {name} {arguments}".rstrip() + f"\n      {meaning}" for arguments, meaning in examples.items()
        ]
        super().__init__(
            prog=name,
            usage=f"%(prog)s {usage}",
            description=about,
            epilog="\n".join([*_ABOUT_OVERRIDES * ("key=value" in usage), "examples:", *lines]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """What argparse calls for words that it cannot parse."""
        raise UserError(f"{self.prog}: {message}; see --help")


def parse_command(parser: CommandParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Parse ``arguments`` with ``parser``, whose ``config`` names a YAML file; load it with the overrides.

    An override is a positional word ``a.b=value`` that is not the name of a file. Mistakes are `UserError`s.
    """
    options, overrides = split_overrides(parser, arguments)
    return options, load_config(options.config, overrides)


def split_overrides(parser: CommandParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """As `parse_command`, but loading the configuration is left to the caller."""
    words: list[str] = []
    overrides: list[str] = []
    expects_value = False
    for word in arguments:
        is_override = (
            not word.startswith("-") and "=" in word and not expects_value and not os.path.exists(word)
        )
        (overrides if is_override else words).append(word)
        expects_value = word.startswith("--") and "=" not in word
    return parser.parse_intermixed_args(words), overrides


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
