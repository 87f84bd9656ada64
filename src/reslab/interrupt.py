"""Ctrl-C at any moment: one closing line instead of a traceback. Imports little: it protects the other imports."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from reslab.errors import Exit

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # only rank 0 prints the closing line


def guarded(command: Callable[[], int], until_exit: bool = False) -> int:
    """Run a command. On Ctrl-C print one line and return the status; on the second Ctrl-C, exit at once.

    With `until_exit`, also handle Ctrl-C while the interpreter shuts down, and do not return after an interrupt: where
    it passed through `exec`, as in the import of a dataclass, Python would end by SIGINT whatever the status.
    """
    in_thread = threading.current_thread() is not threading.main_thread()
    if in_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or the caller's
        return command()
    guard, hook = _start(), sys.unraisablehook
    signal.signal(signal.SIGINT, guard.press)
    sys.unraisablehook = guard.ignore
    try:
        guard.status = command()
    except BaseException as error:  # Lightning makes SystemExit(1) of an interrupt, and C extensions other errors
        if not guard.pressed and not isinstance(error, KeyboardInterrupt):
            raise
        guard.close()
        if until_exit:
            leave(guard.status)
    finally:
        signal.signal(signal.SIGINT, guard.end if until_exit else signal.default_int_handler)
        sys.unraisablehook = guard.ignore if until_exit else hook
    return guard.status


def leave(status: int) -> NoReturn:
    """End the process as sys.exit does, but do not free the memory of torch and Lightning first: that takes seconds."""
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def resume_hint(hint: Callable[[], str]) -> None:
    """Set how the closing line tells to resume; "" while there is nothing to resume."""
    _guard.hint = hint


def close() -> int:
    """Print the closing line, unless it was printed; return the exit status of an interrupted command."""
    return _guard.close()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


class Guard:
    """Handler of SIGINT: raises KeyboardInterrupt the first time and ends the process the second time."""

    def __init__(self) -> None:
        self.pressed = self._printed = False
        self.status: int = Exit.INTERRUPTED
        self.hint: Callable[[], str] = str  # ""
        self._pid = os.getpid()

    def press(self, *_: Any) -> None:
        if self.pressed or os.getpid() != self._pid:  # a loader process that has not set its own handler yet
            self.end()
        self.pressed = True
        raise KeyboardInterrupt

    def end(self, *_: Any) -> None:
        """Exit without cleaning up, and kill the child processes."""
        if os.getpid() == self._pid:
            if self.pressed:
                self.close()
            if multiprocessing := sys.modules.get("multiprocessing"):
                for child in multiprocessing.active_children():
                    child.kill()
        os._exit(self.status)

    def close(self) -> int:
        if not self._printed:
            hint = self.hint()  # takes time: a second Ctrl-C here prints the line itself
            with _without_interrupts():
                self._printed = True
                self.status = Exit.PREEMPTED if hint else Exit.INTERRUPTED
                if not any(int(os.environ.get(name) or 0) for name in RANKS):
                    os.write(2, f"reslab: interrupted{': ' * bool(hint)}{hint}\n".encode())
        return self.status

    def ignore(self, unraisable: Any) -> None:
        """Handle an exception that nobody can catch, as in a destructor: if it is the interrupt, exit."""
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            self.end()
        elif not self.pressed:
            sys.__unraisablehook__(unraisable)


_guard = Guard()


def _start() -> Guard:
    global _guard
    _guard = Guard()
    return _guard
