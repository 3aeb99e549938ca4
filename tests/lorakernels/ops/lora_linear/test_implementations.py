"""The choice among implementations of the LoRA linear: each direction apart, checked, forced."""

import functools
import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lorakernels import dispatch, examination, lora_linear
from lorakernels.dispatch import Implementation
from lorakernels.ops.lora_linear import aten, implementations
from lorakernels.ops.lora_linear.problem import Problem


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAKERNELS_CACHE_DIR", str(tmp_path))
    # what these tests remember must not depend on what else the machine does
    monkeypatch.setattr(examination, "BUSY", float("inf"))


@pytest.fixture
def every_size(monkeypatch):
    """No problem is too small for a choice."""
    monkeypatch.setitem(dispatch.LARGE, "cpu", 0)


def bfloat16_arguments(device: str = "cpu") -> list:
    tensors = [torch.randn(*shape, device=device).bfloat16() for shape in ((32, 48), (64, 48), (64,))]
    return [*tensors, torch.randn(4, 48, device=device), torch.randn(64, 4, device=device), 2.0]


def test_lora_linear_chooses_between_16_bit_and_wide_products(every_size):
    lora_linear(*bfloat16_arguments())
    ((problem, choice),) = dispatch.kernel_choices().items()
    assert "bfloat16 with float32 adapters, M<=32 N=64 K=48 r=4" in problem
    assert choice["winner"] in choice["milliseconds"]
    assert set(choice["milliseconds"]) | set(choice["rejected"]) == {"aten", "aten-wide"}
    report = dispatch.kernel_report()
    assert problem in report
    assert "<- chosen" in report
    lora_linear(*bfloat16_arguments())
    assert len(dispatch.kernel_choices()) == 1


def test_lora_linear_chooses_between_the_libraries_of_a_cpu(every_size):
    arguments = [argument.float() for argument in bfloat16_arguments()[:-1]]
    lora_linear(*arguments, 2.0)
    ((problem, choice),) = dispatch.kernel_choices().items()
    assert "float32 with float32 adapters" in problem
    assert set(choice["milliseconds"]) == {"aten", "onednn"}


def test_small_problems_of_a_cpu_are_not_measured():
    lora_linear(*bfloat16_arguments())
    assert not dispatch.kernel_choices()


def test_small_products_of_a_gpu_are_not_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(dispatch, "choose", lambda problem, *_, **__: measured.append(problem))
    monkeypatch.setattr(dispatch, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(implementations, "candidates", lambda *_: (implementations.ATEN,) * 2)
    with FakeTensorMode():
        weight = torch.empty(2**10, 2**10, device="cuda", dtype=torch.bfloat16)
        for rows in (2**11 - 1, 2**11):
            x = torch.empty(rows, 2**10, device="cuda", dtype=torch.bfloat16)
            lora_b = torch.empty(2**10, 4, device="cuda", dtype=torch.bfloat16)
            problem = Problem(x, weight, None, lora_b.T, lora_b, 1.0, 0.0, x)
            small = implementations.select(problem, "auto", "forward")
            assert (small is implementations.ATEN) == (rows < 2**11)
    assert len(measured) == 1


@pytest.fixture
def nothing_known():
    """Nothing is known of any device, nor is afterwards."""

    def forget():
        dispatch.device_properties.cache_clear()
        implementations._with_shipped_gemms.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_second_call_asks_nothing_of_the_device(backend, monkeypatch, nothing_known):
    pytest.importorskip("triton")
    from lorakernels.ops.lora_linear.triton import tiles

    asked = []

    def properties(device):
        asked.append("properties")
        return SimpleNamespace(name="a GPU", major=8, shared_memory_per_block_optin=98_765)

    def shipped_gemms(*arguments, **options):
        asked.append("tiles")
        return given_gemms(*arguments, **options)

    given_gemms = tiles.shipped_gemms
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties(device).name)
    monkeypatch.setattr(tiles, "shipped_gemms", shipped_gemms)
    monkeypatch.setattr(dispatch, "choose", lambda problem, candidates, *_, **__: candidates[-1])
    monkeypatch.setitem(dispatch.LARGE, "cuda", 0)
    with FakeTensorMode():
        x = torch.empty(8, 16, device="cuda", dtype=torch.bfloat16)
        problem = Problem(x, x, None, x, x, 1.0, 0.0, x)
        first = implementations.select(problem, backend, "forward")
        assert asked == ["properties", "tiles"]
        for direction in ("forward", "backward"):
            assert implementations.select(problem, backend, direction) is first
    assert asked == ["properties", "tiles"]


