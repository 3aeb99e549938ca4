"""gpu-check's speed half: nothing that is wrong, or does not fit, has a time."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from benchmarks import interleave, report
from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check.__main__ import check, main
from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.pool import Item, Setting
from benchmarks.gpu_check.speed import clock, launches, layer_items, loss_items, models, step_items
from benchmarks.gpu_check.speed.items import speed_items, warming
from benchmarks.gpu_check.speed.sides import (
    EAGER,
    GRAPH,
    NO_MEMORY,
    WARM,
    Case,
    Side,
    UnavailableError,
    far_off,
)
from lorakernels import LoRALinear, linear_cross_entropy
from tests.test_gpu_check import DEVICE, KERNELS, hanging, kill_when, right

ONLY = interleave.ONLY
RUN = {"device": "cpu", "rehearsal": True, "workers": 1, "seconds": 300.0}
ONES = torch.ones(4, dtype=torch.float64)


def new_case(mode: str = EAGER) -> Case:
    return Case("case[1]", "a group", "a title", "PEFT", mode)


def side(value: float) -> Side:
    exact = [("y", ONES)]

    def compute() -> list[torch.Tensor]:
        return [torch.full((4,), value)]

    return Side({ONLY: compute}, compute, exact, lambda got: far_off(exact, 0.05, got))


def failing(error: Exception):
    def build() -> Side:
        raise error

    return build


@pytest.fixture
def setting(tmp_path):
    return Setting("cpu", True, tmp_path)


def timed_item(findings, setting, mode):
    """Quick, for the pool's processes."""
    new_case(mode).measure(findings, setting, {"PEFT": lambda: side(1.0), "bloomft": lambda: side(1.0)})


def hanging_item(findings, setting, mode):
    if mode != WARM:
        hanging(findings, setting)


def item(name: str, function) -> Item:
    return Item(name, function, {"mode": EAGER})


def stored(out: Path) -> dict:
    return json.loads((out / "speed.json").read_text())


def run(timed, out) -> int:
    return check([], out, timed=timed, **RUN)


def test_every_operator_is_timed_eagerly_and_as_a_graph_the_step_first():
    items = speed_items()
    names = [one.name for one in items]
    assert len(set(names)) == len(names)
    assert names[0] == "step"
    for start in ("step", "layer", "loss", "attention", "block"):
        modes = [one.arguments["mode"] for one in items if one.name.startswith(start)]
        assert modes.count(EAGER) == modes.count(GRAPH) > 0
    assert len(warming(items)) == len(items) // 2
    assert {one.arguments["mode"] for one in warming(items)} == {WARM}


@pytest.mark.parametrize("mode", [EAGER, GRAPH])
def test_a_wrong_side_is_not_timed(mode, setting):
    findings = Findings()
    sides = {"PEFT": lambda: side(1.0), "bloomft": lambda: side(1.2)}
    assert list(new_case(mode).measure(findings, setting, sides)) == ["PEFT"]
    (case,) = findings.cases.values()
    found = case["extra_info"]
    assert list(found["phases"][ONLY]) == list(found["host_ms"][ONLY]) == list(found["memory"]) == ["PEFT"]
    assert found["left_out"]["bloomft"].startswith("wrong: y: relative error 0.2")
    assert found["errors"]["bloomft, y"] == pytest.approx(0.2)
    assert findings.faults == ["bloomft: y: relative error 0.2, not the same function"]


def test_what_does_not_fit_or_is_missing_is_named_and_no_fault(setting):
    findings, case = Findings(), new_case()
    sides = {
        "PEFT": failing(torch.OutOfMemoryError("of 80 GiB")),
        "Liger": failing(UnavailableError("not installed")),
        "bloomft": lambda: side(1.0),
    }
    assert list(case.measure(findings, setting, sides)) == ["bloomft"]
    assert case.left_out == {"PEFT": NO_MEMORY, "Liger": "not installed"}
    assert findings.faults == []
    assert findings.cases["case[1]"]["extra_info"]["floor"] == "bloomft"


def test_a_side_that_fails_is_a_fault_and_the_others_are_timed(setting):
    findings = Findings()
    sides = {"PEFT": lambda: side(1.0), "bloomft": failing(RuntimeError("no such\nkernel"))}
    assert list(new_case().measure(findings, setting, sides)) == ["PEFT"]
    assert findings.faults == ["bloomft: RuntimeError: no such kernel"]


