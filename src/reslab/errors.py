"""Errors that the user can mend, and the exit statuses of every command."""

from enum import IntEnum


class UserError(Exception):
    """Wrong usage, config or data: shown as one plain message without a traceback, exit status 2."""


class Exit(IntEnum):
    """Exit statuses of the `reslab` command."""

    OK = 0
    FAILED = 1  # failed, diverged, or what was checked is not as it should be
    USAGE = 2  # wrong usage, config or data
    PREEMPTED = 75  # stopped by a signal with a checkpoint: run the same command again
    INTERRUPTED = 130  # stopped by Ctrl-C, with no checkpoint to resume from
