"""Cases of `python -m lorakernels.trace --cases benchmarks.traced_cases`: rivals of the layer, a block and a
whole training step of BLOOM-1b7, by PEFT on transformers and by bloomft."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from benchmarks.baselines.bloom_step import with_bloomft, with_peft, with_peft_not_upcast
from benchmarks.baselines.lora_linear import addmm_in_place, peft_linear, peft_without_upcast
from bloomft.config.keys import OptimConfig, OptimizerConfig, SchedulerConfig
from bloomft.model.fused_block import FusedInputs
from bloomft.model.fused_classes import checkpoint_blocks
from bloomft.run.state import RunState
from lorakernels import alibi_slopes, attention_mask
from lorakernels.ops.lora_linear.check import Case as LayerCase
from lorakernels.trace import cases as operators
from lorakernels.trace.cases import BATCH, HEADS, LENGTH, VOCABULARY, K, M, N, empty, forward_and_backward
from lorakernels.trace.record import Case, Trace

LAYERS, CLIP = 24, 1.0

Build = Callable[[BloomForCausalLM], nn.Module]
SIDES: dict[str, Build] = {
    "peft": with_peft,
    "peft:bf16": with_peft_not_upcast,
    "lorakernels:aten": with_bloomft,
    "lorakernels:triton": with_bloomft,
}
CHECKPOINTING: dict[str, bool | str] = {"full": True, "selective": "selective"}


def cases() -> Iterator[Case]:
    """The layer's rivals at every rank; one block, and the step, by every side."""
    for rank in operators.RANKS:
        name = operators.layer_name(rank)
        yield Case(name, "addmm", _rival_layer(addmm_in_place, rank))
        yield Case(name, "peft", _rival_layer(peft_linear, rank))
        yield Case(name, "peft:bf16", _rival_layer(peft_without_upcast, rank))
    for side, build in SIDES.items():
        yield Case(f"block 1b7 {BATCH}x{LENGTH} bfloat16", side, _block(build))
    for name, mode in CHECKPOINTING.items():
        case = f"block 1b7 {BATCH}x{LENGTH} bfloat16, {name} checkpointing"
        yield Case(case, "lorakernels:triton", _block(with_bloomft, mode))
    step = f"step 1b7 {LAYERS} layers {BATCH}x{LENGTH}"
    for side, build in SIDES.items():
        yield Case(step, side, _step(build))
    for name, mode in CHECKPOINTING.items():
        yield Case(f"{step}, {name} checkpointing", "lorakernels:triton", _step(with_bloomft, mode))


def _rival_layer(build: Callable, rank: int) -> Callable[[Trace], None]:
    def run(trace: Trace) -> None:
        x, dy = empty(M, K, trained=True), empty(M, N)
        adapters = [empty(*shape, dtype=torch.float32) for shape in ((rank, K), (N, rank))]
        seed = empty(0, dtype=torch.int64)
        layer, _ = build(LayerCase(x, empty(N, K), empty(N), *adapters, operators.SCALE, 0.0, seed, dy))
        forward_and_backward(trace, lambda: layer(x))

    return run


def _model(build: Build, layers: int) -> nn.Module:
    """BLOOM-1b7 with adapters, cut to so many layers, in bfloat16."""
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=K, n_layer=layers, n_head=HEADS, use_cache=False)
    with torch.device("cuda"):
        model = BloomForCausalLM(config).to(operators.DTYPE)
    return build(model.requires_grad_(False)).train()


def _block(build: Build, checkpointing: bool | str = False) -> Callable[[Trace], None]:
    def run(trace: Trace) -> None:
        model = _model(build, 1)
        if checkpointing:
            checkpoint_blocks(model, checkpointing)
        trunk = next(one for one in model.modules() if hasattr(one, "word_embeddings_layernorm"))
        hidden = empty(BATCH, LENGTH, K, trained=True)
        if build is with_bloomft:
            slopes = alibi_slopes(HEADS, device=hidden.device)
            alibi, mask = FusedInputs(slopes, attention_mask(None, BATCH, LENGTH, hidden.device)), None
        else:
            alibi = trunk.build_alibi_tensor(empty(BATCH, LENGTH), HEADS, operators.DTYPE)
            mask = empty(BATCH, 1, LENGTH, LENGTH)
        forward_and_backward(trace, lambda: trunk.h[0](hidden, alibi=alibi, attention_mask=mask)[0])

    return run


def _step(build: Build, checkpointing: bool | str = False) -> Callable[[Trace], None]:
    """Forward, backward, clipping and AdamW of one micro-batch."""

    def run(trace: Trace) -> None:
        model = _model(build, LAYERS)
        if checkpointing:
            checkpoint_blocks(model, checkpointing, preserve_rng_state=False)
        step = _bloomft_step(model) if build is with_bloomft else _plain_step(model)
        with trace.recording("step"):
            step()

    return run


def _bloomft_step(model: nn.Module) -> Callable[[], None]:
    """A step of the trainer as it is captured in a CUDA graph: packed rows, read from static inputs."""
    settings = OptimConfig(OptimizerConfig(lr=1e-4), SchedulerConfig(num_training_steps=100))
    run = RunState(model, settings, fp16=False, fixed_shapes=True)
    run.optimizer.step()  # the first step makes the optimizer's state
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids, "document_ids": ids.int()}

    def step() -> None:
        run.forward_backward(batch, labels=BATCH * (LENGTH - 1))
        run.reduce_gradients(CLIP)
        run.optimizer_step(BATCH)

    return step


def _plain_step(model: nn.Module) -> Callable[[], None]:
    """A step as users write it, on a batch that is on the device."""
    ids = empty(BATCH, LENGTH, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": torch.empty_like(ids)}
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()  # the first step makes the optimizer's state
    optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        torch.autograd.backward(model(**batch).loss)
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
