"""How a command fails: by the user's mistake, or because a signal stopped it."""

EXIT_USAGE = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, resumes


class UserError(Exception):
    """A mistake that the user can correct. Its text is one line: what was wrong, where, and what to do."""


class Stopped(BaseException):
    """A signal stopped the work early; the text is one line and says what is saved.

    Not an `Exception`, so that no error handler on the way catches it.
    """
