"""Cross-validation: folds of the training images, runs of one fold, and studies over folds."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from reslab.ablation import launch
from reslab.ablation.analysis import analyse
from reslab.ablation.cells import cells, states
from reslab.ablation.plan import describe
from reslab.ablation.report import read_report, sentences, write_report
from reslab.ablation.statistics import compare, fold_factor, summarise
from reslab.ablation.study import Study, read_study
from reslab.config import Experiment
from reslab.data.order import fold_out, hold_out
from reslab.errors import UserError
from runner import DIGITS, REPO, fit, manifest
from studies import DATA, make_study, run_cell

sys.path.append(str(REPO / "benchmarks"))
from fold_verdicts import false_verdicts


def images(n: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return keys and labels of n different images."""
    return np.random.default_rng(n).integers(0, 2**64, n, dtype=np.uint64), np.arange(n) % classes


# Folds of images


@given(n=st.integers(200, 400), folds=st.integers(2, 10), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_folds_partition_the_images(n: int, folds: int, seed: int, data: st.DataObject) -> None:
    keys, labels = images(n)
    held_out = []
    for fold in range(folds):
        rest, mine = fold_out(keys, labels, folds, fold, seed)
        assert np.array_equal(np.sort(np.concatenate([rest, mine])), np.arange(n))
        held_out.append(mine)
    assert np.array_equal(np.sort(np.concatenate(held_out)), np.arange(n)), "not disjoint and complete"
    # Removing an image moves no other one.
    gone = data.draw(st.integers(0, n - 1))
    for fold in range(folds):
        _, mine = fold_out(np.delete(keys, gone), np.delete(labels, gone), folds, fold, seed)
        assert set(np.delete(keys, gone)[mine]) == set(keys[held_out[fold]]) - {keys[gone]}


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_folds_have_about_equal_sizes_in_total_and_per_class(folds: int) -> None:
    keys, labels = images(60_000, 10)
    for fold in range(folds):
        _, mine = fold_out(keys, labels, folds, fold, seed=0)
        assert len(mine) == pytest.approx(60_000 / folds, rel=0.05)
        assert np.bincount(labels[mine]) == pytest.approx(np.full(10, 6_000 / folds), rel=0.2)


def test_equal_images_are_in_the_same_fold() -> None:
    keys, labels = images(300)
    rest, mine = fold_out(np.repeat(keys, 2), np.repeat(labels, 2), 5, 3, 0)
    assert not {*(rest // 2)} & {*(mine // 2)}


@pytest.mark.parametrize("folds", [4, 10, 20])
def test_first_fold_is_what_a_fraction_holds_out(folds: int) -> None:
    keys, labels = images(5000)
    assert np.array_equal(fold_out(keys, labels, folds, 0, 7)[1], hold_out(keys, labels, 1 / folds, 7)[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.folds=1", "--data.fold=0"], "data.folds must be at least 2, got 1"),
        (["--data.folds=-5", "--data.fold=0"], "data.folds must be at least 2"),
        (["--data.folds=5"], "data.folds requires data.fold"),
        (["--data.fold=0"], "data.fold requires data.folds"),
        (["--data.folds=5", "--data.fold=5"], r"data.fold must be from 0 to 4 \(data.folds is 5\), got 5"),
        (["--data.folds=5", "--data.fold=-1"], "data.fold must be from 0 to 4"),
    ],
)
def test_a_fold_that_does_not_exist_is_refused_before_the_data_are_read(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Experiment([*DIGITS, *options]).build()


@pytest.mark.parametrize(
    ("labels", "folds", "message"),
    [(np.arange(4) % 2, 50, "has none of the 4 images"), (np.arange(4) % 2, 2**70, "has none of the 4 images"),
     (np.r_[np.zeros(500, int), 1], 2, "has all images of class 1")],
)  # fmt: skip
def test_an_impossible_fold_is_refused(labels: np.ndarray, folds: int, message: str) -> None:
    keys = images(len(labels))[0]
    fold = next((k for k in (0, 1) if len(labels) > 400 and 500 in fold_of(keys, k)), 0)
    with pytest.raises(UserError, match=message):
        fold_out(keys, labels, folds, fold, 0)


def fold_of(keys: np.ndarray, fold: int) -> np.ndarray:
    return fold_out(keys, np.zeros(len(keys), int), 2, fold, 0)[1]


def test_a_run_validates_on_its_fold_and_says_that_val_split_is_not_used(tmp_path: Path) -> None:
    ended = fit(tmp_path / "run", "--data.folds=5", "--data.fold=2", "--run.skip_test=true", "--trainer.max_epochs=1")
    assert ended.status == 0, ended.output
    assert "validation is fold 2 of 5 (from 0)" in ended.output and "data.val_split 0.1 is not used" in ended.output
    data = Experiment([*DIGITS, "--data.folds=5", "--data.fold=2"]).build()[0]
    rest, mine = data.split
    assert manifest(tmp_path / "run")["data"]["split"] == data.identity().hashes["split"]
    assert f"{len(mine)} of {len(rest) + len(mine):,} images" in ended.output
    # Nothing was tested.
    results = manifest(tmp_path / "run")["results"]
    assert "val/acc" in results and not [name for name in results if name.startswith("test/")]
    assert not (tmp_path / "run/predictions.npz").exists() and (tmp_path / "run/weights.safetensors").exists()


# Statistics


@pytest.mark.parametrize("n", [3, 5, 10])
def test_corrected_test_has_the_standard_error_of_nadeau_and_bengio(n: int) -> None:
    rng = np.random.default_rng(n)
    baseline, arm = rng.normal(0.9, 0.01, n), rng.normal(0.91, 0.01, n)
    plain, corrected = (compare(baseline, {"arm": arm}, test=test)["arm"] for test in ("paired", "folds"))
    half = [(c.delta_ci_high or 0) - (c.delta or 0) for c in (plain, corrected)]
    variance = (1 / n + 1 / (n - 1)) / (1 / n)
    assert half[1] / half[0] == pytest.approx(variance**0.5) == pytest.approx(fold_factor(n))
    assert (corrected.p or 0) > (plain.p or 0) and corrected.sd == plain.sd
    assert (corrected.min_detectable_delta or 0) / (plain.min_detectable_delta or 1) == pytest.approx(fold_factor(n))
    means = [summarise(arm, test) for test in ("paired", "folds")]
    widths = [(m.ci_high or 0) - (m.ci_low or 0) for m in means]
    assert widths[1] / widths[0] == pytest.approx(fold_factor(n))


def test_folds_allow_no_looks() -> None:
    with pytest.raises(ValueError, match="no planned looks"):
        compare([1, 2, 3], {"a": [1, 2, 3]}, looks=[3], test="folds")


def test_corrected_test_keeps_the_chance_of_a_false_verdict() -> None:
    plain, corrected = (false_verdicts(test, images=100, folds=5, repetitions=300) for test in ("paired", "folds"))
    assert plain > 0.08, "the simulation shows no problem to correct"
    assert corrected < 0.07


# Studies over folds


def study_over_folds(tmp_path: Path, **keys: object) -> Study:
    text = {"base": [str(REPO / "configs/experiment/digits.yaml")], "baseline": "A", "margin": 0.002, "folds": 5}
    text |= {"name": "demo", "arms": {"A": {}, "lr": {"model.optimizer.init_args.lr": 0.2}}, **keys}
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump(text))
    return read_study(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"folds": 2}, "folds must be an integer of at least 3: folds: 5"),
        ({"folds": True}, "folds must be an integer"),
        ({"seeds": 5}, "folds excludes seeds"),
        ({"looks": [3, 5]}, "folds excludes looks"),
        ({"test": "pooled"}, "folds excludes test"),
        ({"metric": "test/acc"}, "metric must be val/NAME with folds"),
        ({"metric": "train/loss"}, "metric must be val/NAME with folds"),
        ({"arms": {"A": {}, "B": {"data.fold": 2}}}, "arm B: an arm cannot change data.fold"),
        ({"arms": {"A": {}, "B": {"data.split_seed": 2}}}, "arm B: an arm cannot change data.split_seed"),
    ],
)
def test_what_a_study_over_folds_cannot_have(tmp_path: Path, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        study_over_folds(tmp_path, **keys)


def test_every_cell_runs_its_fold_without_a_test(tmp_path: Path) -> None:
    study = study_over_folds(tmp_path)
    assert study.metric == "val/acc" and study.folds == 5
    for config in launch.typed_configs(study).values():
        config = yaml.safe_load(config)
        assert config["run"]["skip_test"] and config["data"]["folds"] == 5
    for cell in cells(study, tmp_path / "out"):
        words = launch.command(cell)
        assert words[words.index("--data.fold") + 1] == words[words.index("--seed_everything") + 1] == str(cell.seed)


def run_folds(study: Study, out: Path, accuracy: dict[str, float]) -> None:
    """Write all cells as finished runs, each with the split of its fold."""
    rng = np.random.default_rng(0)
    for cell in cells(study, out):
        data = {**DATA, "split": f"fold {cell.seed}"}
        run_cell(study, cell, accuracy[cell.arm] + rng.normal(0, 0.002), data=data)
        config = yaml.safe_load((cell.folder / "config.yaml").read_text())
        config["data"]["fold"] = cell.fold
        (cell.folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_report_compares_folds_and_calls_its_verdicts_exploratory(tmp_path: Path) -> None:
    study, out = study_over_folds(tmp_path), tmp_path / "out"
    run_folds(study, out, {"A": 0.95, "lr": 0.90})
    write_report(study, out)
    report, _ = read_report(out)
    assert report["arms"]["lr"]["verdict"] == "worse" and not report["arms"]["lr"]["data_differ"]
    assert "Nadeau & Bengio" in report["exploratory"] and "not independent" in report["warnings"][0]
    assert "worse (exploratory)" in sentences(report)["lr"] or "exploratory" in sentences(report)["lr"]
    for name in ("report.md", "report.html"):
        assert "Corrected t tests over 5 folds" in (out / name).read_text()
    assert "5 folds" in describe(study, out) and "corrected" in describe(study, out)
    json.dumps(report)


def test_an_inconclusive_study_over_folds_does_not_ask_for_more_folds(tmp_path: Path) -> None:
    study, out = study_over_folds(tmp_path), tmp_path / "out"
    run_folds(study, out, {"A": 0.95, "lr": 0.9505})
    report = analyse(study, out, states(study, out))
    assert report["arms"]["lr"]["verdict"] == "inconclusive"
    assert "a study over independent seeds" in report["arms"]["lr"]["reason"]
    assert "new study with about" not in report["arms"]["lr"]["reason"]


def test_a_cell_of_another_fold_is_not_counted(tmp_path: Path) -> None:
    study, out = study_over_folds(tmp_path), tmp_path / "out"
    run_folds(study, out, {"A": 0.95, "lr": 0.9})
    config = out / "lr/seed-3/config.yaml"
    config.write_text(config.read_text().replace("fold: 3", "fold: 2"))
    assert [(s.cell.name, s.status) for s in states(study, out) if s.status != "complete"] == [
        ("lr/seed-3", "mismatched")
    ]


def test_an_arm_with_another_split_in_one_fold_gets_no_verdict(tmp_path: Path) -> None:
    study, out = study_over_folds(tmp_path), tmp_path / "out"
    run_folds(study, out, {"A": 0.95, "lr": 0.9})
    file = out / "lr/seed-3/manifest.json"
    file.write_text(file.read_text().replace("fold 3", "fold 9"))
    assert analyse(study, out, states(study, out))["arms"]["lr"]["data_differ"]


def test_a_validation_metric_requires_validation(tmp_path: Path) -> None:
    study = make_study(tmp_path, metric="val/acc")
    nothing = read_study(study.path, ["--data.val_split", "0"])
    with pytest.raises(UserError, match=r"metric val/acc requires validation: set data.val_split above 0"):
        launch.typed_configs(nothing)


def test_shipped_study_over_folds(tmp_path: Path) -> None:
    assert read_study("digits_folds").folds == 5
