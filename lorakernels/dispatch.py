"""Which implementation computes an operator: measured on the user's own device, checked first, remembered.

The first time a problem appears (device, dtypes, shape bucket, rank), every candidate is checked against the
operator's definition on that very problem and timed, in rounds that time each candidate once; its best time
counts, which other work on the machine lengthens least. The first candidate is the baseline: another one
takes its place only when it is at least 3% faster. One that is wrong or fails is dropped with a warning. The
winner is kept in memory, on disk under the versions it was measured with, and in whatever the caller makes of
choices(); a run that hands it back to use_choices() computes the same bits again. What was measured while the
machine was busy stays off the disk, or every later process would inherit it.

LORAKERNELS_BACKEND forces an implementation wherever backend="auto" is asked for, by its whole name or the
part before the colon. LORAKERNELS_CACHE_DIR moves the file on disk. Nothing is measured while a CUDA graph is
captured.
"""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

import torch

# A candidate replaces the baseline at this share of its time or less; an operator may ask for more.
MARGIN = 0.97
ROUNDS = 7
# The machine is busy where half of a candidate's times exceed its best by this factor and by so many seconds:
# it gets more rounds, to find a quiet moment.
BUSY, BUSY_SECONDS, MOST_ROUNDS = 1.2, 2e-4, 21


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator; backward must understand what its own forward saved."""

    name: str
    forward: Callable
    backward: Callable


@dataclass(frozen=True)
class Choice:
    """What was chosen for a problem: the winner, the milliseconds of each, and why others were dropped."""

    winner: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


class Trial(Protocol):
    """A problem to measure on, made only when it is needed."""

    device: torch.device

    def run(self, implementation: Implementation) -> None:
        """Compute forward and backward once."""

    def failures(self, implementation: Implementation) -> list[str]:
        """What is wrong with the implementation's results; empty where they are right."""


# problem -> Choice, of this process; the one piece of state in the package
_choices: dict[str, Choice] = {}
_lock = threading.Lock()


def choose(
    problem: str,
    candidates: Sequence[Implementation],
    make_trial: Callable[[], Trial],
    margin: float = MARGIN,
) -> Implementation:
    """The candidate to compute problem with: the first one, unless another takes at most margin of its time.

    problem names everything the choice may depend on, the device included. make_trial is called, in a thread
    of its own, if the problem is new; where it cannot be measured now, the baseline stands in and nothing is
    remembered.
    """
    if len(candidates) == 1:
        return candidates[0]
    winner = _winner(_choices.get(problem), candidates)
    if winner is not None:
        return winner
    if _capturing():
        return candidates[0]
    with _lock:
        choice = _choices.get(problem) or _read_disk().get(problem)
        winner = _winner(choice, candidates)
        if winner is None:
            choice, quiet = _measure_in_thread(problem, candidates, make_trial, margin)
            if quiet:
                _write_disk(problem, choice)
            winner = _winner(choice, candidates)
        _choices[problem] = choice
    return winner


def choices() -> dict[str, dict]:
    """Every choice of this process, ready for JSON: {problem: {winner, milliseconds, rejected}}."""
    return {problem: asdict(choice) for problem, choice in sorted(_choices.items())}


def use_choices(recorded: dict[str, dict]) -> None:
    """Repeat what choices() returned in an earlier process; problems that are not in it are measured as ever.

    Raises:
        ValueError: recorded is not of that form.
    """
    try:
        _choices.update(_parse(recorded))
    except (AttributeError, TypeError) as error:
        raise ValueError(f"recorded: expected what dispatch.choices() returns ({error})") from error


def forget() -> None:
    """Drop every choice of this process; the file on disk stays."""
    _choices.clear()


