"""Runs the cells of a study on a Slurm cluster, as arrays of jobs that are submitted through submitit.

A job's process turns into the cell's `reslab fit`, so that Slurm's signals reach the run itself: it writes a
checkpoint, puts its job back into the queue, and goes on when the job runs again. The process that submits is needed
no more; while it lives, it shows what goes on and tries failed cells again.
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
from reslab.ablation.board import StudyProgress
from reslab.ablation.cells import Cell, read_config, state
from reslab.ablation.resolve import read_mapping
from reslab.ablation.study import Study
from reslab.errors import Exit, UserError
from reslab.files import write_text
from reslab.runs.folder import RunFolder

POLL = 5.0  # seconds between two looks at the queue, which all users of the cluster share
NOTICE = 90  # seconds before a job's time is up that Slurm signals it
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)


@dataclass(frozen=True)
class Cluster:
    """What the job of a cell asks of Slurm; nodes and tasks follow the cell's trainer.num_nodes and devices.

    Args:
        partition: Slurm's own default if not given.
        minutes: The time limit; a cell that takes longer is requeued and goes on.
        gpus: GPUs a node; by default the devices where the accelerator is a GPU, else none.
        cpus: CPUs a process: its threads and its loaders.
        memory: GB a node; Slurm's own default if not given.
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
            raise UserError(f"Slurm: minutes {self.minutes}: a job is told to save {NOTICE} s before the end, give 5")

    @classmethod
    def read(cls, file: str | None, **flags: Any) -> "Cluster":
        """From a YAML file with these names as keys, flags over it; raises UserError for any other key."""
        asked = read_mapping(Path(file)) if file else {}
        if unknown := set(asked) - (names := {f.name for f in fields(cls)}):
            raise UserError(f"{file}: no such key {min(unknown)!r}; there are: {', '.join(sorted(names))}")
        given = {key: value for key, value in flags.items() if value is not None}
        return cls(**{**asked, **given, "sbatch": {**asked.get("sbatch", {}), **given.get("sbatch", {})}})

    def parameters(self, trainer: Mapping[str, Any]) -> dict[str, Any]:
        """submitit's, for a cell whose config has this trainer."""
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
            # srun takes no CPUs over from sbatch (since 22.05); when a process fails, the others do not wait for it.
            "srun_args": [f"--cpus-per-task={self.cpus}", "--kill-on-bad-exit=1"],
            "additional_parameters": {"requeue": True, **self.sbatch},
        }


class SlurmError(UserError):
    """Slurm is not there, does not answer, or does not take a job."""


class Job(NamedTuple):
    """A cell's job: its number as scancel takes it, and Slurm's word for its state."""

    number: str
    state: str


