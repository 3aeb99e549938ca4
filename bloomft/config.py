"""Every configuration key in one place: its type, default, bounds, unit and meaning.

`load_config` turns a YAML file and ``key=value`` overrides into a `Config`; whatever is wrong with them ends
in one `UserError` that names the key, the line, what is allowed and, for an unknown key, the nearest known.
``python -m bloomft.config`` prints the reference table of the README.
"""

import dataclasses
import difflib
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bloomft.config_yaml import (
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

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
    "greedy",
)
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
LARGEST_FILE = 2**18  # bytes; YAML of this size takes about two seconds to read


def _key(default: Any, doc: str, **bounds: Any) -> Any:
    """A dataclass field with its documentation and bounds.

    Bounds are at_least, above, at_most, below, nonzero, length and choices; a list's hold for its items.
    """
    metadata = {"doc": doc, **bounds}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """Text and how it becomes rows of tokens."""

    filenames: str | list[str] = _key(
        dataclasses.MISSING,
        "file or list of files, globs with `**` allowed: one document a file, or `*.jsonl` with `text` or "
        "`prompt`/`response`; `builtin:installed-readmes` needs no file",
    )
    max_length: int = _key(dataclasses.MISSING, "tokens in a row", at_least=2)
    random_state: int = _key(42, "seed of split, order, adapters and dropout", at_least=0, below=2**63)
    split_state: int | None = _key(
        None,
        "seed of the held-out split alone; default `random_state`",
        at_least=0,
        below=2**63,
    )
    packing: bool = _key(True, "several short documents in one row, without attention between them")
    heldout_fraction: float = _key(
        0.05, "share of the documents kept for the held-out loss", at_least=0, below=1
    )
    cache_dir: str | None = _key(None, "folder of token caches; default `$XDG_CACHE_HOME/bloomft`")


@dataclass
class TransformerConfig:
    """The base model; the optional keys go to `from_pretrained` as they are."""

    pretrained_model_name_or_path: str = _key(
        dataclasses.MISSING, "hub name or folder of a BLOOM model; `builtin:tiny` needs no network"
    )
    revision: str | None = _key(None, "branch, tag or commit on the hub")
    subfolder: str | None = _key(None, "folder inside the repository")
    cache_dir: str | None = _key(None, "download cache of the hub")
    local_files_only: bool | None = _key(None, "never ask the network")
    token: str | None = _key(None, "access token of the hub; kept out of every file that a run writes")


@dataclass
class LoraConfig:
    """The adapters. `lora_dim` 8 and `lora_scale` 4 are PEFT's r=8 and lora_alpha=32."""

    lora_dim: int = _key(8, "rank r", at_least=1, at_most=2**16)
    lora_scale: float = _key(4.0, "factor of B·A (PEFT's lora_alpha / r)", nonzero=True)
    attention_layer_name: str = _key(
        "query_key_value", "name of the linear layers that get an adapter", choices=TARGETS
    )
    lora_dropout: float = _key(0.0, "dropout on the adapter's input", at_least=0, below=1)
    parts: str | list[str] | None = _key(
        None,
        "adapt only these rows of query_key_value, e.g. `[q, v]`; default all",
        choices=("q", "k", "v"),
    )


@dataclass
class ModelConfig:
    """Base and adapters."""

    transformer: TransformerConfig
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = _key(dataclasses.MISSING, "peak learning rate", above=0)
    betas: list[float] = _key([0.9, 0.999], "decay rates of the two moments", at_least=0, below=1, length=2)
    eps: float = _key(1e-6, "added to the denominator", above=0)
    weight_decay: float = _key(0.1, "decoupled; on matrices only", at_least=0)


@dataclass(kw_only=True)
class SchedulerConfig:
    """Any schedule of transformers' `get_scheduler`."""

    name: str = _key("linear", "schedule; the last two follow the held-out loss", choices=SCHEDULES)
    num_warmup_steps: int = _key(0, "optimizer steps", at_least=0)
    num_training_steps: int = _key(dataclasses.MISSING, "optimizer steps of the run", at_least=1)
    scheduler_specific_kwargs: dict[str, bool | int | float | str | None] = _key(
        {}, "what a schedule takes beside these, e.g. `{num_cycles: 2}`"
    )


@dataclass
class OptimConfig:
    """Optimizer and schedule."""

    optimizer: OptimizerConfig
    scheduler: SchedulerConfig


