"""The command line that export and generate share: options, then configuration overrides."""

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from bloomft.config import Config, load_config
from bloomft.errors import UserError


def parse_command(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, Config]:
    """Parse ``arguments`` with ``parser``, whose ``config`` names a YAML file; load it with the overrides.

    An override is a positional word ``a.b=value`` that is not the name of a file. Mistakes are `UserError`s.
    """
    options, overrides = split_overrides(parser, arguments)
    return options, load_config(options.config, overrides)


def split_overrides(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """As `parse_command`, but the configuration is the caller's to load."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{parser.prog}: {message}; see --help")

    parser.error = refuse
    words, overrides, expects_value = [], [], False
    for word in arguments:
        is_override = (
            not word.startswith("-") and "=" in word and not expects_value and not os.path.exists(word)
        )
        (overrides if is_override else words).append(word)
        expects_value = word.startswith("--") and "=" not in word
    return parser.parse_intermixed_args(words), overrides
