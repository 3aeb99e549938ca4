"""Plots of stored benchmarks: bars from zero, limits drawn, readable at a README's width of 830 pixels.

This project is blue and other projects are grey; where another one is ahead, it is orange and says so in
words. All colors are of the palette of Okabe and Ito, which colour-blind readers tell apart.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import front_page
from benchmarks.front_page import Quantity
from benchmarks.interleave import ahead, is_ours, limit_ms, medians, rivals, whole

OURS_COLOR, THEIRS_COLOR, AHEAD_COLOR, LIMIT_COLOR = "#0072b2", "#b3bcc7", "#d55e00", "#111111"
# 830 pixels of 1/96 inch, at twice the density
WIDTH_INCHES, DPI = 830 / 96, 192
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
PLAIN_METADATA = {"Software": None}
# Marker, color and whether it is filled, by implementation of the LoRA layer.
MARKERS = {
    "lorakernels": ("o", OURS_COLOR, True),
    "plain PyTorch": ("v", "#56b4e9", True),
    "PyTorch, addmm in place": ("x", "#111111", True),
    "PEFT": ("s", "#e69f00", True),
    "PEFT, bf16 adapters": ("s", "#e69f00", False),
    "PEFT compiled": ("D", "#cc79a7", True),
    "loralib": ("^", "#009e73", True),
    "lorakernels, Triton alone": ("o", OURS_COLOR, False),
    "lorakernels, ATen alone": ("P", OURS_COLOR, True),
}


def draw(cases: dict[str, dict], folder: Path) -> list[str]:
    """Write every plot that the cases have figures for; returns the file names."""
    with rc_context(STYLE):
        return [name for name, picture in PICTURES.items() if picture(cases, folder / name)]


def _of_group(cases: dict[str, dict], group: str) -> dict[str, dict]:
    return {name: case for name, case in cases.items() if case["group"] == group}


def _save(figure: Figure, path: Path) -> bool:
    figure.savefig(path, dpi=DPI, metadata=PLAIN_METADATA)
    return True


def _bars(
    axes: Axes,
    groups: Mapping[str, Mapping[str, float]],
    *,
    better: str = "faster",
    more_is_better: bool = False,
    limits: Mapping[str, float] | None = None,
    named: str = "beside",
) -> None:
    """Horizontal bars under a title of up to two lines for each group, with their values.

    named: the rivals' names "beside" the bars, "above" them, or "not" at all, with no titles. limits are
    drawn across their group. A rival that is ahead of ours has a color of its own and says so.
    """
    largest = max(value for values in groups.values() for value in values.values())
    at, ticks = 0.0, {}
    for title, values in groups.items():
        sign = -1 if more_is_better else 1
        before = ahead({name: sign * value for name, value in values.items()})
        limit = (limits or {}).get(title, 0)
        if title:
            head, _, rest = title.partition("\n")
            for line, weight in ((head, "bold"), (rest, "normal")):
                if named != "not" and line:
                    axes.text(0, at, line, fontweight=weight, va="center").set_in_layout(False)
                at += 0.85 if line else 0
        first = at - 0.4
        for name, value in values.items():
            color = OURS_COLOR if is_ours(name) else AHEAD_COLOR if name in before else THEIRS_COLOR
            text = {"va": "center", "color": AHEAD_COLOR if name in before else "black"}
            written = _three_digits(value)
            if name in before:
                written += f", {better} than {next(filter(is_ours, values))}"
            if named == "above":
                weight = "bold" if is_ours(name) else "normal"
                axes.text(0, at, f"{name}: {written}", fontweight=weight, **text).set_in_layout(False)
                at += 0.75
            else:
                # beyond the limit's line, which would cross it
                axes.text(max(value, limit), at, f" {written}", **text).set_in_layout(False)
            axes.barh(at, value, height=0.6 if named == "above" else 0.75, color=color)
            ticks[at] = name
            at += 1
        axes.vlines(0, first, at - 0.6, color="#888888", lw=0.8)
        if limit:
            axes.vlines(limit, first - 0.1, at - 0.5, color=LIMIT_COLOR, lw=1.6)
        at += 0.5
    axes.set_ylim(at - 0.9, -0.6)
    axes.set_xlim(0, (1.02 if named == "above" else 1.25) * max(largest, *(limits or {"": 0}).values()))
    axes.set_yticks(list(ticks), list(ticks.values()) if named == "beside" else [""] * len(ticks))
    axes.tick_params(axis="both", length=0, labelbottom=False)
    axes.spines[:].set_visible(False)
    # a title may be wider than its axes
    axes.patch.set_visible(False)


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _height(groups: Mapping[str, Mapping]) -> float:
    """Inches for the bars and two lines of title of each group."""
    return 0.5 + 0.23 * sum(len(values) + 2.2 for values in groups.values())


def _step(cases: dict[str, dict], path: Path) -> bool:
    """Seconds and memory of the whole step by implementation, its matrix products alone as a line."""
    steps = list(_of_group(cases, "step").values())
    if not steps:
        return False
    slowest = max(taken for case in steps for taken in medians(whole(case)).values())
    unit, divisor = ("seconds", 1e3) if slowest > 1e3 else ("milliseconds", 1)
    times, peaks, limits = {}, {}, {}
    for case in steps:
        limit = limit_ms(whole(case)) / divisor
        written = f"line: its matrix products alone, {_three_digits(limit)}" if limit else "limit not timed"
        title = f"{case['title']}\n{written}"
        times[title] = {name: taken / divisor for name, taken in rivals(medians(whole(case))).items()}
        peaks[title] = {name: case["memory"][name] / 2**30 for name in times[title]}
        limits[title] = limit
    figure = Figure(figsize=(WIDTH_INCHES, _height(times)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 0.8))
    _bars(left, times, limits=limits)
    _bars(right, peaks, better="less", named="not")
    left.set_title(f"Training step, {unit}")
    weights = "with" if any("memory_of_weights" in case for case in steps) else "beyond"
    right.set_title(f"GiB at the peak, {weights} the weights")
    return _save(figure, path)


def _share_of_limit(cases: dict[str, dict], path: Path) -> bool:
    """The rate of each whole against that of its matrix products alone, measured in the same rounds."""
    shares = {}
    for case in cases.values():
        limit = limit_ms(whole(case))
        if limit and any(name.endswith("products alone") for name in whole(case)):
            others = rivals(medians(whole(case)))
            shares[case["title"]] = {name: 100 * limit / taken for name, taken in others.items()}
    if not shares:
        return False
    figure = Figure(figsize=(WIDTH_INCHES, _height(shares)), layout="constrained")
    axes = figure.subplots()
    _bars(axes, shares, more_is_better=True, limits=dict.fromkeys(shares, 100.0))
    axes.set_title("Speed in % of its matrix products alone (the line)", x=0)
    return _save(figure, path)


def _lora_tax(cases: dict[str, dict], path: Path) -> bool:
    """What LoRA adds to the frozen layer, by shape, rank and dtype, and what its operations alone add."""
    layers = [
        case
        for case in _of_group(cases, "lora_linear").values()
        if "target" not in case and case["floor"] == "frozen linear"
    ]
    if not layers:
        return False
    layers.sort(key=lambda case: (case["case"]["dtype"] != "float32", case["case"]["K"], case["case"]["r"]))
    figure = Figure(figsize=(WIDTH_INCHES, 1.4 + 0.6 * len(layers)), layout="constrained")
    axes = figure.subplots()
    added = [
        {name: 100 * (timing["ratio"] - 1) for name, timing in rivals(whole(case)).items()} for case in layers
    ]
    largest = max(value for values in added for value in values.values())
    drawn = [name for name in MARKERS if any(name in values for values in added)]
    for index, name in enumerate(drawn):
        marker, color, filled = MARKERS[name]
        # each rival on a line of its own within the row, so that no two cover each other
        shift = 0.74 * (index / max(1, len(drawn) - 1) - 0.5)
        points = [(values[name], row + shift) for row, values in enumerate(added) if name in values]
        axes.scatter(
            *zip(*points, strict=True),
            marker=marker,
            s=60 if is_ours(name) else 28,
            color=color if filled else "none",
            edgecolors=None if marker == "x" else color,
            zorder=3,
            label=name,
        )
    for row, (case, values) in enumerate(zip(layers, added, strict=True)):
        least = 100 * (case["operations_alone"] - 1)
        label = "limit: its operations alone" if row == 0 else None
        axes.vlines(least, row - 0.4, row + 0.4, color=LIMIT_COLOR, lw=1.6, label=label)
        if torchs := whole(case).get("frozen linear, torch's"):
            label = "frozen layer, PyTorch's GEMM" if row == 0 else None
            at = 100 * (torchs["ratio"] - 1)
            axes.vlines(at, row - 0.4, row + 0.4, color=LIMIT_COLOR, lw=1, ls=":", label=label)
        axes.axhline(row + 0.5, color="#dddddd", lw=0.8)
        if faster := ahead(values):
            text = "\n".join(["faster than lorakernels:", *faster])
            axes.text(1.06 * largest, row, text, color=AHEAD_COLOR, va="center")
    axes.set_yticks(
        range(len(layers)),
        [
            f"{case['case']['model']}, r={case['case']['r']}\nM={case['case']['M']}, {case['case']['dtype']}"
            for case in layers
        ],
    )
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlim(min(0.0, axes.get_xlim()[0]), 1.5 * largest)
    axes.axvline(0, color="#888888", lw=0.8)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 1.05 * largest])
    axes.set_xlabel("added to the frozen layer's time, forward and backward, %", loc="left")
    axes.set_title("What LoRA on query_key_value adds to the frozen layer")
    figure.legend(ncols=3, loc="outside lower center")
    return _save(figure, path)


def _roofline(cases: dict[str, dict], path: Path) -> bool:
    """Operations per second over operations per byte, under the two limits measured on this machine."""
    machine = next(iter(_of_group(cases, "machine").values()), None)
    layers = [
        case
        for case in _of_group(cases, "lora_linear").values()
        if case["case"]["dtype"] == "float32" and "target" not in case
    ]
    if machine is None or not layers:
        return False
    timings = whole(machine)
    flop_rate = machine["flops"]["square product"] / timings["square product"]["median_ms"] / 1e6
    byte_rate = machine["bytes"]["copy"] / timings["copy"]["median_ms"] / 1e6
    figure = Figure(figsize=(WIDTH_INCHES, 3.9), layout="constrained")
    parts, wholes = figure.subplots(1, 2)
    bend, ranks = flop_rate / byte_rate, {}
    for axes, reach in ((parts, (0.5, bend, 100)), (wholes, (100, 260))):
        axes.plot(reach, [min(flop_rate, byte_rate * x) for x in reach], color=LIMIT_COLOR, lw=1.6)
        axes.set_xlabel("FLOP per byte, every tensor moved once")
    for index, (model, own) in enumerate(_by_model(layers).items()):
        marker = "os^D"[index % 4]
        for case in own:
            shape = case["case"]
            m, k, n, r = (shape[key] for key in ("M", "K", "N", "r"))
            taken = medians(whole(case))
            moved = 4 * 2 * (m * k + n * k + m * n)
            for name, color in (("frozen linear", "#6b7785"), ("lorakernels", OURS_COLOR)):
                rate = case["flops"][name] / taken[name] / 1e6
                face = color if name == "lorakernels" else "none"
                wholes.scatter(
                    case["flops"][name] / moved, rate, marker=marker, s=46, color=face, edgecolors=color
                )
            added = taken["lorakernels"] - taken["frozen linear"]
            if added > 0:
                # x, y-sized and their gradients, each read or written once more
                at = 6 * m * r * (n + k) / (4 * (3 * m * k + 3 * m * n))
                rate = 6 * m * r * (n + k) / added / 1e6
                parts.scatter(at, rate, marker=marker, s=46, color=OURS_COLOR, zorder=3)
                ranks[r] = at
        wholes.scatter([], [], marker=marker, color="#6b7785", label=f"{model}, M={own[0]['case']['M']}")
    for r, at in ranks.items():
        parts.annotate(f"r={r}", (at, 14), ha="center")
    parts.set(
        xscale="log", yscale="log", ylabel="GFLOP/s", ylim=(10, 1.6 * flop_rate), title="What LoRA adds"
    )
    parts.annotate(f"copy: {byte_rate:.0f} GB/s", (1, byte_rate), (8, -10), textcoords="offset points")
    parts.annotate(f"square product: {flop_rate:.0f} GFLOP/s", (bend, 1.08 * flop_rate))
    wholes.annotate(f"square product: {flop_rate:.0f} GFLOP/s", (100, 1.01 * flop_rate))
    wholes.scatter([], [], color="none", edgecolors="#6b7785", label="hollow: frozen linear")
    wholes.scatter([], [], color=OURS_COLOR, label="blue: lorakernels")
    wholes.set(ylim=(0.8 * flop_rate, 1.05 * flop_rate), title="The whole layer, enlarged")
    figure.legend(ncols=5, loc="outside lower center", handletextpad=0.2, columnspacing=1.2)
    return _save(figure, path)


def _by_model(layers: list[dict]) -> dict[str, list[dict]]:
    models = dict.fromkeys(case["case"]["model"] for case in layers)
    return {model: [case for case in layers if case["case"]["model"] == model] for model in models}


def draw_front_page(gpu: dict[str, dict], cpu: dict[str, dict], path: Path) -> None:
    """Time and memory of the whole step, and a layer in which this project loses, on a GPU and on a CPU."""
    steps = {"fp32": cpu[front_page.CPU_STEP], "bf16": cpu[front_page.CPU_STEP_BF16]}
    step, layer = {"": gpu[front_page.GPU_STEP]}, {"": gpu[front_page.GPU_LAYER]}
    weights = step[""]["memory_of_weights"] / 2**30
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 7.1), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.09, w_pad=0.12)
        grid = figure.subplots(3, 2, height_ratios=(12, 12, 5))
        lost = {"": cpu[front_page.CPU_LAYER_BF16]}
        _panel(grid[0, 0], "GPU", "step of BLOOM-1b7, bf16, milliseconds", step)
        _panel(grid[0, 1], "CPU", "step of BLOOM-560m's shape, seconds", steps, 1e3)
        with_weights = f"GiB at the peak, {weights:.1f} of weights in it"
        _panel(grid[1, 0], "GPU", with_weights, step, 2**30, of_memory=True)
        _panel(grid[1, 1], "CPU", "GiB at the peak, beyond the weights", steps, 2**30, of_memory=True)
        _panel(grid[2, 0], "GPU", "where we lose, one LoRA layer, bf16, ms", layer)
        _panel(grid[2, 1], "CPU", "where we lose, one LoRA layer, bf16, ms", lost)
        _save(figure, path)


def _panel(
    axes: Axes,
    device: str,
    title: str,
    cases: Mapping[str, dict],
    divisor: float = 1,
    *,
    of_memory: bool = False,
) -> None:
    """Bars of a step's rivals; of two steps or of a layer only the usual rival, the fastest and ours."""
    groups = {}
    for name, case in cases.items():
        times = Quantity(device, case)
        values = Quantity(device, case, of_memory).by_rival()
        shown = list(values)
        if len(cases) > 1 or case["group"] != "step":
            shown = [*times.others(), next(filter(is_ours, values))]
        groups[name] = {rival: values[rival] / divisor for rival in shown}
    _bars(axes, groups, better="less" if of_memory else "faster", named="above")
    axes.set_title(f"{device}: {title}", fontweight="bold")
    later = "; corrected since, not timed again" if any("note" in case for case in cases.values()) else ""
    axes.set_xlabel(f"{times.where()}{later}", loc="left", color="#555555")


PICTURES: dict[str, Callable[[dict[str, dict], Path], bool]] = {
    "lora_tax.png": _lora_tax,
    "step.png": _step,
    "share_of_limit.png": _share_of_limit,
    "roofline.png": _roofline,
}
