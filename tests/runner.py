"""Run reslab with a fault injected at a chosen call, forked from a server that has already imported torch.

As a script: `python tests/runner.py FAULT fit --config FILE`, where FAULT is "target act call rank", or "-" for none.
"""

import contextlib
import csv
import functools
import importlib
import json
import multiprocessing
import os
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from reslab.host import STOP_SIGNALS

REPO = Path(__file__).resolve().parents[1]
DIGITS = ["--config", str(REPO / "configs/experiment/digits.yaml"), "--trainer.accelerator=cpu"]
# 20 steps per epoch (1,294 images // 64), 3 validation batches, 6 test batches
SHORT = ["--trainer.max_epochs=3", "--trainer.log_every_n_steps=5", "--run.checkpoint_every_steps=3"]
PATIENCE = 240  # seconds after which a run is considered hung

TRAINING = "reslab.training.classifier:Classifier.training_step"
VALIDATION = "reslab.training.classifier:Classifier.validation_step"
TEST = "reslab.training.classifier:Classifier.test_step"
EPOCH_END = "reslab.training.progress:ProgressReport.on_train_epoch_end"
SUMS = "reslab.training.checkpoint:_write_sums"  # called twice per checkpoint: before and after it is moved into place
RENAME = "pathlib:Path.replace"  # of any atomic write

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["reslab.experiment", "reslab.runs.figures", "reslab.runs.report"])


