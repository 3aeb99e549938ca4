"""Types and bounds of the keys, from their declarations, and both in words.

``python -m bloomft.config`` prints the reference table of the README.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from bloomft.config.keys import Config
from bloomft.config.yaml_text import shown


def reference_table() -> str:
    """The configuration reference as a Markdown table, one row a key."""
    rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for key in known_keys():
        spec = field_of(key)
        default = spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
        text = "required" if default is dataclasses.MISSING else f"`{shown(default)}`"
        rows.append(f"| `{key}` | {text} | {_bounds_text(spec)} | {spec.metadata['doc']} |")
    return "\n".join(rows)


def fields_of(node: type) -> dict[str, dataclasses.Field[Any]]:
    """Name to field of every key or node below ``node``, one of the dataclasses of `keys`."""
    return {spec.name: spec for spec in dataclasses.fields(node)}


def node_type(spec: dataclasses.Field[Any]) -> type | None:
    """The dataclass that a field holds, if it is a node; None for a key."""
    return spec.type if isinstance(spec.type, type) and dataclasses.is_dataclass(spec.type) else None


def known_keys(node: type = Config, prefix: str = "") -> Iterator[str]:
    """The full path of every key below ``node``."""
    for name, spec in fields_of(node).items():
        if below := node_type(spec):
            yield from known_keys(below, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def field_of(key: str) -> dataclasses.Field[Any]:
    """The field of a key's full path; ``key[n]`` is the field of the whole list."""
    node: Any = Config
    for name in re.sub(r"\[\d+\]$", "", key).split("."):
        spec = fields_of(node)[name]
        node = spec.type
    return spec


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Full path, field and value of every key below ``node``, an instance."""
    for name, spec in fields_of(type(node)).items():
        value = getattr(node, name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", spec, value


def is_allowed(spec: dataclasses.Field[Any], value: Any) -> bool:
    """Whether ``value`` is within the bounds of its field; its type has been checked before."""
    rules = spec.metadata
    items = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
    if not all(_is_plain(item) for item in items) or value == []:
        return False
    if value is None:
        return True  # a key that cannot be null has been refused before, by its type
    if "choices" in rules:
        known = [(type(choice), choice) for choice in rules["choices"]]
        return len(set(items)) == len(items) and all((type(item), item) in known for item in items)
    if "length" in rules and len(items) != rules["length"]:
        return False
    for number in items:
        if "nonzero" in rules and number == 0:
            return False
        if "at_least" in rules and number < rules["at_least"]:
            return False
        if "above" in rules and number <= rules["above"]:
            return False
        if "at_most" in rules and number > rules["at_most"]:
            return False
        if "below" in rules and number >= rules["below"]:
            return False
    return True


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is null, a boolean, a finite 64-bit number, or non-empty UTF-8 text without NUL."""
    if isinstance(value, str):
        try:
            return value.encode() != b"" and "\0" not in value
        except UnicodeEncodeError:
            return False
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, int) and abs(value) < 2**63)


def _bounds_text(spec: dataclasses.Field[Any]) -> str:
    rules = spec.metadata
    if "choices" in rules:
        return ", ".join(shown(choice) for choice in rules["choices"])
    words: dict[object, str] = {
        int: "integer",
        float: "number",
        bool: "true or false",
        str: "text",
        list[str]: "a list of texts",
        list[float]: f"{rules.get('length', 'some')} numbers",
    }
    union = typing.get_args(spec.type) if isinstance(spec.type, types.UnionType) else (spec.type,)
    options = [option for option in union if option is not types.NoneType]
    text = " or ".join(words.get(option, "a mapping of names to numbers or texts") for option in options)
    signs = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}
    limits = [f"{sign} {_power(rules[name])}" for name, sign in signs.items() if name in rules]
    limits += ["≠ 0"] if "nonzero" in rules else []
    return f"{text} {' and '.join(limits)}" if limits else text


def _power(bound: float) -> str:
    return f"2^{int(bound).bit_length() - 1}" if bound > 1e6 else str(bound)


def describe_key(key: str) -> str:
    """What a key means and which values it takes, for a message."""
    spec = field_of(key)
    return f"{spec.metadata['doc']} ({_bounds_text(spec)})"


def not_allowed(key: str, value: Any) -> str:
    """Why ``value`` is not allowed for the key, and what is."""
    spec = field_of(key)
    names = [choice for choice in spec.metadata.get("choices", ()) if isinstance(choice, str)]
    match = difflib.get_close_matches(shown(value), names, n=1)
    close = f"; did you mean {match[0]}?" if match else ""
    return f"{shown(value)} is not allowed; allowed: {_bounds_text(spec)}{close}"


def type_of_key(key: str) -> Any:
    """The declared type of a key, of a node, or of the values of a mapping; None where there is none."""
    kind: Any = Config
    for name in key.split("."):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            spec = fields_of(kind).get(name)
            kind = spec and spec.type
        else:
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
    return kind