def report() -> str:
    """A table of what was chosen, its time, the runners-up and what was dropped."""
    if not _choices:
        return "lorakernels: no choice between implementations was needed"
    lines = []
    for problem, choice in sorted(_choices.items()):
        lines.append(f"{problem}: {choice.winner}")
        for name, time_ms in sorted(choice.milliseconds.items(), key=lambda item: item[1]):
            lines.append(f"    {time_ms:10.3f} ms  {name}{'  <- chosen' if name == choice.winner else ''}")
        lines += [f"       dropped     {name}: {reason}" for name, reason in choice.rejected.items()]
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    """The device as problems name it; of a CPU what its speed depends on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()}) with {torch.get_num_threads()} threads"


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def forced_backend() -> str | None:
    """The value of LORAKERNELS_BACKEND, None where it is unset, empty or "auto"."""
    name = os.environ.get("LORAKERNELS_BACKEND", "")
    return None if name in ("", "auto") else name


def _winner(choice: Choice | None, candidates: Sequence[Implementation]) -> Implementation | None:
    """The candidate that was chosen, None where nothing was or it is not among them."""
    if choice is not None:
        for candidate in candidates:
            if candidate.name == choice.winner:
                return candidate
    return None


def _measure_in_thread(
    problem: str, candidates: Sequence[Implementation], make_trial: Callable[[], Trial], margin: float
) -> tuple[Choice, bool]:
    # operators run with autograd switched off for the thread; the check needs it, and a fresh thread has it
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(_measure, problem, candidates, make_trial, margin).result()


def _measure(
    problem: str, candidates: Sequence[Implementation], make_trial: Callable[[], Trial], margin: float
) -> tuple[Choice, bool]:
    """The choice, and whether the machine was quiet enough for it to be remembered."""
    trial = make_trial()
    on_device = torch.cuda.device(trial.device) if trial.device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        right, rejected = [], {}
        for candidate in candidates:
            try:
                wrong = trial.failures(candidate)
            except Exception as error:
                # a kernel that does not compile or does not fit this chip must not stop the run
                wrong = [f"{type(error).__name__}: {error}"]
            if wrong:
                rejected[candidate.name] = "; ".join(wrong)
                warnings.warn(
                    f"lorakernels: {candidate.name} is not used for {problem}: {rejected[candidate.name]}",
                    stacklevel=2,
                )
            else:
                right.append(candidate)
        if not right:
            return Choice(candidates[0].name, {}, rejected), True
        samples: dict[str, list[float]] = {candidate.name: [] for candidate in right}
        for done in range(MOST_ROUNDS):
            if done >= ROUNDS and not any(map(_busy, samples.values())):
                break
            for candidate in right:
                samples[candidate.name].append(_time(trial, candidate))
    milliseconds = {name: 1e3 * min(times) for name, times in samples.items()}
    baseline = right[0].name
    winner = min(milliseconds, key=milliseconds.__getitem__)
    if milliseconds[winner] > margin * milliseconds[baseline]:
        winner = baseline
    return Choice(winner, milliseconds, rejected), not any(map(_busy, samples.values()))


def _busy(times: list[float]) -> bool:
    best = min(times)
    return median(times) > max(BUSY * best, best + BUSY_SECONDS)


def _time(trial: Trial, candidate: Implementation) -> float:
    _synchronize(trial.device)
    start = time.perf_counter()
    trial.run(candidate)
    _synchronize(trial.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _disk_path() -> Path:
    folder = os.environ.get("LORAKERNELS_CACHE_DIR")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakernels"
    return Path(folder) / "choices.json"


@functools.cache
def _versions() -> str:
    """What a measured time depends on besides the problem: torch, triton and this package's sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("**/*.py")):
        digest.update(path.read_bytes())
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "none"
    runtime = torch.version.cuda or torch.version.hip or "cpu"
    return f"torch {torch.__version__}, {runtime}, triton {triton_version}, sources {digest.hexdigest()[:16]}"


def _parse(recorded: dict[str, dict]) -> dict[str, Choice]:
    """What choices() returned, as it was; AttributeError or TypeError for anything else."""
    parsed = {problem: Choice(**choice) for problem, choice in recorded.items()}
    for problem, choice in parsed.items():
        texts = [choice.winner, *choice.milliseconds, *choice.rejected, *choice.rejected.values()]
        times = choice.milliseconds.values()
        if not all(isinstance(text, str) for text in texts) or not all(
            type(t) in (int, float) for t in times
        ):
            raise TypeError(f"{problem}: {choice}")
    return parsed


def _read_file() -> dict[str, dict[str, dict]]:
    try:
        content = json.loads(_disk_path().read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_disk() -> dict[str, Choice]:
    try:
        return _parse(_read_file().get(_versions(), {}))
    except (AttributeError, TypeError):
        return {}


def _write_disk(problem: str, choice: Choice) -> None:
    """Add a choice to the file by renaming a new one over it; where that fails the next process measures."""
    path, content = _disk_path(), _read_file()
    current = content.setdefault(_versions(), {})
    if not isinstance(current, dict):
        current = content[_versions()] = {}
    current[problem] = asdict(choice)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