def exec_into(command: list[str], log: str, environment: Mapping[str, str]) -> None:
    """Turns this process into another program that prints into a log."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.execve(command[0], command, {**os.environ, **environment})


def submit(study: Study, out: Path, todo: Iterable[Cell], cluster: Cluster, at_a_time: int | None = None) -> None:
    """Submits cells as one array of jobs; as several, where they need different numbers of nodes or tasks.

    Args:
        study: The study.
        out: Its folder.
        todo: The cells.
        cluster: What their jobs ask for.
        at_a_time: How many of an array may run at a time.

    Raises:
        SlurmError: Slurm or submitit is not there, or the job is refused.
    """
    arrays: dict[str, tuple[dict[str, Any], list[Cell]]] = {}
    for cell in todo:
        asked = cluster.parameters(study.arms[cell.arm].config.get("trainer", {}))
        arrays.setdefault(json.dumps(asked), (asked, []))[1].append(cell)
    for asked, cells in arrays.values():
        if at_a_time:
            asked["array_parallelism"] = at_a_time
        _submit_array(f"{study.name}.{secrets.token_hex(3)}", out / "slurm", cells, asked, cluster.cpus)


def _submit_array(name: str, folder: Path, cells: list[Cell], asked: dict[str, Any], cpus: int) -> None:
    try:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ImportError as error:
        raise SlurmError("--launcher slurm needs submitit: pip install 'reslab[slurm]'") from error
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(cpus)}
    environments = [{**threads, **launch.threads_so_far(cell)} for cell in cells]
    folder.mkdir(exist_ok=True)
    # Before the jobs, which are known by their name: whenever this process dies, none is submitted twice.
    write_text(folder / f"{name}.json", json.dumps([cell.name for cell in cells]))
    try:
        executor = submitit.SlurmExecutor(folder / name)
        executor.update_parameters(job_name=name, **asked)
        executor.map_array(exec_into, map(launch.command, cells), [str(cell.log) for cell in cells], environments)
    except (FailedJobError, FailedSubmissionError, RuntimeError) as error:
        raise SlurmError(f"Slurm does not take the jobs: {error}") from error


def jobs(out: Path) -> dict[str, Job]:
    """The newest job of each cell by the cell's name, as far as Slurm remembers; raises SlurmError if it is mute."""
    question = ["squeue", "--me", "--array", "--states=all", "--noheader", "--sort=i", "--format=%j|%i|%K|%T"]
    try:
        answer = subprocess.run(question, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise SlurmError("there is no Slurm here: squeue is not in PATH") from error
    except subprocess.CalledProcessError as error:
        raise SlurmError(f"Slurm does not answer: {error.stderr.strip()}") from error
    submitted = {file.stem: json.loads(file.read_text()) for file in (out / "slurm").glob("*.json")}
    found: dict[str, Job] = {}
    for name, number, index, word in (line.split("|") for line in answer.splitlines()):
        if name in submitted:
            cell = submitted[name][int(index) if index.isdigit() else 0]  # one alone is no array
            if cell not in found or word not in ENDED or found[cell].state in ENDED:
                found[cell] = Job(number, word)
    return found


def run_slurm(
    study: Study, out: Path, cluster: Cluster, at_a_time: int | None = None, retries: int = 1, detach: bool = False
) -> int:
    """Submits what is still to run of a study, and waits for it.

    Args:
        study: The study.
        out: Its folder, on a disk that all nodes see.
        cluster: What a cell's job asks for.
        at_a_time: How many cells of an array may run at a time; all by default.
        retries: How often a cell that failed is submitted again, while this process waits.
        detach: Do not wait.

    Returns:
        0 if every cell is complete (or was left to its job by `detach`), 1 if not, 75 if the waiting was interrupted.
    """
    folder = RunFolder(out)
    folder.probe()
    with folder.lock(), StudyProgress(study, launch.prepare(study, out)) as board:
        queue = Queue(board, out, cluster, at_a_time, retries)
        status = Exit.OK
        try:
            queue.fill()
            if not detach:
                queue.wait()
                return queue.status()
        except KeyboardInterrupt:
            status = Exit.PREEMPTED
    print(queue.detach_message(), flush=True)
    return status


class Queue:
    """The cells of a study that are not finished, and their jobs.

    Args:
        board: Shows the cells, and knows their states.
        out: The study's folder.
        cluster: What a cell's job asks for.
        at_a_time: How many cells of an array may run at a time.
        retries: How often a cell that failed is submitted again.
    """

    def __init__(self, board: StudyProgress, out: Path, cluster: Cluster, at_a_time: int | None, retries: int) -> None:
        self.board, self.out, self.cluster, self.at_a_time, self.retries = board, out, cluster, at_a_time, retries
        self.todo = [cell for cell, s in board.states.items() if s.status not in ("complete", "unreadable")]
        self.tries = Counter(self.todo)

    def fill(self) -> None:
        """Submits the cells that have no job, of this process or of one before."""
        known = jobs(self.out)
        new = [cell for cell in self.todo if cell.name not in known or known[cell.name].state in ENDED]
        submit(self.board.study, self.out, new, self.cluster, self.at_a_time)
        print(f"submitted to Slurm: {len(new)} cells; {len(self.todo) - len(new)} have a job already", flush=True)

    def wait(self) -> None:
        """Until no cell has a job."""
        while self.todo:
            try:
                known = jobs(self.out)
            except SlurmError:
                pass  # mute for a while, as controllers are
            else:
                self._look(known)
            self.board.refresh()
            time.sleep(POLL)

    def status(self) -> int:
        complete = all(s.status == "complete" for s in self.board.states.values())
        return Exit.OK if complete else Exit.FAILED

    def detach_message(self) -> str:
        """How to come back to the jobs, and how to be rid of them."""
        alive = [job for job in jobs(self.out).values() if job.state not in ENDED]
        numbers = {job.number.partition("_")[0] for job in alive}
        cancel = f"To cancel them: scancel {' '.join(sorted(numbers))}"
        return f"The jobs go on. To wait for them: the same command without --detach. {cancel}"

    def _look(self, known: Mapping[str, Job]) -> None:
        again = []
        for cell in list(self.todo):
            job = known.get(cell.name)
            if job is None or job.state in ENDED:
                self.todo.remove(cell)
                again += [cell] if self._worth_another(cell, job) else []
            elif job.state == "PENDING":  # as at first, or requeued
                self.board.running.pop(cell, None)
            elif cell not in self.board.running:
                self.board.started(cell, f" as job {job.number}")
        submit(self.board.study, self.out, again, self.cluster, self.at_a_time)
        self.tries.update(again)
        self.todo += again

    def _worth_another(self, cell: Cell, job: Job | None) -> bool:
        """Whether a cell without a job has to be submitted again; shows how it ended."""
        found = state(self.board.study, cell, read_config(cell.config))
        # A task of an array that is cancelled before it starts leaves no trace.
        cancelled = job is None or job.state == "CANCELLED"
        over = cancelled or found.status in ("complete", "diverged", "unreadable")
        again = not over and self.tries[cell] <= self.retries
        how = f"job {job.number}: {job.state.lower()}" if job else "its job is gone"
        note = f" ({how})" if found.status != "complete" else ""
        self.board.ended(found, note + ("; will be tried again" if again else ""))
        return again
