"""One BLOOM-1b7 block between two layer norms, adapters on query_key_value, forward and backward."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import BloomForCausalLM
from transformers.models.bloom.modeling_bloom import BloomModel

from benchmarks.baselines import bloom_step
from benchmarks.baselines.rounded_model import gradient_bound
from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.pool import Item, Setting
from benchmarks.gpu_check.speed import models
from benchmarks.gpu_check.speed.sides import MODES, WARM, Case, Differentiated, Side, free_memory, other_side
from benchmarks.gpu_check.speed.step_items import OTHERS_GRADIENT, ROWS
from benchmarks.interleave import ONLY, is_ours
from lorakernels.tolerance import relative_error

# the head takes no part
VOCABULARY = 512
RESULTS = ("out", "dembeddings", "dA", "dB")


def items() -> list[Item]:
    """Eagerly and as a graph."""
    return [Item(f"block{suffix}", check_block, {"mode": mode}, limit=60.0) for mode, suffix in MODES.items()]


def check_block(findings: Findings, setting: Setting, mode: str) -> None:
    """Every side, fed with embeddings that require a gradient."""
    shape = bloom_step.smaller(models.shape_of(setting, layers=1), vocab_size=VOCABULARY)
    rows = setting.pick(ROWS, 2)
    base = models.make_base(setting, shape)
    generator = torch.Generator(setting.device).manual_seed(3)
    size = (rows, shape.tokens, shape.hidden_size)
    embeddings, incoming = (
        torch.randn(size, generator=generator, device=setting.device).to(models.DTYPE) for _ in range(2)
    )
    references = None if mode == WARM else exact_results(base, embeddings, incoming)
    builders: dict[str, Callable[[], Side]] = {
        name: functools.partial(make_side, name, base, build, embeddings, incoming, references)
        for name, build in models.builders(setting, (rows, shape.tokens)).items()
        if name != models.FROZEN
    }
    if mode != WARM:
        for name, make in models.products(setting, shape, rows, head=False).items():
            builders[name] = lambda make=make: Side({ONLY: make()})
    Case(
        "block[bloom-1b7]",
        "block",
        f"one block of BLOOM-1b7, {rows} x {shape.tokens} tokens, hidden {shape.hidden_size}, bfloat16",
        models.GEMMS,
        mode,
        seconds=4.0,
        extra={
            "case": {"T": shape.tokens, "hidden": shape.hidden_size},
            "flops": models.flops(shape, rows, head=False),
        },
    ).measure(findings, setting, builders)


def make_side(
    name: str,
    base: BloomForCausalLM,
    build: models.Build,
    embeddings: Tensor,
    incoming: Tensor,
    references: tuple[list[Tensor], list[Tensor]] | None,
) -> Side:
    """Forward and backward of one model's trunk."""
    both = trunk(*models.make(base, build), embeddings, incoming)
    phases = {ONLY: both.results}
    if references is None:
        return Side(phases)
    exact, rounded = references
    named = list(zip(RESULTS, exact, strict=True))
    if not is_ours(name):
        return other_side(both, named, OTHERS_GRADIENT, phases)

    def wrong(got: list[Tensor]) -> list[str]:
        terms = 4 * base.config.hidden_size
        return [
            f"{result}: relative error {error:.2g} above {bound:.2g}"
            for (result, right), one, once in zip(named, got, rounded, strict=True)
            if not (error := relative_error(one, right))
            <= (bound := gradient_bound(right, once, base.dtype, terms))
        ]

    return Side(phases, both.results, named, wrong)


def trunk(
    model: torch.nn.Module, adapters: list[Tensor], embeddings: Tensor, incoming: Tensor
) -> Differentiated:
    """The decoder of model on embeddings, which need a gradient as its adapters do."""
    decoder = next(one for one in model.modules() if isinstance(one, BloomModel))
    leaf = embeddings.clone().requires_grad_()
    return Differentiated(
        lambda: decoder(inputs_embeds=leaf, use_cache=False).last_hidden_state, [leaf, *adapters], incoming
    )


def exact_results(
    base: BloomForCausalLM, embeddings: Tensor, incoming: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients in float64, and with every module's result rounded."""
    found = []
    for rounded in (False, True):
        model, adapters = models.exact_model(base, rounded)
        found.append(trunk(model, adapters, embeddings.double(), incoming.double()).results())
        del model, adapters
        free_memory()
    return found[0], found[1]
