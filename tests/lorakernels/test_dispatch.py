"""The measured choice: wrong candidates dropped, 3% asked of a rival, remembered, forced, repeated."""

import functools
import json
import time

import pytest
import torch

from lorakernels import cpu_gemm, dispatch, lora_linear
from lorakernels.dispatch import Implementation
from lorakernels.ops.lora_linear import aten, implementations


class FakeTrial:
    """A problem whose candidates take as long, and are as wrong, as their backward says."""

    device = torch.device("cpu")
    made = 0

    def __init__(self):
        FakeTrial.made += 1

    def run(self, implementation):
        seconds, _ = implementation.backward
        time.sleep(seconds)

    def failures(self, implementation):
        _, wrong = implementation.backward
        if isinstance(wrong, Exception):
            raise wrong
        return wrong


def candidate(name: str, seconds: float, wrong=()) -> Implementation:
    return Implementation(name, None, (seconds, wrong if isinstance(wrong, Exception) else list(wrong)))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAKERNELS_CACHE_DIR", str(tmp_path))
    # what these tests remember must not depend on what else the machine does
    monkeypatch.setattr(dispatch, "BUSY", float("inf"))
    FakeTrial.made = 0


def test_the_faster_one_is_taken_and_remembered(tmp_path):
    slow, fast = candidate("slow", 0.02), candidate("fast", 0.002)
    assert dispatch.choose("p", (slow, fast), FakeTrial) is fast
    assert dispatch.choose("p", (slow, fast), FakeTrial) is fast
    dispatch.forget()
    assert dispatch.choose("p", (slow, fast), FakeTrial) is fast
    assert FakeTrial.made == 1
    assert dispatch.choose("q", (slow, fast), FakeTrial) is fast
    assert FakeTrial.made == 2
    content = json.loads((tmp_path / "choices.json").read_text())
    (versions,) = content
    assert f"torch {torch.__version__}" in versions
    assert sorted(content[versions]) == ["p", "q"]


def test_a_candidate_must_be_three_percent_faster(monkeypatch):
    times = {"baseline": 0.100, "rival": 0.098}
    monkeypatch.setattr(dispatch, "_time", lambda trial, one: times[one.name])
    pair = (candidate("baseline", 0), candidate("rival", 0))
    assert dispatch.choose("p", pair, FakeTrial).name == "baseline"
    times["rival"] = 0.0969
    assert dispatch.choose("q", pair, FakeTrial).name == "rival"


@pytest.mark.parametrize("quiet_after", [3, 15, 99])
def test_a_busy_machine_is_measured_for_longer_and_not_remembered(quiet_after, monkeypatch, tmp_path):
    """Other work doubles the times and more; one quiet round is enough to tell them apart."""
    monkeypatch.setattr(dispatch, "BUSY", 1.2)
    taken = {"slow": [], "fast": []}

    def seconds(trial, one):
        round_ = len(taken[one.name])
        taken[one.name].append(round_)
        best = {"slow": 0.012, "fast": 0.010}[one.name]
        return best if round_ >= quiet_after or round_ == 1 else best * (2.1 + round_ % 3)

    monkeypatch.setattr(dispatch, "_time", seconds)
    pair = (candidate("slow", 0), candidate("fast", 0))
    assert dispatch.choose("p", pair, FakeTrial).name == "fast"
    rounds = {3: dispatch.ROUNDS, 15: dispatch.MOST_ROUNDS, 99: dispatch.MOST_ROUNDS}[quiet_after]
    assert len(taken["slow"]) == len(taken["fast"]) == rounds
    assert (tmp_path / "choices.json").exists() == (quiet_after == 3)
    assert dispatch.choose("p", pair, FakeTrial).name == "fast"
    assert len(taken["slow"]) == rounds


@pytest.mark.parametrize("wrong", [["y: relative error 0.5"], RuntimeError("out of shared memory")], ids=str)
def test_a_wrong_candidate_is_dropped_with_a_warning(wrong):
    good, bad = candidate("good", 0.01), candidate("bad", 0.0, wrong)
    with pytest.warns(UserWarning, match="bad is not used for p: .*(relative error|shared memory)"):
        assert dispatch.choose("p", (good, bad), FakeTrial) is good
    assert "dropped     bad" in dispatch.report()


def test_a_wrong_baseline_is_replaced():
    bad, good = candidate("bad", 0.0, ["dA: inf"]), candidate("good", 0.01)
    with pytest.warns(UserWarning, match="bad is not used"):
        assert dispatch.choose("p", (bad, good), FakeTrial) is good


def test_a_recorded_choice_is_repeated_without_measuring():
    slow, fast = candidate("slow", 0.02), candidate("fast", 0.0)
    recorded = json.loads(
        json.dumps({"p": {"winner": "slow", "milliseconds": {"slow": 1.0}, "rejected": {}}})
    )
    dispatch.use_choices(recorded)
    assert dispatch.choose("p", (slow, fast), FakeTrial) is slow
    assert FakeTrial.made == 0
    assert dispatch.choices() == recorded


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        {"p": 3},
        {"p": {"winer": "slow"}},
        {"p": {"winner": 3}},
        {"p": {"winner": "slow", "milliseconds": {"slow": "fast"}}},
        {"p": {"winner": "slow", "milliseconds": [1]}},
        {"p": {"winner": "slow", "rejected": {"fast": ["a"]}}},
        {"p": {"winner": "slow", "rejected": 3}},
    ],
)
def test_what_was_never_recorded_is_a_value_error(wrong):
    with pytest.raises(ValueError, match="recorded: expected"):
        dispatch.use_choices(wrong)
    assert dispatch.choices() == {}
    assert dispatch.report().endswith("was needed")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 3}', "[" * 100_000])
