"""Which implementation computes an operator: measured on the user's own device, checked first, remembered.

The first time a problem appears (device, dtypes, shape bucket, rank; for some operators each direction is a
problem of its own), every candidate is checked against the operator's definition on that very problem and
timed, by the device's own clock on a GPU (`device_timing`), by the host's on a CPU, in rounds that time each
candidate once; its best time counts, which other work on the machine lengthens least. The first candidate is
the baseline: another one takes its place only when it is at least 3% faster. One that is wrong or cannot run
is dropped with a warning; one whose kernel needs more than the chip has, without. Where none is left, the
plain reference is checked and used, untimed; where that fails too, there is an error. A sole candidate is
checked in the same way, and so is a forced one, which nothing replaces. Products that are too small (`LARGE`)
take the baseline, neither checked nor timed.

The winner is kept in memory and in whatever the caller makes of kernel_choices(); a run that passes it to
use_kernel_choices() computes the same bits again. On disk, under the versions it was measured with, it is
kept only where every candidate could be run or is too large for the chip, and the machine was quiet: a busy
moment or a failure would decide for every later process. What ran out of memory is not kept at all: another
implementation stands in for the call, and later calls try again.

LORAKERNELS_BACKEND forces an implementation wherever backend="auto" is asked for, by its whole name or the
part before the colon. LORAKERNELS_CACHE_DIR moves the file on disk. Nothing can be measured while a CUDA
graph is captured: a problem that is new then is an error.
"""

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from lorakernels import choice_file
from lorakernels.choice_file import Choice
from lorakernels.examination import Examination, Implementation, Trial, is_busy, is_out_of_memory

__all__ = [
    "LARGE",
    "Implementation",
    "Trial",
    "backend_suffix",
    "choose",
    "default_backend",
    "device_name",
    "device_properties",
    "dtype_name",
    "forget",
    "is_large",
    "kernel_choices",
    "kernel_report",
    "known",
    "rounded_rows",
    "use_kernel_choices",
]

# A candidate replaces the baseline at this share of its time or less; an operator may ask for more.
MARGIN = 0.97
# Multiplications of a product, by the type of its device, below which a choice costs more than it can save.
# On a CPU: a tenth of a millisecond of one core. On a GPU: 6 us at 741 TFLOP/s, which an H200 was measured to
# reach in bfloat16; one launch takes 5 to 10 us there.
LARGE = {"cpu": 2**23, "cuda": 2**31}

Candidate = TypeVar("Candidate", bound=Implementation)


@dataclass
class _StandIn:
    """What computes a problem whose check ran out of memory, and for how many further calls."""

    name: str
    wait: int
    left: int


@dataclass(frozen=True)
class _Outcome:
    """What a measurement found, and whether it may be kept on disk, or not even in memory."""

    choice: Choice
    durable: bool = False
    out_of_memory: bool = False


# the state of this process, by problem; warnings also by what they are about
_choices: dict[str, Choice] = {}
_stand_ins: dict[str, _StandIn] = {}
_warned: set[tuple[str, str]] = set()
_lock = threading.Lock()


def choose(
    problem: str,
    candidates: Sequence[Candidate],
    make_trial: Callable[[], Trial[Candidate]],
    margin: float = MARGIN,
    *,
    reference: Candidate | None = None,
) -> Candidate:
    """The candidate to compute problem with: the first one, unless another takes at most margin of its time.

    problem names everything the choice may depend on, the device included. make_trial is called, in a thread
    of its own, if the problem is new.

    Args:
        reference: what computes the problem where no candidate is right; None where nothing may, since the
            caller asked for these candidates.

    Raises:
        RuntimeError: no candidate is right, nor is the reference; or the problem is new while a CUDA graph is
            captured.
    """
    known = candidates if reference is None else (*candidates, reference)
    winner = _winner(_choices.get(problem), known)
    if winner is not None:
        return winner
    if _capturing():
        return _while_capturing(problem, known)
    with _lock:
        if (stand_in := _waiting(problem, known)) is not None:
            return stand_in
        choice = _choices.get(problem) or choice_file.read().get(problem)
        winner = _winner(choice, known)
        if choice is None or winner is None:
            outcome = _in_thread(
                functools.partial(_measure, problem, candidates, reference, make_trial, margin)
            )
            choice = outcome.choice
            winner = next(one for one in known if one.name == choice.winner)
            if outcome.out_of_memory:
                _let_stand_in(problem, winner.name)
                return winner
            if outcome.durable:
                choice_file.write(problem, choice)
        _choices[problem] = choice
        _stand_ins.pop(problem, None)
    return winner


