"""YAML whose scalars stay text until the type of their key says how to read them.

YAML itself guesses a type from the spelling, so that a revision ``1.10`` becomes a number. Here the declared
type decides; what is not text follows the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema).
"""

import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_BOOLEANS = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_NULLS = ("", "~", "null", "Null", "NULL")
# An item of a list on the command line: quoted text, which may hold commas, or anything up to the next comma.
_ITEM = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,]*?))\s*(?:,|\Z)""")


@dataclass(frozen=True)
class Scalar:
    """A value as it was written; ``plain`` without quotes around it."""

    text: str
    plain: bool


class Origin:
    """Says where a key was written: ``file:line: key`` or ``command line: key``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, str] = {}

    def note_line(self, key: str, line: int) -> None:
        """``key`` is in the file, on this line, counted from 1."""
        self._places[key] = f"{self.path}:{line}"

    def note_override(self, key: str) -> None:
        """``key`` is on the command line."""
        self._places[key] = "command line"

    def __call__(self, key: str) -> str:
        place = self._places.get(key) or self._places.get(re.sub(r"\[\d+\]$", "", key)) or self.path
        return f"{place}: {key}"


class InvalidYAMLError(ValueError):
    """Text that is not YAML, or uses what is not supported; ``line`` counts from 1, None if unknown."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


class WrongTypeError(ValueError):
    """A value that its key cannot hold; ``key`` is the full path, ``value`` what was written."""

    def __init__(self, key: str, value: Any) -> None:
        super().__init__(f"{key}: {shown(value)}")
        self.key, self.value = key, value


def read_yaml(text: str, note_line: Callable[[str, int], None] = lambda key, line: None) -> Any:
    """The document in ``text``: mappings and lists as they are, every scalar as a `Scalar`.

    ``note_line`` is called with the line, from 1, of every key and list item by its full path. Raises
    `InvalidYAMLError`, also for anchors, aliases, tags and duplicate keys.
    """
    if found := re.search("[\x85\u2028\u2029]", text):  # YAML 1.1, which PyYAML reads, breaks lines there
        line = text.count("\n", 0, found.start()) + 1
        raise InvalidYAMLError(f"write {found[0]!r} as an escape in double quotes", line)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise InvalidYAMLError(error.problem or str(error), mark.line + 1 if mark else None) from error
    except yaml.YAMLError as error:
        raise InvalidYAMLError(" ".join(str(error).split())) from error
    return _tree(node, "", note_line)


def read_word(word: str, kind: Any) -> Any:
    """A value of the command line for a key of type ``kind``, in the form of `read_yaml`.

    Text is the word itself. ``[a, b]`` is a list where the key takes one, ``{a: b}`` a YAML mapping. The
    only null is ``null``: a lone ``~`` is the home directory.
    """
    options = _options(kind)
    brackets = word[:1] + word[-1:]
    if brackets == "{}" and str not in options:
        return read_yaml(word)
    if brackets == "[]" and any(typing.get_origin(option) is list for option in options):
        return _items(word[1:-1])
    return Scalar(word, plain=word == "null" or word not in _NULLS)


def to_type(value: Any, kind: Any, key: str) -> Any:
    """``value``, as `read_yaml` gives it, as the declared type ``kind``: a scalar type, list, dict or union.

    Raises `WrongTypeError`.
    """
    options = _options(kind)
    if isinstance(value, Scalar):
        return _scalar(value, options, key)
    for option in options:
        if isinstance(value, list) and typing.get_origin(option) is list:
            (item_kind,) = typing.get_args(option)
            return [to_type(item, item_kind, f"{key}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, dict) and typing.get_origin(option) is dict:
            return {name: to_type(item, typing.get_args(option)[1], key) for name, item in value.items()}
    raise WrongTypeError(key, value)


def to_yaml(values: dict[str, Any]) -> str:
    """``values`` as YAML that `read_yaml` and `to_type`, and other YAML readers, read back unchanged."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def shown(value: Any) -> str:
    """``value`` on one line, for messages and tables."""
    if isinstance(value, Scalar):
        value = value.text
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, int) and abs(value) >= 2**63:
        text = "a number of more than 64 bits"
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(map(shown, value))}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{name}: {shown(item)}' for name, item in value.items())}}}"
    elif isinstance(value, str):
        text = value if value and value == value.strip() and value.isprintable() else repr(value)
    else:
        text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


class _Loader(yaml.BaseLoader):
    """Composes nodes without guessing types; anchors, aliases and tags are refused."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            problem = "no anchors, aliases or tags here: text that begins with &, * or ! needs quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1, or 1.2's core schema, would read as another type."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if not text.isprintable() else "'" if _core_type(text) is not str else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _tree(node: yaml.Node | None, key: str, note_line: Callable[[str, int], None]) -> Any:
    if node is None:
        return Scalar("", plain=True)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            note_line(f"{key}[{index}]", item.start_mark.line + 1)
        return [_tree(item, f"{key}[{index}]", note_line) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return Scalar(node.value, plain=node.style is None)
    values = {}
    for name, value in node.value:
        line = name.start_mark.line + 1
        if not isinstance(name, yaml.ScalarNode):
            raise InvalidYAMLError("the name of a key is not text", line)
        if name.value in values:
            raise InvalidYAMLError(f"found duplicate key {shown(name.value)}", line)
        path = f"{key}.{name.value}" if key else name.value
        note_line(path, line)
        values[name.value] = _tree(value, path, note_line)
    return values


def _items(text: str) -> list[Scalar]:
    items, at = [], 0
    while at < len(text) and (found := _ITEM.match(text, at)):
        quoted = next((part for part in found.groups()[:2] if part is not None), None)
        items.append(Scalar(found[3], plain=True) if quoted is None else Scalar(quoted, plain=False))
        at = found.end()
    return items


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _core_type(text: str) -> type:
    if text in _NULLS:
        return types.NoneType
    if text in _BOOLEANS:
        return bool
    return int if _INT.fullmatch(text) else float if _FLOAT.fullmatch(text) else str


def _scalar(value: Scalar, options: tuple[Any, ...], key: str) -> Any:
    kind = _core_type(value.text)
    # Where a key takes text and other types, quotes mean text; a key of numbers takes quoted ones too.
    if not value.plain and (kind is types.NoneType or str in options):
        kind = str
    if kind is int and int not in options:
        kind = float
    if kind not in options:
        if value.plain and not value.text:
            raise WrongTypeError(key, None)
        kind = str
    if kind not in options:
        raise WrongTypeError(key, value)
    try:
        return _CONVERSIONS[kind](value.text)
    except ValueError as error:  # Python limits the digits of an integer, and float reads no hexadecimal
        raise WrongTypeError(key, value) from error


_CONVERSIONS: dict[type, Callable[[str], Any]] = {
    types.NoneType: lambda text: None,
    bool: _BOOLEANS.__getitem__,
    int: lambda text: int(text, 0 if text[:2] in ("0o", "0x") else 10),
    float: lambda text: float(text.replace(".", "") if text[-1] in "fFnN" else text),  # .inf and .nan
    str: str,
}
