"""The one way in which operators launch Triton kernels, and compiling many kernels at once, ahead of use."""

import contextlib
import logging
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

_LOG = logging.getLogger("lorakernels")
_only_compiles: ContextVar[bool] = ContextVar("lorakernels_only_compiles", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` of a `triton.jit` kernel; inside `compiling` compile only.

    arguments are tensors, numbers and tensor descriptors in the kernel's order; constants are its constexprs
    and Triton's options, such as num_warps, by name.
    """
    if _only_compiles.get():
        kernel.warmup(*arguments, grid=grid, **constants)
    else:
        kernel[grid](*arguments, **constants)


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Inside, in this thread, `launch` compiles for Triton's active driver and launches nothing.

    Kernels that this process has not compiled yet are compiled by as many threads as there are cores; the end
    of the block waits for them. An error of the compiler is not raised: the next launch of that kernel meets
    it again. The logger "lorakernels" gets, at level INFO, how many kernels are compiled for `what`, the
    errors, and how long it took.
    """
    # imported here: a CPU user need not have Triton
    from triton import AsyncCompileMode

    started = time.monotonic()
    with _Compilers(len(os.sched_getaffinity(0))) as compilers:
        with AsyncCompileMode(compilers, ignore_errors=True):
            token = _only_compiles.set(True)
            try:
                yield
            finally:
                _only_compiles.reset(token)
            if compilers.submitted:
                _LOG.info("compiling %d kernels for %s", len(compilers.submitted), what)
        if not compilers.submitted:
            return
        for error in filter(None, (one.exception() for one in compilers.submitted)):
            _LOG.info(
                "a kernel does not compile: %s", textwrap.shorten(f"{type(error).__name__}: {error}", 300)
            )
        _LOG.info("compiled in %.1f s", time.monotonic() - started)


class _Compilers(ThreadPoolExecutor):
    """A pool that keeps what was submitted: Triton submits one call for each kernel that it must compile."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads, thread_name_prefix="lorakernels-compile")
        self.submitted: list[Future] = []

    def submit(self, call: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """As `ThreadPoolExecutor.submit`."""
        future = super().submit(call, *args, **kwargs)
        self.submitted.append(future)
        return future