@dataclass
class TrainConfig:
    """The loop."""

    batch_size: int = _key(dataclasses.MISSING, "rows in a micro-batch, per process", at_least=1)
    accumulate_grad_batches: int = _key(1, "micro-batches in an optimizer step", at_least=1)
    gradient_clip_val: float = _key(1.0, "largest global gradient norm; 0 turns clipping off", at_least=0)
    gradient_checkpointing: bool | str = _key(
        False,
        "recompute the blocks in the backward pass; `selective` keeps projections and attention",
        choices=(True, False, "selective"),
    )
    log_every_n_steps: int = _key(10, "optimizer steps", at_least=1)
    save_every_n_train_steps: int = _key(2500, "optimizer steps", at_least=1)
    eval_every_n_steps: int = _key(
        500, "optimizer steps between held-out losses; 0 for the last step alone", at_least=0
    )
    eval_max_batches: int = _key(
        100,
        "bound of an evaluation in batches of 8192 tokens, whatever `batch_size` is: the same random "
        "held-out rows each time",
        at_least=1,
    )
    precision: str = _key(
        "auto",
        "dtype of the frozen base (adapters stay fp32); auto is bf16 on CUDA and fp32 on a CPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    device: str = _key("auto", "auto is CUDA where there is one", choices=("auto", "cpu", "cuda"))
    compile: bool = _key(False, "torch.compile the blocks")
    resume: str = _key(
        "auto", "`auto`: from last.ckpt where there is one; `never`; or the path of a checkpoint"
    )
    output_dir: str | None = _key(None, "folder of this run; default `runs/<stem of the config file>`")
    logger: str = _key("none", "beside metrics.jsonl", choices=("none", "wandb", "tensorboard"))


@dataclass
class Config:
    """The whole configuration of a run."""

    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Config:
    """Read ``path``, apply ``overrides`` (``a.b.c=value``), check everything.

    ``train.output_dir`` and ``data.cache_dir`` come back filled in. The hub's access token is taken out of
    ``sys.argv``, which loggers record. Raises `UserError` with the key's full path, its line in the file (or
    "command line"), what is allowed and a suggestion for an unknown key.
    """
    path = Path(path)
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
        raise UserError(f"{path}: no configuration is larger than {LARGEST_FILE} bytes")
    origin = Origin(path)
    try:
        written = read_yaml(text, origin.note_line)
    except InvalidYAMLError as error:
        line = f":{error.line}" if error.line else ""
        raise UserError(f"{path}{line}: not valid YAML: {error}") from error
    if not isinstance(written, dict):
        raise UserError(f"{path}: expected the nodes {', '.join(_names(Config))} with keys below them")
    values = _typed(written, Config, "", origin)
    for override in overrides:
        name, _, word = override.partition("=")
        if not name or not word:
            raise UserError(f"command line: {override!r:.200} is not of the form key=value")
        try:
            written = read_word(word, _type_of(name))
        except InvalidYAMLError as error:
            raise UserError(f"command line: {override!r:.200} cannot be read: {error}") from error
        for part in reversed(name.split(".")):
            written = {part: written}
        for key in _all_keys(written):
            origin.note_override(key)
        _update(values, _typed(written, Config, "", origin))
    if missing := sorted(_missing(values, Config)):
        raise UserError(f"{path}: {missing[0]} is missing: {_describe(missing[0])}")
    config = _made(values, Config)
    for key, spec, value in _leaves(config):
        if not _is_allowed(spec, value):
            raise UserError(f"{origin(key)}: {_allowed(key, value)}")
    _check_together(config, origin)
    return config


def _typed(written: dict[str, Any], node: type, prefix: str, origin: Origin) -> dict[str, Any]:
    """What was written below a node, every value in the type of its key; `UserError` where that fails."""
    names = _names(node)
    values = {}
    for name, value in written.items():
        key = f"{prefix}{name}"
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            elsewhere = [known for known in _known_keys() if known.rsplit(".", 1)[-1] == name]
            guess = f"{prefix}{close[0]}" if close else (elsewhere[0] if elsewhere else "")
            hint = f"; did you mean {guess}?" if guess else ""
            raise UserError(f"{origin(key)}: unknown key{hint} (allowed here: {', '.join(names)})")
        kind = names[name].type
        if not dataclasses.is_dataclass(kind):
            try:
                values[name] = to_type(value, kind, key)
            except WrongTypeError as error:
                raise UserError(f"{origin(error.key)}: {_allowed(error.key, error.value)}") from error
        elif isinstance(value, dict):
            values[name] = _typed(value, kind, f"{key}.", origin)
        else:
            raise UserError(f"{origin(key)}: expected the keys {', '.join(_names(kind))} below it")
    return values


def _type_of(key: str) -> Any:
    """The declared type of a key, of a node, or of the values of a mapping; None where there is none."""
    kind: Any = Config
    for name in key.split("."):
        if dataclasses.is_dataclass(kind):
            spec = _names(kind).get(name)
            kind = spec and spec.type
        else:
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
    return kind


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
    for name, spec in _names(node).items():
        if dataclasses.is_dataclass(spec.type):
            yield from _missing(values.get(name, {}), spec.type, f"{prefix}{name}.")
        elif name not in values and spec.default is spec.default_factory is dataclasses.MISSING:
            yield f"{prefix}{name}"


def _made(values: dict[str, Any], node: type) -> Any:
    nodes = {name: spec.type for name, spec in _names(node).items() if dataclasses.is_dataclass(spec.type)}
    return node(**values | {name: _made(values.get(name, {}), kind) for name, kind in nodes.items()})


def default_cache_dir() -> Path:
    """Home of token caches and the embedded base: ``$XDG_CACHE_HOME/bloomft`` or ``~/.cache/bloomft``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bloomft"


def plain_values(config: Config) -> dict[str, Any]:
    """The resolved configuration as nested dictionaries, without the hub's access token."""
    values = dataclasses.asdict(config)
    values["model"]["transformer"]["token"] = None
    return values


def config_to_yaml(config: Config) -> str:
    """`plain_values` as YAML that `load_config` takes back."""
    return to_yaml(plain_values(config))


def filename_patterns(config: DataConfig) -> list[str]:
    """``data.filenames`` as a list."""
    return [config.filenames] if isinstance(config.filenames, str) else list(config.filenames)


def reference_table() -> str:
    """The configuration reference as a Markdown table, one row a key."""
    rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for key in _known_keys():
        spec = _spec(key)
        default = spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
        text = "required" if default is dataclasses.MISSING else f"`{shown(default)}`"
        rows.append(f"| `{key}` | {text} | {_bounds_text(spec)} | {spec.metadata['doc']} |")
    return "\n".join(rows)


def _names(node: type) -> dict[str, dataclasses.Field]:
    return {spec.name: spec for spec in dataclasses.fields(node)}


def _known_keys(node: type = Config, prefix: str = "") -> Iterator[str]:
    for name, spec in _names(node).items():
        if dataclasses.is_dataclass(spec.type):
            yield from _known_keys(spec.type, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _spec(key: str) -> dataclasses.Field:
    node: Any = Config
    for name in re.sub(r"\[\d+\]$", "", key).split("."):
        spec = _names(node)[name]
        node = spec.type
    return spec


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    for name, spec in _names(type(node)).items():
        value = getattr(node, name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", spec, value


def _is_allowed(spec: dataclasses.Field, value: Any) -> bool:
    rules = spec.metadata
    items = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
    if not all(_is_plain(item) for item in items) or value == []:
        return False
    if value is None:
        return True  # what a key without a default may not be, its type has refused before
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
    """Whether ``value`` is null, a boolean, a finite number of 64 bits, or text that a file can hold."""
    if isinstance(value, str):
        try:
            return value.encode() != b"" and "\0" not in value
        except UnicodeEncodeError:
            return False
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, int) and abs(value) < 2**63)


def _bounds_text(spec: dataclasses.Field) -> str:
    rules = spec.metadata
    if "choices" in rules:
        return ", ".join(shown(choice) for choice in rules["choices"])
    words = {
        int: "integer",
        float: "number",
        bool: "true or false",
        str: "text",
        list[str]: "a list of texts",
        list[float]: f"{rules.get('length', 'some')} numbers",
    }
    options = typing.get_args(spec.type) if isinstance(spec.type, types.UnionType) else (spec.type,)
    options = [option for option in options if option is not types.NoneType]
    text = " or ".join(words.get(option, "a mapping of names to numbers or texts") for option in options)
    words = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}
    limits = [f"{sign} {_power(rules[name])}" for name, sign in words.items() if name in rules]
    limits += ["≠ 0"] if "nonzero" in rules else []
    return f"{text} {' and '.join(limits)}" if limits else text


