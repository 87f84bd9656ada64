"""Cells forked from a process that has imported everything are the runs that new processes would be."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reslab.ablation import forkserver, launch
from reslab.ablation.cells import cells, states
from reslab.ablation.forkserver import ForkedProcess, ForkServer
from reslab.ablation.study import read_study
from reslab.runs.folder import RunFolder
from runner import manifest, metrics
from test_ablation import write

pytestmark = pytest.mark.skipif(not forkserver.is_supported(), reason="cells are forked on Linux only")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    yield ForkServer({"OMP_NUM_THREADS": "1"})


def wait(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.05)


def status_of(process: ForkedProcess) -> int | None:
    wait(lambda: process.poll() is not None)
    return process.returncode


def digits(folder: Path, *options: str) -> list[str]:
    return ["fit", "digits", "--run.dir", str(folder), "--trainer.accelerator=cpu", *options]


@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [(["--version"], 0, "reslab "), (["fit", "digit"], 2, "nearest: digits"), (["list", "data"], 0, "cifar10")],
)  # fmt: skip
def test_status_and_output_are_those_of_the_command(
    server: ForkServer, tmp_path: Path, argv: list[str], status: int, text: str
) -> None:
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    assert status_of(server.start(argv, log, {})) == status
    assert log.read_text().startswith("before\n") and text in log.read_text()


def test_environment_and_directory_come_from_the_caller(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESLAB_DATA", "/data/of/the/caller")
    log = tmp_path / "log.txt"
    assert status_of(server.start(digits(Path("run"), "--trainer.max_steps=2"), log, {"OMP_NUM_THREADS": "2"})) == 0
    assert manifest(tmp_path / "run")["environment"]["threads"] == 2
    assert status_of(server.start(["doctor", "cifar10_fast"], log, {})) != 0
    assert "/data/of/the/caller" in log.read_text()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGKILL, -9)])
def test_signal_stops_a_run(server: ForkServer, tmp_path: Path, number: signal.Signals, status: int) -> None:
    run, log = tmp_path / "run", tmp_path / "log.txt"
    process = server.start(digits(run, "--epochs=500"), log, {})
    wait(lambda: (run / "metrics.csv").exists() and process.poll() is None)
    process.send_signal(number)
    assert status_of(process) == status, log.read_text()
    if number != signal.SIGKILL:
        assert manifest(run)["status"] == "preempted"
    process.terminate()  # has no effect after the end


def test_forked_cell_has_the_bits_of_a_new_process(server: ForkServer, tmp_path: Path) -> None:
    options = ["--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--data.num_workers=1"]
    study, runs = read_study(write(tmp_path), options), []
    for out, how in ((tmp_path / "forked", server), (tmp_path / "new", None)):
        out.mkdir()
        launch.prepare(study, out)
        cell = cells(study, out)[0]
        process = launch.start(cell, {}, how)
        wait(lambda process=process: process.poll() is not None)  # type: ignore[misc]
        assert process.returncode == 0 and "test/acc" in cell.log.read_text(), cell.log.read_text()
        runs.append([manifest(cell.folder)[name] for name in ("weights_sha256", "results")] + metrics(cell.folder))
    assert runs[0] == runs[1]


@pytest.mark.slow
def test_killed_study_leaves_no_cell_running(tmp_path: Path) -> None:
    study, out = write(tmp_path, seeds=[0]), tmp_path / "out"
    options = ["--jobs", "2", "--trainer.accelerator=cpu", "--trainer.max_epochs=900"]
    command = [sys.executable, "-m", "reslab", "ablate", "run", str(study), "--out", str(out), *options]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    folders = [cell.folder for cell in cells(read_study(study, options[2:]), out)]
    wait(lambda: all((folder / "metrics.csv").exists() for folder in folders))
    process.kill()
    process.wait()
    wait(lambda: not any(RunFolder(folder).busy() for folder in folders), 10)
    assert {s.status for s in states(read_study(study, options[2:]), out)} == {"preempted"}


def test_changed_sources_need_a_new_process(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.is_current()
    (tmp_path / "module.py").write_text("")
    monkeypatch.setattr(forkserver, "PACKAGE", tmp_path)
    monkeypatch.setattr(forkserver.forkserver, "ensure_running", lambda: None)
    new = ForkServer({})
    assert new.is_current()
    os.utime(tmp_path / "module.py", ns=(1, 1))
    assert not new.is_current()


@pytest.mark.parametrize(
    ("trainer", "forks"),
    [({}, True), ({"devices": 1}, True), ({"devices": 2}, False), ({"devices": 1, "num_nodes": 2}, False)],
)
def test_cells_of_several_processes_are_new_processes(
    server: ForkServer, tmp_path: Path, trainer: dict[str, int], forks: bool
) -> None:
    options = [f"--trainer.{key}={value}" for key, value in trainer.items()]
    study = read_study(write(tmp_path), options)

    class Progress:
        def __init__(self) -> None:
            self.study = study

        def to_run(self) -> list[launch.Cell]:
            return cells(study, tmp_path)

    pool = launch.Pool(Progress(), [{}], server)  # type: ignore[arg-type]
    assert {pool._can_fork(cell) for cell in pool.waiting} == {forks}
