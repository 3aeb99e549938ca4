"""Plots of stored benchmarks: axes from zero, the floor drawn, readable at a README's width."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.interleave import is_ours, whole

OURS_COLOR, THEIRS_COLOR, FLOOR_COLOR = "#0b6e4f", "#a9b4c2", "#c1121f"
WIDTH_INCHES, DPI = 9.0, 110
PLAIN_METADATA = {"Software": None}


def draw(cases: dict[str, dict], folder: Path) -> list[str]:
    """Write every plot that the cases have figures for; returns the file names."""
    return [name for name, picture in PICTURES.items() if picture(cases, folder / name)]


def _color(name: str) -> str:
    return OURS_COLOR if is_ours(name) else THEIRS_COLOR


def _of_group(cases: dict[str, dict], group: str) -> dict[str, dict]:
    return {name: case for name, case in cases.items() if case["group"] == group}


def _save(figure, path: Path) -> bool:
    figure.savefig(path, dpi=DPI, metadata=PLAIN_METADATA)
    plt.close(figure)
    return True


def _lora_tax(cases: dict[str, dict], path: Path) -> bool:
    """What LoRA adds to the frozen layer, by shape and rank; a red mark at what its operations alone add."""
    layers = {
        name: case for name, case in _of_group(cases, "lora_linear").items() if name.startswith("test_layer[")
    }
    if not layers:
        return False
    layers = dict(sorted(layers.items(), key=lambda item: (item[1]["case"]["K"], item[1]["case"]["r"])))
    rivals = list(dict.fromkeys(name for case in layers.values() for name in whole(case)))
    rivals = [
        name
        for name in rivals
        if any(whole(case).get(name, {}).get("ratio", 1) != 1 for case in layers.values())
    ]
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 4.2), layout="constrained")
    height = 0.8 / len(rivals)
    greys = ["#5c677d", "#7d8597", "#979dac", "#b6bcc8", "#ced4da", "#e2e6ea"]
    for index, rival in enumerate(rivals):
        color = OURS_COLOR if is_ours(rival) else greys[index % len(greys)]
        points = [
            (at + index * height, 100 * (whole(case)[rival]["ratio"] - 1))
            for at, case in enumerate(layers.values())
            if rival in whole(case)
        ]
        axes.bar(
            [x for x, _ in points], [y for _, y in points], width=height * 0.92, color=color, label=rival
        )
    middle = 0.4 - height / 2
    for at, case in enumerate(layers.values()):
        least = 100 * (case["operations_alone"] - 1)
        axes.hlines(
            least,
            at - height / 2,
            at + 0.8 - height / 2,
            color=FLOOR_COLOR,
            lw=1.5,
            label="its operations alone" if at == 0 else None,
        )
    axes.set_xticks(
        [at + middle for at in range(len(layers))],
        [
            f"{case['case']['model']}\nr={case['case']['r']}, M={case['case']['M']}"
            for case in layers.values()
        ],
    )
    axes.set_ylabel("added to the frozen layer, %")
    axes.set_ylim(bottom=0)
    axes.set_title("LoRA on query_key_value, forward and backward", loc="left")
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    return _save(figure, path)


def _bars(axes: Axes, values: dict[str, float], unit: str) -> None:
    names = list(values)
    axes.barh(names, [values[name] for name in names], color=[_color(name) for name in names])
    for at, name in enumerate(names):
        axes.text(values[name], at, f" {values[name]:.3g}", va="center", fontsize=8)
    axes.set_xlim(0, 1.15 * max(values.values()))
    axes.invert_yaxis()
    axes.set_xlabel(unit)


def _step(cases: dict[str, dict], path: Path) -> bool:
    """Seconds and memory of the whole step by implementation, the products alone as a line."""
    steps = list(_of_group(cases, "step").values())
    if not steps:
        return False
    figure, grid = plt.subplots(
        len(steps), 2, figsize=(WIDTH_INCHES, 0.6 + 1.9 * len(steps)), layout="constrained", squeeze=False
    )
    for (left, right), case in zip(grid, steps, strict=True):
        timings, limit = _split(whole(case))
        _bars(left, {name: one["median_ms"] / 1e3 for name, one in timings.items()}, "seconds")
        left.set_title(case["title"], loc="left", fontsize=10)
        if limit:
            left.axvline(limit / 1e3, color=FLOOR_COLOR, lw=1.5, label="its products alone")
            left.legend(fontsize=8, frameon=False, loc="lower right")
        memory = {name: case["memory"][name] / 2**30 for name in timings}
        _bars(right, memory, "GiB at the peak, over the weights")
        right.tick_params(axis="y", labelleft=False)
    return _save(figure, path)


def _split(timings: dict[str, dict]) -> tuple[dict[str, dict], float]:
    """The rivals, and the milliseconds of all matrix products alone, attention's too; 0 if not timed."""
    rivals = {name: one for name, one in timings.items() if not name.endswith("products alone")}
    return rivals, sum(one["median_ms"] for name, one in timings.items() if name not in rivals)


