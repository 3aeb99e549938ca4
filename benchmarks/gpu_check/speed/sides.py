"""A case: sides that are made, checked and then timed in turn; a side that is wrong has no time."""

import contextlib
import gc
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import interleave
from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.pool import Setting
from benchmarks.gpu_check.speed.clock import Phases, Rounds, captured, gpu_state, peak_beyond, run_all
from lorakernels.tolerance import relative_error

# Other projects' results need not meet this project's rules, but have to be the same function's.
OTHERS_AT_MOST = 0.05
NO_MEMORY = "does not fit the memory"
REASON_LENGTH = 300
MOST_ROUNDS, WARMUP_ROUNDS = 50, 2

EAGER, GRAPH, WARM = "eager", "graph", "warm"
# what is timed, and how an item's name says so
MODES = {EAGER: "", GRAPH: ", as a graph"}


class Unavailable(Exception):
    """A side that cannot be had on this machine, and why."""


@dataclass
class Side:
    """What is timed: phases in order, and the check of their results.

    Attributes:
        failures: what is wrong with the results, a line each; a limit, which has none, keeps the default.
        launched: runs once what is listed launch by launch, below autograd and its operators.
    """

    phases: Phases
    failures: Callable[[], list[str]] = list
    launched: Callable[[], object] | None = None


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


def far_off(
    names: Sequence[str], got: Sequence[Tensor], exact: Sequence[Tensor], at_most: float = OTHERS_AT_MOST
) -> list[str]:
    """A line for each result whose relative error is above at_most: for other projects' sides."""
    errors = {name: relative_error(*pair) for name, *pair in zip(names, got, exact, strict=True)}
    return [
        f"{name}: relative error {error:.3g}, not the same function"
        for name, error in errors.items()
        if not error <= at_most
    ]


@contextlib.contextmanager
def remembered_rows(remember: bool) -> Iterator[None]:
    """Where asked to, the loss finds once which rows have labels: it waits for the device, as no graph can."""
    if not remember:
        yield
        return
    loss = importlib.import_module("lorakernels.ops.linear_cross_entropy")
    find = loss._supervised
    loss._supervised = _first_of(find)
    try:
        yield
    finally:
        loss._supervised = find


def _first_of(find: Callable[..., Tensor]) -> Callable[..., Tensor]:
    found: list[Tensor] = []

    def remembered(*arguments: object) -> Tensor:
        if not found:
            found.append(find(*arguments))
        return found[0]

    return remembered


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
        sides: dict[str, Side] = {}
        memory: dict[str, int] = {}
        for name, build in builders.items():
            self._attempt(findings, name, lambda name=name, build=build: self._add(
                findings, setting, name, build, sides, memory
            ))  # fmt: skip
        if self.mode == WARM:
            return {}
        timed = {name: side.phases for name, side in sides.items()}
        if self.mode == GRAPH:
            timed = self._captured(sides, setting.device)
        if not timed:
            return {}
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
            memory={name: memory[name] + self.weights for name in timed},
            **({"memory_of_weights": self.weights} if self.weights else {}),
            gpu_state={"before": before, "after": gpu_state(setting.device)},
            left_out=self.left_out,
            **self.extra,
        )
        stored = f"{self.name[:-1]}-graph]" if self.mode == GRAPH else self.name
        findings.cases[stored] = {"group": self.group, "extra_info": rounds.extra_info}
        return {name: sides[name] for name in timed}

    def _add(
        self,
        findings: Findings,
        setting: Setting,
        name: str,
        build: Callable[[], Side],
        sides: dict[str, Side],
        memory: dict[str, int],
    ) -> None:
        side = build()
        if self.mode == WARM:
            run_all(side.phases)
            return
        if wrong := side.failures():
            self.left_out[name] = f"wrong: {'; '.join(wrong)}"
            findings.faults += [f"{name}: {line}" for line in wrong]
            return
        memory[name] = peak_beyond(lambda: run_all(side.phases), setting.device)
        sides[name] = side

    def _captured(self, sides: Mapping[str, Side], device: str) -> dict[str, Phases]:
        """Each side as one graph; what a capture refuses is left out, with its reason."""
        replays: dict[str, Phases] = {}
        pool = torch.cuda.graph_pool_handle() if device == "cuda" else None
        for name, side in sides.items():
            try:
                replays[name] = {interleave.ONLY: captured(side.phases, device, pool)}
            except Exception as error:
                self.left_out[name] = f"no graph: {_one_line(error)}"
        return replays

    def _attempt(self, findings: Findings, name: str, make: Callable[[], None]) -> None:
        try:
            make()
        except Unavailable as reason:
            self.left_out[name] = str(reason)
        except torch.OutOfMemoryError:
            self.left_out[name] = NO_MEMORY
        except Exception as error:
            self.left_out[name] = f"failed: {_one_line(error)}"
            findings.faults.append(f"{name}: {_one_line(error)}")
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:REASON_LENGTH]
