"""Ctrl-C at any moment: one closing line, no traceback, no processes left behind, and a study that can be resumed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reslab.ablation.cells import cells, states
from reslab.ablation.study import read_study
from reslab.interrupt import guarded
from runner import DIGITS, TRAINING, Ended, Fault, all_gone, fit, reslab
from test_ablation import write


def assert_closing_line(ended: Ended, status: int = 130, line: str = "reslab: interrupted\n") -> None:
    assert ended.status == status, ended.output
    assert ended.output.endswith(line) and ended.output.count("reslab: interrupted") == 1
    assert "Traceback" not in ended.output and "Exception ignored" not in ended.output


# While modules are imported: the real program


@pytest.mark.parametrize(
    ("module", "presses"),
    [
        ("reslab.cli", 1),
        pytest.param("argparse", 2, marks=pytest.mark.slow),
        ("torch", 1),
        pytest.param("torch.nn", 2, marks=pytest.mark.slow),
        pytest.param("jsonargparse", 2, marks=pytest.mark.slow),
        pytest.param("lightning.pytorch", 1, marks=pytest.mark.slow),
    ],
)
def test_interrupt_during_an_import(tmp_path: Path, module: str, presses: int) -> None:
    code = f"""if True:
        import runpy, signal, sys

        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == {module!r}:
                    try:
                        signal.raise_signal(signal.SIGINT)
                    finally:
                        {presses} > 1 and signal.raise_signal(signal.SIGINT)

        sys.meta_path.insert(0, Finder())
        runpy.run_module("reslab", run_name="__main__")
    """
    command = [sys.executable, "-c", code, "fit", *DIGITS, "--run.dir", str(tmp_path / "run")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert_closing_line(Ended(done.returncode, done.stdout))
    assert not list(tmp_path.iterdir())


def test_interrupt_while_the_interpreter_exits() -> None:
    code = (
        "import atexit, signal, sys; from reslab.__main__ import main\n"
        "atexit.register(signal.raise_signal, signal.SIGINT); sys.argv[1:] = ['list', 'data']; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# Inside commands


MOMENTS = {
    "parsing": (["fit", *DIGITS], "reslab.config:Experiment.parse_arguments"),
    "building": (["fit", *DIGITS], "reslab.config:Experiment.build"),
    "evaluation": (["test", "RUN"], "reslab.training.classifier:Classifier.test_step"),  # in Lightning's Trainer
    "loading": (["validate", "RUN"], "reslab.data.datamodule:ImageData.setup"),
    "export": (["export", "RUN", "--format", "pt2", "--out", "OUT/x.pt2"], "torch.export:save"),
    "check of an export": (["export", "RUN", "--format", "pt2", "--out", "OUT/x.pt2"], "torch.export:load"),
    "prediction": (["predict", "RUN", "--images", "PETS", "--out", "OUT/x.csv"], "reslab.training:Classifier.eval"),
    "verification": (["verify", "RUN"], "reslab.files:hashlib.file_digest"),
    "plan": (["ablate", "plan", "digits_shortcuts"], "reslab.ablation.plan:describe"),
    "report": (["ablate", "report", "digits_shortcuts", "--out", "OUT"], "reslab.ablation.report:write_report"),
    "preview": (["preview", "lr", *DIGITS, "--out", "OUT/x.png"], "reslab.training:Classifier.configure_optimizers"),
    "list": (["list", "models", "resnet*"], "reslab.models.zoo:list_models"),
}


@pytest.mark.parametrize(
    ("moment", "act"),
    [
        *((moment, "interrupt") for moment in MOMENTS),
        *((moment, "interrupt_repeatedly") for moment in ("evaluation", "report")),
        *(pytest.param(m, "interrupt_repeatedly", marks=pytest.mark.slow) for m in ("parsing", "export", "prediction")),
    ],
)
def test_interrupt_inside_a_command(
    undisturbed: Callable[..., Path], pets: Path, tmp_path: Path, moment: str, act: str
) -> None:
    command, target = MOMENTS[moment]
    places = {"RUN": str(undisturbed()), "PETS": str(pets), "OUT": str(tmp_path / "out")}
    words = [places.get(word, word).replace("OUT/", f"{places['OUT']}/") for word in command]
    options = ["--run.dir", tmp_path / "out"] if words[0] == "fit" else []
    assert_closing_line(reslab(*words, *options, fault=Fault(target, act)))
    if act == "interrupt":  # nothing half-written
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_interrupt_of_a_loader_process_and_its_run(undisturbed: Callable[..., Path]) -> None:
    fault = Fault("torch.utils.data._utils.worker:_worker_loop", "interrupt_all")
    assert_closing_line(reslab("test", undisturbed(), "--data.num_workers=2", fault=fault))


def test_only_rank_0_prints_the_closing_line(undisturbed: Callable[..., Path]) -> None:
    fault = Fault("reslab.files:hashlib.file_digest", "interrupt", rank=1)
    assert reslab("verify", undisturbed(), fault=fault, RANK="1") == (130, "")


def test_second_interrupt_ends_a_training_run_without_a_traceback(tmp_path: Path) -> None:
    ended = fit(tmp_path, "--data.num_workers=1", fault=Fault(TRAINING, "interrupt_twice", 11))
    assert_closing_line(ended, -signal.SIGINT, "reslab: interrupted: run the same command again to resume\n")


@pytest.mark.parametrize("line", range(12))
def test_second_interrupt_while_the_closing_line_is_printed(line: int) -> None:
    code = f"""if True:
        import signal, sys
        from reslab import interrupt

        lines = 0

        def trace(frame, event, arg):
            global lines
            if event == "line" and frame.f_code.co_name in ("close", "_without_interrupts"):
                lines += 1
                if lines == {line} + 1:
                    sys.settrace(None)
                    signal.raise_signal(signal.SIGINT)
            return trace

        def command():
            sys.settrace(trace)
            signal.raise_signal(signal.SIGINT)

        sys.exit(interrupt.guarded(command))
    """
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert_closing_line(Ended(done.returncode, done.stdout))


def test_ignored_interrupt_stays_ignored() -> None:
    def command() -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
    try:
        assert guarded(command) == 0
    finally:
        signal.signal(signal.SIGINT, before)


# Studies

STUDY = """if True:
    import sys
    import reslab.ablation.launch as launch
    from reslab.__main__ import main

    if script := sys.argv.pop(1):
        launch.command = lambda cell: [sys.executable, "-c", script, str(cell.folder / "pid")]
        launch.is_supported = lambda: False
    sys.exit(main())