def known(problem: str, candidates: Sequence[Candidate]) -> Candidate | None:
    """What `choose` chose for problem in this process, None where nothing was: nothing is measured."""
    return _winner(_choices.get(problem), candidates)


def kernel_choices() -> dict[str, dict]:
    """Every choice of this process, ready for JSON: {problem: {winner, milliseconds, rejected}}."""
    return {problem: asdict(choice) for problem, choice in sorted(_choices.items())}


def use_kernel_choices(recorded: dict[str, dict]) -> None:
    """Repeat what kernel_choices() returned in an earlier process; problems not in it are measured as usual.

    Raises:
        ValueError: recorded is not of that form.
    """
    try:
        _choices.update(choice_file.parse(recorded))
    except (AttributeError, TypeError) as error:
        raise ValueError(f"recorded: expected what kernel_choices() returns ({error})") from error


def forget() -> None:
    """Drop every choice of this process; the file on disk stays."""
    for state in (_choices, _stand_ins, _warned):
        state.clear()


def kernel_report() -> str:
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
        return device_properties(device).name
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()}) with {torch.get_num_threads()} threads"


@functools.cache
def device_properties(device: torch.device) -> Any:
    """torch.cuda.get_device_properties(device), kept: every call of an operator asks for them."""
    return torch.cuda.get_device_properties(device)


def is_large(rows: int, weight: torch.Tensor) -> bool:
    """Whether a product of `rows` rows with weight [N, K] is worth a choice on the weight's device."""
    return rows * weight.numel() >= LARGE["cpu" if weight.is_cpu else "cuda"]


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def rounded_rows(rows: int) -> int:
    """The power of two that stands for so many rows, at least 1, in the name of a problem."""
    return 1 << (rows - 1).bit_length()


def backend_suffix(backend: str) -> str:
    """What ends the name of a problem whose candidates are those of one backend."""
    return "" if backend == "auto" else f", {backend} only"


def default_backend() -> str:
    """What backend="auto" means: the value of LORAKERNELS_BACKEND, "auto" where it is unset or empty."""
    return os.environ.get("LORAKERNELS_BACKEND") or "auto"