def test_measuring_leaves_the_random_state_alone(every_size):
    arguments = bfloat16_arguments()
    state = torch.get_rng_state()
    lora_linear(*arguments)
    assert dispatch.kernel_choices()
    assert torch.equal(state, torch.get_rng_state())


def test_a_wrong_lora_linear_is_caught_by_the_self_check(every_size, monkeypatch):
    broken = Implementation("broken", broken_y, functools.partial(aten.backward_wide))
    table = (implementations.ATEN_WIDE, broken)
    monkeypatch.setattr(implementations, "candidates", lambda x, dropout_p: table)
    with pytest.warns(
        UserWarning, match="broken is not used for lora_linear forward .*y: relative error.*S: relative"
    ):
        lora_linear(*bfloat16_arguments())


def broken_y(problem):
    return aten.forward_wide(replace(problem, scale=2 * problem.scale))


def test_a_forced_backend_is_checked_once(every_size, monkeypatch):
    checked = []
    failures = implementations._Trial.failures
    monkeypatch.setattr(
        implementations._Trial, "failures", lambda *both: checked.append(both[1].name) or failures(*both)
    )
    for _ in range(2):
        lora_linear(*bfloat16_arguments(), backend="aten")
    assert checked == ["aten"]
    monkeypatch.setattr(implementations, "ATEN", Implementation("aten", broken_y, aten.backward_wide))
    dispatch.forget()
    with pytest.raises(
        RuntimeError, match=r"^lorakernels: no implementation of lora_linear .* is right: aten: y: rel.*$"
    ):
        lora_linear(*bfloat16_arguments(), backend="aten")


def test_a_wrong_sole_candidate_gives_way_to_the_reference(every_size, monkeypatch):
    broken = Implementation("broken", broken_y, aten.backward_wide)
    monkeypatch.setattr(implementations, "candidates", lambda *_: (broken,))
    arguments = bfloat16_arguments()
    with pytest.warns(UserWarning, match="the plain reference computes lora_linear .*: broken: y: relative"):
        y = lora_linear(*arguments)
    assert torch.equal(y, lora_linear(*arguments, backend="reference"))