def test_a_capture_that_is_refused_leaves_the_others(setting, monkeypatch):
    def captured(phases, device, pool):
        if phases is refused.phases:
            raise RuntimeError("not permitted")
        return clock.captured(phases, device, pool)

    monkeypatch.setattr("benchmarks.gpu_check.speed.sides.captured", captured)
    refused, findings, case = side(1.0), Findings(), new_case(GRAPH)
    assert list(case.measure(findings, setting, {"PEFT": lambda: refused, "bloomft": lambda: side(1.0)})) == [
        "bloomft"
    ]
    assert case.left_out == {"PEFT": "no graph: RuntimeError: not permitted"}
    assert findings.faults == []
    assert list(findings.cases) == ["case[1-graph]"]


def test_what_does_not_fit_is_timed_again_with_fewer_layers(setting, monkeypatch):
    depths = []

    def measure(_findings, _setting, shape, mode, cut):
        depths.append((shape.layers, cut))
        return {} if len(depths) == 2 else {"PEFT as installed": NO_MEMORY}

    monkeypatch.setattr(step_items, "measure", measure)
    full = Setting("cpu", False, setting.scratch)
    step_items.check_step(Findings(), full, EAGER)
    assert depths == [(24, False), (12, True)]


def test_a_cut_step_says_so(setting):
    findings = Findings()
    shape = models.shape_of(setting, layers=1)
    step_items.measure(findings, setting, shape, EAGER, cut=True)
    assert findings.faults == []
    (name,) = findings.cases
    assert name == "step[bloom-1b7-1-layers]"
    assert "1 of 24 layers, " in findings.cases[name]["extra_info"]["title"]


def test_a_run_that_is_cut_keeps_what_it_had(tmp_path):
    timed = [item("quick", timed_item), item("hanging", hanging_item)]
    path = tmp_path / "speed.json"
    kill_when(lambda: path.exists() and stored(tmp_path)["benchmarks"], run, timed, tmp_path)
    content = stored(tmp_path)
    assert {one["item"]: one["status"] for one in content["items"]} == {"quick": "pass", "hanging": "not run"}
    assert list(report.read_cases([path])) == ["case[1]"]


def test_what_does_not_fit_into_the_seconds_is_listed(tmp_path, capsys):
    start = time.monotonic()
    timed, seconds = [item("hanging", hanging_item), item("waiting", timed_item)], 2.0
    assert check([Item("checked", hanging)], tmp_path, timed=timed, **{**RUN, "seconds": seconds}) == 1
    assert time.monotonic() - start < seconds + 15
    assert {one["status"] for one in stored(tmp_path)["items"]} == {"not run"}
    checked = json.loads((tmp_path / "correctness.json").read_text())["items"]
    assert [one["status"] for one in checked] == ["not run"]
    assert capsys.readouterr().out.endswith("\n2 not run\n")


@pytest.mark.parametrize("status", ["pass", "fail"])
def test_both_halves_share_the_seconds_and_decide_the_exit_status(status, tmp_path, monkeypatch):
    calls = []

    def run_items(items, setting, *, workers, seconds, report):
        calls.append((len(items), workers, seconds))
        for one in items:
            outcome = {"status": status if one.name == "quick" else "pass", "seconds": 0.0, "detail": ""}
            report(one, outcome)
        time.sleep(0.2)

    monkeypatch.setattr(command, "run_items", run_items)
    options = {**RUN, "workers": 3, "seconds": 70.0}
    red = check([Item("right", right)], tmp_path, timed=[item("quick", timed_item)], **options)
    assert red == (status == "fail")
    (beside, workers, first), (alone, worker, second) = calls
    assert (beside, workers, first) == (2, 3, pytest.approx(40.0))
    assert (alone, worker) == (1, 1)
    assert second <= 69.8
    assert [(one["item"], one["status"]) for one in stored(tmp_path)["items"]] == [("quick", status)]
    checked = json.loads((tmp_path / "correctness.json").read_text())
    assert [(one["item"], one["status"]) for one in checked["items"]] == [("right", "pass")]


