"""A case: sides that are made, checked and then timed in turn; a side that is wrong has no time."""

import functools
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import interleave
from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.pool import Setting
from benchmarks.gpu_check.speed.clock import (
    Phases,
    Rounds,
    captured,
    gpu_state,
    new_pool,
    peak_beyond,
    run_all,
    run_aside,
)
from lorakernels.tolerance import relative_error

# Other projects' results need not meet this project's rules, but have to be the same function's.
OTHERS_AT_MOST = 0.05
NO_MEMORY = "does not fit the memory"
REASON_LENGTH = 300
MOST_ROUNDS, WARMUP_ROUNDS = 50, 2

EAGER, GRAPH, WARM = "eager", "graph", "warm"
# what is timed, and how an item's name says so
MODES = {EAGER: "", GRAPH: ", as a graph"}
# what the title of a graph says where our sides have a loss: no graph can wait for the device to find them
ROWS_GIVEN = {
    EAGER: "",
    GRAPH: ", lorakernels' loss with the rows that have labels found beforehand",
    WARM: "",
}


class UnavailableError(Exception):
    """A side that cannot be run on this machine, and why."""


@dataclass
class Side:
    """What is timed: phases in order, and the check of their results.

    Attributes:
        results: computes what is checked; None for a limit, which does a part of the work only.
        exact: the same in float64, by name; errors of the same name are stored as one, the largest.
        wrong: a line for each way in which results are too far from exact.
        launched: runs once what is listed launch by launch, below autograd and its operators.
    """

    phases: Phases
    results: Callable[[], Sequence[Tensor]] | None = None
    exact: Sequence[tuple[str, Tensor]] = ()
    wrong: Callable[[Sequence[Tensor]], list[str]] | None = None
    launched: Callable[[], object] | None = None

    def check(self) -> tuple[dict[str, float], list[str]]:
        """The largest relative error by name, and what is wrong."""
        if self.results is None:
            return {}, []
        got = self.results()
        errors: dict[str, float] = {}
        for (name, right), one in zip(self.exact, got, strict=True):
            errors[name] = max(errors.get(name, 0.0), relative_error(one, right))
        return errors, self.wrong(got)


@dataclass
class Differentiated:
    """A function of no arguments, and its gradients by autograd: forward, then backward."""

    function: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    incoming: Tensor | None = None
    _y: Tensor | None = field(default=None, init=False)

    def forward(self) -> None:
        """Compute y and keep it."""
        self._y = self.function()

    def backward(self) -> list[Tensor]:
        """y and the gradients of the leaves."""
        y, self._y = self._y, None
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.incoming)]

    def results(self) -> list[Tensor]:
        """Both phases."""
        self.forward()
        return self.backward()

    def phases(self) -> Phases:
        """Both, by name."""
        return {"forward": self.forward, "backward": self.backward}


def far_off(exact: Sequence[tuple[str, Tensor]], at_most: float, got: Sequence[Tensor]) -> list[str]:
    """A line for each result whose relative error is above at_most: for other projects' sides."""
    errors = [(name, relative_error(one, right)) for (name, right), one in zip(exact, got, strict=True)]
    return [
        f"{name}: relative error {error:.3g}, not the same function"
        for name, error in errors
        if not error <= at_most
    ]


def other_side(
    both: Differentiated,
    exact: Sequence[tuple[str, Tensor]],
    at_most: float = OTHERS_AT_MOST,
    phases: Phases | None = None,
) -> Side:
    """Another project's function, which has to be the same one."""
    return Side(phases or both.phases(), both.results, exact, functools.partial(far_off, exact, at_most))


