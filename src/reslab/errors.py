"""Errors that the user can mend, and the exit statuses of every command."""

import sys
import traceback
from enum import IntEnum
from pathlib import Path


class UserError(Exception):
    """Wrong usage, config or data: shown as one plain message without a traceback, exit status 2."""


def cause(error: BaseException) -> str:
    """Return the type and last line of an error, and the file and line if the user's own code raised it."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    here, libraries = str(Path(__file__).parent), (sys.prefix, sys.base_prefix)
    user = [f for f in frames if not f.filename.startswith((here, *libraries, "<"))]
    return f"{text} ({user[-1].filename}, line {user[-1].lineno})" if user else text


class Exit(IntEnum):
    """Exit statuses of the `reslab` command."""

    OK = 0
    FAILED = 1  # failed, diverged, or what was checked is not as it should be
    USAGE = 2  # wrong usage, config or data
    EQUIVALENT = 3  # of `ablate verdict`, as the next two; better is 0
    WORSE = 4
    INCONCLUSIVE = 5  # or no verdict yet
    PREEMPTED = 75  # stopped by a signal with a checkpoint: run the same command again
    INTERRUPTED = 130  # stopped by Ctrl-C, with no checkpoint to resume from
