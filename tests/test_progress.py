"""The progress bar fits its terminal, labels everything, and shows values that were logged anyway."""

import fcntl
import os
import re
import struct
import termios
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from reslab.training.progress import ProgressReport
from runner import DIGITS, SHORT, _forked, _server

METRICS = {"train/loss": 0.4123, "train/acc": 0.8712, "lr": 0.1, "val/loss": 0.5, "val/acc": 0.9, "val/acc5": 0.99}


def picture(width: int, latest: dict[str, float], step: int = 1234, total: int = 7000, epochs: int = 10) -> list[str]:
    """Return the lines of the bar on a terminal of this width, in the middle of a training at 1,422 images/s."""
    report = ProgressReport()
    report._console = Console(width=width, force_terminal=True, color_system=None, legacy_windows=False)
    report.images, report.seconds = 14220, 10.0
    report._step, report._total, report._epoch, report._epochs = step, total, 3, epochs
    report._first_step, report._began = 0, -3600.0
    model: Any = SimpleNamespace(latest=latest, metric_names=list(METRICS))
    report._fields = report._bar_fields(model)
    with report._console.capture() as shown:
        report._console.print(report.picture())
    return [line.rstrip() for line in shown.get().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bar_labels_all_values(width: int) -> None:
    first, second = picture(width, METRICS)
    assert re.fullmatch(r"epoch 3/10  step 1,234/7,000  [━╸╺ ]{8,}  left \d+:\d\d:\d\d", first)
    assert second.startswith("loss 0.4123  acc 0.8712  1,422 images/s  val/acc 0.9000")
    assert len(first) == width and len(second) <= width
    assert ("val/acc5 0.9900" in second) == (width == 120)


def test_bar_before_the_first_values() -> None:
    assert picture(60, {})[1].startswith("loss –  acc –  1,422 images/s")


def test_bar_of_an_objective_without_accuracy() -> None:
    report, model = ProgressReport(), SimpleNamespace(latest={"train/loss": 1.0, "val/f1": 0.5}, metric_names=[])
    assert report._bar_fields(model)[:2] == ["loss 1.0000", "val/f1 0.5000"]  # type: ignore[arg-type]


def test_speed_is_that_of_this_process() -> None:
    """The first process trained at 10 images/s, the one that resumes its run at 500."""
    report, model = ProgressReport(), SimpleNamespace(latest={}, metric_names=[])
    trainer = SimpleNamespace(global_step=20, estimated_stepping_batches=80, max_epochs=4, current_epoch=1)
    trainer.is_global_zero = False
    report.load_state_dict({"images": 1000, "seconds": 100.0})
    report.on_train_start(trainer, model)  # type: ignore[arg-type]
    assert "– images/s" in report._bar_fields(model)  # type: ignore[arg-type]
    report.images, report.seconds = 2000, 102.0
    assert "500 images/s" in report._bar_fields(model)  # type: ignore[arg-type]
    assert report.images_per_second() == 2000 / 102.0  # of the whole run, for the manifest


@given(
    width=st.integers(60, 200),
    step=st.integers(1, 10**7),
    more=st.integers(0, 10**7),
    epochs=st.integers(0, 999),
    values=st.lists(st.floats(0, 99), min_size=3, max_size=3),
)
def test_bar_fits_terminals_of_60_columns_and_more(
    width: int, step: int, more: int, epochs: int, values: list[float]
) -> None:
    latest = dict(zip(["train/loss", "train/acc", "val/acc"], values, strict=True))
    lines = picture(width, latest, step, step + more, epochs)
    assert len(lines) == 2 and max(map(len, lines)) <= width
    first, second = lines
    assert f"step {step:,}/{step + more:,}" in first and "left " in first
    assert "loss " in second and "acc " in second and "1,422 images/s" in second


def test_bar_in_a_terminal_of_60_columns(tmp_path: Path) -> None:
    """A run on a pseudo-terminal: no line is longer than the terminal, and the last state of the bar is complete."""
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    argv = ["fit", *DIGITS, *SHORT, "--trainer.max_epochs=2", "--run.dir", str(tmp_path / "r")]
    environ = {"COLUMNS": "60", "TERM": "xterm"}
    process = _server.Process(target=_forked, args=(argv, os.ttyname(terminal), None, None, Path.cwd(), environ))
    written: list[bytes] = []

    def read() -> None:
        while b"predict" not in (chunk := os.read(controller, 65536)):
            written.append(chunk)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    process.start()
    process.join(120)
    reader.join(10)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(written).decode())
    bars = [line for line in re.split(r"[\r\n]+", text) if line.startswith(("epoch", "loss"))]
    assert process.exitcode == 0, text
    assert bars and max(map(len, bars)) <= 60
    assert re.match(r"epoch 2/2  step 40/40  ━+  left 0:00", [line for line in bars if "epoch" in line][-1])
    last = [line for line in bars if line.startswith("loss")][-1]
    assert re.match(r"loss \d\.\d{4}  acc \d\.\d{4}  [\d,]+ images/s  val/acc \d\.\d{4}", last)
