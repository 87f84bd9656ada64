"""Errors that the user can mend, and the exit statuses of every command."""

import sysconfig
import traceback
from enum import IntEnum
from pathlib import Path


class UserError(Exception):
    """Wrong usage, config or data: shown as one plain message without a traceback, exit status 2."""


def last_line(error: BaseException, named: bool = False) -> str:
    """Return the last line of an exception's message, after its type if `named` or if there is no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = named and not isinstance(error, ImportError)
    return ": ".join([*([type(error).__name__] if named or not lines else []), *lines[-1:]])


def raised_in(error: BaseException, with_reslab: bool = False) -> list[str]:
    """Return the lines of the user's code, or also of reslab, that an exception passed through; outermost first."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    package = Path(__file__).parent
    other = (*libraries, "<", str(package / "config.py") if with_reslab else str(package))
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename}, line {frame.lineno}" for frame in frames if not frame.filename.startswith(other)]


def cause(error: BaseException) -> str:
    """Return the type and last line of an error, and the file and line if the user's own code raised it."""
    return last_line(error, named=True) + "".join(f" ({place})" for place in raised_in(error)[-1:])


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