@pytest.mark.parametrize("half", ["correctness", "speed"])
def test_one_half_alone_has_no_items_of_the_other(half, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(command, "environment", lambda device: {})
    monkeypatch.setattr(command, "check", lambda items, out, *, timed, **_: calls.append((items, timed)))
    main(["--out", str(tmp_path), "--rehearse", "--only", half])
    ((items, timed),) = calls
    assert bool(items) == (half == "correctness")
    assert bool(timed) == (half == "speed")


def test_an_unknown_half_is_a_mistake_in_the_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path), "--only", "both"])
    assert stopped.value.code == 2
    assert "--only" in capsys.readouterr().err


def test_rounds_end_with_the_time():
    calls = []
    clock.Rounds(0.0).pedantic(lambda: calls.append(0), rounds=50, warmup_rounds=1)
    assert len(calls) == 1 + clock.LEAST_ROUNDS
    clock.Rounds(60.0).pedantic(lambda: calls.append(0), rounds=5)
    assert len(calls) == 1 + clock.LEAST_ROUNDS + 5


def test_launches_count_each_operand_once_and_results():
    x, weight, y = torch.ones(8, 16), torch.ones(4, 16), torch.ones(8, 4)

    def run() -> None:
        linear(x, weight)
        y.addmm_(x, weight.T)
        y.view(4, 8)

    rows = {row["kernel"]: row for row in launches.by_launch(run, "cpu", rate=1.0, repeats=3)}
    assert {name: row["calls"] for name, row in rows.items()} == {"mm": 1, "addmm_": 1}
    product = 4 * (x.numel() + weight.numel() + y.numel())
    assert launches._bytes([x, weight, y, x, {"again": [weight]}]) == product
    assert launches._bytes(torch.ones(1).expand(100)) == 4
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=1e-3)


def without_scale(forward):
    def wrong(self, x):
        self.scale = 1.0
        return forward(self, x)

    return wrong


@pytest.mark.skipif(not KERNELS, reason="launches a Triton kernel")
def test_a_layer_without_its_scale_is_not_timed(setting, monkeypatch):
    monkeypatch.setattr(LoRALinear, "forward", without_scale(LoRALinear.forward))
    findings = Findings()
    layer_items.check_layer(findings, Setting(DEVICE, True, setting.scratch), 8, EAGER)
    assert any(fault.startswith("lorakernels: y: relative error") for fault in findings.faults)
    found = findings.cases["layer[bloom-1b7-8]"]["extra_info"]
    assert not any(map(interleave.is_ours, interleave.whole(found)))
    assert "PEFT" in interleave.whole(found)


def test_a_wrong_loss_is_not_timed(setting, monkeypatch):
    monkeypatch.setattr(
        loss_items,
        "linear_cross_entropy",
        lambda *inputs, **options: linear_cross_entropy(*inputs, **options) * 1.1,
    )
    findings = Findings()
    loss_items.check_loss(findings, setting, EAGER)
    (case,) = findings.cases.values()
    assert "lorakernels" not in interleave.whole(case["extra_info"])
    assert findings.faults


@pytest.mark.parametrize("mode", [EAGER, GRAPH])
@pytest.mark.parametrize("check", [loss_items.check_loss, step_items.check_step])
def test_a_graph_is_given_the_rows_that_have_labels_and_says_so(check, mode, setting, monkeypatch):
    """Our sides alone: none of them looks for rows, which would wait for the device."""
    module = sys.modules["lorakernels.ops.linear_cross_entropy"]
    find, calls = module._supervised, []
    monkeypatch.setattr(module, "_supervised", lambda *arguments: calls.append(1) or find(*arguments))
    findings = Findings()
    check(findings, setting, mode)
    assert not findings.faults
    assert bool(calls) == (mode == EAGER)
    (case,) = findings.cases.values()
    found = case["extra_info"]
    assert any(map(interleave.is_ours, interleave.whole(found)))
    assert found["rows_given"] == (mode == GRAPH)
    assert ("rows that have labels found beforehand" in found["title"]) == (mode == GRAPH)


def test_a_wrong_model_is_not_timed(setting, monkeypatch):
    monkeypatch.setattr(
        "bloomft.model.fused_classes.linear_cross_entropy",
        lambda *inputs, **options: linear_cross_entropy(*inputs, **options) * 1.05,
    )
    findings = Findings()
    step_items.check_step(findings, setting, EAGER)
    timed = interleave.whole(findings.cases["step[bloom-1b7]"]["extra_info"])
    assert "bloomft" not in timed
    assert "PEFT as installed" in timed
    assert any(fault.startswith("bloomft: loss 0: relative error") for fault in findings.faults)
