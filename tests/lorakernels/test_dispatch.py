"""The measured choice: wrong candidates dropped, 3% asked of a rival, remembered, repeated."""

import json
import threading
import time
import warnings

import pytest
import torch

from lorakernels import choice_file, dispatch, examination
from lorakernels.dispatch import Implementation


class FakeTrial:
    """A problem whose candidates take as long, and are as wrong, as their backward says."""

    device = torch.device("cpu")
    made = 0

    def __init__(self):
        FakeTrial.made += 1

    def run(self, implementation):
        seconds, _ = implementation.backward
        if isinstance(seconds, Exception):
            raise seconds
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
    monkeypatch.setattr(examination, "BUSY", float("inf"))
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
    monkeypatch.setattr(examination, "host_seconds", lambda trial, one: times[one.name])
    pair = (candidate("baseline", 0), candidate("rival", 0))
    assert dispatch.choose("p", pair, FakeTrial).name == "baseline"
    times["rival"] = 0.0969
    assert dispatch.choose("q", pair, FakeTrial).name == "rival"


@pytest.mark.parametrize("quiet_after", [3, 15, 99])
def test_a_busy_machine_is_measured_for_longer_and_not_remembered(quiet_after, monkeypatch, tmp_path):
    """Other work doubles the times and more; one quiet round is enough to tell them apart."""
    monkeypatch.setattr(examination, "BUSY", 1.2)
    taken = {"slow": [], "fast": []}

    def seconds(trial, one):
        round_ = len(taken[one.name])
        taken[one.name].append(round_)
        best = {"slow": 0.012, "fast": 0.010}[one.name]
        return best if round_ >= quiet_after or round_ == 1 else best * (2.1 + round_ % 3)

    monkeypatch.setattr(examination, "host_seconds", seconds)
    pair = (candidate("slow", 0), candidate("fast", 0))
    assert dispatch.choose("p", pair, FakeTrial).name == "fast"
    rounds = {3: examination.ROUNDS, 15: examination.MOST_ROUNDS, 99: examination.MOST_ROUNDS}[quiet_after]
    assert len(taken["slow"]) == len(taken["fast"]) == rounds
    assert (tmp_path / "choices.json").exists() == (quiet_after == 3)
    assert dispatch.choose("p", pair, FakeTrial).name == "fast"
    assert len(taken["slow"]) == rounds


@pytest.mark.parametrize("wrong", [["y: relative error 0.5"], RuntimeError("out of shared memory")], ids=str)
def test_a_wrong_candidate_is_dropped_with_a_warning(wrong):
    good, bad = candidate("good", 0.01), candidate("bad", 0.0, wrong)
    with pytest.warns(UserWarning, match="bad is not used for p: .*(relative error|shared memory)"):
        assert dispatch.choose("p", (good, bad), FakeTrial) is good
    assert "dropped     bad" in dispatch.kernel_report()


def test_a_wrong_baseline_is_replaced():
    bad, good = candidate("bad", 0.0, ["dA: inf"]), candidate("good", 0.01)
    with pytest.warns(UserWarning, match="bad is not used"):
        assert dispatch.choose("p", (bad, good), FakeTrial) is good


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:20])
@pytest.mark.parametrize("during", ["check", "measurement"])
def test_out_of_memory_holds_for_a_call_and_warns_once(error, during, tmp_path):
    good = candidate("good", 0.01)
    short = candidate("fast", 0.0, error) if during == "check" else candidate("fast", error)
    with pytest.warns(UserWarning, match="fast is not used for p") as seen:
        assert [dispatch.choose("p", (good, short), FakeTrial) for _ in range(3)] == [good] * 3
    assert len(seen) == 1
    assert dispatch.kernel_choices() == {}
    assert not (tmp_path / "choices.json").exists()
    # the third call above took the stand-in; the next one tries again, and there is memory now
    fast = candidate("fast", 0.0)
    assert dispatch.choose("p", (good, fast), FakeTrial) is fast
    assert dispatch.kernel_choices()["p"]["rejected"] == {}
    assert (tmp_path / "choices.json").exists()


def test_tries_become_rare_while_memory_is_short():
    calls = []

    def make_trial():
        calls.append(len(used))
        raise torch.OutOfMemoryError

    pair, plain, used = (candidate("a", 0.0), candidate("b", 0.0)), candidate("reference", 0.0), []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(20):
            used.append(dispatch.choose("p", pair, make_trial, reference=plain))
    assert used == [plain] * 20
    assert calls == [0, 1, 3, 7, 15]
    (warning,) = seen
    assert "reference computes p unchecked: out of memory" in str(warning.message)


@pytest.mark.parametrize("during", ["check", "measurement"])
def test_what_does_not_compile_is_dropped_for_this_process_alone(during, tmp_path):
    error = RuntimeError("PassManager::run failed\n" + 100 * "  some IR\n")
    good = candidate("good", 0.01)
    broken = candidate("fast", 0.0, error) if during == "check" else candidate("fast", error)
    with pytest.warns(UserWarning, match="fast is not used for p: RuntimeError: PassManager") as seen:
        assert [dispatch.choose("p", (good, broken), FakeTrial) for _ in range(3)] == [good] * 3
    assert (len(seen), FakeTrial.made) == (1, 1)
    assert len(str(seen[0].message)) < 400
    assert "\n" not in str(seen[0].message)
    assert set(dispatch.kernel_choices()["p"]["milliseconds"]) == {"good"}
    assert not (tmp_path / "choices.json").exists()


