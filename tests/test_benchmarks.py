"""The benchmarks refuse what is wrong, compare honestly, and their report regenerates byte for byte."""

import json
from pathlib import Path

import peft
import pytest
import torch

from benchmarks import interleave, report, test_bench_lora_linear
from lorakernels import LoRALinear

RESULTS = sorted({path.parent for path in report.RESULTS.glob("*/report.md")})


class Benchmark:
    """pytest-benchmark's fixture, as far as the benchmarks use it."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, rounds=1, warmup_rounds=0):
        for _ in range(warmup_rounds + rounds):
            result = function()
        return result


@pytest.fixture
def small_layer(monkeypatch):
    monkeypatch.setattr(test_bench_lora_linear, "SHAPES", {"small": (48, 96, 32)})
    monkeypatch.setattr(test_bench_lora_linear, "DEVICE", "cpu")

    def run(benchmark):
        names = ["frozen linear", "lorakernels", "plain PyTorch", "PEFT", "loralib"]
        return test_bench_lora_linear.run(benchmark, "small", 32, 4, torch.float32, rounds=4, names=names)

    return run


def test_a_case_stores_every_rival_and_phase(small_layer, capsys):
    benchmark = Benchmark()
    timings = small_layer(benchmark)
    stored = json.loads(json.dumps(benchmark.extra_info))
    assert set(stored["phases"]) == {"forward", "backward", "both"}
    both = stored["phases"]["both"]
    assert list(both) == ["frozen linear", "lorakernels", "plain PyTorch", "PEFT", "loralib"]
    assert both["lorakernels"]["ratio"] == pytest.approx(timings["lorakernels"].ratio, abs=1e-4)
    assert both["frozen linear"]["ratio"] == 1
    assert stored["environment"]["threads"] == torch.get_num_threads()
    assert stored["environment"]["peft"] == peft.__version__
    assert "lorakernels" in capsys.readouterr().out


def test_a_kernel_without_its_scale_is_not_timed(small_layer, monkeypatch, capsys):
    forward = LoRALinear.forward

    def without_scale(self, x):
        self.scale = 1.0
        return forward(self, x)

    monkeypatch.setattr(LoRALinear, "forward", without_scale)
    benchmark = Benchmark()
    with pytest.raises(AssertionError, match=r"no speed is printed.*lorakernels.*y: relative error"):
        small_layer(benchmark)
    assert " ms" not in capsys.readouterr().out
    assert not benchmark.extra_info


def test_ratios_are_taken_within_a_round():
    samples = {"step": {"floor": [1.0, 10.0, 2.0], "rival": [2.0, 20.0, 4.0]}}
    timing = interleave.record(Benchmark(), samples, floor="floor", title="t")["step"]["rival"]
    assert timing.median_ms == 4.0
    assert timing.ratio == 2.0
    assert timing.ratio_quartiles == (2.0, 2.0)


def stored_case(ratio: float, spread: float, rival: str = "lorakernels") -> dict[str, dict]:
    timing = {"ratio": ratio, "ratio_quartiles": [ratio - spread, ratio + spread]}
    return {"case": {"group": "g", "floor": "frozen linear", "phases": {"both": {rival: timing}}}}


def test_compare_flags_what_left_the_noise():
    old = stored_case(1.06, 0.01)
    assert list(report.regressions(old, stored_case(1.075, 0.01))) == []
    assert list(report.regressions(old, stored_case(0.9, 0.01))) == []
    (line,) = report.regressions(old, stored_case(1.09, 0.01))
    assert line.startswith("case, both, lorakernels: 1.090 of frozen linear, was 1.060")
    slower = stored_case(1.09, 0.01)
    old["case"]["choices"], slower["case"]["choices"] = {"p": "oneDNN", "q": "a"}, {"p": "BLAS", "q": "a"}
    (line,) = report.regressions(old, slower)
    assert line.endswith("1.070]; p: BLAS, was oneDNN")
    assert list(report.regressions(stored_case(1, 0, "PEFT"), stored_case(2, 0, "PEFT"))) == []


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_the_report_regenerates(folder: Path):
    cases = report.read_cases(sorted(folder.glob("*.json")))
    pictures = [name for name in report.plots.PICTURES if (folder / name).exists()]
    assert (folder / "report.md").read_text("utf-8") == report.report(cases, pictures)
    readme = (report.ROOT / "README.md").read_text("utf-8")
    if str(folder.relative_to(report.ROOT)) in readme:
        assert report.with_figures(readme, cases, pictures, folder) == readme