def _share_of_limit(cases: dict[str, dict], path: Path) -> bool:
    """The rate of each whole against that of its matrix products alone, measured in the same rounds."""
    shares = {}
    for case in cases.values():
        timings, limit = _split(whole(case))
        if limit:
            for name, one in timings.items():
                shares[f"{case['title']}: {name}"] = 100 * limit / one["median_ms"]
    if not shares:
        return False
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 0.9 + 0.3 * len(shares)), layout="constrained")
    names = list(shares)
    axes.barh(names, list(shares.values()), color=[_color(name.rsplit(": ", 1)[1]) for name in names])
    for at, name in enumerate(names):
        # with a background, since the limit's line passes behind it
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(shares[name] + 1, at, f"{shares[name]:.0f}%", va="center", fontsize=8, bbox=background)
    axes.axvline(100, color=FLOOR_COLOR, lw=1.5)
    axes.set_xlim(0, max(115, 1.1 * max(shares.values())))
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("% of the rate of its matrix products alone")
    axes.set_title("Share of the measured limit", loc="left")
    return _save(figure, path)


def _roofline(cases: dict[str, dict], path: Path) -> bool:
    """Operations per second over operations per byte, under the two limits measured on this machine."""
    machine = next(iter(_of_group(cases, "machine").values()), None)
    layers = [case for case in _of_group(cases, "lora_linear").values() if case["case"]["dtype"] == "float32"]
    if machine is None or not layers:
        return False
    timings = whole(machine)
    flop_rate = machine["flops"]["square product"] / timings["square product"]["median_ms"] / 1e6
    byte_rate = machine["bytes"]["copy"] / timings["copy"]["median_ms"] / 1e6
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 4.5), layout="constrained")
    intensity = [0.1, flop_rate / byte_rate, 3000]
    axes.plot(intensity, [min(flop_rate, byte_rate * x) for x in intensity], color=FLOOR_COLOR, lw=1.5)
    axes.annotate(
        f"{flop_rate:.0f} GFLOP/s, square product", (1.2 * intensity[1], 1.05 * flop_rate), fontsize=8
    )
    axes.annotate(f"{byte_rate:.1f} GB/s, copy", (0.15, 0.15 * byte_rate * 1.6), fontsize=8)
    for case in layers:
        shape = case["case"]
        m, k, n, r = (shape[key] for key in ("M", "K", "N", "r"))
        moved = 4 * 2 * (m * k + n * k + m * n)
        for name, color in (("frozen linear", THEIRS_COLOR), ("lorakernels", OURS_COLOR)):
            rate = case["flops"][name] / whole(case)[name]["median_ms"] / 1e6
            axes.scatter(case["flops"][name] / moved, rate, color=color, s=22, zorder=3)
        thin = 6 * m * r * (n + k)
        added = whole(case)["lorakernels"]["median_ms"] - whole(case)["frozen linear"]["median_ms"]
        if added > 0:
            # x, y-sized and their gradients, each read or written once more
            axes.scatter(
                thin / (4 * (3 * m * k + 3 * m * n)), thin / added / 1e6, marker="^", color=OURS_COLOR, s=22
            )
    axes.scatter([], [], color=THEIRS_COLOR, label="frozen linear")
    axes.scatter([], [], color=OURS_COLOR, label="lorakernels, the whole layer")
    axes.scatter([], [], color=OURS_COLOR, marker="^", label="what LoRA adds, alone")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte, every tensor moved once", ylabel="GFLOP/s")
    axes.set_title("Where the LoRA linear stands under the machine's limits", loc="left")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return _save(figure, path)


PICTURES: dict[str, Callable[[dict[str, dict], Path], bool]] = {
    "lora_tax.png": _lora_tax,
    "step.png": _step,
    "share_of_limit.png": _share_of_limit,
    "roofline.png": _roofline,
}
