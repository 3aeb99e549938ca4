"""From a configuration to a run that is ready for its next step."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import BloomForCausalLM

from bloomft.config.keys import Config
from bloomft.config.schema import leaves
from bloomft.data.loading import TrainingData, load_data
from bloomft.data.rows import PackedDataset
from bloomft.errors import UserError
from bloomft.model.base import Base, load_base, patch_base
from bloomft.model.compiled_blocks import compile_blocks
from bloomft.model.fused_classes import FusedBloomForCausalLM, checkpoint_blocks
from bloomft.model.patch import adapted_layers, adapter_state
from bloomft.model.sharding import held_bytes, shard_base
from bloomft.ranks import Ranks
from bloomft.run.checkpoint import LAST, TrainingState, save_checkpoint
from bloomft.run.precision import Precision, choose_precision
from bloomft.run.resumption import RunIdentity, find_resumption, resume
from bloomft.run.state import RunState
from bloomft.run.step_graph import GraphChoice, choose_graph, draws_random_numbers
from bloomft.run.strategy import choose_strategy

# Keys that may differ between the machines of a run.
_OF_ONE_MACHINE = ("data.cache_dir", "model.transformer.cache_dir", "model.transformer.token")


@dataclass
class Job:
    """A run and what it works on.

    Attributes:
        last: its last.ckpt; saved: the step that this holds, None where it is not of this run.
        notes: lines for the log.
    """

    run: RunState
    identity: RunIdentity
    data: TrainingData
    last: Path
    saved: int | None
    notes: list[str]

    def save(self, *, keep: bool) -> None:
        """Write last.ckpt and, with ``keep``, step-<n>.ckpt, which process 0 does for all."""
        if self.run.ranks.is_first:
            state = TrainingState(**self.run.state_dict(), **vars(self.identity))
            save_checkpoint(state, self.last.parent, keep=keep)
        self.saved = self.run.step


def set_up(config: Config, device: torch.device, ranks: Ranks | None = None) -> Job:
    """Base, data, adapters and optimizer, restored if there is a checkpoint to resume from.

    ``ranks`` are the processes that train together. Raises `UserError` for whatever the user can correct.
    """
    ranks = ranks or Ranks()
    resumption = ranks.from_first(lambda: find_resumption(config))
    remembered = None if resumption.state is None else resumption.state.precision
    precision = ranks.from_first(lambda: choose_precision(config.train.precision, device, remembered))
    dtype = precision.dtype
    strategy = choose_strategy(config, device, dtype, ranks)
    sharded = strategy.name == "fsdp"
    least_tokens = config.train.batch_size * (config.data.max_length if config.data.packing else 2)
    base = ranks.after_first(lambda: load_base(config.model.transformer, weights=not sharded))
    torch.manual_seed(config.data.random_state)
    model = patch_base(base, config.model.lora, device, dtype, least_tokens)
    if sharded:
        if not cast(FusedBloomForCausalLM, model).fuses_loss({}):
            raise UserError("train.strategy: fsdp: the base asks for another loss than BLOOM's; use ddp")
        shard_base(model, base.stored, device, cpu_offload=config.train.cpu_offload)
    draws = draws_random_numbers(model)
    if draws and ranks.size > 1:
        raise UserError("the base has dropout, which would be the same on every process; train it with one")
    checkpoint_blocks(model, config.train.gradient_checkpointing, preserve_rng_state=draws)
    if config.train.compile:
        shape = (config.train.batch_size, config.data.max_length)
        compile_blocks(model, shape if config.data.packing else None)
    data = load_data(config.data, base.tokenizer, ranks)
    packing = config.data.packing
    was = None if resumption.state is None else resumption.state.cuda_graph
    graph = choose_graph(config.train, model, packing=packing, remembered=was)
    run = RunState(
        model,
        config.optim,
        fp16=dtype == torch.float16,
        # a CPU gains nothing, and computes the rows that are filled up
        fixed_shapes=packing and (device.type == "cuda" or graph.used),
        recorder=graph.recorder(device),
        ranks=ranks,
    )
    identity = RunIdentity.of(config, base.identity, data.identity)
    if resumption.state is not None and resumption.path is not None:
        resume(run, resumption.state, identity, resumption.path)
    shared = {key: value for key, _, value in leaves(config) if key not in _OF_ONE_MACHINE}
    ranks.check_equal({**shared, "base": base.identity, "data": data.identity, "adapters": _digest(model)})
    last = config.train.run_dir / LAST
    saved = run.step if resumption.path == last else None
    notes = [
        *_describe(base, precision, graph, model, data),
        *([strategy.describe(ranks)] if ranks.size > 1 else []),
        *describe_plan(config, data.train, ranks.size),
        describe_memory(model),
        *resumption.notes,
    ]
    return Job(run, identity, data, last, saved, notes)


def _digest(model: BloomForCausalLM) -> str:
    """A hash of the adapters' bits."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in adapter_state(model).values():
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _describe(
    base: Base, precision: Precision, graph: GraphChoice, model: BloomForCausalLM, data: TrainingData
) -> Iterator[str]:
    layers = adapted_layers(model)
    name, first = next(iter(layers.items()))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    yield f"base: {base.name} ({str(base.identity['fingerprint'])[:8]})"
    yield f"base: {precision.name} on {model.device} ({precision.reason})"
    yield (
        f"LoRA: r={first.r} scale={first.scale} on {len(layers)} {name.rpartition('.')[-1]}, "
        f"{trainable:,} of {everything:,} parameters"
    )
    yield f"CUDA graph: {'yes' if graph.used else 'no'} ({graph.reason})"
    rows, heldout = data.train, data.heldout
    yield f"data: {rows.report.describe()}"
    yield (
        f"data: {len(rows)} rows of at most {rows.max_length} tokens, "
        f"{rows.num_supervised_tokens:,} labels, {rows.padding_fraction:.1%} padding; "
        f"{'nothing' if heldout is None else f'{len(heldout)} rows'} held out"
    )


def describe_plan(config: Config, rows: PackedDataset, processes: int = 1) -> Iterator[str]:
    """What a step takes and how many there are, in two lines for the log."""
    train, schedule = config.train, config.optim.scheduler
    per_step = train.batch_size * train.accumulate_grad_batches * processes
    # without packing a row is only as long as its text
    tokens = f"{per_step * rows.num_tokens / len(rows):,.0f}"
    epoch = len(rows) / per_step
    several = f" x {processes} processes" if processes > 1 else ""
    yield (
        f"step: {train.batch_size} rows x {train.accumulate_grad_batches}{several}, about {tokens} tokens; "
        f"epoch: {len(rows):,} rows, {epoch:,.1f} steps"
    )
    mode = train.gradient_checkpointing
    yield (
        f"run: {schedule.num_training_steps:,} steps, {schedule.num_training_steps / epoch:,.1f} epochs; "
        f"lr {config.optim.optimizer.lr:.1e} {schedule.name}, warm-up {schedule.num_warmup_steps:,}; "
        f"checkpointing {mode if isinstance(mode, str) else 'on' if mode else 'off'}"
    )


def describe_memory(model: BloomForCausalLM) -> str:
    """What weights, adapters and optimizer take, computed from the shapes, without activations."""
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += held_bytes(parameter)
    # a gradient and AdamW's two moments for each adapter
    parts = {"base": sizes[False], "adapters": sizes[True], "gradients and AdamW": 3 * sizes[True]}
    amounts = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in parts.items())
    return f"memory, computed: {amounts} MiB"
