"""Run the cells of a study on a Slurm cluster, as job arrays submitted through submitit.

A job's process replaces itself with the cell's `reslab fit`, so that Slurm's signals reach the run: it writes a
checkpoint, requeues its job, and resumes when the job runs again. The submitting process may exit; as long as it runs,
it reports progress and retries failed cells.
"""

import json
import os
import secrets
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from reslab.ablation import launch
from reslab.ablation.cells import Cell
from reslab.ablation.progress import StudyProgress
from reslab.ablation.study import Study
from reslab.ablation.wording import count
from reslab.errors import Exit, UserError
from reslab.files import write_text
from reslab.resolve import read_mapping
from reslab.runs.folder import RunFolder

POLL = 5.0  # seconds between calls of squeue, which loads the controller of the whole cluster
NOTICE = 90  # seconds between Slurm's signal and the time limit
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)


@dataclass(frozen=True)
class Cluster:
    """Resources that the job of a cell requests; nodes and tasks follow the cell's trainer.num_nodes and devices."""

    partition: str | None = None
    minutes: int = 240  # time limit; a cell that takes longer is requeued and resumed
    gpus: int | None = None  # per node; default: trainer.devices if the accelerator is a GPU, else none
    cpus: int = 1  # per process, for its threads and loader workers
    memory: int | None = None  # GB per node
    sbatch: dict[str, Any] = field(default_factory=dict)  # others, such as {"account": "vision", "exclusive": true}

    def __post_init__(self) -> None:
        if self.minutes < 5:
            raise UserError(f"minutes must be at least 5, got {self.minutes}: a job saves {NOTICE} s before its end")

    @classmethod
    def read(cls, file: str | None, **flags: Any) -> "Cluster":
        """Read a YAML file with these names as keys, overridden by flags; raise UserError for any other key."""
        options = read_mapping(Path(file)) if file else {}
        if unknown := set(options) - (names := {f.name for f in fields(cls)}):
            raise UserError(f"{file}: no such key {min(unknown)!r}; keys: {', '.join(sorted(names))}")
        flags = {key: value for key, value in flags.items() if value is not None}
        return cls(**{**options, **flags, "sbatch": {**options.get("sbatch", {}), **flags.get("sbatch", {})}})

    def parameters(self, trainer: Mapping[str, Any]) -> dict[str, Any]:
        """Return submitit's parameters for a cell whose config has this trainer."""
        devices = trainer.get("devices", 1)
        if not isinstance(devices, int) or devices < 1:  # a list, or "auto"
            devices = len(devices) if isinstance(devices, list) else self.gpus or 1
        on_gpu = trainer.get("accelerator") in ("gpu", "cuda")
        return {
            "partition": self.partition,
            "time": self.minutes,
            "nodes": trainer.get("num_nodes") or 1,
            "ntasks_per_node": devices,
            "gpus_per_node": self.gpus or (devices if on_gpu else None),
            "cpus_per_task": self.cpus,
            "mem": self.memory and f"{self.memory}GB",
            "signal_delay_s": NOTICE,
            "stderr_to_stdout": True,
            # Since 22.05, srun does not inherit --cpus-per-task from sbatch. If a process fails, kill the others.
            "srun_args": [f"--cpus-per-task={self.cpus}", "--kill-on-bad-exit=1"],
            "additional_parameters": {"requeue": True, **self.sbatch},
        }


class SlurmError(UserError):
    """Slurm is not installed, does not respond, or rejects a job."""


class Job(NamedTuple):
    """A cell's job."""

    number: str  # for scancel
    state: str  # in Slurm's terms


