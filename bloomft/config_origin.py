"""Where the keys of a configuration were written: the line of its YAML file, or the command line."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bloomft.errors import UserError


class Origin:
    """Says where a key was written: ``file:line: key`` or ``command line: key``."""

    def __init__(self, path: Path, text: str):
        self.path = path
        self.overridden: set[str] = set()
        self._lines: dict[str, int] = {}
        self._text = text

    def __call__(self, key: str) -> str:
        if re.sub(r"\[\d+\]$", "", key) in self.overridden:
            return f"command line: {key}"
        if not self._lines:
            self._lines = dict(_key_lines(yaml.compose(self._text), ""))
        return f"{self.path}:{self._lines.get(key, 1)}: {key}" if key else f"{self.path}"


def all_keys(values: DictConfig, prefix: str = "") -> Iterator[str]:
    """Full path of every key in ``values``, of nodes and leaves."""
    for name in values:
        yield f"{prefix}{name}"
        if isinstance(child := values._get_node(name), DictConfig):
            yield from all_keys(child, f"{prefix}{name}.")


def _key_lines(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = f"{prefix}{name.value}"
            yield key, name.start_mark.line + 1
            yield from _key_lines(value, f"{key}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix.removesuffix('.')}[{index}]", value.start_mark.line + 1


def parse_yaml(text: str, origin: Origin) -> DictConfig | None:
    """The mapping that ``text`` holds, None where it holds something else; `UserError` with the line."""
    try:
        node = yaml.compose(text)
        # Duplicate keys and odd tags surface here, not in compose.
        return OmegaConf.create(text) if isinstance(node, yaml.MappingNode) else None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{origin.path}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{origin.path}: not valid YAML: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Of its message, or the name of its class."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
