"""Every configuration key in one place: its type, default, bounds, unit and meaning."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def _key(default: Any, doc: str, **bounds: Any) -> Any:
    """A dataclass field with its documentation and bounds.

    Bounds are at_least, above, at_most, below, nonzero, length and choices; a list's apply to its items.
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

    @property
    def token_cache_dir(self) -> Path:
        """``cache_dir`` of a loaded configuration."""
        return _filled_in(self.cache_dir)


@dataclass
class TransformerConfig:
    """The base model; the optional keys go to `from_pretrained` unchanged."""

    pretrained_model_name_or_path: str = _key(
        dataclasses.MISSING,
        "hub name or folder of a BLOOM model; `builtin:tiny` and `builtin:tiny-from-scratch` need no network",
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
    """The training loop."""

    batch_size: int = _key(dataclasses.MISSING, "rows in a micro-batch, per process", at_least=1)
    accumulate_grad_batches: int = _key(1, "micro-batches in an optimizer step", at_least=1)
    gradient_clip_val: float = _key(1.0, "largest global gradient norm; 0 turns clipping off", at_least=0)
    gradient_checkpointing: bool | str = _key(
        False,
        "recompute the blocks in the backward pass; `selective` recomputes what follows attention",
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
        "dtype of the frozen base (adapters stay fp32); auto is bf16 on CUDA and, of fp32 and "
        "bf16, what is faster on a CPU; a resumed run keeps its own",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    device: str = _key("auto", "auto is CUDA where there is one", choices=("auto", "cpu", "cuda"))
    strategy: str = _key(
        "auto",
        "of several processes that torchrun starts: with ddp each holds the whole base, with fsdp its share "
        "of it; auto is fsdp where the base takes more than half of a GPU's memory",
        choices=("auto", "ddp", "fsdp"),
    )
    cpu_offload: bool = _key(False, "with fsdp on GPUs, keep the blocks' shards in host memory")
    timeout_minutes: float = _key(
        30.0,
        "how long a process waits for another one in a step before the job fails",
        above=0,
        at_most=10**6,
    )
    compile: bool = _key(False, "torch.compile the blocks")
    cuda_graph: bool | str = _key(
        "auto",
        "replay forward and backward of a micro-batch from one CUDA graph; auto is wherever that is "
        "possible, with packed rows and a base without dropout; a resumed run keeps its own",
        choices=("auto", False),
    )
    resume: str = _key(
        "auto", "`auto`: from last.ckpt where there is one; `never`; or the path of a checkpoint"
    )
    output_dir: str | None = _key(None, "folder of this run; default `runs/<stem of the config file>`")
    logger: str = _key("none", "beside metrics.jsonl", choices=("none", "wandb", "tensorboard"))

    @property
    def run_dir(self) -> Path:
        """``output_dir`` of a loaded configuration."""
        return _filled_in(self.output_dir)


@dataclass
class Config:
    """The whole configuration of a run."""

    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig


def _filled_in(folder: str | None) -> Path:
    if folder is None:
        raise ValueError("this folder has no value before load_config has filled it in")
    return Path(folder)


def filename_patterns(config: DataConfig) -> list[str]:
    """``data.filenames`` as a list."""
    return [config.filenames] if isinstance(config.filenames, str) else list(config.filenames)


def default_cache_dir() -> Path:
    """Folder of token caches and the embedded base: ``$XDG_CACHE_HOME/bloomft`` or ``~/.cache/bloomft``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bloomft"
