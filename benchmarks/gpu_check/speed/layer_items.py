"""One LoRA linear: BLOOM-1b7's query_key_value, every implementation and other projects' layers."""

import functools
from collections.abc import Callable

import torch

from benchmarks.baselines import lora_linear as baselines
from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.lora_items import forced
from benchmarks.gpu_check.pool import Item, Setting
from benchmarks.gpu_check.speed.launches import COPIED_BYTES, REPEATS, by_launch, copy_rate
from benchmarks.gpu_check.speed.models import FROZEN
from benchmarks.gpu_check.speed.sides import EAGER, MODES, Case, Differentiated, Side, other_side
from lorakernels import LoRALinear, dispatch
from lorakernels.dispatch import Implementation
from lorakernels.ops.lora_linear import check, implementations

RANKS = (8, 64)
OURS = "lorakernels"
OTHERS = {
    "PyTorch, addmm in place": baselines.addmm_in_place,
    "PEFT": baselines.peft_linear,
    "PEFT, bf16 adapters": baselines.peft_without_upcast,
    "plain PyTorch": baselines.plain,
}
LIMITS = {FROZEN: baselines.frozen, "frozen linear, torch's": baselines.torch_frozen}


def items() -> list[Item]:
    """Both ranks eagerly, then as graphs."""
    return [
        Item(f"layer, r={rank}{suffix}", check_layer, {"rank": rank, "mode": mode}, limit=90.0)
        for mode, suffix in MODES.items()
        for rank in RANKS
    ]


def check_layer(findings: Findings, setting: Setting, rank: int, mode: str) -> None:
    """Every side, and what each of the candidates and the in-place one launches."""
    m, k, n = setting.pick((8192, 2048, 6144), (48, 64, 96))
    problem = make_problem(setting, m, k, n, rank)
    exact = check.exact_results(problem)
    candidates = implementations.candidates(problem, "forward")
    if setting.rehearsal:
        candidates += implementations.triton_implementations(problem, "forward")
    builders: dict[str, Callable[[], Side]] = {
        name: functools.partial(make_limit, problem, make) for name, make in LIMITS.items()
    }
    roundings = max(one.roundings for one in candidates)
    builders[OURS] = functools.partial(make_auto, problem, exact, roundings)
    for one in candidates:
        builders[f"{OURS}, {one.name}"] = functools.partial(make_one, problem, exact, one)
    others = {**OTHERS, "PEFT compiled": functools.partial(make_compiled_peft, setting)}
    for name, make in others.items():
        builders[name] = functools.partial(make_other, problem, exact, make)
    dtype = dispatch.dtype_name(problem.x.dtype)
    case = Case(
        f"layer[bloom-1b7-{rank}]",
        "lora_linear",
        f"bloom-1b7 query_key_value, M={m} K={k} N={n} r={rank} {dtype}",
        FROZEN,
        mode,
        seconds=4.0,
        extra={
            "case": {"model": "bloom-1b7", "M": m, "K": k, "N": n, "r": rank, "dtype": dtype},
            "flops": {FROZEN: 4 * m * n * k, OURS: 4 * m * n * k + 6 * m * rank * (n + k)},
            "operations_alone": 1 + 1.5 * rank * (1 / k + 1 / n),
        },
    )
    sides = case.measure(findings, setting, builders)
    if mode == EAGER and case.name in findings.cases:
        rate = copy_rate(setting.device, setting.pick(COPIED_BYTES, 2**20))
        found = findings.cases[case.name]["extra_info"]
        found["copy_rate"] = round(rate)
        found["kernels"] = {
            name: by_launch(side.launched, setting.device, rate, setting.pick(REPEATS, 1))
            for name, side in sides.items()
            if side.launched is not None
        }


def make_problem(setting: Setting, m: int, k: int, n: int, rank: int) -> check.Case:
    """A bfloat16 layer with float32 adapters, as the trainer has it."""
    generator = torch.Generator(setting.device).manual_seed(0)
    weight = torch.randn(n, k, device=setting.device, generator=generator).div_(k**0.5).to(torch.bfloat16)
    return check.random_case(m, weight, rank, torch.float32)


def make_limit(problem: check.Case, make: Callable[[check.Case], baselines.Layer]) -> Side:
    """A part of the work."""
    return Side(differentiated(problem, make(problem)).phases())


def make_other(
    problem: check.Case, exact: check.Exact, make: Callable[[check.Case], baselines.Layer]
) -> Side:
    """Another project's layer."""
    both = differentiated(problem, make(problem))
    side = other_side(both, named(exact))
    if make is baselines.addmm_in_place:
        side.launched = both.results
    return side


def make_compiled_peft(setting: Setting, problem: check.Case) -> baselines.Layer:
    """PEFT's layer under torch.compile."""
    layer, adapters = baselines.peft_linear(problem)
    return torch.compile(layer, **setting.compiler), adapters


def make_auto(problem: check.Case, exact: check.Exact, roundings: int) -> Side:
    """`LoRALinear` with what "auto" chooses."""
    both = ours(problem)
    return Side(both.phases(), both.results, named(exact), failures(problem, exact, roundings))


def make_one(problem: check.Case, exact: check.Exact, one: Implementation) -> Side:
    """`LoRALinear` with one implementation, which is also listed launch by launch."""
    both = ours(problem)

    def within(function: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with forced(one.name):
                return function()

        return run

    return Side(
        {name: within(phase) for name, phase in both.phases().items()},
        within(both.results),
        named(exact),
        failures(problem, exact, one.roundings),
        lambda: check.run_results(one.forward, one.backward, problem),
    )


def failures(
    problem: check.Case, exact: check.Exact, roundings: int
) -> Callable[[list[torch.Tensor]], list[str]]:
    """The project's rule, as a function of the results."""
    return lambda got: check.failures(got, problem, roundings=roundings, exact=exact)


def named(exact: check.Exact) -> list[tuple[str, torch.Tensor]]:
    """The four results by name."""
    return list(zip(check.RESULTS, exact.results, strict=True))


def ours(problem: check.Case) -> Differentiated:
    """`LoRALinear`, as in a model."""
    layer = LoRALinear(problem.weight, problem.bias, problem.lora_a, problem.lora_b, problem.scale)
    return differentiated(problem, (layer, [layer.lora_a, layer.lora_b]))


def differentiated(problem: check.Case, layer: baselines.Layer) -> Differentiated:
    """y, then dx and, where there are adapters, dA and dB."""
    function, adapters = layer
    x = problem.x.detach().clone().requires_grad_()
    return Differentiated(lambda: function(x), [x, *adapters], problem.dy)