def _power(bound: float) -> str:
    return f"2^{int(bound).bit_length() - 1}" if bound > 1e6 else str(bound)


def _describe(key: str) -> str:
    spec = _spec(key)
    return f"{spec.metadata['doc']} ({_bounds_text(spec)})"


def _allowed(key: str, value: Any) -> str:
    spec = _spec(key)
    names = [choice for choice in spec.metadata.get("choices", ()) if isinstance(choice, str)]
    match = difflib.get_close_matches(shown(value), names, n=1)
    close = f"; did you mean {match[0]}?" if match else ""
    return f"{shown(value)} is not allowed; allowed: {_bounds_text(spec)}{close}"


def _check_together(config: Config, origin: Origin) -> None:
    lora, schedule = config.model.lora, config.optim.scheduler
    if lora.parts is not None and lora.attention_layer_name != "query_key_value":
        raise UserError(
            f"{origin('model.lora.parts')}: {shown(lora.parts)} are rows of query_key_value; "
            f"{lora.attention_layer_name} has no such parts"
        )
    if config.train.output_dir and Path(config.train.output_dir).resolve() == Path("/"):
        raise UserError(
            f"{origin('train.output_dir')}: {config.train.output_dir} is no folder for a run alone"
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


if __name__ == "__main__":
    print(reference_table())
