"""Errors that reach a user: one line each, with the exit status they end in."""

from typing import ClassVar


class FuseDiskError(Exception):
    """An operation failed; the message says what was wrong and what to do (exit status 1)."""

    exit_code: ClassVar[int] = 1


class UsageError(FuseDiskError):
    """A value on the command line makes no sense (exit status 2)."""

    exit_code = 2