def die(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_soon(*args: Any) -> None:
    """Die within the next few steps, at any point of the program."""
    threading.Timer(random.uniform(0, 0.3), die).start()


def terminate(*args: Any) -> None:
    signal.raise_signal(signal.SIGTERM)


def terminate_all(*args: Any) -> None:
    """Signal the run and its loaders from outside, as a scheduler does."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    subprocess.run(["kill", "-TERM", *map(str, pids)], check=True)


def interrupt(*args: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def interrupt_repeatedly(*args: Any) -> None:
    """Press Ctrl-C again and again, also while the program cleans up and exits."""
    for i in range(20):
        timer = threading.Timer(0.01 * i, os.kill, [os.getpid(), signal.SIGINT])
        timer.daemon = True
        timer.start()
    time.sleep(1)


def interrupt_all(*args: Any) -> None:
    """Signal a loader process and the run, as a terminal does."""
    os.kill(os.getppid(), signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def interrupt_twice(*args: Any) -> None:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def fail(*args: Any) -> None:
    raise ArithmeticError("injected")


def damage(*args: Any) -> None:
    from reslab.data.datasets import DataError

    raise DataError("the injected picture is damaged")


def linger(*args: Any) -> None:
    time.sleep(3)


def wait_for_slurm(*args: Any) -> None:
    """Wait until the job is signalled because its time limit is near; a requeued job does not wait."""
    if "SLURM_RESTART_COUNT" not in os.environ:
        signal.pause()


def kill_worker(*args: Any) -> None:
    multiprocessing.active_children()[0].kill()


def halve_and_die(checkpoints: Path, *args: Any) -> None:
    """Leave behind what a kill in the middle of a checkpoint write does: half a temporary file."""
    [part] = checkpoints.glob(".*.part")
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    die()


def spoil(module: Any, batch: Any, *args: Any) -> None:
    batch.images.fill_(float("nan"))


def count_collectives(module: Any, *args: Any) -> None:
    """Record at every following forward pass how many collectives there were so far, including those of C++."""
    import torch

    group = torch.distributed.distributed_c10d._get_default_group()
    file = Path(os.environ["COLLECTIVES"]).open("w", buffering=1)  # noqa: SIM115 - open until the process ends
    module.net.register_forward_pre_hook(lambda *args: print(group._get_sequence_number_for_group(), file=file))


def fill_disk(*args: Any) -> None:
    with Path(os.environ["FILLER"]).open("wb", buffering=0) as file:
        for size in (2**20, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


@dataclass(frozen=True)
class Fault:
    """A fault injected into one rank of a run, just before the n-th call of a function.

    Args:
        target: The function, as module:name or module:Class.name.
        act: The name of a function in this module, called with the same arguments.
        call: The number of the call, from 1.
        rank: The rank of the process.
    """

    target: str
    act: str = "die"
    call: int = 1
    rank: int = 0

    def inject(self) -> None:
        if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK", "0")) != self.rank:
            return
        module, _, path = self.target.partition(":")
        *outer, name = path.split(".")
        owner = functools.reduce(getattr, outer, importlib.import_module(module))
        original, act, calls = getattr(owner, name), globals()[self.act], 0

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call:
                Path(os.environ.get("HURT_AT", os.devnull)).write_text(str(time.time()))
                act(*args)
            return original(*args, **kwargs)

        setattr(owner, name, wrapper)


class Ended(NamedTuple):
    """The exit status of a process (minus the signal number if it was killed) and its output."""

    status: int
    output: str


def reslab(
    *argv: str | Path,
    fault: Fault | None = None,
    largest_file: int | None = None,
    cwd: Path | None = None,
    **environ: str,
) -> Ended:
    """Run a reslab command to its end.

    Args:
        argv: The arguments of the command.
        fault: The fault to inject.
        largest_file: Maximum file size in bytes; writing more fails, as on a full disk.
        cwd: Working directory; default: the current one.
        environ: Added to the environment. FIGURES=1: draw the figures of the run.
    """
    with tempfile.NamedTemporaryFile("r") as log:
        words = [*map(str, argv)]
        process = _server.Process(
            target=_forked, args=(words, log.name, fault, largest_file, cwd or Path.cwd(), environ)
        )
        process.start()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"reslab {' '.join(words)} hangs:\n{log.read()}")
        return Ended(process.exitcode, log.read())


def _forked(
    argv: list[str], log: str, fault: Fault | None, largest_file: int | None, cwd: Path, environ: dict[str, str]
) -> None:
    from torch.utils.data import _utils as workers

    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environ)
    os.chdir(cwd)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # loaders fork as usual
    for number in STOP_SIGNALS:  # ignored, if a study started the server
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for module in (workers, workers.worker):  # seconds until a dead worker or parent is noticed
        module.MP_STATUS_CHECK_INTERVAL = 0.2
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    _main(argv, fault)


def _main(argv: list[str], fault: Fault | None) -> None:
    runpy.run_path(str(Path(__file__).parent / "user/sitecustomize.py"))
    from reslab.cli import main
    from reslab.runs import figures

    if "FIGURES" not in os.environ:  # most tests look at no picture, and drawing takes as long as training
        figures.draw_figures = lambda *args: []
    if fault:
        fault.inject()
    sys.exit(main(argv))


def spawn(*argv: str | Path, fault: Fault | None = None, **environ: str) -> Ended:
    """Like `reslab`, for runs of several processes: Lightning starts the others with the same command line."""
    words = " ".join(map(str, astuple(fault))) if fault else "-"
    return ended([[sys.executable, __file__, words, *map(str, argv)]], environ)


def torchrun(nodes: int, *argv: str | Path, cwd: Path, fault: Fault | None = None, **environ: str) -> Ended:
    """Like `spawn`, with one torchrun of one process per node, all on this machine."""
    words = " ".join(map(str, astuple(fault))) if fault else "-"
    with socket.create_server(("localhost", 0)) as free:
        endpoint = f"localhost:{free.getsockname()[1]}"
    group = ["--nnodes", str(nodes), "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
    command = [sys.executable, "-m", "torch.distributed.run", *group, "--rdzv_id", "job7"]
    return ended([[*command, __file__, words, *map(str, argv), f"--trainer.num_nodes={nodes}"]] * nodes, environ, cwd)


def ended(commands: list[list[str]], environ: dict[str, str], cwd: Path = REPO) -> Ended:
    """Run commands in parallel until all of their processes are gone; return the status of the first."""
    with tempfile.TemporaryFile("w+") as log:
        options: dict[str, Any] = {"stdout": log, "stderr": log, "env": {**os.environ, **environ}, "cwd": cwd}
        processes = [subprocess.Popen(command, start_new_session=True, **options) for command in commands]
        try:
            for process in processes:
                process.wait(PATIENCE)
            log.seek(0)
            assert all_gone(process.pid for process in processes), f"processes are left over:\n{log.read()}"
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        return Ended(processes[0].returncode, log.read())


def all_gone(groups: Iterable[int], patience: float = 10) -> bool:
    """Whether the process groups soon have no living member: loader processes of a killed run end by themselves.

    A zombie is not alive. A container's first process may never collect it, and then its group stays for ever.
    """

    def alive() -> bool:
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
                state, _, group, *_ = file.read_text().rpartition(")")[2].split()
                if state not in "ZX" and int(group) in groups:
                    return True
        return False

    groups, deadline = set(groups), time.monotonic() + patience
    while alive():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def fit(folder: Path, *options: str | Path, **kwargs: Any) -> Ended:
    """Train the short demonstration run in `folder`; kwargs are those of `reslab`."""
    return reslab("fit", *DIGITS, *SHORT, "--run.dir", folder, *options, **kwargs)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def metrics(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv, without throughput."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def traces(folder: Path) -> dict[str, Any]:
    """Return everything of a finished run that interruptions must not change."""
    from reslab.training.checkpoint import read_checkpoint, weights_sha256

    record = manifest(folder)
    best = read_checkpoint(folder / "checkpoints/best.ckpt")["state_dict"]
    recorded = {name: record[name] for name in ("status", "weights_sha256", "results")}
    return {**recorded, "metrics": metrics(folder), "best": weights_sha256(best)}


if __name__ == "__main__":
    word, *rest = sys.argv[1:]
    target, act, call, rank = word.split() if word != "-" else ("", "", "0", "0")
    _main(rest, Fault(target, act, int(call), int(rank)) if target else None)