def test_the_plain_reference_is_the_last_candidate(tmp_path):
    """Wrong candidates, seven as on a GPU: one warning, nothing on disk, and the reference is not timed."""
    wrong = [candidate(f"kernel:{tile}", 0.0, ["dA: relative error 0.1"]) for tile in range(7)]
    plain = candidate("reference", RuntimeError("timed"))
    with pytest.warns(
        UserWarning, match="the plain reference computes p: kernel:0: dA: .*; kernel:6: dA"
    ) as seen:
        assert [dispatch.choose("p", wrong, FakeTrial, reference=plain) for _ in range(3)] == [plain] * 3
    assert (len(seen), FakeTrial.made) == (1, 1)
    choice = dispatch.kernel_choices()["p"]
    assert (choice["winner"], choice["milliseconds"], len(choice["rejected"])) == ("reference", {}, 7)
    assert not (tmp_path / "choices.json").exists()
    # a run that goes on takes it again
    dispatch.forget()
    dispatch.use_kernel_choices({"p": choice})
    assert dispatch.choose("p", wrong, FakeTrial, reference=plain) is plain


def test_a_wrong_reference_is_an_error_and_nothing_wrong_runs():
    wrong, plain = candidate("wrong", 0.0, ["y: inf"]), candidate("reference", 0.0, ["y: 0.5"])
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"no implementation of p is right: wrong: y: inf; reference: y: 0\.5$"
        ):
            dispatch.choose("p", (wrong, wrong), FakeTrial, reference=plain)
    assert dispatch.kernel_choices() == {}


def test_a_sole_candidate_is_checked_once_and_not_timed(tmp_path):
    sole = candidate("sole", RuntimeError("timed"))
    assert [dispatch.choose("p", (sole,), FakeTrial) for _ in range(3)] == [sole] * 3
    assert FakeTrial.made == 1
    assert not (tmp_path / "choices.json").exists()
    wrong, plain = candidate("wrong", 0.0, ["y: 0.5"]), candidate("reference", 0.0)
    with pytest.raises(RuntimeError, match=r"no implementation of q is right: wrong: y: 0\.5$"):
        dispatch.choose("q", (wrong,), FakeTrial)
    with pytest.warns(UserWarning, match="the plain reference computes q: wrong: y: 0.5"):
        assert dispatch.choose("q", (wrong,), FakeTrial, reference=plain) is plain


def test_measuring_follows_the_streams_of_the_caller(monkeypatch):
    followed = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda index: (f"stream of {index}", threading.get_ident())
    )
    # setting a stream makes a context on its device: not where nobody works on a stream of their own
    default = {3: ("stream of 3", threading.get_ident())}
    monkeypatch.setattr(torch.cuda, "default_stream", lambda index: default.get(index, f"default of {index}"))
    monkeypatch.setattr(
        torch.cuda, "set_stream", lambda stream: followed.append((stream, threading.get_ident()))
    )

    def make_trial():
        # the current device's stream comes last, since set_stream sets the device too
        streams, threads = zip(*followed, strict=True)
        here = threading.get_ident()
        assert streams == tuple((f"stream of {index}", caller) for index in (0, 2, 1))
        assert set(threads) == {here}
        assert here != caller
        return FakeTrial()

    caller = threading.get_ident()
    dispatch.choose("p", (candidate("a", 0.0), candidate("b", 0.0)), make_trial)
    assert len(followed) == 3


def test_a_recorded_choice_is_repeated_without_measuring():
    slow, fast = candidate("slow", 0.02), candidate("fast", 0.0)
    recorded = json.loads(
        json.dumps({"p": {"winner": "slow", "milliseconds": {"slow": 1.0}, "rejected": {}}})
    )
    dispatch.use_kernel_choices(recorded)
    assert dispatch.choose("p", (slow, fast), FakeTrial) is slow
    assert FakeTrial.made == 0
    assert dispatch.kernel_choices() == recorded


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
        dispatch.use_kernel_choices(wrong)
    assert dispatch.kernel_choices() == {}
    assert dispatch.kernel_report().endswith("was needed")


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
    monkeypatch.setattr(choice_file, "versions", lambda: "torch 99")
    dispatch.choose("p", pair, FakeTrial)
    assert FakeTrial.made == 2


def test_a_problem_that_is_new_under_capture_is_an_error(monkeypatch):
    pair = (candidate("baseline", 0.02), candidate("fast", 0.0))
    monkeypatch.setattr(dispatch, "_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"chosen yet for p, .* run the captured function once before"):
        dispatch.choose("p", pair, FakeTrial)
    assert FakeTrial.made == 0
    assert dispatch.kernel_choices() == {}
    monkeypatch.setattr(dispatch, "_capturing", lambda: False)
    dispatch.choose("p", pair, FakeTrial)
    monkeypatch.setattr(dispatch, "_capturing", lambda: True)
    assert dispatch.choose("p", pair, FakeTrial).name == "fast"


def test_what_stands_in_for_want_of_memory_does_so_under_capture(monkeypatch):
    class TooLarge(FakeTrial):
        def failures(self, one):
            raise torch.OutOfMemoryError("no memory")

    pair, plain = (candidate("baseline", 0.0), candidate("fast", 0.0)), candidate("plain", 0.0)
    with pytest.warns(UserWarning, match="unchecked"):
        assert dispatch.choose("p", pair, TooLarge, reference=plain).name == "plain"
    monkeypatch.setattr(dispatch, "_capturing", lambda: True)
    for _ in range(3):
        assert dispatch.choose("p", pair, TooLarge, reference=plain).name == "plain"
