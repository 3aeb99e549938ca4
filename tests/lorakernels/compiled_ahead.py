"""Compile kernels ahead for a GPU that is not there; `test_launching` reads what happened, as JSON.

A process of its own, since elsewhere the kernels may be interpreted.
"""

import json
import logging
import os
import threading

import torch
import triton
import triton.compiler
import triton.language as tl

from lorakernels.aot.chips import CHIPS
from lorakernels.aot.stand_in import StandInDriver
from lorakernels.launching import compiling, launch

THREADS = 3


@triton.jit
def scale_kernel(x_ptr, y_ptr, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, factor * tl.load(x_ptr + at))


@triton.jit
def broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 0)


class _Driver(StandInDriver):
    """Counts launches."""

    launched = 0

    def launcher_cls(self, source, metadata):
        def launcher(*arguments) -> None:
            _Driver.launched += 1

        return launcher


def main() -> None:
    """Print the compilations, those that ran at once, launches and log lines of each phase."""
    os.sched_getaffinity = lambda _: set(range(THREADS))
    triton.runtime.driver.set_active(_Driver(CHIPS["sm_90"]))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("lorakernels").addHandler(handler)
    logging.getLogger("lorakernels").setLevel(logging.INFO)

    compiled: list[str] = []
    # nobody goes on before as many kernels are being compiled as there are threads
    together, compile_one = threading.Barrier(THREADS, timeout=60), triton.compiler.compile

    def watched(source, *arguments, **options):
        compiled.append(source.fn.__name__)
        if threading.current_thread() is not threading.main_thread():
            together.wait()
        return compile_one(source, *arguments, **options)

    triton.compiler.compile = watched
    x, y = torch.zeros(1024), torch.empty(1024)
    found = {}

    def note(phase: str, error: str = "") -> None:
        found[phase] = {
            "compiled": sorted(compiled), "launched": _Driver.launched, "lines": list(lines), "error": error,
        }  # fmt: skip
        compiled.clear()
        lines.clear()
        _Driver.launched = 0

    def launch_all() -> None:
        for block in (128, 256):
            launch(scale_kernel, (1024 // block,), x, y, 2.0, BLOCK=block, num_warps=4)

    with compiling("a problem"):
        launch_all()
        launch_all()
        launch(broken_kernel, (1,), x, BLOCK=8)
    note("ahead")
    with compiling("the same problem"):
        launch_all()
    note("again")
    launch_all()
    note("launched")
    try:
        launch(broken_kernel, (1,), x, BLOCK=8)
    except Exception as error:
        note("broken", type(error).__name__)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