def exec_into(command: list[str], log: str, environment: Mapping[str, str]) -> None:
    """Replace this process with another program that prints to a log file."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.execve(command[0], command, {**os.environ, **environment})


def jobs(out: Path) -> dict[str, Job]:
    """Return the newest job of each cell by cell name, as far as Slurm remembers."""
    squeue = ["squeue", "--me", "--array", "--states=all", "--noheader", "--sort=i", "--format=%j|%i|%K|%T"]
    try:
        listing = subprocess.run(squeue, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise SlurmError("Slurm is not installed: squeue is not in PATH") from error
    except subprocess.CalledProcessError as error:
        raise SlurmError(f"Slurm does not respond: {error.stderr.strip()}") from error
    submitted = {file.stem: json.loads(file.read_text()) for file in (out / "slurm").glob("*.json")}
    newest: dict[str, Job] = {}
    for name, number, index, job_state in (line.split("|") for line in listing.splitlines()):
        if name in submitted:
            cell = submitted[name][int(index) if index.isdigit() else 0]  # a single job has no index
            if cell not in newest or job_state not in ENDED or newest[cell].state in ENDED:
                newest[cell] = Job(number, job_state)
    return newest


def run_slurm(
    study: Study, out: Path, cluster: Cluster, limit: int | None = None, retries: int = 1, detach: bool = False
) -> int:
    """Submit the unfinished cells of a study, and wait for them.

    Args:
        study, out: The study and its directory, on a file system shared by all nodes.
        cluster: Resources of each job.
        limit: How many cells of a job array may run at once; default: all.
        retries: How often a failed cell is submitted again while this process waits.
        detach: Return after submitting.

    Returns:
        Exit status: 0 if every cell is complete (or `detach` is set), 1 if not, 75 if the wait was interrupted.
    """
    _check_precision(study, cluster)
    folder = RunFolder(out)
    folder.probe()
    with folder.lock(), StudyProgress(study, launch.prepare(study, out), retries) as progress:
        queue = Queue(progress, out, cluster, limit)
        status = Exit.OK
        try:
            queue.fill()
            if not detach:
                queue.wait()
                return progress.exit_status()
            if study.looks:
                print("When they have ended, run the same command again: it judges them and submits the next look.")
        except KeyboardInterrupt:
            status = Exit.PREEMPTED
    numbers = {job.number.partition("_")[0] for job in jobs(out).values() if job.state not in ENDED}
    cancel = f"To cancel them: scancel {' '.join(sorted(numbers))}"
    print(f"The jobs keep running. To wait for them: the same command without --detach. {cancel}", flush=True)
    return status


def _check_precision(study: Study, cluster: Cluster) -> None:
    """Refuse an automatic precision for jobs on GPUs if this machine, which has to choose it, has none."""
    trainers = [arm.config.get("trainer", {}) for arm in study.arms.values()]
    automatic = [t for t in trainers if t.get("precision") == "auto" and cluster.parameters(t)["gpus_per_node"]]
    if automatic and not launch.visible_gpus():
        raise UserError(
            f"{study.path}: trainer.precision auto is chosen on the machine that submits the jobs, which has no GPU: "
            "add --precision bf16-mixed, or 32-true"
        )


class Queue:
    """Unfinished cells and their jobs; arguments as for `run_slurm`."""

    def __init__(self, progress: StudyProgress, out: Path, cluster: Cluster, limit: int | None) -> None:
        self.progress, self.out, self.cluster, self.limit = progress, out, cluster, limit
        self.todo = progress.to_run()

    def fill(self) -> None:
        """Submit the cells that have no job yet, from this process or an earlier one."""
        known = jobs(self.out)
        new = [cell for cell in self.todo if cell.name not in known or known[cell.name].state in ENDED]
        if new == self.todo:  # no job is left: what the last look decided may not be logged yet
            self.progress.next_look()
        self._submit(new)
        others = len(self.todo) - len(new)
        print(f"submitted to Slurm: {count(len(new), 'cell')}; {others} already submitted", flush=True)

    def wait(self) -> None:
        """Wait until no cell has a job."""
        while self.todo:
            try:
                known = jobs(self.out)
            except SlurmError:
                pass  # controllers are sometimes unresponsive for a while
            else:
                self._update(known)
            if not self.todo and (next_look := self.progress.next_look()):
                self._submit(next_look)
                self.todo = next_look
            self.progress.refresh()
            time.sleep(POLL)

    def _update(self, known: Mapping[str, Job]) -> None:
        again = []
        for cell in list(self.todo):
            job = known.get(cell.name)
            if job is None or job.state in ENDED:
                self.todo.remove(cell)
                # Slurm forgets an array task that is cancelled before it starts.
                cancelled = job is None or job.state == "CANCELLED"
                how = f"job {job.number}: {job.state.lower()}" if job else "its job is gone"
                if self.progress.ended(cell, not cancelled, f" ({how})"):
                    again.append(cell)
            elif job.state == "PENDING":  # not started yet, or requeued
                self.progress.running.pop(cell, None)
            elif cell not in self.progress.running:
                self.progress.started(cell, f" as job {job.number}")
        self._submit(again)
        self.todo += again

    def _submit(self, cells: list[Cell]) -> None:
        """Submit cells as a job array, or as several if they need different numbers of nodes or tasks."""
        arrays: dict[str, list[Cell]] = {}
        limit = {"array_parallelism": self.limit} if self.limit else {}
        for cell in cells:
            trainer = self.progress.study.arms[cell.arm].config.get("trainer", {})
            arrays.setdefault(json.dumps(self.cluster.parameters(trainer) | limit), []).append(cell)
        for parameters, of_array in arrays.items():
            name = f"{self.progress.study.name}.{secrets.token_hex(3)}"
            _submit_array(name, self.out / "slurm", of_array, json.loads(parameters), self.cluster.cpus)


def _submit_array(name: str, folder: Path, cells: list[Cell], parameters: dict[str, Any], cpus: int) -> None:
    try:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ImportError as error:
        raise SlurmError("--launcher slurm requires submitit: pip install 'reslab[slurm]'") from error
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(cpus)}
    environments = [{**threads, **launch.previous_threads(cell)} for cell in cells]
    folder.mkdir(exist_ok=True)
    # Written before the jobs, which are found by their name: if this process dies, none is submitted twice.
    write_text(folder / f"{name}.json", json.dumps([cell.name for cell in cells]))
    try:
        executor = submitit.SlurmExecutor(folder / name)
        executor.update_parameters(job_name=name, **parameters)
        executor.map_array(exec_into, map(launch.command, cells), [str(cell.log) for cell in cells], environments)
    except (FailedJobError, FailedSubmissionError, RuntimeError) as error:
        raise SlurmError(f"Slurm rejected the jobs: {error}") from error
