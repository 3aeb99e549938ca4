"""A YAML file and ``key=value`` overrides to a checked `Config`, and back to YAML.

A fault in either raises one `UserError` that names the key, the line, what is allowed and, for an unknown
key, the closest known one.
"""

import dataclasses
import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bloomft.config.keys import METRIC_SCHEDULES, Config, default_cache_dir
from bloomft.config.schema import (
    describe_key,
    fields_of,
    is_allowed,
    known_keys,
    leaves,
    node_type,
    not_allowed,
    type_of_key,
)
from bloomft.config.yaml_text import (
    InvalidYAMLError,
    Origin,
    WrongTypeError,
    read_word,
    read_yaml,
    shown,
    to_type,
    to_yaml,
)
from bloomft.errors import UserError

SHIPPED = Path(__file__).parents[1] / "configs"
LARGEST_FILE = 2**18  # bytes; YAML of this size takes about two seconds to read


def find_config(path: str | os.PathLike[str]) -> Path:
    """``path``, or where nothing is there the shipped configuration of that name, which stderr then says.

    ``bloom-tiny.yaml`` and ``configs/bloom-tiny.yaml`` are the names of the shipped ``bloom-tiny.yaml``.
    """
    path = Path(path)
    shipped = SHIPPED / path.name
    # os.path, unlike Path, has no error for a name that is too long
    if os.path.lexists(path) or path.parent not in (Path(), Path("configs")) or not os.path.isfile(shipped):
        return path
    print(f"{path}: not found here; using the one shipped with bloomft, {shipped}", file=sys.stderr)
    return shipped


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read the file that `find_config` finds, apply ``overrides`` (``a.b.c=value``), check everything.

    ``train.output_dir`` and ``data.cache_dir`` are filled in. The hub's access token is removed from
    ``sys.argv``, which loggers record. Raises `UserError` with the key's full path, its line in the file (or
    "command line"), what is allowed and a suggestion for an unknown key.
    """
    path = find_config(path)
    try:
        config = _resolve(path, overrides)
    except RecursionError as error:
        raise UserError(f"{path} or the command line: nested too deeply") from error
    config.train.output_dir = os.path.expanduser(config.train.output_dir or Path("runs") / path.stem)
    config.data.cache_dir = os.path.expanduser(config.data.cache_dir or default_cache_dir())
    if token := config.model.transformer.token:
        for words in (sys.argv, sys.orig_argv):
            words[:] = [word.replace(token, "hidden") for word in words]
    return config


def _resolve(path: Path, overrides: Sequence[str]) -> Config:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: cannot read the configuration: {reason}") from error
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path}: larger than {LARGEST_FILE} bytes, the limit for a configuration")
    origin = Origin(path)
    try:
        written = read_yaml(text, origin.note_line)
    except InvalidYAMLError as error:
        line = f":{error.line}" if error.line else ""
        raise UserError(f"{path}{line}: not valid YAML: {error}") from error
    if not isinstance(written, dict):
        raise UserError(f"{path}: expected the nodes {', '.join(fields_of(Config))} with keys below them")
    values = _typed(written, Config, "", origin)
    for override in overrides:
        name, _, word = override.partition("=")
        if not name or not word:
            raise UserError(f"command line: {override!r:.200} is not of the form key=value")
        try:
            written = read_word(word, type_of_key(name))
        except InvalidYAMLError as error:
            raise UserError(f"command line: {override!r:.200} cannot be read: {error}") from error
        for part in reversed(name.split(".")):
            written = {part: written}
        for key in _all_keys(written):
            origin.note_override(key)
        _update(values, _typed(written, Config, "", origin))
    if missing := sorted(_missing(values, Config)):
        raise UserError(f"{path}: {missing[0]} is missing: {describe_key(missing[0])}")
    config = _made(values, Config)
    for key, spec, value in leaves(config):
        if not is_allowed(spec, value):
            raise UserError(f"{origin(key)}: {not_allowed(key, value)}")
    _check_together(config, origin)
    return config


def _typed(written: dict[str, Any], node: type, prefix: str, origin: Origin) -> dict[str, Any]:
    """What was written below a node, converted to the types of the keys; `UserError` where that fails."""
    names = fields_of(node)
    values = {}
    for name, value in written.items():
        key = f"{prefix}{name}"
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            elsewhere = [known for known in known_keys() if known.rsplit(".", 1)[-1] == name]
            guess = f"{prefix}{close[0]}" if close else (elsewhere[0] if elsewhere else "")
            hint = f"; did you mean {guess}?" if guess else ""
            raise UserError(f"{origin(key)}: unknown key{hint} (allowed here: {', '.join(names)})")
        below = node_type(names[name])
        if below is None:
            try:
                values[name] = to_type(value, names[name].type, key)
            except WrongTypeError as error:
                raise UserError(f"{origin(error.key)}: {not_allowed(error.key, error.value)}") from error
        elif isinstance(value, dict):
            values[name] = _typed(value, below, f"{key}.", origin)
        else:
            raise UserError(f"{origin(key)}: expected the keys {', '.join(fields_of(below))} below it")
    return values


def _all_keys(written: Any, prefix: str = "") -> Iterator[str]:
    for name, value in written.items() if isinstance(written, dict) else ():
        yield f"{prefix}{name}"
        yield from _all_keys(value, f"{prefix}{name}.")


def _update(values: dict[str, Any], later: dict[str, Any]) -> None:
    for name, value in later.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _update(values[name], value)
        else:
            values[name] = value


def _missing(values: dict[str, Any], node: type, prefix: str = "") -> Iterator[str]:
    for name, spec in fields_of(node).items():
        if below := node_type(spec):
            yield from _missing(values.get(name, {}), below, f"{prefix}{name}.")
        elif name not in values and spec.default is spec.default_factory is dataclasses.MISSING:
            yield f"{prefix}{name}"


def _made(values: dict[str, Any], node: type) -> Any:
    nodes = {name: below for name, spec in fields_of(node).items() if (below := node_type(spec))}
    return node(**values | {name: _made(values.get(name, {}), kind) for name, kind in nodes.items()})


def plain_values(config: Config) -> dict[str, Any]:
    """The resolved configuration as nested dictionaries, without the hub's access token."""
    values = dataclasses.asdict(config)
    values["model"]["transformer"]["token"] = None
    return values


def config_to_yaml(config: Config) -> str:
    """`plain_values` as YAML that `load_config` reads back."""
    return to_yaml(plain_values(config))


def _check_together(config: Config, origin: Origin) -> None:
    lora, schedule = config.model.lora, config.optim.scheduler
    if lora.parts is not None and lora.attention_layer_name != "query_key_value":
        raise UserError(
            f"{origin('model.lora.parts')}: {shown(lora.parts)} are rows of query_key_value; "
            f"{lora.attention_layer_name} has no such parts"
        )
    if config.train.output_dir and Path(config.train.output_dir).resolve() == Path("/"):
        raise UserError(
            f"{origin('train.output_dir')}: {config.train.output_dir} is not a folder for a single run"
        )
    if schedule.num_warmup_steps > schedule.num_training_steps:
        raise UserError(
            f"{origin('optim.scheduler.num_warmup_steps')}: {schedule.num_warmup_steps} is more than "
            f"num_training_steps ({schedule.num_training_steps}); allowed: at most as many"
        )
    if schedule.name in METRIC_SCHEDULES and not (
        config.train.eval_every_n_steps and config.data.heldout_fraction
    ):
        raise UserError(
            f"{origin('optim.scheduler.name')}: {schedule.name} follows the held-out loss; set "
            f"train.eval_every_n_steps and data.heldout_fraction above 0"
        )
