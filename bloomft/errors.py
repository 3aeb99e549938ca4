"""How a command ends that does not succeed: the user's mistake, or a signal that stopped it."""

EXIT_MISTAKE = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, goes on


class UserError(Exception):
    """A mistake that the user can correct. Its text is one line: what was wrong, where, and what to do."""


class Stopped(BaseException):
    """A signal ended the work before its end; the text is one line and says what is saved.

    No `Exception`, so that nothing which handles errors on the way takes it for one.
    """
