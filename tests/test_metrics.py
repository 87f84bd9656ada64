"""metrics.csv: one row per step, read while it is written and after a kill."""

from pathlib import Path

import pytest

from reslab.runs.csv_logger import MetricsCSV
from reslab.runs.metrics import cut, read_metrics, read_rows, series

COLUMNS = ["step", "epoch", "train/loss"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    logger = MetricsCSV(tmp_path / "metrics.csv", COLUMNS)
    for step in (10, 20, 30):
        logger.log_metrics({"epoch": 0, "train/loss": 1 / step}, step)
    return logger.path


def test_values_logged_at_one_step_share_a_row(path: Path) -> None:
    logger = MetricsCSV(path, COLUMNS)  # of a resumed run
    logger.log_metrics({"val/f1": 0.5}, 30)
    logger.log_metrics({"train/loss": 0.25}, 40)
    assert path.read_text().splitlines() == [
        "step,epoch,train/loss,val/f1",
        "10,0,0.1,",
        "20,0,0.05,",
        f"30,0,{1 / 30},0.5",
        "40,,0.25,",
    ]


@pytest.mark.parametrize("end", ["40,0", "40,0,0.02", "40,0\n", "\0\0\0\n", '"40,0'])
def test_half_written_rows_are_left_out(path: Path, end: str) -> None:
    with path.open("a") as file:
        file.write(end)
    columns, rows = read_rows(path)
    assert columns == COLUMNS and [row["step"] for row in rows] == ["10", "20", "30"]


def test_tail_reads_the_last_rows_only(path: Path) -> None:
    whole = read_rows(path)
    assert read_rows(path, tail=10**6) == whole
    assert read_rows(path, tail=30) == (COLUMNS, whole[1][-1:])


def test_series_holds_finite_values_and_the_last_one_per_step(path: Path) -> None:
    with path.open("a") as file:
        file.write("30,0,7\n40,0,nan\n50,0,\n60,0,?\n")
    steps, values = series(read_rows(path)[1], "train/loss")
    assert steps.tolist() == [10, 20, 30] and values.tolist() == [0.1, 0.05, 7]
    assert [*read_metrics(path)] == ["epoch", "train/loss"]


def test_cut_drops_later_and_half_written_rows(path: Path) -> None:
    with path.open("a") as file:
        file.write("40,0")
    cut(path, 20)
    assert path.read_text() == "step,epoch,train/loss\n10,0,0.1\n20,0,0.05\n"


@pytest.mark.parametrize("text", ["", "step,epo"])
def test_file_without_a_whole_header_is_empty(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    assert read_rows(path) == ([], []) == read_rows(tmp_path / "missing.csv")
    cut(path, 10)
    assert not path.exists()
