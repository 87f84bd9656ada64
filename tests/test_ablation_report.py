"""Report of a study whose cells are finished, broken or mismatched."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wandb
from PIL import Image
from scipy import stats

from reslab.ablation import report as reports
from reslab.ablation.cells import Cell, cells
from reslab.ablation.report import log_summary, sentences, write_report
from reslab.ablation.statistics import Reason, Why
from reslab.ablation.study import Study
from reslab.ablation.wording import REASONS, Unit, explain, markdown, probability, tex
from reslab.cli import main
from reslab.errors import UserError
from studies import DATA, ENVIRONMENT, make_study, predict, run_cell, run_study

ACCURACY = {"identity": 0.95, "plain": 0.91, "twin": 0.95}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path, ACCURACY, seeds=3)


@pytest.fixture
def out(study: Study, tmp_path: Path) -> Path:
    """Return a finished study: plain is worse than identity, twin equals identity in every seed."""
    out = tmp_path / "out"
    run_study(study, out, ACCURACY)
    for seed in study.seeds:
        results = json.loads((out / f"identity/seed-{seed}/manifest.json").read_text())["results"]
        run_cell(study, cell(study, out, f"twin/seed-{seed}"), results["test/acc"], results=results)
    return out


def cell(study: Study, out: Path, name: str) -> Cell:
    return next(cell for cell in cells(study, out) if cell.name == name)


def written(study: Study, out: Path) -> dict[str, Any]:
    write_report(study, out)
    return json.loads((out / "report.json").read_text())


def text(out: Path) -> str:
    """Return the visible text of the page."""
    page = (out / "report.html").read_text()
    return " ".join(unescape(re.sub("<[^>]*>", " ", page.partition("</style>")[2])).split())


# Numbers


def test_numbers_match_the_finished_cells(study: Study, out: Path) -> None:
    report = written(study, out)
    table = pd.read_csv(out / "results.csv").pivot(index="seed", columns="arm", values="test/acc")
    plain, difference = report["arms"]["plain"], table["plain"] - table["identity"]
    assert plain["mean"] == pytest.approx(table["plain"].mean())
    assert plain["sd"] == pytest.approx(table["plain"].std())
    assert plain["delta"] == pytest.approx(difference.mean())
    assert plain["p"] == pytest.approx(stats.ttest_rel(table["plain"], table["identity"]).pvalue)
    low, high = stats.t.interval(0.95, 2, difference.mean(), stats.sem(difference))
    assert (plain["delta_ci_low"], plain["delta_ci_high"]) == pytest.approx((low, high))
    assert plain["p"] < plain["p_holm"] < 0.05
    assert {name: arm.get("verdict") for name, arm in report["arms"].items()} == {
        **{"identity": None, "plain": "worse", "twin": "equivalent"}
    }
    assert report["plan"] == {"hash": study.hash, "recorded": study.hash, "matches": True}
    assert report["cells"] == {"planned": 9, "complete": 9} and report["missing"] == [] and report["warnings"] == []


def test_results_csv_has_one_row_per_cell_and_no_timings(study: Study, out: Path) -> None:
    write_report(study, out)
    first = (out / "results.csv").read_bytes()
    assert first.decode().splitlines()[0] == "arm,seed,status,test/acc,test/loss,val/acc,val/loss"
    assert [line.split(b",")[:3] for line in first.splitlines()[1:4]] == [
        [b"identity", str(seed).encode(), b"complete"] for seed in study.seeds
    ]
    for one in cells(study, out):
        path = one.folder / "manifest.json"
        manifest = json.loads(path.read_text())
        later = {"wall_seconds": 999.0, "samples_per_second": 1.0, "attempts": [{"how": "killed"}, {"how": "complete"}]}
        path.write_text(json.dumps(manifest | later))
    write_report(study, out)
    assert (out / "results.csv").read_bytes() == first


def test_hours_are_counted_by_device(study: Study, out: Path) -> None:
    for one in cells(study, out):
        gpus = ENVIRONMENT | {"gpus": ["H100"] * 2, "world_size": 2}
        run_cell(study, one, 0.9, wall_seconds=1800.0, environment=gpus if one.arm == "plain" else ENVIRONMENT)
    report = written(study, out)
    assert report["gpu_hours"] == pytest.approx(3 * 2 * 0.5) and report["cpu_hours"] == pytest.approx(6 * 0.5)
    assert report["arms"]["plain"]["wall_seconds"] == 1800


def test_images_are_compared_if_all_cells_were_tested_on_the_same(study: Study, out: Path) -> None:
    report = written(study, out)
    plain = report["per_image"]["plain"]
    assert plain["delta"] == pytest.approx(report["arms"]["plain"]["delta"])
    assert plain["ci_low"] < plain["delta"] < plain["ci_high"] < 0
    assert (plain["seeds"], plain["images"]) == (3, 500)
    predict(cell(study, out, "plain/seed-1"), 400, images=450)
    cell(study, out, "twin/seed-0").folder.joinpath("predictions.npz").write_bytes(b"no archive")
    arms = written(study, out)["per_image"]
    assert "plain/seed-1" in arms["plain"]["reason"] and "twin/seed-0" in arms["twin"]["reason"]


def test_factor_study_has_effects_and_level_columns(tmp_path: Path) -> None:
    factors = {"data.augment.crop_padding": [0, 1], "data.augment.flip": ["none", "horizontal"]}
    study = make_study(tmp_path, ["crop_padding=0+flip=none"], seeds=3, factors=factors)
    accuracy = {n: 0.9 + 0.02 * ("crop_padding=1" in n) + 0.01 * ("horizontal" in n) for n in study.arms}
    run_study(study, tmp_path / "out", accuracy)
    report = written(study, tmp_path / "out")
    assert [effect["levels"][0] for effect in report["effects"]] == [
        ["data.augment.crop_padding", "0", "1"],
        ["data.augment.flip", "none", "horizontal"],
    ]
    assert report["effects"][0]["delta"] == pytest.approx(0.02, abs=0.005)
    assert len(report["interactions"]) == 1 and (tmp_path / "out/figures/effects.png").exists()
    header = (tmp_path / "out/results.csv").read_text().splitlines()[0]
    assert header.startswith("arm,seed,status,data.augment.crop_padding,data.augment.flip,test/acc")


# Missing and wrong results


def test_report_before_any_cell_ran(study: Study, tmp_path: Path) -> None:
    report = written(study, tmp_path / "new")
    assert report["cells"] == {"planned": 9, "missing": 9} and len(report["missing"]) == 9
    assert report["arms"]["plain"]["mean"] is None and report["arms"]["plain"]["verdict"] is None
    assert not report["plan"]["matches"]
    page = text(tmp_path / "new")
    assert "0 of 9 cells" in page and "plain/seed-2 missing" in page and "reslab ablate run" in page
    assert list((tmp_path / "new/figures").iterdir()) == []


def test_cells_without_a_result_are_listed_with_their_reason(study: Study, out: Path) -> None:
    how = {
        "failed": "failed: out of memory",
        "diverged": "diverged: the loss is nan",
        "preempted": "preempted: SIGTERM",
    }
    for seed, (status, reason) in enumerate(how.items()):
        one = cell(study, out, f"plain/seed-{seed}")
        run_cell(study, one, 0.9, status=status, results={}, attempts=[{"how": reason}])
    (cell(study, out, "twin/seed-0").folder / "manifest.json").write_text('{"status": ')
    shutil.rmtree(cell(study, out, "twin/seed-1").folder)
    run_cell(study, cell(study, out, "twin/seed-2"), 0.9, seed=7)
    report = written(study, out)
    states = {state["cell"]: state["status"] for state in report["missing"]}
    assert states == {
        **{"plain/seed-0": "failed", "plain/seed-1": "diverged", "plain/seed-2": "preempted"},
        **{"twin/seed-0": "unreadable", "twin/seed-1": "missing", "twin/seed-2": "mismatched"},
    }
    assert not report["plan"]["matches"]
    for document in (text(out), (out / "report.md").read_text()):
        assert all(name in document and status in document for name, status in states.items())
        assert "out of memory" in document and "the loss is nan" in document and report["command"] in document
    assert report["arms"]["identity"]["n"] == 3  # unharmed
    assert pd.read_csv(out / "results.csv")["test/acc"].notna().sum() == 3


def test_missing_cell_affects_the_verdict_of_its_arm_only(study: Study, out: Path) -> None:
    before = written(study, out)["arms"]
    shutil.rmtree(cell(study, out, "plain/seed-1").folder)
    after = written(study, out)["arms"]
    assert after["plain"]["verdict"] is None
    assert after["plain"]["reason"] == "no result for plain/seed-1; `reslab ablate run` runs the missing cells"
    assert after["plain"]["n_pairs"] == 2 and after["plain"]["delta"] < 0
    assert after["twin"]["verdict"] == before["twin"]["verdict"] == "equivalent"


def test_arm_with_other_data_gets_no_verdict(study: Study, out: Path) -> None:
    run_cell(study, cell(study, out, "plain/seed-0"), 0.9, data=DATA | {"split": "zz"})
    arms = written(study, out)["arms"]
    assert arms["plain"]["verdict"] is None and "split" in arms["plain"]["reason"]
    assert arms["twin"]["verdict"] == "equivalent"
    assert "used different data than the baseline" in text(out)


def test_different_hardware_and_code_are_reported(study: Study, out: Path) -> None:
    run_cell(study, cell(study, out, "plain/seed-0"), 0.9, environment=ENVIRONMENT | {"threads": 8})
    run_cell(study, cell(study, out, "plain/seed-1"), 0.9, git={"sha": "beef", "dirty": True, "diff_sha256": "1"})
    report = written(study, out)
    assert [len(group["cells"]) for group in report["hardware"]] == [8, 1]
    assert re.search(r"hardware: threads differ in plain/seed-0", text(out))
    assert re.search(r"code: diff_sha256, dirty, sha differ in plain/seed-1", text(out))


def test_changed_study_file_and_unplanned_runs_are_reported(study: Study, out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "plain", out / "old_arm")
    changed = make_study(tmp_path, ACCURACY, seeds=3, margin=0.01)
    report = written(changed, out)
    assert report["plan"] == {"hash": changed.hash, "recorded": study.hash, "matches": False}
    assert "has changed since the runs were planned" in text(out) and "old_arm/seed-0" in text(out)


def test_unlogged_metric_is_reported_with_the_logged_ones(tmp_path: Path) -> None:
    study = make_study(tmp_path, ACCURACY, seeds=3, metric="test/acc5")
    run_study(study, tmp_path / "out", ACCURACY)
    with pytest.raises(UserError, match=r"'test/acc5'.*they log: test/acc, "):
        write_report(study, tmp_path / "out")


def test_invalid_results_count_as_missing(study: Study, out: Path) -> None:
    for name, results in (("plain/seed-0", {"test/acc": None}), ("plain/seed-1", "?"), ("plain/seed-2", {"lr": True})):
        run_cell(study, cell(study, out, name), 0.9, results=results)
    (cell(study, out, "twin/seed-0").folder / "metrics.csv").write_bytes(b"\xff\xfe,\n")
    report = written(study, out)
    assert report["arms"]["plain"]["n"] == 0 and report["arms"]["twin"]["n"] == 3
    assert "finished without a value of test/acc: plain/seed-0" in text(out)


def test_validation_metric_is_named_as_such_and_test_images_are_not_compared(tmp_path: Path) -> None:
    study = make_study(tmp_path, ACCURACY, seeds=3, metric="val/loss", test_weights="best")
    run_study(study, tmp_path / "out", ACCURACY)
    report = written(study, tmp_path / "out")
    assert report["arms"]["plain"]["verdict"] == "worse" and report["arms"]["plain"]["delta"] > 0  # lower is better
    assert set(report["per_image"]["plain"]) == {"reason"}
    page = text(tmp_path / "out")
    assert "validation metric" in page and "lower is better" in page and "points" not in page.partition("Over test")[0]


# Texts, tables and figures


def test_verdicts_are_sentences(study: Study, out: Path) -> None:
    plain = written(study, out)["arms"]["plain"]
    number = r"[−+]\d+\.\d+"
    sentence = re.search(
        rf"plain is worse than identity: {number} points, 95 % interval {number} to {number}, p_Holm = [\d.]+, n = 3\.",
        text(out),
    )
    assert sentence and f"{100 * plain['delta']:.2f}".replace("-", "−") in sentence[0]
    assert "twin is equivalent to identity within ±0.2 points: 0.00 points" in text(out)


def test_page_is_self_contained_and_every_figure_has_an_alt_text(tmp_path: Path) -> None:
    question = "Is <script>alert(1)</script> 50 % of cost_$ & {x} | y?"
    study = make_study(tmp_path, ACCURACY, seeds=3, question=question)
    run_study(study, tmp_path / "out", ACCURACY)
    page = write_report(study, tmp_path / "out").read_text()
    assert "<script" not in page and question in unescape(page)
    loaded = re.findall(r"\b(?:src|srcset|href|action|poster)=\"?([^\s>]+)", page)
    assert loaded and all(link.startswith("data:") for link in loaded)
    pictures = re.findall(r'<img [^>]*alt="([^"]+)"', page)
    assert len(pictures) == len(list((tmp_path / "out/figures").glob("*.png"))) == 4
    assert any("identity 9" in alt and "plain 9" in alt for alt in pictures)


@pytest.mark.parametrize(("arms", "seeds"), [(2, 1), (3, 2), (9, 3)])
def test_figures_are_drawn_for_any_numbers(tmp_path: Path, arms: int, seeds: int) -> None:
    names = ["baseline", *(f"a_very_long_name_of_an_arm+lr=0.{i}+weight_decay=5e-{i}" for i in range(1, arms))]
    study = make_study(tmp_path, names, seeds)
    run_study(study, tmp_path / "out", dict.fromkeys(names, 0.9), spread=0 if arms == 2 else 0.01)
    last = cell(study, tmp_path / "out", f"{names[-1]}/seed-0")
    run_cell(study, last, 0.1, wall_seconds=9999.0)
    write_report(study, tmp_path / "out")
    paths = sorted((tmp_path / "out/figures").glob("*.png"))
    assert [path.stem for path in paths] == ["arms", "cost", "differences", "learning_curves"]
    for path in paths:
        with Image.open(path) as image:
            assert image.width <= 1000 and len(image.convert("L").getcolors(256) or []) > 1


def test_curves_hold_every_seed(study: Study, out: Path) -> None:
    name, curves = reports._curves(study, reports.states(study, out))
    assert name == "val/acc" and curves["plain"].shape == (5, 3)
    finals = [json.loads((out / f"plain/seed-{s}/manifest.json").read_text())["results"]["val/acc"] for s in (0, 1, 2)]
    assert curves["plain"].iloc[-1].to_numpy() == pytest.approx(np.array(finals) * (1 - np.exp(-6)))


def test_latex_table_is_complete_and_bold_by_verdict_only(study: Study, out: Path) -> None:
    write_report(study, out)
    table = (out / "table.tex").read_text()
    rows = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 4 and {row.count("&") - row.count(r"\&") for row in rows} == {5}
    assert table.count(r"\begin{") == table.count(r"\end{") == 2 and table.count("{") == table.count("}")
    assert "textbf" not in table  # twin equals identity, so no arm is best
    for seed in study.seeds:
        run_cell(study, cell(study, out, f"twin/seed-{seed}"), 0.85 + 0.01 * seed)
    write_report(study, out)
    assert r"\textbf{identity}" in (out / "table.tex").read_text()


def test_latex_compiles_the_table(study: Study, out: Path, tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed")
    write_report(study, out)
    begin = r"\documentclass{article}\usepackage{booktabs}\begin{document}"
    (tmp_path / "paper.tex").write_text(rf"{begin}\input{{{out / 'table.tex'}}}\end{{document}}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


def test_markdown_links_its_figures_and_has_no_broken_rows(study: Study, out: Path) -> None:
    write_report(study, out)
    lines = (out / "report.md").read_text().splitlines()
    figures = [re.search(r"\((figures/.*)\)$", line)[1] for line in lines if line.startswith("![")]
    assert len(figures) == 4 and all((out / figure).exists() for figure in figures)
    assert {line.count("|") for line in lines if line.startswith("|")} == {11}
    assert str(out) not in "\n".join(lines)


UNIT = Unit(percent=True, decimals=2)


@pytest.mark.parametrize(
    ("reasons", "text"),
    [
        ([Reason(Why.FEW_SEEDS, 1)], "a verdict requires at least 3 seeds, got 1; add seeds to the study and rerun"),
        ([Reason(Why.MISSING, cells=tuple("abcdef"))], "no result for a, b, c, d and 2 more; `reslab ablate run` runs"),
        (
            [Reason(Why.DIVERGED, cells=("a",))],
            "no finite result for a; leaving out a diverged seed would favor the arm",
        ),
        (
            [Reason(Why.IDENTICAL), Reason(Why.NO_MARGIN)],
            "in every seed; with a margin in the study file, the arms would",
        ),
        ([Reason(Why.CONSTANT)], "every seed differs by the same 0.1 points, so no test applies"),
        ([Reason(Why.NEGLIGIBLE)], "significant (p_Holm = 0.012) but smaller than the margin of 0.2 points"),
        ([Reason(Why.MAYBE_NEGLIGIBLE)], "the difference may be smaller than the margin of 0.2 points"),
        (
            [Reason(Why.ADJUSTED, 10), Reason(Why.SEPARATE, 12)],
            "significant on its own, but not after adjusting for 10 comparisons; "
            "a new study with about 17 seeds per arm, or planned looks, would detect a difference of 0.1 points at",
        ),
        (
            [Reason(Why.EQUIVALENCE, 1)],
            "a new study with about 6 seeds per arm, or planned looks, would show equivalence within ±0.2 points",
        ),
        ([Reason(Why.SEPARATE)], "more than 1,000 seeds per arm would be needed to detect a difference of 0.1 points"),
    ],
    ids=lambda value: value[0].why if isinstance(value, list) else "",
)
def test_reasons_are_sentences(reasons: list[Reason], text: str) -> None:
    assert text in explain(reasons, UNIT, margin=0.002, delta=-0.001, p_holm=0.0123, n=5)


def test_every_reason_has_a_sentence() -> None:
    assert set(REASONS) == set(Why)


@pytest.mark.parametrize(("plain", "printed"), [("a_b 5 % & #1", r"a\_b 5 \% \& \#1"), ("±−<", r"$\pm$$-$$<$")])
def test_tex_is_escaped(plain: str, printed: str) -> None:
    assert tex(plain) == printed


def test_markdown_is_escaped() -> None:
    assert markdown("a_b _c_ *d* | <e>") == r"a_b \_c\_ \*d\* \| \<e\>"


def test_digits_follow_the_spread() -> None:
    def unit(metric: str, sd: float | None) -> Unit:
        return Unit.of({"metric": metric, "arms": {"a": {"sd": sd}, "b": {"sd": None}}})

    assert unit("test/acc", 0.0018).number(0.91254) == "91.25"
    assert unit("test/acc", 0.018).difference(-0.041) == "−4.1 points"
    assert unit("test/loss", 0.0123).number(0.5) == "0.500"
    assert unit("test/acc", None).signed(-0.0) == "0.00"
    assert [probability(p) for p in (None, 1e-9, 0.00042, 0.0123, 0.5)] == ["–", "< 0.0001", "0.0004", "0.012", "0.50"]


def test_report_does_not_import_torch() -> None:
    code = "import sys, reslab.ablation.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# W&B


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    wandb.teardown()


def test_summary_is_one_wandb_run_of_the_studys_group(tmp_path: Path, offline: None) -> None:
    logger = tmp_path / "logger.yaml"
    logger.write_text("trainer: {logger: {class_path: reslab.runs.tracking.WandB, init_args: {project: p}}}\n")
    digits = str(Path(__file__).parents[1] / "configs/experiment/digits.yaml")
    study, out = make_study(tmp_path, ACCURACY, seeds=3, base=[digits, str(logger)]), tmp_path / "out"
    run_study(study, out, ACCURACY)
    for _ in range(2):
        write_report(study, out)
        log_summary(study, out)
    runs = sorted((out / "wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(runs[0])]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    [about] = [json.loads(line)["run"] for line in lines if json.loads(line)["type"] == "run"]
    assert (about["run_group"], about["job_type"], about["project"]) == ("demo", "report", "p")
    assert len(runs) == 2 and len({run.name.rpartition("-study-")[2][:16] for run in runs}) == 1  # one id
    media = runs[0] / "files/media"
    assert len(list((media / "images/figures").glob("*.png"))) == 4
    assert len(list((media / "table/tables").glob("*.json"))) == 2


def test_nothing_is_logged_without_a_wandb_logger(study: Study, out: Path) -> None:
    write_report(study, out)
    log_summary(study, out)
    assert not (out / "wandb").exists()


@pytest.mark.slow
def test_report_of_200_cells(tmp_path: Path) -> None:
    names = [f"arm{i}" for i in range(40)]
    study, out = make_study(tmp_path, names, seeds=5), tmp_path / "out"
    run_study(study, out, dict.fromkeys(names, 0.9))
    write_report(study, out)
    assert set(json.loads((out / "report.json").read_text())["arms"]) == set(names)


def test_report_of_very_short_cells(tmp_path: Path) -> None:
    study, out = make_study(tmp_path, ["A", "none"]), tmp_path / "out"
    for cell in cells(study, out):
        run_cell(study, cell, 0.9, wall_seconds=0.4)
    write_report(study, out)
    assert (out / "figures/cost.png").exists()


# On the terminal


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run `reslab ablate` in this process; return exit status, stdout and stderr."""
    status = main(["ablate", *map(str, words)])
    return status, *capsys.readouterr()


