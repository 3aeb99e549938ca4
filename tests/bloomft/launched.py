"""Several processes of one training run, with the environment that torchrun gives them."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from bloomft import train
from bloomft.command_line import run_command
from bloomft.run.signals import watch_signals

# forked from a process that has loaded torch and transformers once, and has not started any thread
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["bloomft.train", "tests.bloomft.launched"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Launched:
    """``python -m bloomft.train config`` in ``size`` processes, of which each calls ``before`` first.

    Their output and errors go to files in ``folder``.
    """

    def __init__(
        self,
        size: int,
        config: Path,
        folder: Path,
        overrides: tuple[str, ...] = (),
        before: Callable[[], object] | None = None,
        **environment: str,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self._errors = [folder / f"errors of {rank}" for rank in range(size)]
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = []
        for rank, errors in enumerate(self._errors):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
            arguments = (variables | common | environment, [str(config), *overrides], errors, before)
            process = _PROCESSES.Process(target=_train, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)

    def finish(self, seconds: float = 100) -> list[int | None]:
        """Waits for the end; returns the exit statuses in the order of the ranks, minus a signal's number."""
        for process in self.processes:
            process.join(seconds)
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
        return statuses

    def errors(self) -> list[str]:
        """What each process has written to standard error."""
        return [path.read_text() for path in self._errors]


def _train(variables: dict[str, str], arguments: list[str], errors: Path, before: Callable | None) -> None:
    os.environ |= variables
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a fork server ignores it
    torch.set_num_threads(1)
    watch_signals()
    if before is not None:
        before()
    sys.argv = ["train", *arguments]
    run_command(train.main)


def run_together(size: int, check: Callable[[], object]) -> list[int | None]:
    """Exit statuses of ``size`` processes in one process group that each call ``check``."""
    port, started = free_port(), []
    for rank in range(size):
        started.append(_PROCESSES.Process(target=_check, args=(rank, size, port, check), daemon=True))
        started[-1].start()
    for process in started:
        process.join(60)
    return [process.exitcode for process in started]


def _check(rank: int, size: int, port: int, check: Callable[[], object]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    check()
    dist.destroy_process_group()
