"""The whole training step: BLOOM-1b7's shape, 4 x 2,048 tokens, with gradient clipping and AdamW."""

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import BloomForCausalLM

from benchmarks.baselines import bloom_step
from benchmarks.baselines.rounded_model import gradient_bound, loss_bound
from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.pool import Item, Setting
from benchmarks.gpu_check.speed import models
from benchmarks.gpu_check.speed.launches import profile
from benchmarks.gpu_check.speed.sides import (
    EAGER,
    GRAPH,
    NO_MEMORY,
    ROWS_GIVEN,
    WARM,
    Case,
    Side,
    free_memory,
)
from benchmarks.interleave import ONLY, is_ours
from bloomft.model.fused_classes import FusedBloomForCausalLM, rows_with_labels
from lorakernels.tolerance import relative_error

ROWS = 4
# where a side does not fit, all are timed again with fewer layers
LAYERS = (24, 12, 6)
# blocks are compiled for any vocabulary and number of layers
WARM_LAYERS, WARM_VOCABULARY = 2, 4096
# PEFT rounds attention's biases, which moves gradients far; they have to be nearer to the truth than zero is.
OTHERS_LOSS, OTHERS_GRADIENT = 0.05, 1.0


def items() -> list[Item]:
    """The step as the trainer runs it, and as a replayed graph."""
    return [
        Item("step", check_step, {"mode": EAGER}, limit=200.0),
        Item("step, as a graph", check_step, {"mode": GRAPH}, limit=150.0),
    ]


def check_step(findings: Findings, setting: Setting, mode: str) -> None:
    """Every side at full depth, and once more with fewer layers where one did not fit."""
    for layers in LAYERS:
        shape = models.shape_of(setting, layers)
        if mode == WARM:
            shape = bloom_step.smaller(shape, layers=WARM_LAYERS, vocab_size=WARM_VOCABULARY)
        left_out = measure(findings, setting, shape, mode, cut=layers != LAYERS[0])
        if NO_MEMORY not in left_out.values() or mode == WARM:
            break
        free_memory()


def measure(
    findings: Findings, setting: Setting, shape: bloom_step.Shape, mode: str, cut: bool
) -> dict[str, str]:
    """One depth; what was left out, and why."""
    rows = setting.pick(ROWS, 2)
    base = models.make_base(setting, shape)
    generator = torch.Generator(setting.device).manual_seed(1)
    ids = torch.randint(shape.vocab_size, (rows, shape.tokens), generator=generator, device=setting.device)
    references = None if mode == WARM else kept_references(setting, base, ids)
    held = sum(parameter.nbytes for parameter in base.parameters())
    depth = f"{shape.layers} of {LAYERS[0]} layers, " if cut else ""
    case = Case(
        f"step[bloom-1b7{f'-{shape.layers}-layers' if cut else ''}]",
        "step",
        f"bf16: BLOOM-1b7, {depth}{rows} x {shape.tokens} tokens, forward, backward, clip and AdamW"
        f"{ROWS_GIVEN[mode]}",
        models.INSTALLED,
        mode,
        seconds=12.0,
        weights=held,
        extra={
            "rows_given": mode == GRAPH,
            "counts": {"unit": "tokens", "number": ids.numel()},
            "case": {"model": "bloom-1b7", "layers": shape.layers, "rows": rows, "tokens": shape.tokens,
                     "dtype": "bfloat16"},
            "flops": models.flops(shape, rows, head=True),
        },
    )  # fmt: skip
    builders: dict[str, Callable[[], Side]] = {
        name: functools.partial(make_side, name, base, build, ids, references, mode)
        for name, build in models.builders(setting, (rows, shape.tokens)).items()
    }
    if mode != WARM:
        for name, make in models.products(setting, shape, rows, head=True).items():
            builders[name] = lambda make=make: Side({ONLY: make()})
    sides = case.measure(findings, setting, builders)
    if mode == EAGER and models.OURS in sides:
        found = findings.cases[case.name]["extra_info"]
        found["kernels"] = {models.OURS: profile(sides[models.OURS].phases[ONLY], setting.device)}
    return case.left_out


def make_side(
    name: str, base: BloomForCausalLM, build: models.Build, ids: Tensor, references: list | None, mode: str
) -> Side:
    """A step of one model: loss, gradients, clipping, AdamW."""
    model, trained = models.make(base, build)
    rows = {}
    if mode == GRAPH and isinstance(model, FusedBloomForCausalLM):
        rows["supervised_rows"] = rows_with_labels(ids)
    on_gpu = ids.is_cuda
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=on_gpu, capturable=on_gpu)

    def loss_and_gradients() -> Tensor:
        loss = model(input_ids=ids, labels=ids, use_cache=False, **rows).loss
        loss.backward()
        return loss.detach()

    def step() -> None:
        loss_and_gradients()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def results() -> list[Tensor]:
        found = [loss_and_gradients(), *(value.grad for value in trained)]
        optimizer.zero_grad(set_to_none=True)
        return found

    if name == models.FROZEN or references is None:
        return Side({ONLY: step})
    (loss, gradients), _ = references
    exact = [("loss", torch.tensor(loss, dtype=torch.float64, device=ids.device))]
    exact += [("gradients", gradient) for gradient in gradients]
    wrong = functools.partial(wrong_results, name, base, ids.numel(), references)
    return Side({ONLY: step}, results, exact, wrong)


def wrong_results(
    name: str, base: BloomForCausalLM, tokens: int, references: list, got: list[Tensor]
) -> list[str]:
    """A line for each result that is too far from float64; ours by what bfloat16 costs at best."""
    (exact, right), (rounded, once) = references
    errors = [abs(got[0].item() - exact) / abs(exact)]
    errors += [relative_error(*pair) for pair in zip(got[1:], right, strict=True)]
    if is_ours(name):
        terms = max(4 * base.config.hidden_size, base.config.vocab_size)
        bounds = [loss_bound(exact, rounded, base.dtype, tokens, terms)]
        bounds += [gradient_bound(*pair, base.dtype, terms) for pair in zip(right, once, strict=True)]
    else:
        bounds = [OTHERS_LOSS] + [OTHERS_GRADIENT] * len(right)
    return [
        f"{'gradient' if index else 'loss'} {index}: relative error {error:.2g} above {bound:.2g}"
        for index, (error, bound) in enumerate(zip(errors, bounds, strict=True))
        if not error <= bound
    ]


def kept_references(setting: Setting, base: BloomForCausalLM, ids: Tensor) -> list:
    """Loss and gradients in float64, and with every module's result rounded; made once a run."""
    path = setting.scratch / f"step-{base.config.n_layer}-layers.pt"
    if not path.exists():
        found = []
        for rounded in (False, True):
            model, adapters = models.exact_model(base, rounded)
            found.append(bloom_step.recomputed_step(model, adapters, ids, ids))
            del model, adapters
            free_memory()
        # aside and renamed: another worker may ask at the same time
        written = path.with_suffix(f".{os.getpid()}")
        torch.save(found, written)
        written.replace(path)
    return torch.load(path, map_location=setting.device)
