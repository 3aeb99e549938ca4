"""SIGINT and SIGTERM as a request to stop, which a run follows at a point where nothing is lost."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bloomft.errors import Stopped
from bloomft.process import launched_processes


class StopRequest:
    """True once SIGINT or SIGTERM has come; a second signal acts as if it were not caught.

    A launched process notes every one: its launcher sends its own after what the terminal or the scheduler
    sends to all, and kills what does not end in time.
    """

    def __init__(self) -> None:
        self._received = False
        self._raise_text: str | None = None
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self._received

    @contextmanager
    def at_once(self, text: str) -> Iterator[None]:
        """Inside, a signal raises `Stopped` with ``text`` wherever the program is.

        Outside it is only noted. One that was noted earlier raises on entry.
        """
        self._raise_text = text
        try:
            self._raise_if_received()
            yield
            self._raise_if_received()  # an exception raised inside a destructor gets lost
        finally:
            self._raise_text = None

    def _raise_if_received(self) -> None:
        if self._received and self._raise_text is not None:
            raise Stopped(self._raise_text)

    def _install(self) -> None:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        except ValueError:
            pass  # not the main thread: whoever owns the process owns its signals

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def ignore(self) -> None:
        """From here on signals have no effect: the work is done, and its exit status stands."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self._received and launched_processes() > 1:
            return
        self._received = True
        if launched_processes() == 1:
            self._restore()
        self._raise_if_received()


_watching: StopRequest | None = None


def watch_signals() -> StopRequest:
    """Note signals from here to the end of the process, or until the `stop_signals` that called this ends."""
    global _watching
    if _watching is None:
        _watching = StopRequest()
        _watching._install()
    return _watching


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """The process's `StopRequest`. Earlier handlers return at the end, unless `watch_signals` set it up."""
    global _watching
    if _watching is not None:
        yield _watching
        return
    stop = watch_signals()
    try:
        yield stop
    finally:
        stop._restore()
        _watching = None
