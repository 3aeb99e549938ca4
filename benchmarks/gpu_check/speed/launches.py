"""Where the time goes: a profile by kernel, and a list of operations with the bytes that each has to move."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

MOST_KERNELS, REPEATS = 25, 5
ALL = "all of them"
# The device waits so many cycles first, or it would be idle between operations and the waits be counted.
HEAD_START_CYCLES = 100_000_000
COPIED_BYTES = 2**30


def profile(run: Callable[[], object], device: str) -> list[dict]:
    """All kernels of one run, and those that take longest: {kernel, calls, ms, share of all kernels' time}.

    On a CPU, which has no kernels, ATen's operations.
    """
    run()
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as found:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    events = found.key_averages()
    taken = [(one.self_device_time_total if on_gpu else one.self_cpu_time_total, one) for one in events]
    total = sum(microseconds for microseconds, _ in taken) or 1.0
    taken.sort(key=lambda pair: -pair[0])
    launched = sum(one.count for microseconds, one in taken if microseconds)
    return [
        _row(ALL, launched, total / 1e3, total / 1e3),
        *(
            _row(one.key, one.count, microseconds / 1e3, total / 1e3)
            for microseconds, one in taken[:MOST_KERNELS]
            if microseconds
        ),
    ]


def copy_rate(device: str, size: int = COPIED_BYTES) -> float:
    """Bytes a second, read and written, of a copy of size bytes: the best of a few."""
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(REPEATS):
        start = _mark(device)
        target.copy_(source)
        times.append((start, _mark(device)))
    return max(2 * size / (1e-3 * milliseconds) for milliseconds in _laps(times, device))


def by_launch(run: Callable[[], object], device: str, rate: float, repeats: int = REPEATS) -> list[dict]:
    """What run launches, by name: calls, ms, share of the time, GB, and the share of rate, in bytes a second.

    Bytes are those of the operands, each counted once, and of the results: the least that has to be moved.
    Every operation is timed by a pair of events, which adds about 2 microseconds to each.
    """
    run()
    runs = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(HEAD_START_CYCLES)
        with _Launches(device) as launches, _triton_launches(launches):
            run()
        runs.append((launches.found, _laps([marks for _, _, marks in launches.found], device)))
    found = runs[-1][0]
    # a run that differs, by a choice that was made in it, is not averaged with the last one
    same = [laps for other, laps in runs if len(other) == len(found)]
    medians = [statistics.median(one) for one in zip(*same, strict=True)]
    total = sum(medians) or 1.0
    rows: dict[str, list[float]] = {}
    for (name, moved, _), milliseconds in zip(found, medians, strict=True):
        row = rows.setdefault(name, [0, 0.0, 0.0])
        for at, value in enumerate((1, milliseconds, moved)):
            row[at] += value
    return [
        {
            **_row(name, int(calls), milliseconds, total),
            "gb": round(moved / 1e9, 4),
            "share_of_copy": round(moved / (1e-3 * milliseconds) / rate, 3) if milliseconds else 0.0,
        }
        for name, (calls, milliseconds, moved) in sorted(rows.items(), key=lambda row: -row[1][1])
    ]


class _Launches(TorchDispatchMode):
    """Name, bytes and a pair of marks of every ATen operation that is not a view or an allocation."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.found: list[tuple[str, int, tuple]] = []
        self._inside = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        returned = function._schema.returns
        is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in returned)
        if self._inside or is_view or name.startswith(("empty", "new_empty")):
            return function(*args, **(kwargs or {}))
        return self.timed(name, lambda: function(*args, **(kwargs or {})), (args, kwargs))

    def timed(self, name: str, call: Callable[[], object], operands: object):
        """Call, and note it; what it calls in turn is part of it."""
        self._inside, start = True, _mark(self.device)
        try:
            result = call()
        finally:
            self._inside = False
        marks = (start, _mark(self.device))
        self.found.append((name, _bytes(operands) + _bytes(result), marks))
        return result


@contextlib.contextmanager
def _triton_launches(launches: _Launches) -> Iterator[None]:
    """Triton's launches, compiled or interpreted, are noted too; they are no operations of ATen."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    kinds = (JITFunction, InterpretedFunction)
    plain = {kind: kind.run for kind in kinds}

    def noting(run: Callable) -> Callable:
        def launch(self, *args, **kwargs):
            name = getattr(self, "__name__", None) or self.fn.__name__
            return launches.timed(name, lambda: run(self, *args, **kwargs), (args, kwargs))

        return launch

    for kind, run in plain.items():
        kind.run = noting(run)
    try:
        yield
    finally:
        for kind, run in plain.items():
            kind.run = run


def _bytes(values: object) -> int:
    """Of all different tensors in values, Triton's descriptors included; a broadcast one as it is stored."""
    sizes: dict[tuple, int] = {}

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            stored = min(value.nbytes, value.untyped_storage().nbytes())
            sizes[(value.data_ptr(), value.shape, value.stride())] = stored
        elif isinstance(value, dict):
            add(list(value.values()))
        elif isinstance(value, list | tuple):
            for one in value:
                add(one)
        elif isinstance(getattr(value, "base", None), Tensor):
            add(value.base)

    add(values)
    return sum(sizes.values())


def _row(kernel: str, calls: int, milliseconds: float, total: float) -> dict:
    share = round(milliseconds / total, 4)
    return {"kernel": kernel, "calls": calls, "ms": round(milliseconds, 4), "share": share}


def _mark(device: str):
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _laps(marks: list[tuple], device: str) -> list[float]:
    """Milliseconds between the two marks of each pair."""
    if device != "cuda":
        return [1e3 * (end - start) for start, end in marks]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]
