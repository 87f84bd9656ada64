"""Slurm for the tests: one controller and one node on this machine, without munge, cgroups or accounting."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PATIENCE = 240  # seconds; anything slower hangs
# CPUs: what the tests' jobs require, whatever the machine has. A requeued job waits for cred_expire.
CONFIG = """
ClusterName=reslab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=5
MinJobAge=300
ReturnToService=2
NodeName=localhost NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE
"""


def command(*words: str | Path) -> str:
    """Run a command and return its output."""
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True, timeout=PATIENCE).stdout


def queue() -> dict[str, str]:
    """Return the state of each pending or running job by its number; each array task counts as one."""
    lines = command("squeue", "--array", "--noheader", "--format=%i %T").splitlines()
    return dict(line.split() for line in lines)  # type: ignore[misc]


def until(condition: Callable[[], object], why: str = "") -> None:
    """Wait until the condition is true; fail with `why` after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"timed out after {PATIENCE} s: {why}"
        time.sleep(0.1)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[None]:
    """Run Slurm with its files in `folder` and SLURM_CONF set; stop it and its jobs at the end."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("PATH", "/usr/sbin", prepend=os.pathsep)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        config = CONFIG.format(folder=folder, ports=_free_ports(2), user=getpass.getuser())
        (folder / "slurm.conf").write_text(config)
        for daemon in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
            stack.enter_context(_daemon(daemon))
        until(lambda: "idle" in _output("sinfo", "--noheader", "--format=%T"), f"the node is not up, see {folder}")
        try:
            yield
        finally:
            command("scancel", f"--user={getpass.getuser()}")
            until(lambda: not queue(), "jobs that do not end")


@contextlib.contextmanager
def _daemon(words: list[str]) -> Iterator[None]:
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE).stdout


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [s.getsockname()[1] for s in sockets]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start Slurm, one per pytest-xdist process that uses it."""
    if shutil.which("slurmctld", path=f"/usr/sbin{os.pathsep}{os.environ['PATH']}") is None:
        pytest.skip("Slurm is not installed: apt-get install slurm-wlm")
    with running(tmp_path_factory.mktemp("slurm")):
        yield
