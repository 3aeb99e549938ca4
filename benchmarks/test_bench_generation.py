"""Greedy generation with adapters: transformers with PEFT against the patched model; tokens a second.

    python -m pytest benchmarks/test_bench_generation.py --benchmark-only -s

Four layers of BLOOM-560m's shape, its whole vocabulary, a prompt of 64 tokens. Both sides keep a cache of
keys and values.
"""

from pathlib import Path

import pytest
import torch

from benchmarks import interleave
from benchmarks.baselines import bloom_step
from lorakernels.tolerance import deviations, relative_error

SHAPE = bloom_step.Shape(layers=4)
PROMPT, NEW = 64, 16
PEFT, OURS = "PEFT", "bloomft"
# Terms of all sums on the way to a logit: in a layer those over its width (query_key_value, dense, the MLP's
# first), the MLP's second, over 4 widths, and attention's; then the head's.
TERMS = SHAPE.layers * (7 * SHAPE.hidden_size + PROMPT) + SHAPE.hidden_size


@pytest.mark.benchmark(group="generation")
def test_generation(benchmark):
    prompt = SHAPE.batch()["input_ids"][:, :PROMPT]
    with bloom_step.scratch_folder() as folder:
        weights = bloom_step.write_weights(SHAPE, Path(folder))
        bases = {name: bloom_step.load_base(SHAPE, weights) for name in (PEFT, OURS, "float64")}
    models = {
        PEFT: bloom_step.with_peft(bases[PEFT]),
        OURS: bloom_step.with_bloomft(bases[OURS]),
        "float64": bloom_step.with_peft(bases["float64"]),
    }
    for model in models.values():
        bloom_step.fill_adapters(model.eval())

    with torch.no_grad():
        exact = models.pop("float64").double()(prompt, logits_to_keep=1).logits
        logits = models[OURS](prompt, logits_to_keep=1).logits
    wrong = deviations("logits", logits, exact, torch.float32, operands=torch.float32, terms=TERMS)

    def generate(model) -> torch.Tensor:
        with torch.no_grad():
            return model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW,
                min_new_tokens=NEW, do_sample=False, use_cache=True, pad_token_id=0,
            )  # fmt: skip

    if not torch.equal(generate(models[OURS]), generate(models[PEFT])):
        wrong.append(f"other tokens than {PEFT}'s")
    interleave.require_right({OURS: wrong})
    timings = interleave.compare(
        benchmark,
        {name: lambda model=model: generate(model) for name, model in models.items()},
        floor=PEFT,
        rounds=5,
        warmup=1,
        title=f"{NEW} new tokens after {PROMPT}, {SHAPE.layers} layers, float32",
        errors={"logits": relative_error(logits, exact)},
        counts={"unit": "tokens", "number": NEW},
    )[interleave.ONLY]
    for name, timing in timings.items():
        print(f"  {name:10} {1e3 * NEW / timing.median_ms:.1f} tokens/s")
