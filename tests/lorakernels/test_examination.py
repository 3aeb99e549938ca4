"""A choice on a GPU: kernels compiled ahead, together; then checked, then timed by the device itself."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from lorakernels import device_timing, dispatch, examination, launching
from lorakernels.dispatch import Implementation

MILLISECONDS = {"baseline": 2.0, "fast": 1.0, "wrong": 0.1, "broken": 0.1}
# of Triton itself, and of torch.compile around it
TOO_LARGE = {
    "large": OutOfResources(229376, 101376, "shared memory"),
    "large, compiled": RuntimeError(
        "No valid triton configs. OutOfResources: out of resource: shared memory, Required: 229376"
    ),
}


class Trial:
    """A problem of a GPU; what is asked of it is noted."""

    device = torch.device("cuda", 0)

    def __init__(self, seen: list):
        self.seen = seen

    def note(self, action: str, one: Implementation) -> None:
        self.seen.append((action, one.name))
        if one.name == "broken":
            raise RuntimeError("PassManager::run failed")
        if one.name in TOO_LARGE:
            raise TOO_LARGE[one.name]

    def compile(self, one: Implementation) -> None:
        self.note("compile", one)

    def failures(self, one: Implementation) -> list[str]:
        self.note("check", one)
        return ["y: 0.5"] if one.name == "wrong" else []

    def run(self, one: Implementation) -> None:
        self.note("run", one)


@pytest.fixture
def seen(monkeypatch, tmp_path) -> list:
    """What happens, in order."""
    seen = []

    @contextlib.contextmanager
    def compiling(what):
        seen.append(("compiling", what))
        yield
        seen.append(("compiled", what))

    def seconds(call, device, rounds):
        assert (device, rounds) == (Trial.device, examination.ROUNDS)
        call()
        return rounds * [1e-3 * MILLISECONDS[seen[-1][1]]]

    monkeypatch.setenv("LORAKERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(examination, "has_triton", lambda: True)
    monkeypatch.setattr(launching, "compiling", compiling)
    monkeypatch.setattr(device_timing, "seconds", seconds)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return seen


def candidates(*names: str) -> list[Implementation]:
    return [Implementation(name, None, None) for name in names]


def test_all_are_compiled_before_the_first_is_checked_and_timed_one_after_another(seen, tmp_path):
    given = candidates("baseline", "fast")
    assert dispatch.choose("p", given, lambda: Trial(seen)) is given[1]
    assert seen == [
        ("compiling", "p"), ("compile", "baseline"), ("compile", "fast"), ("compiled", "p"),
        ("check", "baseline"), ("check", "fast"), ("run", "baseline"), ("run", "fast"),
    ]  # fmt: skip
    assert dispatch.kernel_choices()["p"]["milliseconds"] == pytest.approx({"baseline": 2.0, "fast": 1.0})
    assert (tmp_path / "choices.json").exists()


def test_what_does_not_compile_is_dropped_by_the_check(seen):
    given = candidates("baseline", "broken", "wrong")
    with pytest.warns(
        UserWarning, match="(broken|wrong) is not used for p: (RuntimeError: PassManager|y: 0.5)"
    ):
        assert dispatch.choose("p", given, lambda: Trial(seen)) is given[0]
    assert seen[1:5] == [*(("compile", one.name) for one in given), ("compiled", "p")]
    assert [action for action, name in seen if name == "broken"] == ["compile", "check"]
    assert [name for action, name in seen if action == "run"] == ["baseline"]


@pytest.mark.parametrize("large", TOO_LARGE)
def test_what_is_too_large_for_the_chip_is_left_out_silently_and_for_good(large, seen, tmp_path, recwarn):
    given = candidates("baseline", large, "fast")
    assert dispatch.choose("p", given, lambda: Trial(seen)) is given[2]
    assert not recwarn.list
    assert "out of resource" in dispatch.kernel_choices()["p"]["rejected"][large]
    dispatch.forget()
    seen.clear()
    assert dispatch.choose("p", given, lambda: Trial(seen)) is given[2]
    assert not seen


def test_without_triton_there_is_nothing_to_compile(seen, monkeypatch):
    monkeypatch.setattr(examination, "has_triton", lambda: False)
    dispatch.choose("p", candidates("baseline", "fast"), lambda: Trial(seen))
    assert seen[0] == ("check", "baseline")
