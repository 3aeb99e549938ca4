"""One BLOOM block, forward and backward, adapters on query_key_value: 1 x 1,024 tokens of BLOOM-560m's shape.

    python -m pytest benchmarks/test_bench_block.py --benchmark-only -s [--full]

A model of one block between its two layer norms, fed with embeddings that require a gradient. The floor is
the block's products with frozen weights alone; attention's products are timed too. --full adds both models
under torch.compile.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import interleave, process_memory
from benchmarks.baselines import bloom_step
from benchmarks.step_processes import ATTENTION, GEMMS
from bloomft.model.compiled_blocks import compile_blocks
from bloomft.process import setup_process
from lorakernels.tolerance import relative_error

SHAPE = bloom_step.Shape(layers=1, vocab_size=512)
FLOOR, OURS, PEFT = GEMMS, "bloomft", "PEFT"
# A model in float32 stays this close to float64; operators have separate bounds, in their benchmarks.
TOLERANCE = 1e-5
RESULTS = ("out", "dembeddings", "dA", "dB")


def compiled_peft(model) -> nn.Module:
    """PEFT's model with its block compiled."""
    model = bloom_step.with_peft(model)
    model.base_model.model.transformer.h[0].compile()
    return model


def compiled_ours(model) -> nn.Module:
    """Our model with its block compiled."""
    model = bloom_step.with_bloomft(model)
    compile_blocks(model, (1, SHAPE.tokens))
    return model


BUILDERS = {
    PEFT: bloom_step.with_peft,
    OURS: bloom_step.with_bloomft,
    "PEFT compiled": compiled_peft,
    "bloomft compiled": compiled_ours,
}


class Step:
    """Forward and backward of the decoder in any dtype, with the same weights and adapters for all."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        with bloom_step.scratch_folder() as folder:
            weights = bloom_step.write_weights(SHAPE, Path(folder))
            model = BUILDERS[name](bloom_step.load_base(SHAPE, weights))
        self.adapters = bloom_step.fill_adapters(model)
        model.to(dtype)
        generator = torch.Generator().manual_seed(3)
        size = (1, SHAPE.tokens, SHAPE.hidden_size)
        self.embeddings = torch.randn(size, generator=generator).to(dtype).requires_grad_()
        self.incoming = torch.randn(size, generator=generator).to(dtype)
        self.decoder = next(one for one in model.modules() if isinstance(one, bloom_step.BloomModel))

    def results(self) -> list[torch.Tensor]:
        """The output and the gradients of the embeddings, lora_a and lora_b."""
        out = self.decoder(inputs_embeds=self.embeddings).last_hidden_state
        return [out.detach(), *torch.autograd.grad(out, [self.embeddings, *self.adapters], self.incoming)]


def peak_over_weights(name: str) -> int:
    """Bytes of one forward and backward; for a fresh process."""
    setup_process()
    return process_memory.peak_over(Step(name).results)


@pytest.mark.benchmark(group="block")
def test_block(benchmark, full):
    names = list(BUILDERS) if full else [PEFT, OURS]
    steps = {name: Step(name) for name in names}
    exact = Step(PEFT, torch.float64).results()
    wrong, errors = {}, {}
    for name in names:
        wrong[name] = []
        for result, got, right in zip(RESULTS, steps[name].results(), exact, strict=True):
            error = errors[f"{name}, {result}"] = relative_error(got, right)
            wrong[name] += [f"{result}: {error:.2g} above {TOLERANCE}"] if not error <= TOLERANCE else []
    interleave.require_right({name: wrong[name] for name in names if name.startswith(OURS)})
    memory = {name: process_memory.in_fresh_process(peak_over_weights, name) for name in (PEFT, OURS)}
    interleave.compare(
        benchmark,
        {
            FLOOR: bloom_step.make_gemms(SHAPE, head=False),
            ATTENTION: bloom_step.make_attention_products(SHAPE),
            **{name: step.results for name, step in steps.items()},
        },
        floor=FLOOR,
        rounds=9,
        title=f"one block, 1 x {SHAPE.tokens} tokens, hidden {SHAPE.hidden_size}, float32",
        case={"T": SHAPE.tokens, "hidden": SHAPE.hidden_size},
        errors=errors,
        memory=memory,
        flops={
            FLOOR: bloom_step.total_flops(bloom_step.gemms(SHAPE, head=False)),
            ATTENTION: bloom_step.total_flops(bloom_step.attention_products(SHAPE)),
        },
    )
