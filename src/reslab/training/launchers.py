"""Refuse a launcher (torchrun, srun, mpirun) that started another number of processes than the config runs.

A run has `trainer.devices` × `trainer.num_nodes` processes. If a launcher started more, each of them would train a copy
of the run; if it started fewer, they would wait for the others forever. This module does not import torch.
"""

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from reslab.errors import Exit, UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

GRACE = 3.0  # seconds for rank 0 to print its message: launchers stop all processes when the first one fails
INTERACTIVE = ("bash", "interactive")  # Lightning ignores Slurm in jobs with these names
RANKS = (
    "RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK",
    "MV2_COMM_WORLD_RANK", "FLUX_TASK_RANK", "HOROVOD_RANK",
)  # fmt: skip
USE_MPI4PY = (
    "Lightning joins MPI processes only if mpi4py is installed: pip install mpi4py, or start them with torchrun"
)


class Launcher(NamedTuple):
    """A launcher, and the environment variables in which it counts the processes that it started."""

    name: str
    size: str  # variable: number of processes
    local_size: str  # variable: number of processes on this node; "" if there is none
    environment: str  # the cluster environment of Lightning that joins these processes
    remedy: str = ""  # if Lightning uses another cluster environment


TORCHRUN = Launcher("torchrun", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TorchElasticEnvironment")
SRUN = Launcher(
    "srun", "SLURM_STEP_NUM_TASKS", "", "SLURMEnvironment",
    f"Lightning ignores Slurm in jobs called {' or '.join(INTERACTIVE)}: export SLURM_JOB_NAME=reslab before srun",
)  # fmt: skip
OTHERS = (
    Launcher(
        "jsrun", "JSM_NAMESPACE_SIZE", "", "LSFEnvironment",
        "Lightning joins jsrun's processes only if LSB_JOBID and LSB_DJOB_RANKFILE are set, as in an LSF job",
    ),
    Launcher("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPIEnvironment", USE_MPI4PY),
    Launcher("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPIEnvironment", USE_MPI4PY),
    Launcher("mpiexec", "PMI_SIZE", "MPI_LOCALNRANKS", "MPIEnvironment", USE_MPI4PY),
    Launcher("flux", "FLUX_JOB_SIZE", "", "MPIEnvironment", USE_MPI4PY),
    Launcher("horovodrun", "HOROVOD_SIZE", "HOROVOD_LOCAL_SIZE", "MPIEnvironment", USE_MPI4PY),
    Launcher(
        "the launcher", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LightningEnvironment",
        "also set LOCAL_RANK and NODE_RANK in each process, or start them with torchrun",
    ),
)  # fmt: skip


LAUNCHERS = (TORCHRUN, SRUN, *OTHERS)


class Started(NamedTuple):
    """Processes started by a launcher."""

    by: Launcher
    processes: int
    per_node: int


def started_processes(environ: Mapping[str, str]) -> list[Started]:
    """Return what each launcher in the environment started; torchrun hides the launchers around it."""
    if "TORCHELASTIC_RUN_ID" in environ:
        launchers: tuple[Launcher, ...] = (TORCHRUN,)
    else:
        # An interactive shell of `srun --pty` has the variables of a job step, but it is one process.
        is_step = "SLURM_STEP_ID" in environ and "SLURM_PTY_PORT" not in environ
        launchers = (SRUN, *OTHERS) if is_step else OTHERS
    nodes = _number(environ, "SLURM_STEP_NUM_NODES") or 1
    counts = [(by, _number(environ, by.size), _number(environ, by.local_size)) for by in launchers]
    return [Started(by, count, local or max(count // nodes, 1)) for by, count, local in counts if count]


def _number(environ: Mapping[str, str], name: str) -> int:
    """Return the value of a variable; 0 if it is not set or not a number."""
    value = environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def check_trainer(trainer: "Trainer") -> None:
    """Raise UserError if a launcher started other processes than this Trainer expects (see `check_launcher`)."""
    environment = getattr(trainer.strategy, "cluster_environment", None)  # None in a run of one process
    # `trainer.world_size` may be the launcher's.
    check_launcher(
        os.environ, trainer.num_devices * trainer.num_nodes, type(environment).__name__ if environment else ""
    )


def check_launcher(environ: Mapping[str, str], world_size: int, environment: str = "") -> None:
    """Raise UserError if a launcher started another number of processes than the run has, or Lightning ignores it.

    Only rank 0 reports it: the other processes of the launcher exit silently with the same status.

    Args:
        environ: Environment variables of this process.
        world_size: Number of processes that the Trainer expects.
        environment: Name of the class of the Trainer's cluster environment; "" if it has none.
    """
    if not (problem := _problem(environ, world_size, environment)):
        return
    if _rank(environ) and started_processes(environ):
        time.sleep(GRACE)
        raise SystemExit(Exit.USAGE)
    raise UserError(problem)


def _rank(environ: Mapping[str, str]) -> str | None:
    """Return the variable that says that this process is not rank 0."""
    return next((name for name in RANKS if _number(environ, name)), None)


def _problem(environ: Mapping[str, str], world_size: int, environment: str) -> str:
    started, rank = started_processes(environ), _rank(environ)
    runs = f"this config runs {world_size} (trainer.devices × trainer.num_nodes)"
    for by, count, per_node in started:
        if count != world_size:
            processes = f"{count} process{'es' if count > 1 else ''}"
            flags = f"--trainer.devices {per_node} --trainer.num_nodes {count // per_node}"
            return f"{by.name} started {processes}, {runs}: give {flags}, or let {by.name} start {world_size}"
    if world_size == 1:
        return f"{rank} is {environ[rank]}, so there are several processes, but {runs}" if rank and not started else ""
    if environment == "SLURMEnvironment" and not started:
        return f"Slurm started 1 process, {runs}: put srun before the command"
    if started and not any(_joins(environ, environment, by) for by, _, _ in started):
        by = started[0].by
        return f"{by.name} started {world_size} processes, but Lightning cannot join them: {by.remedy}"
    return ""


def _joins(environ: Mapping[str, str], environment: str, launcher: Launcher) -> bool:
    """Return whether a cluster environment of Lightning joins the processes of a launcher."""
    if environment != "LightningEnvironment":  # any class that is not in the table is the user's choice
        return environment == launcher.environment or all(environment != by.environment for by in LAUNCHERS)
    return bool({"LOCAL_RANK", "NODE_RANK", "GROUP_RANK"} & environ.keys()) or not set(RANKS) & environ.keys()
