"""Progress of what takes a while, on standard error: bars on a terminal, elsewhere a line now and then.

A process has one terminal, so there is one display; a wait inside another one joins it.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress as rich_progress
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

# Off a terminal a wait's first line comes after so many seconds, the next ones after twice as many each.
FIRST_LINE, MOST_BETWEEN_LINES = 5.0, 60.0
POLL = 1.0  # seconds
WIDTH = 80  # columns that a line may take


class Task:
    """One wait: how much is done of it, and since when. ``status`` follows its words."""

    def __init__(self, text: str, total: int | None, done: int, in_bytes: bool) -> None:
        self.text, self.total, self.done, self.status = text, total, done, ""
        self._in_bytes = in_bytes
        self._gap = FIRST_LINE
        self.restart()

    def restart(self) -> None:
        """Estimate the time left from what is done from here on."""
        self._since, self._first = time.monotonic(), self.done

    @property
    def has_begun(self) -> bool:
        """Whether anything was done since the clock started."""
        return self.done > self._first

    def update(self, done: int, total: int | None = None) -> None:
        """``done`` is done, of ``total`` where that is given now."""
        self.done, self.total = done, self.total if total is None else total

    def advance(self, count: int) -> None:
        """``count`` more is done."""
        self.done += count

    def seconds_left(self) -> float | None:
        """Seconds until the end at the average rate so far; None where nothing says so."""
        if self.total is None or not self.has_begun:
            return None
        rate = (self.done - self._first) / max(time.monotonic() - self._since, 1e-9)
        return max(self.total - self.done, 0) / rate

    def time_words(self) -> str:
        """The time left, or the time so far where that is not known."""
        if (left := self.seconds_left()) is not None:
            return f"{duration(left)} left"
        return f"{duration(time.monotonic() - self._since)} so far"

    def words(self) -> str:
        """The wait on one line, for instance ``held-out row 120 of 900, 45 s left``."""
        count = ""
        if self.total and self._in_bytes:
            count = f" {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB"
        elif self.total:
            count = f" {self.done} of {self.total}"
        return f"{self.text}{count}, {self.time_words()}"

    def next_gap(self) -> float:
        """Seconds until the next line of this wait, twice as many from call to call."""
        gap, self._gap = self._gap, min(2 * self._gap, MOST_BETWEEN_LINES)
        return gap


def duration(seconds: float) -> str:
    """``seconds`` in the unit that suits them, with at most two digits that matter."""
    for unit, size, limit in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 48 * 3600)):
        if seconds < limit:
            amount = seconds / size
            return f"{amount:.1f} {unit}" if unit == "h" and amount < 10 else f"{amount:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


@contextmanager
def muted(muted: bool = True) -> Iterator[None]:
    """Show nothing of this process while the block lasts, where ``muted``."""
    global _muted
    before, _muted = _muted, _muted or muted
    try:
        yield
    finally:
        _muted = before


def say(text: str) -> None:
    """One line on standard error, above the bars where there are any."""
    if _display is None:
        _console().print(text, markup=False, soft_wrap=True)
    else:
        _display.say(text)


def on_terminal() -> bool:
    """Whether there are bars, so that lines which repeat what they show can be left out."""
    return _console().is_terminal


@contextmanager
def waiting(text: str, total: int | None = None, *, done: int = 0, in_bytes: bool = False) -> Iterator[Task]:
    """Show a wait while the block lasts; yields its `Task`, which the block updates.

    ``total`` and ``done`` count whatever the text names, or bytes; without a total only the time is shown.
    """
    global _display
    task = Task(text, total, done, in_bytes)
    outermost = _display is None
    display = _display = _display or _Display()
    try:
        with display.showing(task):
            yield task
    finally:
        if outermost:
            _display = None
            display.close()


class _Words(rich_progress.ProgressColumn):
    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))

    def render(self, row: rich_progress.Task) -> Text:
        task = row.fields["wait"]
        return Text(f"{task.words()}  {task.status}".rstrip())


class _Bar(rich_progress.ProgressColumn):
    def render(self, row: rich_progress.Task) -> ProgressBar:
        task = row.fields["wait"]
        return ProgressBar(task.total or None, task.done, width=12, pulse=not task.total)


class _Display:
    """The waits of the process, the innermost last."""

    def __init__(self) -> None:
        self._console = _console()
        self._tasks: list[Task] = []
        self._due = 0.0
        self._closed = threading.Event()
        self._bars: rich_progress.Progress | None = None
        if self._console.is_terminal:
            self._bars = rich_progress.Progress(_Bar(), _Words(), console=self._console, transient=True)
            self._bars.start()
        else:
            threading.Thread(target=self._print_lines, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
        self._due = max(self._due, time.monotonic() + FIRST_LINE)

    @contextmanager
    def showing(self, task: Task) -> Iterator[None]:
        self._tasks.append(task)
        self._due = time.monotonic() + task.next_gap()
        row = None if self._bars is None else self._bars.add_task("", total=None, wait=task)
        try:
            yield
        finally:
            self._tasks.remove(task)
            if self._bars is not None and row is not None:
                self._bars.remove_task(row)
            for outer in self._tasks:
                if not outer.has_begun:  # a wait before an outer one begins says nothing of its rate
                    outer.restart()

    def _print_lines(self) -> None:
        while not self._closed.wait(POLL):
            tasks = list(self._tasks)
            if tasks and time.monotonic() >= self._due:
                self.say(tasks[-1].words())
                self._due = time.monotonic() + tasks[-1].next_gap()


def _console() -> Console:
    return Console(stderr=True, highlight=False, quiet=_muted)


_display: _Display | None = None
_muted = False