@dataclass
class Case:
    """What is measured of some sides, and how it is stored.

    Attributes:
        name, group, title: as in pytest-benchmark's JSON and in the report.
        floor: the side that ratios refer to.
        mode: eager; as a replayed graph; or warm, which runs every side once and times nothing.
        seconds: for the rounds.
        weights: bytes that the peak of every side counts besides what it takes itself.
        extra: joins extra_info.
    """

    name: str
    group: str
    title: str
    floor: str
    mode: str
    seconds: float = 5.0
    weights: int = 0
    extra: dict[str, object] = field(default_factory=dict)

    def measure(
        self, findings: Findings, setting: Setting, builders: Mapping[str, Callable[[], Side]]
    ) -> dict[str, Side]:
        """Make, check and time the sides, and add the case to findings; the sides that were timed.

        A side of ours that is wrong or fails is a fault, and so is another's that is wrong. What does not fit
        the memory, or is not available, is left out and named in the case.
        """
        self.left_out: dict[str, str] = {}
        self._sides: dict[str, Side] = {}
        self._memory: dict[str, int] = {}
        self._errors: dict[str, float] = {}
        for name, build in builders.items():
            self._add(findings, setting, name, build)
        if self.mode == WARM:
            return {}
        timed = {name: side.phases for name, side in self._sides.items()}
        if self.mode == GRAPH:
            timed = self._captured(setting.device)
        try:
            if timed:
                self._time(findings, setting, timed)
        except torch.OutOfMemoryError:
            self.left_out |= dict.fromkeys(timed, NO_MEMORY)
            return {}
        return {name: self._sides[name] for name in timed}

    def _time(self, findings: Findings, setting: Setting, timed: Mapping[str, Phases]) -> None:
        before = gpu_state(setting.device)
        rounds = Rounds(setting.pick(self.seconds, 0.0))
        interleave.compare(
            rounds,
            timed,
            floor=self.floor if self.floor in timed else next(iter(timed)),
            rounds=setting.pick(MOST_ROUNDS, 2),
            warmup=setting.pick(WARMUP_ROUNDS, 0),
            title=self.title + (", as a replayed graph" if self.mode == GRAPH else ""),
            device=setting.device,
            with_host=True,
            memory={name: self._memory[name] + self.weights for name in timed},
            **({"memory_of_weights": self.weights} if self.weights else {}),
            errors=self._errors,
            left_out=self.left_out,
            **self.extra,
        )
        rounds.extra_info["gpu_state"] = {"before": before, "after": gpu_state(setting.device)}
        stored = f"{self.name[:-1]}-graph]" if self.mode == GRAPH else self.name
        findings.cases[stored] = {"group": self.group, "extra_info": rounds.extra_info}

    def _add(self, findings: Findings, setting: Setting, name: str, build: Callable[[], Side]) -> None:
        """Make, check and measure a side, or note why it is left out."""
        try:
            side = build()
            if self.mode == WARM:
                run_all(side.phases)
                return
            errors, wrong = side.check()
            self._errors |= {f"{name}, {result}": error for result, error in errors.items()}
            if wrong:
                self.left_out[name] = f"wrong: {'; '.join(wrong)}"
                findings.faults += [f"{name}: {line}" for line in wrong]
                return
            self._memory[name] = peak_beyond(lambda: run_all(side.phases), setting.device)
            self._sides[name] = side
        except UnavailableError as reason:
            self.left_out[name] = str(reason)
        except torch.OutOfMemoryError:
            self.left_out[name] = NO_MEMORY
        except Exception as error:
            self.left_out[name] = f"failed: {_one_line(error)}"
            findings.faults.append(f"{name}: {_one_line(error)}")
        finally:
            free_memory()

    def _captured(self, device: str) -> dict[str, Phases]:
        """Each side as one graph, ours first; what a capture refuses is left out, with its reason."""
        replays: dict[str, Phases] = {}
        pool = new_pool(device)
        # all before the first capture: what graphs hold cannot be used outside of them
        for side in self._sides.values():
            run_aside(side.phases, device)
        for name in sorted(self._sides, key=lambda name: not interleave.is_ours(name)):
            try:
                replays[name] = {interleave.ONLY: captured(self._sides[name].phases, device, pool)}
            except Exception as error:
                self.left_out[name] = f"no graph: {_one_line(error)}"
                pool = new_pool(device)
        return {name: replays[name] for name in self._sides if name in replays}


def free_memory() -> None:
    """Give back what a GPU's allocator keeps; models are circles, which only a collection finds."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:REASON_LENGTH]
