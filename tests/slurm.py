"""A Slurm of the tests' own: one controller and one node on this machine, without munge, cgroups or accounting."""

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

PATIENCE = 120  # seconds: what takes longer hangs
# CPUs are as many as the jobs of a test want, whatever the machine has. A requeued job waits for cred_expire.
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
    """What one of Slurm's programs prints."""
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True, timeout=PATIENCE).stdout


def queue() -> dict[str, str]:
    """The state of each job that waits or runs, by its number; each task of an array counts as one."""
    lines = command("squeue", "--array", "--noheader", "--format=%i %T").splitlines()
    return dict(line.split() for line in lines)  # type: ignore[misc]


def until(condition: Callable[[], object], why: str = "") -> None:
    """Waits for the condition to be true; fails with `why` after a while."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s in vain: {why}"
        time.sleep(0.1)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[None]:
    """A Slurm that keeps its files in `folder`; SLURM_CONF leads to it. It is gone at the end, with all its jobs."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("PATH", "/usr/sbin", prepend=os.pathsep)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        config = CONFIG.format(folder=folder, ports=_free_ports(2), user=getpass.getuser())
        (folder / "slurm.conf").write_text(config)
        for daemon in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
            stack.enter_context(_daemon(daemon))
        until(lambda: "idle" in _said("sinfo", "--noheader", "--format=%T"), f"the node is not up, see {folder}")
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


def _said(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE).stdout


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [s.getsockname()[1] for s in sockets]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A running Slurm; each process of pytest-xdist that needs one starts its own."""
    if shutil.which("slurmctld", path=f"/usr/sbin{os.pathsep}{os.environ['PATH']}") is None:
        pytest.skip("Slurm is not installed here: apt-get install slurm-wlm")
    with running(tmp_path_factory.mktemp("slurm")):
        yield