def test_a_damaged_file_costs_a_measurement_only(tmp_path, content):
    (tmp_path / "choices.json").write_text(content)
    pair = (candidate("slow", 0.02), candidate("fast", 0.0))
    assert dispatch.choose("p", pair, FakeTrial).name == "fast"
    dispatch.forget()
    assert dispatch.choose("p", pair, FakeTrial).name == "fast"
    assert FakeTrial.made == 1


def test_a_folder_that_cannot_be_written_costs_a_measurement_only(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAKERNELS_CACHE_DIR", str(tmp_path / "file"))
    pair = (candidate("slow", 0.02), candidate("fast", 0.0))
    assert dispatch.choose("p", pair, FakeTrial).name == "fast"


def test_other_sources_ask_for_another_measurement(monkeypatch):
    pair = (candidate("slow", 0.02), candidate("fast", 0.0))
    dispatch.choose("p", pair, FakeTrial)
    dispatch.forget()
    monkeypatch.setattr(dispatch, "_versions", lambda: "torch 99")
    dispatch.choose("p", pair, FakeTrial)
    assert FakeTrial.made == 2


def test_nothing_is_measured_under_capture(monkeypatch):
    monkeypatch.setattr(dispatch, "_capturing", lambda: True)
    pair = (candidate("baseline", 0.02), candidate("fast", 0.0))
    assert dispatch.choose("p", pair, FakeTrial).name == "baseline"
    assert FakeTrial.made == 0
    assert dispatch.choices() == {}


@pytest.fixture
def every_size(monkeypatch):
    """No problem is too small for a choice."""
    monkeypatch.setattr(cpu_gemm, "LARGE", 0)


def bfloat16_arguments() -> list:
    tensors = [torch.randn(*shape).bfloat16() for shape in ((32, 48), (64, 48), (64,))]
    return [*tensors, torch.randn(4, 48), torch.randn(64, 4), 2.0]


def test_lora_linear_chooses_between_16_bit_and_wide_products(every_size):
    lora_linear(*bfloat16_arguments())
    ((problem, choice),) = dispatch.choices().items()
    assert "bfloat16 with float32 adapters, M<=32 N=64 K=48 r=4" in problem
    assert choice["winner"] in choice["milliseconds"]
    assert set(choice["milliseconds"]) | set(choice["rejected"]) == {"aten", "aten-wide"}
    report = dispatch.report()
    assert problem in report
    assert "<- chosen" in report
    lora_linear(*bfloat16_arguments())
    assert len(dispatch.choices()) == 1


def test_lora_linear_chooses_between_the_libraries_of_a_cpu(every_size):
    arguments = [argument.float() for argument in bfloat16_arguments()[:-1]]
    lora_linear(*arguments, 2.0)
    ((problem, choice),) = dispatch.choices().items()
    assert "float32 with float32 adapters" in problem
    assert set(choice["milliseconds"]) == {"aten", "onednn"}


def test_small_problems_of_a_cpu_are_not_measured():
    lora_linear(*bfloat16_arguments())
    assert not dispatch.choices()


def test_measuring_leaves_the_random_state_alone(every_size):
    arguments = bfloat16_arguments()
    state = torch.get_rng_state()
    lora_linear(*arguments)
    assert dispatch.choices()
    assert torch.equal(state, torch.get_rng_state())


def test_a_wrong_lora_linear_is_caught_by_the_self_check(every_size, monkeypatch):
    def forward(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed):
        return aten.forward_wide(x, weight, bias, lora_a, lora_b, 2 * scale, dropout_p, seed)

    broken = Implementation("broken", forward, functools.partial(aten.backward_wide))
    table = (implementations.ATEN_WIDE, broken)
    monkeypatch.setattr(implementations, "candidates", lambda x, dropout_p: table)
    with pytest.warns(
        UserWarning, match="broken is not used for lora_linear .*y: relative error.*dB: relative"
    ):
        lora_linear(*bfloat16_arguments())


@pytest.mark.parametrize("name", ["reference", "aten", "aten-wide", "triton"])
def test_the_environment_forces_a_backend(name, monkeypatch):
    monkeypatch.setenv("LORAKERNELS_BACKEND", name)
    used = []
    select = implementations.select

    def spy(*arguments):
        chosen = select(*arguments)
        used.append(chosen.name)
        return chosen

    monkeypatch.setattr("lorakernels.ops.lora_linear.select", spy)
    lora_linear(*bfloat16_arguments())
    assert [one.split(":")[0] for one in used] == [name]


def test_an_unknown_forced_backend_is_named(monkeypatch):
    monkeypatch.setenv("LORAKERNELS_BACKEND", "magic")
    with pytest.raises(ValueError, match="backend: expected one of reference, aten, aten-wide, got 'magic'"):
        lora_linear(*bfloat16_arguments())
