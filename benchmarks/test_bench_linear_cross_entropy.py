"""The vocabulary loss, forward and backward, against F.cross_entropy on full logits: time, memory, error.

    python -m pytest benchmarks/test_bench_linear_cross_entropy.py --benchmark-only -s [--full]

BLOOM-560m's head: V = 250,880, H = 1024. The floor is its two products alone, in chunks of 512 rows. At 4,096
rows full logits take 16 GiB, so every turn starts by returning the memory that the others freed, or 24 GiB
would not be enough; the fresh pages slow down the implementation that takes most.
"""

import functools

import pytest
import torch

from benchmarks import interleave, process_memory
from benchmarks.baselines import cross_entropy as baselines
from bloomft.process import release_freed_memory, setup_process
from lorakernels import cpu_gemm, linear_cross_entropy
from lorakernels.dispatch import dtype_name
from lorakernels.ops.linear_cross_entropy import check
from lorakernels.tolerance import relative_error

VOCABULARY, WIDTH = 250_880, 1024
FLOOR, OURS, THEIRS = "its products alone", "lorakernels", "transformers, full logits"
TWICE = "logits in chunks, computed twice"
RIVALS = {
    THEIRS: baselines.full_logits,
    TWICE: baselines.row_chunks,
    "Liger's method, re-implemented": baselines.gradient_in_forward,
    OURS: linear_cross_entropy,
}
LIGER = next(name for name in RIVALS if "Liger" in name)
FULL = pytest.mark.full
SIZES = [
    pytest.param(512, torch.float32, id="512-fp32"),
    pytest.param(512, torch.bfloat16, id="512-bf16", marks=FULL),
    pytest.param(4096, torch.float32, id="4096-fp32", marks=FULL),
]


def make_problem(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, frozen weight and labels; the logits have a standard deviation of about 3."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(VOCABULARY, WIDTH, dtype=dtype)
    for block in weight.split(8192):
        block.copy_(torch.randn(block.shape, generator=generator) * 0.1)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (rows,), generator=generator)


def step(rival: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """The loss and the gradient of hidden."""
    loss = RIVALS[rival](hidden, weight, labels)
    return [loss.detach(), *torch.autograd.grad(loss, hidden)]


def exact_step(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[list[torch.Tensor], float]:
    """The same in float64, a block of the vocabulary at a time, and the largest logit."""
    wide, largest = hidden.detach().double(), 0.0
    total, gradient = wide.new_zeros(len(wide)), torch.zeros_like(wide)
    for block in weight.split(8192):
        block = block.double()
        logits = wide @ block.T
        largest = max(largest, float(logits.abs().max()))
        weights = logits.exp_()  # of logits below 30: no shift is needed in float64
        total += weights.sum(1)
        gradient += weights @ block
    of_labels = weight[labels].double()
    losses = total.log() - (wide * of_labels).sum(1)
    return [losses.mean(), (gradient / total[:, None] - of_labels) / len(labels)], largest


def products_alone(hidden: torch.Tensor, weight: torch.Tensor):
    """A step of hidden @ weight.T and logits @ weight, 512 rows and 8192 columns at a time, by the faster
    library."""
    hidden, gemm = hidden.detach(), cpu_gemm.fastest(weight.dtype)

    def run() -> None:
        for part in hidden.split(512):
            for block in weight.split(8192):
                gemm.backward(gemm.forward(part, block, None), block)

    return run


def peak_over_inputs(rival: str, rows: int, dtype: torch.dtype, threads: int) -> int:
    """Bytes that one step takes at its peak beyond its inputs; to be called in a fresh process."""
    setup_process()
    torch.set_num_threads(threads)
    problem = make_problem(rows, dtype)
    step(rival, problem[0][:8].detach().requires_grad_(), problem[1][:512], problem[2][:8] % 512)
    return process_memory.peak_over(lambda: step(rival, *problem))


@pytest.mark.timeout(1800)
@pytest.mark.benchmark(group="linear_cross_entropy")
@pytest.mark.parametrize(("rows", "dtype"), SIZES)
def test_loss(benchmark, rows, dtype, full):
    # Liger's rule gives chunks of 4 to 32 rows here, which on a CPU read the whole head each
    left_out = set() if full and rows == 512 and dtype == torch.float32 else {LIGER}
    left_out |= set() if full else {TWICE}
    rivals = [rival for rival in RIVALS if rival not in left_out]
    memory = {
        rival: process_memory.in_fresh_process(peak_over_inputs, rival, rows, dtype, torch.get_num_threads())
        for rival in rivals
    }
    problem = make_problem(rows, dtype)
    steps = {rival: functools.partial(step, rival, *problem) for rival in rivals}
    results = steps[OURS]()
    release_freed_memory()
    exact, largest_logit = exact_step(*problem)
    errors = {name: relative_error(*pair) for name, *pair in zip(check.RESULTS, results, exact, strict=False)}
    wrong = check.failures(
        results,
        exact,
        dtype,
        rows=rows,
        width=WIDTH,
        vocabulary=VOCABULARY,
        largest_logit=largest_logit,
        rounds_products=dtype.itemsize == 2 and not cpu_gemm.widens(dtype),
    )
    interleave.require_right({OURS: wrong})
    interleave.compare(
        benchmark,
        {FLOOR: products_alone(*problem[:2]), **steps},
        floor=FLOOR,
        rounds=3,
        warmup=0,
        before_turn=release_freed_memory if rows > 512 else None,
        title=f"loss over {rows} rows of {VOCABULARY} logits, {dtype_name(dtype)}",
        case={"rows": rows, "dtype": dtype_name(dtype)},
        memory=memory,
        errors=errors,
        flops=dict.fromkeys((FLOOR, OURS), 4 * rows * VOCABULARY * WIDTH),
    )
    for rival, peak in memory.items():
        print(f"  {rival:58} {peak / 2**20:7.0f} MiB, {peak / memory[THEIRS]:.3f} of {THEIRS}")
    assert memory[OURS] < memory[THEIRS] / 10