GRID = {"model.net.shortcut": ["A", "B", "none"], "data.augment.crop_padding": [0, 1]}
STUDIES = {
    "short names": (("identity", "plain", "twin"), {}),
    "long names": (("identity", *(f"a_very_long_name_of_an_arm+lr=0.{i}+weight_decay=5e-{i}" for i in range(3))), {}),
    "no margin": (("identity", "plain"), {"margin": None}),
    "a loss": (("identity", "plain"), {"metric": "test/loss", "margin": 0.0002}),
    "factors": (("shortcut=A+crop_padding=0",), {"factors": GRID}),
    "a long question": (("identity", "plain"), {"question": "Does it " + "really " * 30 + "matter?"}),
}


@pytest.mark.parametrize(("arms", "keys"), STUDIES.values(), ids=STUDIES)
def test_report_fits_80_columns_in_one_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arms: tuple[str, ...], keys: dict[str, Any]
) -> None:
    study, out = make_study(tmp_path, arms, **keys), tmp_path / "out"
    run_study(study, out, {name: 0.95 - 0.0012 * i for i, name in enumerate(study.arms)})
    shutil.rmtree(cell(study, out, f"{[*study.arms][-1]}/seed-1").folder)
    status, printed, _ = shown(capsys, "report", study.path, "--out", out)
    assert status == 0
    lines = printed.splitlines()
    assert max(len(line) for line in lines if not line.startswith("report  ")) <= 80
    joined = " ".join(printed.split())
    assert study.question in joined and "mean ± sd" in joined and "verdict" in joined
    for name in study.arms:
        assert any(line.startswith(name) for line in lines)
    report = json.loads((out / "report.json").read_text())
    for sentence in sentences(report).values():
        assert sentence in joined
    if study.metric == "test/acc":
        assert "in points" in joined and not re.search(r"\b0\.\d{3,}", joined.replace("p_Holm = 0.", ""))
    else:
        assert "points" not in joined and "%)" not in joined