def _winner(choice: Choice | None, candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate that was chosen, None where nothing was or it is not among them."""
    if choice is not None:
        for candidate in candidates:
            if candidate.name == choice.winner:
                return candidate
    return None


def _let_stand_in(problem: str, name: str) -> None:
    """Until the next try, which comes at once, then after 1, 3, 7, ... calls: a check costs many of them."""
    before = _stand_ins.get(problem)
    wait = 0 if before is None else 2 * before.wait + 1
    _stand_ins[problem] = _StandIn(name, wait, wait)


def _waiting(problem: str, known: Sequence[Candidate]) -> Candidate | None:
    """The stand-in for problem, None where there is none or the next try is due."""
    stand_in = _stand_ins.get(problem)
    if stand_in is None or stand_in.left == 0:
        return None
    stand_in.left -= 1
    return _winner(Choice(stand_in.name), known)


def _while_capturing(problem: str, known: Sequence[Candidate]) -> Candidate:
    """The stand-in for a problem whose check ran out of memory; RuntimeError where there is none."""
    stand_in = _stand_ins.get(problem)
    winner = None if stand_in is None else _winner(Choice(stand_in.name), known)
    if winner is None:
        raise RuntimeError(
            f"lorakernels: nothing is chosen yet for {problem}, and nothing can be measured while a CUDA "
            "graph is captured: run the captured function once before"
        )
    return winner


def _in_thread(measure: Callable[[], _Outcome]) -> _Outcome:
    # operators run with autograd switched off for the thread; the check needs it, and a fresh thread has it
    streams = _current_streams()

    def follow_and_measure() -> _Outcome:
        _follow(streams)
        return measure()

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(follow_and_measure).result()


def _current_streams() -> list[torch.cuda.Stream]:
    """The caller's streams that are not a device's default, and last its stream on the current CUDA device.

    A thread begins with the default streams, and to set one makes a context on its device.
    """
    if not torch.cuda.is_initialized():
        return []
    current = torch.cuda.current_device()
    streams = [torch.cuda.current_stream(index) for index in range(torch.cuda.device_count())]
    own = [one for index, one in enumerate(streams) if one != torch.cuda.default_stream(index)]
    return [*(one for one in own if one != streams[current]), streams[current]]


def _follow(streams: list[torch.cuda.Stream]) -> None:
    """Make this thread's work follow what its caller has queued; set_stream also sets the device."""
    for stream in streams:
        torch.cuda.set_stream(stream)


def _measure(
    problem: str,
    candidates: Sequence[Candidate],
    reference: Candidate | None,
    make_trial: Callable[[], Trial[Candidate]],
    margin: float,
) -> _Outcome:
    try:
        trial = make_trial()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _unchecked(problem, reference or candidates[0])
    on_device = torch.cuda.device(trial.device) if trial.device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        examination = Examination(trial)
        examination.compile(problem, candidates)
        right = [one for one in candidates if examination.passes(one)]
        samples = examination.seconds(right) if len(candidates) > 1 else {}
        right = [one for one in right if one.name not in examination.dropped]
        if not right:
            return _last_resort(problem, candidates, reference, examination)
    for name, reason in examination.dropped.items():
        if name not in examination.too_large:
            _warn(problem, name, f"{name} is not used for {problem}: {reason}")
    milliseconds = {name: 1e3 * min(times) for name, times in samples.items()}
    winner = baseline = right[0].name
    if samples:
        fastest = min(milliseconds, key=milliseconds.__getitem__)
        winner = fastest if milliseconds[fastest] <= margin * milliseconds[baseline] else baseline
    quiet = not any(map(is_busy, samples.values()))
    return _Outcome(
        Choice(winner, milliseconds, examination.dropped),
        durable=bool(samples) and quiet and not examination.failed,
        out_of_memory=bool(examination.out_of_memory),
    )


def _last_resort(
    problem: str,
    candidates: Sequence[Implementation],
    reference: Implementation | None,
    examination: Examination,
) -> _Outcome:
    """The reference in place of candidates that all failed."""
    dropped = examination.dropped
    if reference is not None and examination.passes(reference):
        _warn(problem, reference.name, f"the plain {reference.name} computes {problem}: {_reasons(dropped)}")
        return _Outcome(Choice(reference.name, {}, dropped), out_of_memory=bool(examination.out_of_memory))
    last = reference or candidates[0]
    if last.name in examination.out_of_memory:
        return _unchecked(problem, last)
    raise RuntimeError(f"lorakernels: no implementation of {problem} is right: {_reasons(dropped)}")


def _reasons(dropped: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in dropped.items())


def _unchecked(problem: str, one: Implementation) -> _Outcome:
    """One that stands in where there is no memory for a check."""
    _warn(problem, one.name, f"{one.name} computes {problem} unchecked: out of memory while it was checked")
    return _Outcome(Choice(one.name), out_of_memory=True)


def _warn(problem: str, about: str, text: str) -> None:
    if (problem, about) not in _warned:
        _warned.add((problem, about))
        warnings.warn(f"lorakernels: {text}", stacklevel=2)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
