"""Several implementations tried on one problem: compiled ahead, checked against the definition, and timed."""

import contextlib
import functools
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol, TypeVar

import torch

from lorakernels import device_timing, launching
from lorakernels.installed import has_triton

ROUNDS = 7
# The machine is busy where half of a candidate's times exceed its best by this factor and by so many seconds:
# the host's clock gets more rounds, to find a quiet moment.
BUSY, BUSY_SECONDS, MOST_ROUNDS = 1.2, 2e-4, 21
# Characters of an exception's text in a warning or an error, which are one line each.
REASON_LENGTH = 300


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator; backward understands what the operator's forward saves.

    roundings: how often a 16-bit result, or what it is a sum of, is rounded on its way; see `tolerance`.
    """

    name: str
    forward: Callable
    backward: Callable
    roundings: int = field(default=1, kw_only=True)


Tried = TypeVar("Tried", bound=Implementation, contravariant=True)


class Trial(Protocol[Tried]):
    """A problem to measure on, made only when it is needed."""

    device: torch.device

    def run(self, implementation: Tried) -> object:
        """Compute once what is timed."""

    def failures(self, implementation: Tried) -> list[str]:
        """What is wrong with the implementation's results; empty where they are right."""

    def compile(self, implementation: Tried) -> None:
        """Call once what run and failures call, while `launching.launch` only compiles; here, run's."""
        self.run(implementation)


class Examination:
    """One trial of several implementations.

    Attributes:
        dropped: why an implementation did not pass, by its name.
        too_large: names of those whose kernel needs more of the chip than it has.
        failed: names of those that raised another exception.
        out_of_memory: names of those among them for which there was too little memory.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.dropped: dict[str, str] = {}
        self.too_large: set[str] = set()
        self.failed: set[str] = set()
        self.out_of_memory: set[str] = set()

    def compile(self, problem: str, candidates: Sequence[Implementation]) -> None:
        """Compile the kernels of all candidates at the same time; an error is met again by `passes`."""
        if self.trial.device.type != "cuda" or not has_triton():
            return
        with launching.compiling(problem):
            for one in candidates:
                with contextlib.suppress(Exception):
                    self.trial.compile(one)

    def passes(self, one: Implementation) -> bool:
        """Whether one gives right results."""
        if wrong := self._attempt(self.trial.failures, one):
            self.dropped[one.name] = "; ".join(wrong)
        return one.name not in self.dropped

    def seconds(self, right: Sequence[Implementation]) -> dict[str, list[float]]:
        """The times of each, by name; those of one that fails meanwhile are left out."""
        if self.trial.device.type == "cuda":
            return self._device_seconds(right)
        samples: dict[str, list[float]] = {one.name: [] for one in right}
        for done in range(MOST_ROUNDS):
            if done >= ROUNDS and not any(map(is_busy, samples.values())):
                break
            for one in right:
                if one.name in samples:
                    samples[one.name].append(self._attempt(functools.partial(host_seconds, self.trial), one))
                if one.name in self.dropped:
                    samples.pop(one.name, None)
        return samples

    def _device_seconds(self, right: Sequence[Implementation]) -> dict[str, list[float]]:
        """One after another: the device's own time needs no quiet host, and a graph holds memory."""

        def measure(one: Implementation) -> list[float]:
            call = functools.partial(self.trial.run, one)
            return device_timing.seconds(call, self.trial.device, ROUNDS)

        samples = {one.name: self._attempt(measure, one) for one in right}
        return {name: times for name, times in samples.items() if name not in self.dropped}

    def _attempt(self, action: Callable, one: Implementation):
        try:
            return action(one)
        except Exception as error:
            # a kernel that does not compile or does not fit this chip must not stop the run
            (self.too_large if is_too_large(error) else self.failed).add(one.name)
            if is_out_of_memory(error):
                self.out_of_memory.add(one.name)
            self.dropped[one.name] = f"{type(error).__name__}: {textwrap.shorten(str(error), REASON_LENGTH)}"
            return None


def is_busy(times: list[float]) -> bool:
    """Whether other work lengthened these times of one implementation, in seconds."""
    best = min(times)
    return median(times) > max(BUSY * best, best + BUSY_SECONDS)


def is_too_large(error: Exception) -> bool:
    """Whether a Triton kernel needs more shared memory, registers or threads than the chip has."""
    # triton's OutOfResources, which torch.compile passes on as the text of its own exceptions
    return "out of resource" in str(error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on whatever device and by whatever allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # the CPU's allocator, the CUDA driver and cuBLAS raise plain RuntimeErrors
    texts = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def host_seconds(trial: Trial, candidate: Implementation) -> float:
    """How long one run takes by the host's clock, which is that of a CPU's work."""
    start = time.perf_counter()
    trial.run(candidate)
    return time.perf_counter() - start