"""
STUBBORN = """if True:
    import os, pathlib, signal, subprocess, sys, time

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    subprocess.Popen(["sleep", "120"])
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(120)
"""


def study_interrupted_when(
    moment: Callable[[], bool], study: Path, out: Path, script: str = "", presses: int = 1
) -> Ended:
    """Run a study of two cells, press Ctrl-C when both have reached a moment, and wait for the end."""
    argv = ["ablate", "run", str(study), "--out", str(out), "--jobs", "2", "--trainer.max_epochs=900"]
    with Path(f"{out}.txt").open("w") as log:
        command = [sys.executable, "-c", STUDY, script, *argv, "--trainer.accelerator=cpu"]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    while not moment():
        assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
        time.sleep(0.05)
    time.sleep(0.3)  # Python itself prints a traceback in its first moments
    for press in range(presses):
        time.sleep(0.3 if press else 0)
        os.killpg(process.pid, signal.SIGINT)
    ended = Ended(process.wait(120), Path(log.name).read_text())
    assert all_gone([process.pid])
    return ended


def assert_study_can_be_resumed(ended: Ended, study: Path, out: Path) -> None:
    assert_closing_line(ended, 75, "--trainer.max_epochs=900 --trainer.accelerator=cpu\n")
    assert f"reslab: interrupted: to resume, run reslab ablate run {study} --out {out} " in ended.output
    assert "missing" not in ended.output and "KeyboardInterrupt" not in ended.output


@pytest.mark.parametrize("status", ["interrupted", pytest.param("preempted", marks=pytest.mark.slow)])
def test_interrupted_cells_can_be_resumed(tmp_path: Path, status: str) -> None:
    study, out = write(tmp_path, seeds=[0]), tmp_path / "out"
    pattern = "*/*/log.txt" if status == "interrupted" else "*/*/metrics.csv"  # imports, or training
    ended = study_interrupted_when(lambda: len(list(out.glob(pattern))) == 2, study, out)
    assert_study_can_be_resumed(ended, study, out)
    assert ended.output.count(f"/seed-0: {status}: ") == 2
    current = states(read_study(study, ["--trainer.max_epochs=900", "--trainer.accelerator=cpu"]), out)
    assert {s.status for s in current} == {status} and all(s.detail for s in current)
    assert not [log for log in out.glob("*/*/log.txt") if "Traceback" in log.read_text()]


def test_second_interrupt_kills_the_cells_and_their_children(tmp_path: Path) -> None:
    study, out = write(tmp_path, seeds=[0]), tmp_path / "out"

    def pids() -> list[str]:
        return [pid for file in out.glob("*/*/pid") if (pid := file.read_text())]

    began = time.monotonic()
    ended = study_interrupted_when(lambda: len(pids()) == 2, study, out, STUBBORN, presses=2)
    assert time.monotonic() - began < 60
    assert_study_can_be_resumed(ended, study, out)
    assert all_gone(int(pid) for pid in pids())


def test_log_of_a_cell_interrupted_by_an_older_version(tmp_path: Path) -> None:
    study, out = read_study(write(tmp_path)), tmp_path / "out"
    for cell, line in zip(
        cells(study, out), ["KeyboardInterrupt", "reslab: interrupted", "reslab: no", ""], strict=True
    ):
        cell.folder.mkdir(parents=True)
        cell.log.write_text(f"Traceback\n{line}\n")
    assert [s.status for s in states(study, out)] == ["interrupted", "interrupted", "missing", "missing"]
