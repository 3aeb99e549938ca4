"""Items in worker processes, to isolate the faults of one: a crash, a hang, a broken CUDA context.

A worker is a new process with its own process group. It serves items until one does not pass; then it is
killed, with whatever it has started, and a fresh one takes the next item.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import connection
from multiprocessing.context import BaseContext
from pathlib import Path

PASS, FAIL, ERROR, NOT_RUN = "pass", "fail", "error", "not run"
_LAST_LINES = 15


@dataclass(frozen=True)
class Setting:
    """Where items run: a device, at full or at the rehearsal's sizes, with a folder for temporary files."""

    device: str
    rehearsal: bool
    scratch: Path

    def pick(self, full, tiny):
        """One of the two by size."""
        return tiny if self.rehearsal else full

    @property
    def compiler(self) -> dict[str, str]:
        """Options of torch.compile: a rehearsal traces, but does not wait for a compiler."""
        return self.pick({}, {"backend": "eager"})

    @property
    def processes(self) -> BaseContext:
        """How new processes start: with CUDA afresh, else as copies, which need not import anything again."""
        return multiprocessing.get_context("spawn" if self.device == "cuda" else "fork")


@dataclass(frozen=True)
class Item:
    """One thing to check: ``check(findings, setting, **arguments)``, in at most `limit` seconds on a GPU."""

    name: str
    check: Callable
    arguments: dict = field(default_factory=dict)
    limit: float = 180.0


def run_items(
    items: Sequence[Item],
    setting: Setting,
    *,
    workers: int,
    seconds: float,
    report: Callable[[Item, dict], None],
) -> None:
    """Run the items in their order, `workers` at a time, and hand each one's outcome to report.

    An outcome has status, seconds and detail, and where the item ran to its end figures, notes and faults.
    What has not ended after `seconds` is reported as not run.
    """
    deadline = time.monotonic() + seconds
    waiting, idle, busy = deque(items), [], []
    try:
        while (waiting or busy) and time.monotonic() < deadline:
            while waiting and len(busy) < workers:
                worker = idle.pop() if idle else _Worker(setting)
                busy.append(worker)
                worker.begin(waiting.popleft())
            until = min(deadline, *(worker.limit for worker in busy))
            connection.wait([worker.pipe for worker in busy], max(0.0, until - time.monotonic()))
            for worker in list(busy):
                outcome = worker.outcome()
                if outcome is None:
                    continue
                busy.remove(worker)
                if outcome["status"] == PASS:
                    idle.append(worker)
                else:
                    worker.end()
                report(worker.item, outcome)
        for worker in busy:
            report(worker.item, not_run(f"stopped after {seconds:.0f} s, the limit of all items together"))
        for item in waiting:
            report(item, not_run(f"not begun within {seconds:.0f} s, the limit of all items together"))
    finally:
        for worker in idle:
            worker.dismiss()
        for worker in (*idle, *busy):
            worker.end()


def environment(device: str) -> dict[str, str]:
    """Variables that have to be set before torch and Triton are imported to run on that device."""
    if device == "cuda":
        return {"TRITON_INTERPRET": "0"}
    # threads do not survive in a copied process: autograd's, of which a GPU needs one, and the tokenizers'
    return {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def not_run(detail: str) -> dict:
    """The outcome of an item that has not run to its end."""
    return {"status": NOT_RUN, "seconds": 0.0, "detail": detail}


class _Worker:
    """A process that serves one item at a time."""

    def __init__(self, setting: Setting) -> None:
        # nothing is timed in a rehearsal, whose machine may have other work
        self._patience = setting.pick(1, 4)
        self.pipe, theirs = setting.processes.Pipe()
        with tempfile.NamedTemporaryFile(dir=setting.scratch, suffix=".log", delete=False) as log:
            self._log = Path(log.name)
        self._process = setting.processes.Process(target=_serve, args=(theirs, setting, self._log))
        self._process.start()
        # or the end of the process would not close the pipe
        theirs.close()

    def begin(self, item: Item) -> None:
        self.item, self._start = item, time.monotonic()
        self.limit = self._start + self._patience * item.limit
        # a process that has died in the meantime is reported by outcome()
        with contextlib.suppress(OSError):
            self.pipe.send(item)

    def outcome(self) -> dict | None:
        """What became of the item, None while it runs."""
        seconds = time.monotonic() - self._start
        try:
            if self.pipe.poll():
                return {"seconds": seconds, **self.pipe.recv()}
        except (OSError, EOFError):
            self._process.join()
            return {"status": ERROR, "seconds": seconds, "detail": self._death()}
        if time.monotonic() >= self.limit:
            detail = f"no result within the item's limit of {seconds:.0f} s; {self._last_lines()}"
            return {"status": ERROR, "seconds": seconds, "detail": detail}
        return None

    def dismiss(self) -> None:
        """Let an idle process exit by itself, which avoids warnings about what it held."""
        # it may not see the end of the pipe, which a later copy of this process holds open
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self._process.join(timeout=5.0)

    def end(self) -> None:
        """Kill the process and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _death(self) -> str:
        code = self._process.exitcode
        reason = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
        return f"the process ended {reason}; {self._last_lines()}"

    def _last_lines(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return "\n".join(["its last output:", *lines]) if lines else "no output"


def _serve(pipe: connection.Connection, setting: Setting, log: Path) -> None:
    """The worker's side: items come in, outcomes go out, until the parent is gone."""
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # not what the parent may have put in their place
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ |= environment(setting.device)
    os.environ["OMP_NUM_THREADS"] = "1"
    # or every worker would start its own pool of compiling processes
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["LORAKERNELS_CACHE_DIR"] = str(log.with_suffix(".choices"))
    os.environ.pop("LORAKERNELS_BACKEND", None)
    import torch

    torch.set_num_threads(1)
    if setting.device == "cpu":
        from benchmarks.interpreter import correct_bfloat16

        correct_bfloat16()
    with contextlib.suppress(EOFError):
        while (item := pipe.recv()) is not None:
            pipe.send(_outcome(item, setting))


def _outcome(item: Item, setting: Setting) -> dict:
    import torch

    from benchmarks.gpu_check.findings import Findings
    from lorakernels import dispatch

    findings = Findings()
    torch.manual_seed(0)
    torch._dynamo.reset()
    dispatch.forget()
    try:
        item.check(findings, setting, **item.arguments)
        if setting.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception:
        lines = traceback.format_exc().rstrip().splitlines()
        return {
            "status": ERROR,
            "detail": "\n".join([lines[-1], *lines[-_LAST_LINES:-1]]),
            **asdict(findings),
        }
    status = FAIL if findings.faults else PASS
    return {"status": status, "detail": "\n".join(findings.faults), **asdict(findings)}


def _end_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os.killpg(0, signal.SIGKILL)
