"""The processes that train one run together, as torchrun starts them, and what they exchange.

Every process takes its share of each step's rows and does the same with the summed
gradients. Process 0 alone reads and writes the run's folder; what it finds out is sent to the others.
"""

import atexit
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bloomft.errors import LostProcessError, UserError
from bloomft.process import launched_processes
from bloomft.progress import muted

# How long the others wait for what process 0 does alone, such as tokenizing. If it dies they notice at once.
ALONE_AT_MOST = timedelta(hours=12)
POLL = 0.02  # seconds
_SET_BY_THE_LAUNCHER = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


class Ranks:
    """The processes of a run; made without arguments, one that trains by itself and exchanges nothing.

    All of them have to call the same methods in the same order. `LostProcessError` where another one has
    ended, or does not answer in time.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def add(self, tensor: Tensor) -> None:
        """Replace ``tensor``, of any shape, by its sum over all processes, the same bits on each."""

    def total(self, *counts: int) -> list[int]:
        """The sum of each of ``counts`` over all processes; no device is waited for."""
        return list(counts)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any process."""
        return bool(self.total(flag)[0])

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on process 0, which alone calls it."""
        return make()

    def after_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns here; the others call it once process 0, which may download, is through."""
        if not self.is_first:
            self.from_first(lambda: None)
            return make()
        made = make()
        self.from_first(lambda: None)
        return made

    def gather(self, value: T) -> list[T]:
        """``value`` of every process, in the order of their numbers."""
        return [value]

    def gathering(self) -> AbstractContextManager[None]:
        """Inside, torch may gather a sharded base between the processes."""
        return nullcontext()

    def check_equal(self, values: dict[str, Any]) -> None:
        """Raise `UserError` on process 0 where one of ``values`` is not the same on every process."""
        everyone = self.gather(values)
        if not self.is_first:
            return
        for rank, theirs in enumerate(everyone):
            if different := [name for name, value in values.items() if theirs[name] != value]:
                raise UserError(
                    f"process {rank}: {', '.join(different)}: not the same as on process 0; every machine "
                    "needs the same files and the same versions of Python's packages"
                )


class _LaunchedRanks(Ranks):
    """Several processes; the default process group takes tensors of the CPU and of the device."""

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(dist.get_rank(), dist.get_world_size())
        self._timeout = timeout
        self._patient = dist.new_group(backend="gloo", timeout=ALONE_AT_MOST)

    def add(self, tensor: Tensor) -> None:
        with self._exchange(self._timeout):
            dist.all_reduce(tensor)

    def total(self, *counts: int) -> list[int]:
        tensor = torch.tensor(counts, dtype=torch.int64)
        self.add(tensor)
        return tensor.tolist()

    def from_first(self, make: Callable[[], T]) -> T:
        sent: list[Any] = [make() if self.is_first else None]
        with self._exchange(ALONE_AT_MOST):
            dist.broadcast_object_list(sent, src=0, group=self._patient)
        return sent[0]

    def gather(self, value: T) -> list[T]:
        received: list[Any] = [None] * self.size
        with self._exchange(self._timeout):
            dist.all_gather_object(received, value)
        return received

    def gathering(self) -> AbstractContextManager[None]:
        return self._exchange(self._timeout)

    @contextmanager
    def _exchange(self, timeout: timedelta) -> Iterator[None]:
        """Inside, an error of the exchange with the others is a `LostProcessError`."""
        try:
            yield
        except RuntimeError as error:  # torch has no narrower class for what gloo reports
            # a GPU reports what an earlier kernel did wrong at any later call, this one too
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            if "timed out" in str(error).lower():
                minutes = timeout.total_seconds() / 60
                why = f"another one did not answer within {minutes:g} minutes"
            else:
                why = f"another one has ended ({_first_sentence(error)})"
            raise LostProcessError(f"process {self.rank} of {self.size} stopped: {why}") from error


@contextmanager
def join_ranks(device: torch.device, timeout_minutes: float) -> Iterator[Ranks]:
    """Meet the processes that torchrun has started beside this one, each on its ``device``.

    Only process 0 shows progress and messages inside. The block is left together. A process that waits for
    another one in a step gives up after ``timeout_minutes``. Raises `UserError` where the environment is not
    one that torchrun sets.
    """
    _check_environment()
    if launched_processes() == 1:
        yield Ranks()
        return
    timeout = timedelta(minutes=timeout_minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        kept, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store = _store_of_this_start(kept, rank, size, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        # after a failure only at the end of the process, so that the others notice once its error is shown
        atexit.register(_leave)
        ranks = _LaunchedRanks(timeout)
    except RuntimeError as error:
        raise LostProcessError(
            f"process {os.environ['RANK']} cannot meet the others: {_first_sentence(error)}"
        ) from error
    with muted(not ranks.is_first):
        yield ranks
    ranks.total(0)
    _leave()


def _check_environment() -> None:
    size, instead = launched_processes(), "start with torchrun, or unset WORLD_SIZE"
    allowed = {"WORLD_SIZE": range(1, sys.maxsize)}
    if size > 1:
        if missing := [name for name in _SET_BY_THE_LAUNCHER if name not in os.environ]:
            raise UserError(f"WORLD_SIZE={size} without {', '.join(missing)}; {instead}")
        allowed |= {"RANK": range(size), "LOCAL_RANK": range(size), "MASTER_PORT": range(2**16)}
    for name, numbers in allowed.items():
        value = os.environ.get(name, "")
        if value and not (value.isdecimal() and int(value) in numbers):
            raise UserError(f"{name}={value}: not a number that a launcher sets; {instead}")


def _first_sentence(error: RuntimeError) -> str:
    return str(error).partition(". ")[0].partition("\n")[0]


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _store_of_this_start(kept: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The part of a launcher's store that no earlier start of the job has written to.

    torchrun keeps one store when it starts the processes again: what stands in it may be the address of a
    killed one, and TORCHELASTIC_RESTART_COUNT differs between machines. So every process announces a new
    token, and process 0 publishes those that it sees until each of the others has found its own among them;
    only the process 0 of this start can have seen that one. RuntimeError after ``timeout``.
    """
    token = secrets.token_hex(8)
    kept.set(f"token {rank}", token)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if rank == 0:
            seen = [kept.get(f"token {other}").decode() for other in range(size)]
            kept.set("tokens", " ".join(seen))
        tokens = kept.get("tokens").decode().split()
        if tokens[rank : rank + 1] == [token]:
            kept.set(f"joined {rank}", tokens[0])
            joined = [f"joined {other}" for other in range(size)]
            if rank != 0 or (kept.check(joined) and all(kept.get(name).decode() == token for name in joined)):
                return dist.PrefixStore(tokens[0], kept)
        time.sleep(POLL)
    raise RuntimeError("timed out")
