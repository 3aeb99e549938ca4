"""One process per rival of the whole step, since settings and memory are per process; they take turns."""

import contextlib
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks import process_memory
from benchmarks.baselines.bloom_step import Shape, make_attention_products, make_gemms, make_step
from bloomft.process import release_freed_memory

GEMMS = "frozen products alone"
ATTENTION = "attention's products alone"
FLOORS = {GEMMS: make_gemms, ATTENTION: make_attention_products}


class RivalProcess:
    """Holds one rival's model; takes steps on request and returns seconds, peak memory, loss and gradients.

    The process starts, and takes an untimed step, when it is first asked, and again after close().
    """

    def __init__(self, name: str, shape: Shape, weights: Path, threads: int) -> None:
        self._arguments = (name, shape, weights, threads)
        self._process = None

    def step(self) -> tuple[float, int]:
        """Seconds of one forward and backward; peak bytes beyond what was in use before the first."""
        if self._process is None:
            self._start()
            self._ask("step")
        return self._ask("step")

    def results(self) -> tuple[float, list[torch.Tensor]]:
        """Loss and adapter gradients of the last step."""
        return self._ask("results")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, *self._arguments), daemon=True)
        self._process.start()
        other.close()

    def _ask(self, question: str):
        with contextlib.suppress(BrokenPipeError):  # a rival that failed has sent its error
            self._pipe.send(question)
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process, which frees its memory."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: Connection, name: str, shape: Shape, weights: Path, threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        if name in FLOORS:
            step, trained = FLOORS[name](shape), []
        else:
            step, trained, model = make_step(name, shape, weights)
            # Mapped weights that this model has not read yet would count as the step's memory.
            for parameter in model.parameters():
                parameter.detach().sum()
        release_freed_memory()
        before = process_memory.resident()
        loss = None
        while True:
            question = pipe.recv()
            if question == "step":
                process_memory.reset_peak()
                start = time.perf_counter()
                loss = step()
                seconds = time.perf_counter() - start
                pipe.send((seconds, process_memory.peak() - before))
            else:
                pipe.send((loss.item(), [value.grad.float().numpy() for value in trained]))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:
        pipe.send(RuntimeError(f"{name}: {type(error).__name__}: {error}"))
