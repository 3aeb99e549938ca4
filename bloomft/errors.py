"""How a command fails: by the user's mistake, with another process, or because a signal stopped it."""

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, resumes


class UserError(Exception):
    """A mistake that the user can correct. Its text is one line: what was wrong, where, and what to do."""


class LostProcessError(Exception):
    """Another process of the same run has ended or does not answer; the text is one line."""


class Stopped(BaseException):
    """A signal stopped the work early; the text is one line and says what is saved.

    Not an `Exception`, so that no error handler on the way catches it.
    """