def test_json_prints_the_report_and_nothing_else(
    study: Study, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, printed, errors = shown(capsys, "report", study.path, "--out", out, "--json")
    assert status == 0 and printed == (out / "report.json").read_text() and "plain is worse" in errors
    monkeypatch.setattr("reslab.cli._run_study", lambda *args, **options: print("[9/9] progress") or 1)
    status, printed, errors = shown(capsys, "run", study.path, "--out", out, "--json")
    assert status == 1 and printed == (out / "report.json").read_text() and "[9/9] progress" in errors


@pytest.mark.parametrize(
    ("arm", "status", "sentence"),
    [
        ("good", 0, "good is better than identity: +"),
        ("twin", 3, "twin is equivalent to identity within ±0.2 points"),
        ("plain", 4, "plain is worse than identity: −"),
        ("noisy", 5, "noisy vs. identity is inconclusive"),
        ("missing", 5, "No verdict on missing vs. identity: no result for missing/seed-2"),
        ("identity", 2, "no arm 'identity' to compare with the baseline"),
        ("plian", 2, "no arm 'plian' to compare with the baseline identity; arms: plain, "),
    ],
)
def test_verdict_is_an_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arm: str, status: int, sentence: str
) -> None:
    accuracy = {"identity": 0.95, "plain": 0.91, "twin": 0.95, "good": 0.97, "noisy": 0.95, "missing": 0.95}
    study, out = make_study(tmp_path, accuracy, seeds=3), tmp_path / "out"
    run_study(study, out, accuracy)
    for seed in study.seeds:
        results = json.loads((out / f"identity/seed-{seed}/manifest.json").read_text())["results"]
        run_cell(study, cell(study, out, f"twin/seed-{seed}"), 0.95, results=results)
        better = results | {"test/acc": results["test/acc"] + 0.02 + 0.001 * seed}
        run_cell(study, cell(study, out, f"good/seed-{seed}"), 0.97, results=better)
        run_cell(study, cell(study, out, f"noisy/seed-{seed}"), 0.94 + 0.01 * seed)
    shutil.rmtree(cell(study, out, "missing/seed-2").folder)
    before = sorted(out.rglob("*"))
    ended, printed, errors = shown(capsys, "verdict", study.path, arm, "--out", out)
    assert ended == status and sentence in (errors if status == 2 else printed)
    assert status == 2 or printed.count("\n") == 1
    assert sorted(out.rglob("*")) == before


def test_verdict_before_any_run_is_inconclusive(study: Study, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    status, printed, _ = shown(capsys, "verdict", study.path, "plain", "--out", tmp_path / "nowhere")
    assert status == 5 and printed.startswith("No verdict on plain")


def test_metric_in_percent_is_not_multiplied() -> None:
    arms = {"a": {"mean": 95.3, "sd": 0.2}, "b": {"mean": None, "sd": None}}
    unit = Unit.of({"metric": "test/acc", "arms": arms})
    assert (unit.number(95.3), unit.axis("test/acc")) == ("95.30", "test/acc")
