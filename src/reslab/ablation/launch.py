"""Runs the cells of a study: each a fresh `reslab fit` process, as many at a time as there is room for."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import yaml

from reslab.ablation.board import StudyProgress
from reslab.ablation.cells import ARM, Cell, State, read_config, state, states, write_plan
from reslab.ablation.resolve import Loader
from reslab.ablation.study import Study
from reslab.errors import Exit, UserError
from reslab.files import write_text
from reslab.host import STOP_SIGNALS, available_cores
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder

POLL = 0.1  # seconds
PR_SET_PDEATHSIG = 1  # of prctl(2)
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class LocalResources:
    """How the cells are spread over this machine.

    Args:
        jobs: Cells at a time; by default as many as the GPUs hold, one without a GPU.
        jobs_per_gpu: Cells that share a GPU.
    """

    jobs: int | None = None
    jobs_per_gpu: int = 1

    def slots(self, study: Study) -> list[dict[str, str]]:
        """The environment of each job: its share of the GPUs and of the CPU's threads."""
        trainer = study.arms[study.baseline].config.get("trainer", {})
        devices = trainer.get("devices")
        each = devices if isinstance(devices, int) and devices > 0 else 1
        gpus = [] if trainer.get("accelerator") == "cpu" else visible_gpus()
        sets = [",".join(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)] * self.jobs_per_gpu
        jobs = self.jobs or len(sets) or 1
        if gpus and jobs > len(sets):
            raise UserError(
                f"--jobs {jobs}: {len(gpus)} GPUs hold {len(sets)} cells of {each} at a time; "
                "to let several share a GPU, give --jobs-per-gpu"
            )
        threads = max(1, available_cores() // (jobs * each))
        shared = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
        return [{**shared, **({"CUDA_VISIBLE_DEVICES": sets[i]} if gpus else {})} for i in range(jobs)]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; asked of the driver, not of torch."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in named.split(",") if gpu.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i, line in enumerate(line for line in listed.split("\n") if line.startswith("GPU "))]


# Before anything runs


def prepare(study: Study, out: Path) -> list[State]:
    """Checks every arm against the typed config, writes plan and arms, and returns the states of all cells.

    Raises:
        UserError: naming the arm and the key that is wrong, or the cell whose folder holds another run.
    """
    configs = typed_configs(study)
    found = states(study, out, {arm: yaml.load(text, Loader) for arm, text in configs.items()})
    if mismatched := [s for s in found if s.status == "mismatched"]:
        rows = "\n".join(f"  {s.cell.name}: {s.detail}" for s in mismatched)
        raise UserError(f"{out} holds runs that are not this plan's: move them away, or give another --out\n{rows}")
    for arm, text in configs.items():
        (out / arm).mkdir(exist_ok=True)
        write_text(out / arm / ARM, text)
    write_plan(study, out)
    return found


def typed_configs(study: Study) -> dict[str, str]:
    """The whole resolved config of every arm, as `reslab fit` means it: every value checked, every class built."""
    from reslab.config import Experiment

    configs: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for arm in study.arms.values():
            file = Path(scratch, ARM)
            file.write_text(yaml.safe_dump(arm.config, sort_keys=False), encoding="utf-8")
            try:
                experiment = Experiment(["--config", str(file)])
                experiment.build()
            except UserError as error:
                message = "\n".join(line for line in str(error).split("\n") if scratch not in line)
                raise UserError(f"{study.path}: arm {arm.name}: {message}") from error
            text = experiment.dump()
            if same := [other for other, there in configs.items() if _plain(there) == _plain(text)]:
                raise UserError(f"{study.path}: arm {arm.name} is the same as {same[0]}: it changes nothing")
            configs[arm.name] = text
    return configs


def _plain(text: str) -> str:
    """The config without the arm's name."""
    config = yaml.load(text, Loader)
    config["run"].update(name=None, job_type=None)
    return yaml.safe_dump(config)


def command(cell: Cell) -> list[str]:
    """The command line that runs a cell, or goes on with it."""
    what = ["--config", str(cell.config), "--seed_everything", str(cell.seed), "--run.dir", str(cell.folder)]
    return [sys.executable, "-m", "reslab", "fit", *what, "--run.tags", f"[seed {cell.seed}]"]


# Running


def run_local(study: Study, out: Path, room: LocalResources, retries: int = 1) -> int:
    """Runs what is still to run of a study on this machine.

    Args:
        study: The study.
        out: Its folder.
        room: How many cells at a time, and on what.
        retries: How often a cell that failed is tried again.

    Returns:
        0 if every cell is complete, 1 if not, 75 if it was interrupted: run it again to go on.
    """
    folder = RunFolder(out)
    slots = room.slots(study)
    folder.probe()
    with folder.lock(), StudyProgress(study, prepare(study, out), len(slots)) as board:
        pool = Pool(board, slots, retries)
        with pool.listening():
            pool.run()
    return pool.status()


class Pool:
    """The cells that wait and those that run.

    Args:
        board: Shows them, and knows their states.
        slots: The environment of each job at a time.
        retries: How often a cell that failed is tried again.
    """

    def __init__(self, board: StudyProgress, slots: list[dict[str, str]], retries: int) -> None:
        self.board, self.free, self.retries = board, list(slots), retries
        self.waiting = [cell for cell, s in board.states.items() if s.status not in ("complete", "unreadable")]
        self.running: dict[Cell, tuple[subprocess.Popen[bytes], dict[str, str]]] = {}
        self.tries: Counter[Cell] = Counter()
        self.stopped: int | None = None  # the signal

    def run(self) -> None:
        """Until no cell waits or runs, or, once told to stop, until those that run have saved and ended."""
        try:
            while self.running or (self.waiting and self.stopped is None):
                self._start()
                self._reap()
                self.board.refresh()
                time.sleep(POLL)
        finally:  # nothing is left behind when this process fails itself
            self._pass_on(signal.SIGTERM)

    def status(self) -> int:
        if all(s.status == "complete" for s in self.board.states.values()):
            return Exit.OK
        return Exit.PREEMPTED if self.stopped is not None else Exit.FAILED

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """A signal to this process is one to the cells that run: they save and end; no other is started."""
        before = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = number
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        for process, _ in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _start(self) -> None:
        # A cell of an earlier `ablate run` that was killed may still be running on its own: it is waited for.
        ready = [cell for cell in self.waiting if not RunFolder(cell.folder).busy()] if self.free else []
        for cell in ready[: len(self.free)]:
            if self.stopped is not None:
                return
            self.waiting.remove(cell)
            slot = self.free.pop(0)
            self.running[cell] = start(cell, slot), slot
            self.tries[cell] += 1
            self.board.started(cell, f" (try {self.tries[cell]})" if self.tries[cell] > 1 else "")

    def _reap(self) -> None:
        for cell, (process, slot) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[cell]
            self.free.append(slot)
            found = state(self.board.study, cell, read_config(cell.config))
            again = self._worth_another(found, process.returncode)
            self.board.ended(found, "; will be tried again" if again else "")
            if again:
                self.waiting.append(cell)

    def _worth_another(self, found: State, status: int) -> bool:
        # Wrong usage and divergence would only come again.
        over = status in (Exit.OK, Exit.USAGE) or found.status in ("complete", "diverged", "unreadable")
        return not over and self.stopped is None and self.tries[found.cell] <= self.retries


def start(cell: Cell, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts a cell in a session of its own: a signal reaches it once, through this process, and it dies with it."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with cell.log.open("ab") as log:
        return subprocess.Popen(
            command(cell),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment, **threads_so_far(cell)},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


def threads_so_far(cell: Cell) -> dict[str, str]:
    """An unfinished cell goes on with the threads it began with: on a CPU their number changes bits."""
    with contextlib.suppress(UserError, KeyError, TypeError):
        environment = manifests.read(RunFolder(cell.folder).manifest)["environment"]
        if not environment["gpus"]:
            return {"OMP_NUM_THREADS": str(environment["threads"])}
    return {}


def _die_with_parent() -> None:
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