def test_a_dropped_bias_is_seen_though_the_layers_own_is_zero(every_size, monkeypatch):
    def forward(problem):
        return aten.forward(replace(problem, bias=None))

    broken = Implementation("broken", forward, aten.backward, roundings=2)
    monkeypatch.setattr(implementations, "candidates", lambda *_: (broken,))
    x, weight, bias, *rest = bfloat16_arguments()
    with pytest.warns(UserWarning, match="broken: y: relative error"):
        lora_linear(x, weight, torch.zeros_like(bias), *rest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_linear(x, weight, None, *rest)


def chosen(direction: str) -> str:
    ((_, choice),) = (item for item in dispatch.kernel_choices().items() if f"{direction} on" in item[0])
    return choice["winner"]


@pytest.mark.parametrize(("forward", "backward"), [("aten", "aten-wide"), ("aten-wide", "aten")])
def test_forward_and_backward_are_chosen_apart(forward, backward, every_size, monkeypatch):
    def seconds(trial, one):
        return 0.001 if one.name == {"forward": forward, "backward": backward}[trial.direction] else 0.002

    def watched(one):
        def run(direction, *arguments):
            used.append((direction, one.name))
            return getattr(one, direction)(*arguments)

        parts = (functools.partial(run, direction) for direction in ("forward", "backward"))
        return Implementation(one.name, *parts, roundings=one.roundings)

    used = []
    table = (watched(implementations.ATEN), watched(implementations.ATEN_WIDE))
    monkeypatch.setattr(examination, "host_seconds", seconds)
    monkeypatch.setattr(implementations, "candidates", lambda x, dropout_p: table)
    x, *rest = bfloat16_arguments()
    y = lora_linear(x.requires_grad_(), *rest)
    assert len(dispatch.kernel_choices()) == 1, "what is only evaluated needs no backward"
    y.sum().backward()
    assert (chosen("forward"), chosen("backward")) == (forward, backward)
    used.clear()
    lora_linear(x, *rest).sum().backward()
    assert used == [("forward", forward), ("backward", backward)]


def test_the_backward_is_judged_without_a_forward(every_size, monkeypatch):
    """Of two whose forwards are wrong the one with the right backward is used for it."""

    def wrong_gradients(problem, dy, s, needs):
        dx, da, db = aten.backward(problem, dy, s, needs)
        return dx, da, 2 * db

    right = Implementation("right", None, aten.backward, roundings=2)
    wrong = Implementation("wrong", None, wrong_gradients, roundings=2)
    monkeypatch.setattr(implementations, "candidates", lambda *_: (wrong, right))
    x, *rest = bfloat16_arguments()
    with pytest.warns(UserWarning, match="lora_linear") as seen:
        lora_linear(x.requires_grad_(), *rest).sum().backward()
    texts = [str(one.message).partition(" on cpu")[0] for one in seen]
    assert texts == [
        "lorakernels: the plain reference computes lora_linear forward",
        "lorakernels: wrong is not used for lora_linear backward",
    ]
    assert re.search(r": dB: relative error [^;]*$", str(seen[1].message))
    assert (chosen("forward"), chosen("backward")) == ("reference", "right")


def test_the_forwards_s_is_checked_since_any_backward_takes_it(every_size, monkeypatch):
    def forward(problem):
        y, s = aten.forward(problem)
        return y, s.bfloat16().float()

    broken = Implementation("broken", forward, aten.backward, roundings=2)
    monkeypatch.setattr(implementations, "candidates", lambda *_: (broken,))
    with pytest.warns(
        UserWarning, match=r"reference computes lora_linear forward .*: broken: S: relative [^;]*$"
    ):
        lora_linear(*bfloat16_arguments())


def test_few_sums_are_checked_among_more(every_size):
    """M = 1 and r = 1: the gradients are multiples of one sum, which may cancel to nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(100, 140):
            weight, lora_b = torch.randn(150, k), torch.randn(150, 1)
            lora_linear(torch.randn(1, k), weight, None, torch.randn(1, k), lora_b, 1.0, backend="aten")


@pytest.fixture
def own_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_the_choice_depends_on_tf32_where_it_may_be_used(monkeypatch, own_precision):
    problems = []

    def choose(problem, candidates, *_, **__):
        problems.append(problem)
        return candidates[0]

    monkeypatch.setattr(dispatch, "choose", choose)
    monkeypatch.setattr(dispatch, "device_name", lambda device: "a GPU")
    monkeypatch.setitem(dispatch.LARGE, "cuda", 0)
    monkeypatch.setattr(implementations, "candidates", lambda *_: (implementations.ATEN,) * 2)
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.empty(4, 8, device="cuda", dtype=dtype)
            for precision in ("highest", "high"):
                torch.set_float32_matmul_precision(precision)
                implementations.select(Problem(x, x, None, x, x, 1.0, 0.0, x), "auto", "forward")
    assert [", TF32" in problem for problem in problems] == [False, True, False, False]


@pytest.mark.parametrize("name", ["reference", "aten", "aten-wide", "triton"])
def test_the_environment_forces_a_backend(name, monkeypatch, device):
    monkeypatch.setenv("LORAKERNELS_BACKEND", name)
    used = []
    select = implementations.select

    def spy(*arguments):
        chosen = select(*arguments)
        used.append(chosen.name)
        return chosen

    monkeypatch.setattr("lorakernels.ops.lora_linear.select", spy)
    lora_linear(*bfloat16_arguments(device))
    assert [one.split(":")[0] for one in used] == [name]


def test_an_unknown_forced_backend_is_named(monkeypatch):
    monkeypatch.setenv("LORAKERNELS_BACKEND", "magic")
    with pytest.raises(ValueError, match="backend: expected one of reference, aten, aten-wide, got 'magic'"):
        lora_linear(*bfloat16_arguments())
