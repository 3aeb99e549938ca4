"""Rounds within a limit of time, peak memory, replayed CUDA graphs, and the state of the GPU."""

import subprocess
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks import process_memory

LEAST_ROUNDS = 3
# calls before a capture, as torch.cuda.graph asks for, so that nothing is made for the first time in it
CALLS_BEFORE_CAPTURE = 3
STATE = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")

Phases = Mapping[str, Callable[[], object]]


class Rounds:
    """What `interleave.compare` needs of pytest-benchmark's fixture, with rounds that end with the time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.extra_info: dict[str, object] = {}

    def pedantic(self, function: Callable[[], object], rounds: int, warmup_rounds: int = 0) -> None:
        """Call function for at most so many rounds, and for `LEAST_ROUNDS` whatever they take."""
        for _ in range(warmup_rounds):
            function()
        end = time.monotonic() + self._seconds
        for done in range(1, rounds + 1):
            function()
            if done >= LEAST_ROUNDS and time.monotonic() >= end:
                break


def run_all(phases: Phases) -> None:
    """Call every phase, in order."""
    for function in phases.values():
        function()


def new_pool(device: str) -> object:
    """Memory that several graphs may share: they then take together what the largest takes.

    No two of them may run at once, and what one leaves there may not be read later.
    """
    return torch.cuda.graph_pool_handle() if device == "cuda" else None


def run_aside(phases: Phases, device: str) -> None:
    """Call every phase a few times on another stream, as a capture needs it."""
    if device != "cuda":
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CALLS_BEFORE_CAPTURE):
            run_all(phases)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def captured(phases: Phases, device: str, pool: object) -> Callable[[], None]:
    """A function that replays all phases as one CUDA graph in pool; on a CPU, one that calls them."""
    if device != "cuda":
        return lambda: run_all(phases)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run_all(phases)
    return graph.replay


def peak_beyond(run: Callable[[], object], device: str) -> int:
    """Bytes that run takes at its peak beyond what is held before it: of the GPU, or of this process."""
    if device != "cuda":
        return process_memory.peak_over(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def gpu_state(device: str) -> dict[str, str]:
    """Clocks, power and temperature as nvidia-smi reports them; empty where there is none."""
    if device != "cuda":
        return {}
    chosen = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader", f"--id={chosen}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(STATE, (value.strip() for value in done.stdout.strip().split(",")), strict=False))
