"""Run the cells of a study on this machine: each is a `reslab fit` process, several at once if resources allow."""

import contextlib
import ctypes
import difflib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import yaml

from reslab.ablation.cells import ARM, Cell, State, cells, states
from reslab.ablation.forkserver import ForkedProcess, ForkServer, is_supported
from reslab.ablation.plan_log import append_plan
from reslab.ablation.progress import StudyProgress
from reslab.ablation.study import Study
from reslab.errors import Exit, UserError
from reslab.files import write_text
from reslab.host import STOP_SIGNALS, available_cores
from reslab.resolve import Config, Loader
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder

if TYPE_CHECKING:
    from reslab.data import ImageData
    from reslab.data.identity import DataIdentity

Process = subprocess.Popen[bytes] | ForkedProcess
POLL = 0.1  # seconds
PR_SET_PDEATHSIG = 1  # of prctl(2)
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class LocalResources:
    """How the cells share this machine."""

    jobs: int | None = None  # concurrent runs; default: as many as the GPUs hold, 1 on CPU
    jobs_per_gpu: int = 1  # runs that share a GPU
    fresh_processes: bool = False  # each cell imports everything, instead of forking from a process that has

    def slots(self, config: Config) -> list[dict[str, str]]:
        """Return the environment variables of each concurrent run of a config: its share of GPUs and CPU threads."""
        trainer = config.get("trainer", {})
        devices = trainer.get("devices")
        each = devices if isinstance(devices, int) and devices > 0 else 1
        gpus = [] if trainer.get("accelerator") == "cpu" else visible_gpus()
        sets = [",".join(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)] * self.jobs_per_gpu
        jobs = self.jobs or len(sets) or 1
        if gpus and jobs > len(sets):
            limit = f"{len(gpus)} GPUs hold {len(sets)} concurrent runs of {each}"
            raise UserError(f"--jobs {jobs}: {limit}; use --jobs-per-gpu to let several runs share a GPU")
        threads = max(1, available_cores() // (jobs * each))
        shared = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
        return [{**shared, **({"CUDA_VISIBLE_DEVICES": sets[i]} if gpus else {})} for i in range(jobs)]

    def server(self, environment: Mapping[str, str]) -> ForkServer | None:
        """Return a server to fork cells from, which imports in the background; None where each needs a new Python."""
        return None if self.fresh_processes or not is_supported() else ForkServer(environment)


def visible_gpus() -> list[str]:
    """Return the GPUs this process may use, as in CUDA_VISIBLE_DEVICES; asks the driver, without importing torch."""
    if (devices := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in devices.split(",") if gpu.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i, line in enumerate(line for line in listing.split("\n") if line.startswith("GPU "))]


def prepare(study: Study, out: Path) -> list[State]:
    """Check every arm against the typed config, write plan and arms, and return the states of all cells.

    Raise UserError if an arm is invalid, or a cell's directory holds another run.
    """
    identities: dict[str, DataIdentity] = {}
    configs = typed_configs(study, identities, runs_of_automatic_precision(study, out))
    data = {arm: dict(identity.hashes) for arm, identity in identities.items()}
    current = states(study, out, {arm: yaml.load(text, Loader) for arm, text in configs.items()}, data)
    if mismatched := [s for s in current if s.status == "mismatched"]:
        rows = [f"  {s.cell.name}: {s.detail}{_data_changes(s, identities)}" for s in mismatched]
        message = f"{out} holds runs that do not match the plan: move them away, or use another --out"
        raise UserError("\n".join([message, *rows]))
    for arm, text in configs.items():
        (out / arm).mkdir(exist_ok=True)
        write_text(out / arm / ARM, text)
    append_plan(study, out, data)
    return current


def runs_of_automatic_precision(study: Study, out: Path) -> list[RunFolder]:
    """Return the directories of all runs in `out` whose precision is chosen by the machine."""
    automatic = [name for name, arm in study.arms.items() if arm.config.get("trainer", {}).get("precision") == "auto"]
    return [RunFolder(cell.folder) for cell in cells(study, out) if cell.arm in automatic]


def _data_changes(state: State, identities: "Mapping[str, DataIdentity]") -> str:
    identity = identities.get(state.cell.arm)
    recorded = state.manifest.get("data")
    changes = identity.changes(recorded, RunFolder(state.cell.folder).data) if identity and recorded else []
    return f": {'; '.join(changes)}" if changes else ""


def typed_configs(
    study: Study, identities: "dict[str, DataIdentity] | None" = None, earlier: Sequence[RunFolder] = ()
) -> dict[str, str]:
    """Return the resolved config of every arm as YAML, after checking every value and building every class.

    If the study is about to run, pass a dictionary: the identity of each arm's data is put into it, as far as the data
    are on this machine, and every arm's network, optimizer and objective are tried. An automatic precision is that of
    the `earlier` runs, if there are any: all arms have the same, whatever machine a run is on.
    """
    from reslab.config import Experiment
    from reslab.training.rehearsal import check_model

    configs: dict[str, str] = {}
    loaded: dict[str, DataIdentity | None] = {}  # by the config of the data
    with tempfile.TemporaryDirectory() as scratch:
        for arm in study.arms.values():
            file = Path(scratch, ARM)
            file.write_text(yaml.safe_dump(arm.config, sort_keys=False), encoding="utf-8")
            try:
                experiment = Experiment(["--config", str(file)])
                for folder in earlier:
                    experiment.keep_precision(folder)
                data, model, _ = experiment.build()
                if study.metric not in model.metric_names:
                    near = difflib.get_close_matches(study.metric, model.metric_names, 3, 0.4) or model.metric_names
                    raise UserError(f"metric {study.metric!r} is not logged; nearest: {', '.join(near)}")
                if study.metric.startswith("val/") and (obstacle := experiment.no_validation(data)):
                    raise UserError(f"metric {study.metric} requires validation: {obstacle}")
                if identities is not None:
                    model.objective.prepare(model.net)
                    check_model(model, data)
                    key = str(experiment.config.data)
                    loaded[key] = loaded.get(key) or _identity(data)
                    identities |= {arm.name: identity} if (identity := loaded[key]) else {}
            except UserError as error:
                message = "\n".join(line for line in str(error).split("\n") if scratch not in line)
                raise UserError(f"{study.path}: arm {arm.name}: {message}") from error
            configs[arm.name] = experiment.dump()
    return configs


def _identity(data: "ImageData") -> "DataIdentity | None":
    """Return the identity of an arm's data; None if only the cluster has them, where the cells check them."""
    from reslab.data.files import DataError

    with contextlib.suppress(DataError):
        data.prepare_data()
        return data.identity()
    return None


def command(cell: Cell) -> list[str]:
    """Return the command line that runs or resumes a cell."""
    options = ["--config", str(cell.config), "--seed_everything", str(cell.seed), "--run.dir", str(cell.folder)]
    options += [] if cell.fold is None else ["--data.fold", str(cell.fold)]
    return [sys.executable, "-m", "reslab", "fit", *options, "--run.tags", f"[seed {cell.seed}]"]


def run_local(study: Study, out: Path, resources: LocalResources, retries: int = 1) -> int:
    """Run the unfinished cells of a study on this machine.

    Args:
        study, out: The study and its directory.
        resources: How many cells run at once, and on what.
        retries: How often a failed cell is retried; wrong usage and divergence would happen again.

    Returns:
        Exit status: 0 if every cell is complete, 1 if not, 75 if it was interrupted and can be resumed.
    """
    folder = RunFolder(out)
    slots = resources.slots(study.arms[study.baseline].config)
    folder.probe()
    with folder.lock():
        server = resources.server(slots[0])
        with StudyProgress(study, prepare(study, out), retries, len(slots)) as progress:
            pool = Pool(progress, slots, server)
            pool.run()
    status = progress.exit_status()
    return Exit.PREEMPTED if status and pool.stopped else status


class Pool:
    """Waiting and running cells.

    Args:
        progress: The cells of the study, and how they ended.
        slots: Environment variables of each concurrent run.
        server: To fork cells from; None: each is a new Python.
    """

    def __init__(self, progress: StudyProgress, slots: list[dict[str, str]], server: ForkServer | None = None) -> None:
        self.progress, self.free, self.server = progress, list(slots), server
        self.waiting = progress.to_run() or progress.next_cells()
        self.running: dict[Cell, tuple[Process, dict[str, str]]] = {}
        self.stopped = False

    def run(self) -> None:
        """Run until no cell is left; after a stop signal, until the running cells, which get it too, have exited."""
        before = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        try:
            while self.running or (self.waiting and not self.stopped):
                self._start()
                self._reap()
                if self.free and not (self.waiting or self.stopped):
                    self.waiting = self.progress.next_cells()
                self.progress.refresh()
                time.sleep(POLL)
        finally:  # leave no processes behind if this one fails
            self._signal(signal.SIGTERM)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped and number == signal.SIGINT:  # second Ctrl-C
            for process, _ in self.running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        self.stopped = True
        self._signal(number)

    def _signal(self, number: int) -> None:
        for process, _ in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _start(self) -> None:
        # A cell of an earlier, killed `ablate run` may still be running: wait for it.
        ready = [cell for cell in self.waiting if not RunFolder(cell.folder).busy()] if self.free else []
        for cell in ready[: len(self.free)]:
            if self.stopped:
                return
            self.waiting.remove(cell)
            slot = self.free.pop(0)
            server = self.server if self._can_fork(cell) else None
            self.running[cell] = (process := start(cell, slot, server)), slot
            self.progress.started(cell)
            if self.stopped:  # perhaps before `process` was among those to signal
                process.terminate()

    def _can_fork(self, cell: Cell) -> bool:
        """Whether a fork of the server runs the cell as a new process would: same code, and it starts no other rank."""
        trainer = self.progress.study.arms[cell.arm].config.get("trainer", {})
        one_process = trainer.get("devices") in (None, 1, "1", "auto") and trainer.get("num_nodes") in (None, 1)
        return self.server is not None and one_process and self.server.is_current()

    def _reap(self) -> None:
        for cell, (process, slot) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[cell]
                self.free.append(slot)
                may_retry = not self.stopped and process.returncode not in (Exit.OK, Exit.USAGE)
                if self.progress.ended(cell, may_retry, interrupted=self.stopped):
                    self.waiting.append(cell)


def start(cell: Cell, environment: Mapping[str, str], server: ForkServer | None = None) -> Process:
    """Start a cell in its own session: signals reach it only through this process, and it dies with this process.

    Args:
        cell: The cell.
        environment: Added to the environment.
        server: Fork the cell from it; None: start a new Python.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    environment = {**environment, **previous_threads(cell)}
    if server:
        return server.start(command(cell)[3:], cell.log, environment)
    with cell.log.open("ab") as log:
        return subprocess.Popen(
            command(cell),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=lambda: _libc and _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )


def previous_threads(cell: Cell) -> dict[str, str]:
    """Return the thread count with which an unfinished CPU cell began: another count would change bits."""
    with contextlib.suppress(UserError, KeyError, TypeError):
        environment = manifests.read(RunFolder(cell.folder).manifest)["environment"]
        if not environment["gpus"]:
            return {"OMP_NUM_THREADS": str(environment["threads"])}
    return {}
