"""The benchmarks refuse what is wrong, compare honestly, and their report regenerates byte for byte."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from matplotlib import image
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from benchmarks import front_page, interleave, plots, report, test_bench_lora_linear
from lorakernels import LoRALinear

RESULTS = sorted({path.parent for path in report.RESULTS.glob("*/*.json")})
GPU, CPU = (report.RESULTS / name for name in front_page.MACHINES.values())
LIMITS = (
    "frozen linear",
    "products alone",
    "its bytes, written and synced",
    "slices without boundaries",
    "square product",
    "copy",
)


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


def stored(folder: Path) -> dict[str, dict]:
    return report.read_cases(sorted(folder.glob("*.json")))


def columns(table: str, heading: str) -> list[str]:
    """The cells of a column, of all Markdown tables that have it."""
    cells, at = [], None
    for line in table.splitlines():
        row = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("| ") else None
        if row is None:
            at = at if line.startswith("|---") else None
        elif heading in row:
            at = row.index(heading)
        elif at is not None:
            cells.append(row[at])
    return cells


def require_drawn(path: Path) -> None:
    """Wide enough, not empty, and with something in this project's color."""
    pixels = image.imread(path)[..., :3]
    assert pixels.shape[1] == 1660
    ours = torch.from_numpy(pixels).sub(torch.tensor(to_rgb(plots.OURS_COLOR))).abs().amax(-1) < 0.02
    assert ours.sum() > 300, f"{path.name} shows nothing of this project"
    assert (pixels.min(-1) < 0.99).mean() > 0.01, f"{path.name} is empty"


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_every_picture_is_drawn_from_the_stored_figures(folder: Path, tmp_path):
    drawn = plots.draw(stored(folder), tmp_path)
    assert set(drawn) == {path.name for path in folder.glob("*.png")} != set()
    for name in drawn:
        require_drawn(tmp_path / name)


def test_the_front_page_regenerates(tmp_path):
    table = front_page.table(stored(GPU), stored(CPU))
    assert (report.RESULTS / "front-page.md").read_text("utf-8") == table
    plots.draw_front_page(stored(GPU), stored(CPU), tmp_path / "front-page.png")
    require_drawn(tmp_path / "front-page.png")
    require_drawn(report.RESULTS / "front-page.png")


def test_the_front_table_is_short_and_dated():
    where = columns((report.RESULTS / "front-page.md").read_text("utf-8"), "measured on")
    assert 1 <= len(where) <= 7
    for row in where:
        for line in row.split("<br>"):
            assert re.match(r".+: .*(NVIDIA H200|2 cores of AMD EPYC), \d{4}-\d\d-\d\d( \[\d\])?$", line)


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_a_limit_is_not_listed_as_a_rival(folder: Path):
    cases = stored(folder)
    known = {name for case in cases.values() for name in interleave.whole(case)}
    assert any(limit in name for name in known for limit in LIMITS)
    pages = {
        "implementation": report.report(cases, []),
        "rivals: times as long": report.figures(cases, [], folder),
        "peak memory: ours, theirs": report.figures(cases, [], folder),
        "others, and how many times as much": front_page.table(stored(GPU), stored(CPU)),
    }
    for heading, page in pages.items():
        cells = columns(page, heading)
        assert cells
        assert [cell for cell in cells for limit in LIMITS if limit in cell] == []


def compared_case(ours: float, theirs: float) -> dict[str, dict]:
    """Three implementations and a limit, of time and memory, without quartiles."""
    values = {"bloomft": ours, "PEFT": theirs, "slow": 9.0, "its products alone": 0.5}
    timings = {name: {"median_ms": value, "ratio": value / ours} for name, value in values.items()}
    memory = {name: round(value * 2**30) for name, value in values.items()}
    case = {"group": "g", "title": "t", "floor": "bloomft", "phases": {"step": timings}, "memory": memory}
    environment = {"device": "D", "cores": 2, "torch": "t"}
    return {"case": {**case, "environment": environment, "date": "2026-11-25"}}


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_loss_is_marked(is_lost):
    cases = compared_case(2.0, 1.0 if is_lost else 3.0)
    (quantity,) = (front_page.Quantity("CPU", case) for case in cases.values())
    marks = {
        "| PEFT (**faster than ours**) |": report.report(cases, []),
        "PEFT **0.50, faster**": report.figures(cases, [], Path()),
        "PEFT 1 ms (**0.5 times: faster**)": quantity.compared(),
    }
    for mark, text in marks.items():
        assert (mark in text) == is_lost
        assert ("faster" in text) == is_lost
    axes = Figure().subplots()
    plots._bars(axes, {"title": quantity.by_rival()})
    colors = [bar.get_facecolor()[:3] for bar in axes.patches]
    assert colors.count(to_rgb(plots.AHEAD_COLOR)) == is_lost
    assert any("faster than bloomft" in text.get_text() for text in axes.texts) == is_lost


def test_losses_are_the_worst_of_each_kind():
    worse, better = compared_case(2.0, 0.5), compared_case(2.0, 1.0)
    cases = {"mild": better["case"], "worst": worse["case"], "won": compared_case(2.0, 3.0)["case"]}
    lost = front_page.losses(cases, {})
    assert [(one.device, one.case, one.of_memory) for one in lost] == [
        ("GPU", cases["worst"], False),
        ("GPU", cases["worst"], True),
    ]


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_the_report_regenerates(folder: Path):
    cases = report.read_cases(sorted(folder.glob("*.json")))
    pictures = [name for name in report.plots.PICTURES if (folder / name).exists()]
    assert (folder / "report.md").read_text("utf-8") == report.report(cases, pictures)
    page = report.PAGE.read_text("utf-8")
    if str(folder.relative_to(report.ROOT)) in page:
        assert report.with_figures(page, cases, pictures, folder) == page
