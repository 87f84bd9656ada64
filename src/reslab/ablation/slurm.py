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
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from reslab.ablation import launch
from reslab.ablation.cells import FINAL, Cell, read_config, state
from reslab.ablation.progress import StudyProgress
from reslab.ablation.resolve import read_mapping
from reslab.ablation.study import Study
from reslab.errors import Exit, UserError
from reslab.files import write_text
from reslab.runs.folder import RunFolder

POLL = 5.0  # seconds between calls of squeue, which loads the controller of the whole cluster
NOTICE = 90  # seconds between Slurm's signal and the time limit
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)


@dataclass(frozen=True)
class Cluster:
    """Resources that the job of a cell requests; nodes and tasks follow the cell's trainer.num_nodes and devices.

    Args:
        partition: Default: Slurm's.
        minutes: Time limit; a cell that takes longer is requeued and resumed.
        gpus: GPUs per node; default: trainer.devices if the accelerator is a GPU, else none.
        cpus: CPUs per process, for its threads and loader workers.
        memory: GB per node; default: Slurm's.
        sbatch: Other options of sbatch, such as {"account": "vision", "exclusive": true}.
    """

    partition: str | None = None
    minutes: int = 240
    gpus: int | None = None
    cpus: int = 1
    memory: int | None = None
    sbatch: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.minutes < 5:
            raise UserError(
                f"Slurm: minutes must be at least 5, got {self.minutes}: a job saves {NOTICE} s before its end"
            )

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
    """A cell's job: its number for scancel, and its state in Slurm's terms."""

    number: str
    state: str


def exec_into(command: list[str], log: str, environment: Mapping[str, str]) -> None:
    """Replace this process with another program that prints to a log file."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.execve(command[0], command, {**os.environ, **environment})


def submit(study: Study, out: Path, todo: Iterable[Cell], cluster: Cluster, limit: int | None = None) -> None:
    """Submit cells as a job array, or as several if they need different numbers of nodes or tasks.

    Args:
        study: The study.
        out: Study directory.
        todo: The cells.
        cluster, limit: See `run_slurm`.

    Raises:
        SlurmError: Slurm or submitit is not installed, or a job is rejected.
    """
    arrays: dict[str, tuple[dict[str, Any], list[Cell]]] = {}
    for cell in todo:
        parameters = cluster.parameters(study.arms[cell.arm].config.get("trainer", {}))
        arrays.setdefault(json.dumps(parameters), (parameters, []))[1].append(cell)
    for parameters, cells in arrays.values():
        if limit:
            parameters["array_parallelism"] = limit
        _submit_array(f"{study.name}.{secrets.token_hex(3)}", out / "slurm", cells, parameters, cluster.cpus)


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


def jobs(out: Path) -> dict[str, Job]:
    """Return the newest job of each cell by cell name, as far as Slurm remembers.

    Raises:
        SlurmError: Slurm is not installed or does not respond.
    """
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
        study: The study.
        out: Study directory, on a file system shared by all nodes.
        cluster: Resources of each job.
        limit: How many cells of an array may run at once; default: all.
        retries: How often a failed cell is submitted again while this process waits.
        detach: Return after submitting.

    Returns:
        Exit status: 0 if every cell is complete (or `detach` is set), 1 if not, 75 if the wait was interrupted.
    """
    folder = RunFolder(out)
    folder.probe()
    with folder.lock(), StudyProgress(study, launch.prepare(study, out)) as progress:
        queue = Queue(progress, out, cluster, limit, retries)
        status = Exit.OK
        try:
            queue.fill()
            if not detach:
                queue.wait()
                return progress.exit_status()
        except KeyboardInterrupt:
            status = Exit.PREEMPTED
    print(queue.detach_message(), flush=True)
    return status


class Queue:
    """Unfinished cells and their jobs; arguments as for `run_slurm`."""

    def __init__(self, progress: StudyProgress, out: Path, cluster: Cluster, limit: int | None, retries: int) -> None:
        self.progress, self.out, self.cluster, self.limit, self.retries = progress, out, cluster, limit, retries
        self.todo = progress.to_run()
        self.tries = Counter(self.todo)

    def fill(self) -> None:
        """Submit the cells that have no job yet, from this process or an earlier one."""
        known = jobs(self.out)
        new = [cell for cell in self.todo if cell.name not in known or known[cell.name].state in ENDED]
        submit(self.progress.study, self.out, new, self.cluster, self.limit)
        cells, others = f"{len(new)} cell{'s' * (len(new) != 1)}", len(self.todo) - len(new)
        print(f"submitted to Slurm: {cells}; {others} already submitted", flush=True)

    def wait(self) -> None:
        """Wait until no cell has a job."""
        while self.todo:
            try:
                known = jobs(self.out)
            except SlurmError:
                pass  # controllers are sometimes unresponsive for a while
            else:
                self._update(known)
            self.progress.refresh()
            time.sleep(POLL)

    def detach_message(self) -> str:
        """Return how to wait for the jobs, and how to cancel them."""
        alive = [job for job in jobs(self.out).values() if job.state not in ENDED]
        numbers = {job.number.partition("_")[0] for job in alive}
        cancel = f"To cancel them: scancel {' '.join(sorted(numbers))}"
        return f"The jobs keep running. To wait for them: the same command without --detach. {cancel}"

    def _update(self, known: Mapping[str, Job]) -> None:
        again = []
        for cell in list(self.todo):
            job = known.get(cell.name)
            if job is None or job.state in ENDED:
                self.todo.remove(cell)
                again += [cell] if self._ended(cell, job) else []
            elif job.state == "PENDING":  # not started yet, or requeued
                self.progress.running.pop(cell, None)
            elif cell not in self.progress.running:
                self.progress.started(cell, f" as job {job.number}")
        submit(self.progress.study, self.out, again, self.cluster, self.limit)
        self.tries.update(again)
        self.todo += again

    def _ended(self, cell: Cell, job: Job | None) -> bool:
        """Report how a cell ended; return whether to submit it again."""
        ended = state(self.progress.study, cell, read_config(cell.config))
        # Slurm forgets an array task that is cancelled before it starts.
        cancelled = job is None or job.state == "CANCELLED"
        final = cancelled or ended.status in (*FINAL, "diverged")
        retry = not final and self.tries[cell] <= self.retries
        how = f"job {job.number}: {job.state.lower()}" if job else "its job is gone"
        note = f" ({how})" if ended.status != "complete" else ""
        self.progress.ended(ended, note + ("; will be retried" if retry else ""))
        return retry
