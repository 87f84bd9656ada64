"""Start cells from one process that has imported torch, Lightning and reslab: a cell then spends no time on imports.

A fork is safe because that process only imports: it starts no OpenMP or autograd thread and no CUDA context.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

from reslab.host import STOP_SIGNALS

PRELOAD = "reslab.ablation.preload"
PACKAGE = Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds for the imports


class ForkServer:
    """Starts `reslab` commands as forks of a process that has imported everything.

    Args:
        environment: Environment variables of the imports, such as OMP_NUM_THREADS.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([PRELOAD])
        self._sources = sources()
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            forkserver.ensure_running()  # imports while this process does something else
        finally:
            os.environ.clear()
            os.environ.update(before)

    def is_current(self) -> bool:
        """Whether reslab's source files are still those that were imported."""
        return self._sources == sources()

    def start(self, argv: Sequence[str], log: Path, environment: Mapping[str, str]) -> "ForkedProcess":
        """Start `python -m reslab ARGV` in its own session, with its output appended to `log`."""
        ready, is_ready = self._context.Pipe(duplex=False)
        arguments = ([*argv], str(log), {**os.environ, **environment}, str(Path.cwd()), is_ready)
        process = self._context.Process(target=_run, args=arguments, daemon=False)
        process.start()
        is_ready.close()
        with contextlib.suppress(EOFError):  # ended before: poll() has its status
            if ready.poll(PATIENCE):
                ready.recv()  # signals that arrive before would be lost
        return ForkedProcess(process)


class ForkedProcess:
    """A process of the fork server, with the methods of subprocess.Popen that a study uses."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        assert process.pid is not None
        self._process, self.pid = process, process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def is_supported() -> bool:
    """Whether processes can be forked safely: on Linux, from the main thread."""
    return sys.platform == "linux" and threading.current_thread() is threading.main_thread()


def sources() -> dict[str, int]:
    """Return the time of the last change of each source file of reslab."""
    return {str(file): file.stat().st_mtime_ns for file in PACKAGE.rglob("*.py")}


def _run(argv: list[str], log: str, environment: dict[str, str], folder: str, is_ready: object) -> None:
    """Be `python -m reslab ARGV`: the body of a forked process."""
    os.setsid()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.chdir(folder)
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)):
        os.dup2(os.open(path, flags), descriptor)
    os.dup2(1, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(PACKAGE / "__main__.py"), *argv]
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # loaders start as usual
    _set_threads()
    is_ready.send(None)  # type: ignore[attr-defined]
    is_ready.close()  # type: ignore[attr-defined]
    from reslab.__main__ import main

    main()


def _die_with_parent() -> None:
    """Wait until the process that asked for this one ends, and end, too; the server may outlive it."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _set_threads() -> None:
    import torch

    if (threads := int(os.environ.get("OMP_NUM_THREADS", 0))) and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
