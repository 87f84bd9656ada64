"""Launchers that started another number of processes than the config runs are refused, with the flag to give."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reslab.cli import main
from reslab.errors import UserError
from reslab.training import launchers
from reslab.training.launchers import LAUNCHERS, check_launcher
from runner import DIGITS, SHORT, ended, reslab

STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
# Processes started by a launcher, as rank 0 of 2 sees them; the cluster environment that Lightning detects.
TWO = {
    "torchrun": (
        {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        "TorchElasticEnvironment",
    ),
    "torchrun in a step of one task": (
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        "TorchElasticEnvironment",
    ),
    "variables set by hand": (
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        "LightningEnvironment",
    ),
    "srun": ({**STEP, "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train"}, "SLURMEnvironment"),
    "srun with PMI": ({**STEP, "SLURM_PROCID": "0", "PMI_SIZE": "2", "PMI_RANK": "0"}, "SLURMEnvironment"),
    "jsrun": ({"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "0"}, "LSFEnvironment"),
    "Open MPI": ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "MPIEnvironment"),
    "MPICH": ({"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALNRANKS": "2"}, "MPIEnvironment"),
    "MVAPICH2": ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_SIZE": "2"}, "MPIEnvironment"),
    "Flux": ({"FLUX_JOB_SIZE": "2", "FLUX_TASK_RANK": "0"}, "MPIEnvironment"),
    "Horovod": ({"HOROVOD_SIZE": "2", "HOROVOD_LOCAL_SIZE": "2"}, "MPIEnvironment"),
}


@pytest.mark.parametrize("case", TWO)
def test_launcher_and_config_must_agree(case: str) -> None:
    environ, environment = TWO[case]
    check_launcher(environ, 2, environment)
    for world_size in (1, 3, 4):
        with pytest.raises(UserError) as error:
            check_launcher(environ, world_size, environment if world_size > 1 else "")
        message = str(error.value)
        assert re.search(rf"\w started 2 processes, this config runs {world_size} ", message)
        assert re.search(rf"--trainer.devices 2 --trainer.num_nodes 1, or let .* start {world_size}$", message)


@pytest.mark.parametrize("case", TWO)
def test_one_process_of_a_launcher_is_not_enough_for_two(case: str) -> None:
    environ = {k: "1" if v == "2" else v for k, v in TWO[case][0].items()}
    check_launcher(environ, 1)
    with pytest.raises(UserError, match=r"started 1 process, this config runs 2 .*--trainer.devices 1 "):
        check_launcher(environ, 2, TWO[case][1])


@pytest.mark.parametrize(
    ("environ", "environment", "message"),
    [
        ({**STEP, "SLURM_PROCID": "0", "SLURM_JOB_NAME": "interactive"}, "LightningEnvironment", "SLURM_JOB_NAME"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "LightningEnvironment", "pip install mpi4py"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "LightningEnvironment", "pip install mpi4py"),
        ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"}, "LightningEnvironment", "pip install mpi4py"),
        ({"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "0"}, "LightningEnvironment", "LSB_JOBID"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LightningEnvironment", "LOCAL_RANK"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "SLURMEnvironment", "put srun before the command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_processes_that_lightning_would_not_join_are_refused(
    environ: dict[str, str], environment: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_launcher(environ, 2, environment)


@pytest.mark.parametrize(
    ("environ", "world_size", "environment"),
    [
        ({}, 1, ""),
        ({}, 8, "LightningEnvironment"),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1, ""),  # the batch shell, salloc
        ({**STEP, "SLURM_PTY_PORT": "1", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash"}, 1, ""),  # srun --pty bash
        ({**STEP, "SLURM_PTY_PORT": "1", "SLURM_JOB_NAME": "bash"}, 4, "LightningEnvironment"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "0"}, 2, "LightningEnvironment"),  # started by Lightning
        ({"WORLD_SIZE": "16", "NODE_RANK": "1"}, 16, "LightningEnvironment"),  # one command per node
        ({"WORLD_SIZE": "2", "RANK": "1"}, 2, "KubeflowEnvironment"),  # --trainer.plugins
        ({"OMPI_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 2, "LightningEnvironment"),
        ({"WORLD_SIZE": "", "RANK": "", "SLURM_STEP_NUM_TASKS": "many"}, 1, ""),
    ],
)
def test_consistent_environment_is_accepted(environ: dict[str, str], world_size: int, environment: str) -> None:
    check_launcher(environ, world_size, environment)


@pytest.mark.parametrize("variable", launchers.RANKS)
def test_rank_without_a_launcher_is_refused(variable: str) -> None:
    with pytest.raises(UserError, match=f"{variable} is 1"):
        check_launcher({variable: "1"}, 1)


@pytest.mark.parametrize("case", TWO)
def test_other_ranks_exit_silently(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launchers, "GRACE", 0)
    with pytest.raises(SystemExit) as stop:
        check_launcher({**TWO[case][0], "OMPI_COMM_WORLD_RANK": "1"}, 1)
    assert stop.value.code == 2 and capsys.readouterr() == ("", "")


def test_flags_name_devices_per_node() -> None:
    environ = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    with pytest.raises(UserError, match=r"--trainer.devices 4 --trainer.num_nodes 2"):
        check_launcher(environ, 1)
    with pytest.raises(UserError, match=r"--trainer.devices 3 --trainer.num_nodes 2"):
        check_launcher({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "2"}, 1)


def test_cluster_environments_are_those_of_lightning() -> None:
    from lightning.pytorch.plugins import environments

    assert all(hasattr(environments, launcher.environment) for launcher in LAUNCHERS)


@pytest.mark.parametrize(
    "command", [["predict", "run", "--images", ".", "--out", "x.csv"], ["ablate", "run", "digits_shortcuts"]]
)
def test_command_of_one_process_is_refused_under_a_launcher(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in TWO["torchrun"][0].items():
        monkeypatch.setenv(name, value)
    assert main(command) == 2
    assert f"torchrun started 2 processes, reslab {command[0]} runs in one" in capsys.readouterr().err


def test_evaluation_by_another_number_of_processes_is_refused(undisturbed: Callable[..., Path]) -> None:
    ended = reslab("test", undisturbed(), WORLD_SIZE="2", LOCAL_RANK="0", RANK="0")
    assert ended.status == 2 and "started 2 processes, this config runs 1" in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--trainer.devices=3", "--trainer.strategy=ddp"]])
def test_torchrun_with_another_number_of_devices_trains_nothing(tmp_path: Path, options: list[str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "reslab"]
    output = ended([[*torchrun, "fit", *DIGITS, *SHORT, *options, "--run.dir", str(tmp_path / "run")]], {}).output
    devices = 3 if options else 1
    message = f"reslab: torchrun started 2 processes, this config runs {devices} "
    assert output.count(message) == 1 and "--trainer.devices 2 --trainer.num_nodes 1" in output
    assert re.search(r"exitcode\s*: 2", output)
    assert not (tmp_path / "run").exists()
