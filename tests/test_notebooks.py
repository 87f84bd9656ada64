"""Run the notebooks from top to bottom; they are committed without outputs."""

from pathlib import Path

import pytest

from reslab.ablation.report import write_report
from studies import make_study, run_study

nbformat = pytest.importorskip("nbformat", reason="notebooks need `pip install -e .[notebooks]`")
nbclient = pytest.importorskip("nbclient", reason="notebooks need `pip install -e .[notebooks]`")
pytest.importorskip("ipykernel", reason="notebooks need `pip install -e .[notebooks]`")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow  # `make notebooks` runs them
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in data for data in outputs)


@pytest.fixture(autouse=True)
def finished_study(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide a finished study to the notebooks: from `make ablation-demo` if it has been run, else a synthetic one."""
    out = repo / "runs/ablations/digits_shortcuts"
    if not (out / "report.json").exists():  # one worse arm and one similar arm
        study, out = make_study(tmp_path, ["A", "none", "B"]), tmp_path / "study"
        run_study(study, out, {"A": 0.95, "none": 0.91, "B": 0.951})
        write_report(study, out)
    monkeypatch.setenv("RESLAB_STUDY", str(out))
