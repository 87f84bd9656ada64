"""Run the Python commands of shell scripts in forks of a server that has already imported torch.

`Warm` starts the server and writes the programs `reslab` and `python` to a directory for $PATH. They pass arguments,
environment and file descriptors to the server. Runs of several processes start as ordinary processes.
"""

import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

# -SE: start without site packages and environment variables, which takes 30 ms
PROGRAM = """#!{python} -SE
import sys
sys.path.insert(0, {folder!r})
from warm import request
request({address!r})
"""
DEVICES = {"--devices", "--trainer.devices"}  # Lightning starts the other processes with the command of the first


class Warm:
    """A server, until `close`.

    Args:
        bin: Directory for the programs, created here.
        environ: Environment of the server; it imports the package that PYTHONPATH names.
        setup: Code to run after the imports.
    """

    def __init__(self, bin: Path, environ: dict[str, str], setup: str = "") -> None:
        self._folder = Path(tempfile.mkdtemp())  # the path of a socket may have 107 bytes
        address = self._folder / "socket"
        text = PROGRAM.format(python=sys.executable, folder=str(Path(__file__).parent), address=str(address))
        bin.mkdir()
        for name in ("reslab", "python"):
            (bin / name).write_text(text)
            (bin / name).chmod(0o755)
        words = [sys.executable, __file__, str(address), str(bin / "python"), setup]
        self._process = subprocess.Popen(words, env=environ, start_new_session=True)
        deadline = time.monotonic() + 120
        while not address.exists():
            assert self._process.poll() is None and time.monotonic() < deadline, "the server does not start"
            time.sleep(0.05)

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._folder)


def request(address: str) -> None:
    """Run this program's command in the server at `address`, or here if it is not one that the server can run."""
    argv = sys.argv[1:]
    if Path(sys.argv[0]).name == "reslab":
        argv = ["-m", "reslab", *shortened(argv)]
    if (argv[:2] != ["-m", "reslab"] and not argv[0].endswith(".py")) or DEVICES.intersection(argv):
        os.execv(sys.executable, [sys.executable, *argv])
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        data = json.dumps([argv, str(Path.cwd()), dict(os.environ)]).encode()
        socket.send_fds(server, [len(data).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(data)
        status = server.recv(4)
    sys.exit(int.from_bytes(status, "big") if status else 1)


def shortened(argv: list[str]) -> list[str]:
    """Stack the config file $SHORTEN on the config files of a run or study; options still override it."""
    short = ["--config", os.environ.get("SHORTEN", "")]
    if not short[1] or argv[0] not in ("fit", "ablate") or argv[1] == "new" or "--print_config" in argv:
        return argv
    places = [i + 2 for i, word in enumerate(argv) if word == "--config"]
    at = max([*places, 2 if argv[0] == "fit" and not argv[1].startswith("-") else 1])
    return [*argv, *short] if argv[0] == "ablate" else [*argv[:at], *short, *argv[at:]]


def serve(address: str, python: str, setup: str) -> None:
    import reslab.experiment
    import reslab.runs.figures
    import reslab.runs.report  # noqa: F401
    from reslab.ablation import launch

    launch.is_supported = lambda: False  # this server starts the cells, too
    exec(setup)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address + ".new")
        server.listen(8)
        Path(address + ".new").rename(address)
        while os.getppid() == parent:
            if not select.select([server], [], [], 5)[0]:
                continue
            client, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                _supervise(client, python)
                os._exit(0)
            client.close()


def _supervise(client: socket.socket, python: str) -> None:
    """Run the command of a client in a child process, and send its exit status."""
    size, descriptors, _, _ = socket.recv_fds(client, 8, 3)
    data = b""
    while len(data) < int.from_bytes(size, "big"):
        data += client.recv(1 << 20)
    if (child := os.fork()) == 0:
        client.close()
        os._exit(_run(descriptors, python, *json.loads(data)))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    client.sendall((status if status >= 0 else 128 - status).to_bytes(4, "big"))


def _run(descriptors: list[int], python: str, argv: list[str], cwd: str, environ: dict[str, str]) -> Any:
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    sys.executable = python  # for the processes that `reslab ablate run` starts
    try:
        if argv[0] == "-m":
            from reslab.cli import main

            return main(argv[2:])
        sys.argv, sys.path[0] = argv, str(Path(argv[0]).resolve().parent)
        runpy.run_path(argv[0], run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    serve(*sys.argv[1:])
