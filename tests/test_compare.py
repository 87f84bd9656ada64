"""`reslab compare`: tests against scipy, what counts as a run, published numbers, text, JSON and page."""

import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reslab.ablation import statistics
from reslab.ablation.cells import cells
from reslab.ablation.compare import judge, mcnemar, paired, prediction, welch
from reslab.ablation.compare_inputs import Sample, read_published
from reslab.ablation.study import Study
from reslab.cli import main
from reslab.errors import UserError
from studies import IMAGES, make_study, run_cell

A = [0.920, 0.918, 0.924, 0.922, 0.916]
B = [0.910, 0.912, 0.918, 0.910, 0.908]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@cache
def study() -> Study:
    return make_study(Path(tempfile.mkdtemp()), ["b", "a"], 5)


@cache
def finished(a: tuple[float, ...], b: tuple[float, ...]) -> Path:
    """Write b/seed-* and a/seed-* (another learning rate), finished with these accuracies."""
    folder = Path(tempfile.mkdtemp())
    for cell in cells(study(), folder):
        of_arm = {"a": a, "b": b}[cell.arm]
        if cell.seed < len(of_arm):
            run_cell(study(), cell, of_arm[cell.seed])
    return folder


def runs(a: Sequence[float] = A, b: Sequence[float] = B) -> None:
    """Copy finished runs with these accuracies to runs/."""
    shutil.copytree(finished(tuple(a), tuple(b)), "runs")


def change(run: str, **entries: Any) -> None:
    """Change entries of a run's manifest."""
    path = Path(run, "manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


Call = Callable[..., Any]


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `reslab compare` and return what it prints."""

    def call(*argv: str) -> str:
        assert main(["compare", *argv]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return call


@pytest.fixture
def report(compare: Call) -> Call:
    """Run `reslab compare --json` and return the object."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return lambda *argv: json.loads(compare(*argv, "--json"), parse_constant=refuse)


# Tests

values = st.lists(st.integers(880, 920).map(lambda x: x / 1000), min_size=3, max_size=8).filter(lambda x: len({*x}) > 1)


@given(values, values)
def test_welch_is_scipys(a: list[float], b: list[float]) -> None:
    truth = stats.ttest_ind(a, b, equal_var=False)
    test = welch(Sample.of(a), Sample.of(b))
    assert test.p == pytest.approx(truth.pvalue, rel=1e-6)
    assert (test.low, test.high) == pytest.approx(tuple(truth.confidence_interval(0.95)), rel=1e-6)
    x, y = Sample.of(a), Sample.of(b)
    summary = stats.ttest_ind_from_stats(x.mean, x.sd, x.n, y.mean, y.sd, y.n, equal_var=False)
    assert test.p == pytest.approx(summary.pvalue, rel=1e-6)


@given(st.lists(st.tuples(st.integers(880, 920), st.integers(880, 920)), min_size=3, max_size=8))
def test_paired_is_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = np.transpose(pairs) / 1000
    test = paired(a.tolist(), b.tolist())
    if np.ptp(a - b) < 1e-9:
        assert test.p == (None if abs(a - b).max() > 1e-9 else 1)
    else:
        truth = stats.ttest_rel(a, b)
        assert test.p == pytest.approx(truth.pvalue, rel=1e-6)
        assert (test.low, test.high) == pytest.approx(tuple(truth.confidence_interval(0.95)), rel=1e-6)


@given(values, st.integers(0, 10_000), st.sampled_from([None, 0.001, 0.005, 0.02]), st.sampled_from(["max", "min"]))
def test_paired_verdicts_are_those_of_the_statistics(
    b: list[float], seed: int, margin: float | None, mode: statistics.Mode
) -> None:
    rng = np.random.default_rng(seed)
    a = (np.array(b) + rng.normal(0, 0.01) + rng.normal(0, 0.003, len(b))).tolist()
    truth = statistics.compare(b, {"a": a}, margin, mode)["a"]
    assert judge(paired(a, b, margin), mode) == truth.verdict


@pytest.mark.parametrize(
    ("delta", "margin", "verdict"),
    [(0.004, None, "better"), (-0.004, None, "worse"), (0.0, None, "inconclusive"), (0.0, 0.002, "equivalent")],
)
def test_verdicts_of_independent_groups(delta: float, margin: float | None, verdict: str) -> None:
    test = welch(Sample(8, 0.9 + delta, 0.001), Sample(6, 0.9, 0.0012), margin)
    assert judge(test, "max") == verdict
    opposite = {"better": "worse", "worse": "better"}.get(verdict, verdict)
    assert judge(test, "min") == opposite


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_binomial_test(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    assert mcnemar(only_a, only_b) == pytest.approx(stats.binomtest(only_a, n).pvalue if n else 1)


def test_prediction_interval_covers_one_further_run() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(0.9, 0.002, (4000, 6))
    p = np.array([prediction(Sample.of(row[:5]), row[5]).p for row in draws], float)
    assert abs((p < 0.05).mean() - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 4000)
    a = Sample(5, 0.9, 0.002)
    half = stats.t.ppf(0.975, 4) * 0.002 * math.sqrt(1 + 1 / 5)
    assert prediction(a, 0.89).high == pytest.approx(0.01 + half)


# Groups of runs


def test_same_seeds_are_paired_and_the_verdict_is_one_sentence(compare: Call, report: Call) -> None:
    runs()
    out, truth = report("runs/a", "--against", "runs/b"), stats.ttest_rel(A, B)
    assert out["test"] == "paired t test" and out["verdict"] == "better"
    assert out["delta"] == pytest.approx(np.mean(A) - np.mean(B)) and out["p"] == pytest.approx(truth.pvalue)
    assert [group["n"] for group in out["groups"]] == [5, 5]
    low, high = (f"{100 * end:+.2f}" for end in truth.confidence_interval(0.95))
    text = compare("runs/a", "--against", "runs/b")
    assert f"a is better than b by 0.84 points (95 % interval {low} to {high}, p " in text
    assert "n = 5 seeds, paired t test)." in text and "Paired by seed: seeds 0, 1, 2, 3, 4" in text
    assert "model.optimizer.init_args.lr: 0.1 → 0.21" in text  # and no other key
    assert [row["key"] for row in out["config_differences"]] == ["model.optimizer.init_args.lr"]


def test_other_seeds_are_independent(compare: Call, report: Call) -> None:
    runs()
    out = report("runs/a/seed-[0-3]", "--against", "runs/b")
    truth = stats.ttest_ind(A[:4], B, equal_var=False)
    assert out["test"] == "Welch's t test" and out["p"] == pytest.approx(truth.pvalue)
    assert "seed 4 in one group only" in out["test_reason"]
    assert "n = 4 and 5 runs, Welch's t test)." in compare("runs/a/seed-[0-3]", "--against", "runs/b")


@pytest.mark.parametrize(
    "group",
    [
        ["runs/a"], ["runs/a/"], ["runs/a/*"], ["runs/*/../a/seed-*"], ["runs/a/seed-?"], ["**/a/seed-*"],
        [f"runs/a/seed-{i}" for i in range(5)], [f"runs/a/seed-{i}/manifest.json" for i in range(5)],
        ["runs/a", "runs/a/seed-0"], ["runs/a/arm.yaml", "runs/a/seed-*"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_directories_and_globs_name_the_same_runs(group: list[str], report: Call) -> None:
    runs()
    out = report(*group, "--against", "runs/b")
    assert [run["seed"] for run in out["groups"][0]["runs"]] == [0, 1, 2, 3, 4]
    assert [run["value"] for run in out["groups"][0]["runs"]] == pytest.approx(A)
    assert out["verdict"] == "better" and out["groups"][0]["name"] == "a"


def damage(run: str, file: str, content: bytes | None) -> None:
    path = Path(run, file)
    path.unlink() if content is None else path.write_bytes(content)


BROKEN: Mapping[str, tuple[Callable[[str], None], str]] = {
    "running": (lambda run: change(run, status="running"), "status is running"),
    "failed": (lambda run: change(run, status="failed"), "status is failed"),
    "not started": (lambda run: damage(run, "manifest.json", None), "no manifest.json"),
    "truncated": (lambda run: damage(run, "manifest.json", b'{"status'), "manifest.json is damaged"),
    "not an object": (lambda run: damage(run, "manifest.json", b"[1]"), "manifest.json is damaged"),
    "no seed": (lambda run: change(run, seed=None), "manifest.json is damaged"),
    "results": (lambda run: change(run, results=[1]), "manifest.json is damaged"),
    "other metric": (lambda run: change(run, results={"test/acc5": 1.0}), "it logs test/acc5"),
    "no config": (lambda run: damage(run, "config.yaml", None), "config.yaml"),
    "binary config": (lambda run: damage(run, "config.yaml", b"\xff\xfe\x00"), "config.yaml"),
    "invalid config": (lambda run: damage(run, "config.yaml", b"a: [1"), "config.yaml"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_unfinished_and_broken_runs_are_named_and_left_out(kind: str, compare: Call, report: Call) -> None:
    runs()
    breaks, reason = BROKEN[kind]
    breaks("runs/a/seed-3")
    out = report("runs/a", "--against", "runs/b")
    assert [run["seed"] for run in out["groups"][0]["runs"]] == [0, 1, 2, 4]
    (omitted,) = out["groups"][0]["omitted"]
    assert omitted["path"] == "runs/a/seed-3" and reason in omitted["reason"]
    assert out["test"] == "Welch's t test" and out["verdict"] == "better"
    assert "Left out of a: runs/a/seed-3" in compare("runs/a", "--against", "runs/b")
    assert main(["compare", "runs/a/seed-3", "--against", "runs/b"]) == 2  # none is left


@pytest.mark.parametrize("entries", [{"status": "diverged"}, {"results": {"test/acc": None}}])
def test_no_verdict_without_the_diverged_runs(entries: dict[str, Any], report: Call) -> None:
    runs()
    change("runs/a/seed-1", **entries)
    out = report("runs/a", "--against", "runs/b")
    assert out["verdict"] is None and out["p"] is None and "diverged runs favors" in out["reason"]


def test_a_repeated_run_is_no_further_sample(report: Call) -> None:
    runs()
    for i in range(5):
        Path(f"runs/a/copy-{i}").mkdir()
        for file in Path(f"runs/a/seed-{i}").iterdir():
            Path(f"runs/a/copy-{i}", file.name).write_bytes(file.read_bytes())
    out = report("runs/a", "--against", "runs/b")
    assert out["groups"][0]["n"] == 5 and out["test"] == "paired t test"
    assert len(out["groups"][0]["omitted"]) == 5 and "same seed and config" in out["groups"][0]["omitted"][0]["reason"]


def test_different_configs_in_a_group_are_not_replicates(report: Call) -> None:
    runs()
    path = Path("runs/a/seed-2/config.yaml")
    path.write_text(re.sub(r"lr: 0.21\d*", "lr: 0.5", path.read_text()))
    warnings = report("runs/a", "--against", "runs/b")["warnings"]
    assert any("not replicates" in text and "model.optimizer.init_args.lr" in text for text in warnings)


def test_keys_that_say_where_a_run_is_executed_are_no_difference(report: Call) -> None:
    runs()
    for i in range(5):
        path = Path(f"runs/a/seed-{i}/config.yaml")
        path.write_text(re.sub(r"num_workers: .*", f"num_workers: {7 + i}", path.read_text()))
    out = report("runs/a", "--against", "runs/b")
    assert [row["key"] for row in out["config_differences"]] == ["model.optimizer.init_args.lr"]
    assert not any("replicates" in text for text in out["warnings"])


@pytest.mark.parametrize("key", ["files", "split", "classes"])
def test_different_data_are_not_comparable(
    key: str, compare: Call, report: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs()
    data = json.loads(Path("runs/a/seed-0/manifest.json").read_text())["data"]
    change("runs/a/seed-0", data=data | {key: "other"})
    out = report("runs/a", "--against", "runs/b")
    assert key in out["not_comparable"] and out["verdict"] is None and out["delta"] is not None
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\033[1mNot comparable" in compare("runs/a", "--against", "runs/b")


@pytest.mark.parametrize(("a", "b", "test"), [(2, 5, "Welch's t test"), (2, 2, "Welch's t test"), (1, 5, None)])
def test_fewer_than_three_runs_get_no_verdict(a: int, b: int, test: str | None, compare: Call, report: Call) -> None:
    runs(A[:a], B[:b])
    out = report("runs/a", "--against", "runs/b")
    assert out["verdict"] is None and out["p"] is None and out["test"] == test and out["delta"] is not None
    assert f"at least 3 finished runs per group; a{'/seed-0' * (a == 1)} has {a}" in compare(
        "runs/a", "--against", "runs/b"
    )


def test_one_run_against_one_is_compared_image_by_image(report: Call) -> None:
    runs(A[:1], B[:1])
    out = report("runs/a/seed-0", "--against", "runs/b/seed-0")
    assert out["test"] is None and out["delta_ci_low"] is None and out["verdict"] is None
    assert len(out["per_image"]["pairs"]) == 1 and out["per_image"]["bootstrap"]["seeds"] == 1
    assert {group["name"] for group in out["groups"]} == {"a/seed-0", "b/seed-0"}


def test_constant_differences_allow_no_test(report: Call) -> None:
    runs(A, [x - 0.01 for x in A])
    out = report("runs/a", "--against", "runs/b")
    assert out["verdict"] == "inconclusive" and out["p"] is None and "no spread" in out["reason"]


@pytest.mark.parametrize(("number", "verdict"), [("92%", "plausible"), ("91%", "inconclusive")])
def test_runs_without_spread_predict_only_their_value(number: str, verdict: str, report: Call) -> None:
    runs([0.92] * 4, B)
    assert report("runs/a", "--published", number)["verdict"] == verdict


def test_a_loss_is_better_if_lower_and_has_no_points(compare: Call, report: Call) -> None:
    runs()
    options = ("runs/a", "--against", "runs/b", "--metric", "test/loss")
    assert report(*options)["verdict"] == "better" and report(*options)["mode"] == "min"
    assert "points" not in compare(*options).partition("\n\nImages")[0]


def test_margin_shows_equivalence(compare: Call) -> None:
    runs(A, [x + d for x, d in zip(A, [0.002, -0.002, 0, 0.002, -0.002], strict=True)])
    assert "a is equivalent to b within ±1 points" in compare("runs/a", "--against", "runs/b", "--margin", "0.01")
    assert "inconclusive" in compare("runs/a", "--against", "runs/b")


# Images


def test_images_that_only_one_run_classifies_correctly(compare: Call, report: Call) -> None:
    runs()
    images = report("runs/a", "--against", "runs/b")["per_image"]
    assert images["images"] == IMAGES and [pair["seed"] for pair in images["pairs"]] == [0, 1, 2, 3, 4]
    for pair in images["pairs"]:
        a, b = (np.load(Path(pair[side], "predictions.npz")) for side in ("runs", "against"))
        right_a, right_b = (x["prediction"] == x["label"] for x in (a, b))
        only = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
        assert (pair["only_runs"], pair["only_against"]) == only
        assert pair["p"] == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    boot = images["bootstrap"]
    assert boot["seeds"] == 5 and boot["delta"] == pytest.approx(np.mean(A) - np.mean(B))
    assert boot["ci_low"] < boot["delta"] < boot["ci_high"]
    text = compare("runs/a", "--against", "runs/b")
    assert "exact McNemar" in text and "With few seeds this interval covers less than 95 %" in text


def test_pairs_of_runs_without_a_common_seed(report: Call) -> None:
    runs()
    images = report("runs/a/seed-[01]", "--against", "runs/b/seed-[234]")["per_image"]
    assert len(images["pairs"]) == 6 and images["bootstrap"] is None


def predictions(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **(dict(np.load(path)) | arrays))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        (Path.unlink, "no readable predictions.npz"),
        (lambda path: path.write_bytes(b"PK\3\4"), "no readable predictions.npz"),
        (predictions(label=np.zeros(IMAGES, int)), "not tested on the same images"),
        (predictions(index=np.arange(IMAGES) + 1), "not tested on the same images"),
        (predictions(label=np.zeros(3, int)), "no readable predictions.npz"),
    ],
)
def test_images_must_be_the_same(breaks: Callable[[Path], Any], reason: str, compare: Call, report: Call) -> None:
    runs()
    breaks(Path("runs/b/seed-1/predictions.npz"))
    out = report("runs/a", "--against", "runs/b")
    assert reason in out["per_image"]["reason"] and out["verdict"] == "better"
    assert reason in compare("runs/a", "--against", "runs/b")


def test_test_images_are_not_used_to_choose_by_validation(report: Call) -> None:
    runs()
    out = report("runs/a", "--against", "runs/b", "--metric", "val/acc")
    assert "val/acc" in out["per_image"]["reason"] and any("test set" in text for text in out["warnings"])


# Published numbers

READ = [
    ("--published", "91.25", [0.912, 0.914], 0.9125),
    ("--published", "0.9125", [0.912, 0.914], 0.9125),
    ("--published", "91.25%", [0.912, 0.914], 0.9125),
    ("--published", " 91.25 % ", [0.912, 0.914], 0.9125),
    ("--published", "100%", [0.99, 0.98], 1.0),
    ("--published", "100", [0.99, 0.98], 1.0),
    ("--published", "1%", [0.99, 0.98], 0.01),
    ("--published", "0.7", [0.3, 0.31], 0.7),
    ("--published", "0.1%", [0.001, 0.002], 0.001),
    ("--published", "0", [0.3, 0.31], 0.0),
    ("--published", "91.25", [91.1, 91.3], 91.25),  # runs that log percent
    ("--published", "0.9125", [91.1, 91.3], 91.25),
    ("--published-error", "8.75", [0.912, 0.914], 0.9125),
    ("--published-error", "0.0875", [0.912, 0.914], 0.9125),
    ("--published-error", "0.23%", [0.997, 0.998], 0.9977),
]


@pytest.mark.parametrize(("option", "text", "logged", "value"), READ)
def test_published_number_is_read_on_the_scale_of_the_runs(
    option: str, text: str, logged: list[float], value: float
) -> None:
    sample, note = read_published(option, text, None, None, logged, True, "max")
    assert sample.mean == pytest.approx(value) and sample.sd is None
    percent = value if max(logged) > 1 else 100 * value
    assert text in note and f"{percent:.6g} %" in note


@pytest.mark.parametrize(
    ("text", "sd", "expected"),
    [("91.25", "0.2", 0.002), ("0.9125", "0.002", 0.002), ("0.9125", "0.2%", 0.002), ("91.25%", "0.2", 0.002)],
)
def test_published_sd_is_on_the_scale_of_the_number(text: str, sd: str, expected: float) -> None:
    sample, note = read_published("--published", text, sd, 5, [0.912, 0.914], True, "max")
    assert sample.n == 5 and sample.sd == pytest.approx(expected) and "0.2 points" in note


def test_a_published_loss_is_taken_as_it_is() -> None:
    sample, note = read_published("--published", "0.3", "0.01", 3, [0.25, 0.28], False, "min")
    assert sample == Sample(3, 0.3, 0.01) and "as it is" in note


REFUSED = [
    ("--published", "1.0", None, [0.99], "write 1% or 100%"),
    ("--published", "0.9", None, [0.012], "write 0.9% or 90%"),
    ("--published-error", "0.23", None, [0.997], "write 0.23% or 23%"),
    ("--published", "101", None, [0.9], "between 0 and 100 %"),
    ("--published", "-3", None, [0.9], "between 0 and 100 %"),
    ("--published", "nan", None, [0.9], "must be a number"),
    ("--published", "inf", None, [0.9], "must be a number"),
    ("--published", "91,25", None, [0.9], "must be a number"),
    ("--published", "", None, [0.9], "must be a number"),
    ("--published", "0.9125", "0.2", [0.9], "write 0.2% or 20%"),
    ("--published", "91.25", "0.002", [0.9], "write 0.002% or 0.2%"),
    ("--published", "91.25", "0", [0.9], "must be positive"),
    ("--published", "91.25", "-0.2", [0.9], "must be positive"),
    ("--published", "91.25", "x", [0.9], "must be a number"),
    ("--published", "3%", None, [2.5, 130.0], "not a share"),
    ("--published-error", "3", None, [2.5, 130.0], "not a share"),
]


@pytest.mark.parametrize(("option", "text", "sd", "logged", "message"), REFUSED)
def test_ambiguous_published_numbers_are_refused(
    option: str, text: str, sd: str | None, logged: list[float], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_published(option, text, sd, 5, logged, True, "max")


def test_published_mean_and_sd_get_a_welch_test(compare: Call, report: Call) -> None:
    runs()
    options = ("runs/a", "--published", "91.25", "--published-sd", "0.2", "--published-n", "5")
    truth = stats.ttest_ind_from_stats(np.mean(A), np.std(A, ddof=1), 5, 0.9125, 0.002, 5, equal_var=False)
    out = report(*options)
    assert out["test"] == "Welch's t test" and out["p"] == pytest.approx(truth.pvalue) and out["verdict"] == "better"
    text = compare(*options)
    assert "a is better than the published result by 0.75 points" in text and "91.25 is taken as a percentage" in text
    assert report(*options, "--margin", "0.05")["verdict"] == "equivalent"
    assert report(*options[:-1], "2")["verdict"] is None


@pytest.mark.parametrize(("number", "verdict"), [("91.5", "plausible"), ("0.93", "implausible")])
def test_a_published_number_alone_may_be_one_more_run(number: str, verdict: str, compare: Call, report: Call) -> None:
    runs()
    out = report("runs/a", "--published", number)
    assert out["test"] == "prediction interval" and out["verdict"] == verdict
    half = stats.t.ppf(0.975, 4) * np.std(A, ddof=1) * math.sqrt(1.2)
    ends = f"{100 * (np.mean(A) - half):.2f} to {100 * (np.mean(A) + half):.2f} %"
    text = compare("runs/a", "--published", number)
    assert f"One further run of a lies within {ends}" in text
    assert "A plausible number may still come from a better or worse recipe" in text


# Command line

MISTAKES = [
    (["runs/aa", "--against", "runs/b"], "did you mean runs/a?"),
    (["runs/a", "--against", "rums/b"], "did you mean runs/b?"),
    (["rnus/a/seed-*", "--against", "runs/b"], "did you mean runs/a/seed-*?"),
    (["runs/xyz", "--against", "runs/b"], "runs holds a, b"),
    (["runs", "--against", "runs/b"], "name one of them (runs/a, runs/b)"),
    (["empty", "--against", "runs/b"], "empty: it holds no run"),
    (["runs/a/arm.yaml", "--against", "runs/b"], "not a run directory"),
    (["runs/a", "--against", "runs/a"], "in both groups"),
    (["runs/a", "--against", "runs/*"], "in both groups"),
    (["runs/a", "--against", "runs/b", "--metric", "test/ac"], "it logs test/acc"),
    (["runs/a", "--against", "runs/b", "--margin", "0"], "--margin must be positive"),
    (["runs/a", "--against", "runs/b", "--margin", "nan"], "--margin must be positive"),
    (["runs/a", "--against", "runs/b", "--published-n", "3"], "require --published"),
    (["runs/a", "--published", "91", "--published-n", "3"], "require each other"),
    (["runs/a", "--published", "91", "--published-sd", "0.2"], "require each other"),
    (["runs/a", "--published", "91", "--published-sd", "0.2", "--published-n", "1"], "at least 2"),
    (["runs/a", "--published", "91", "--margin", "0.002"], "--margin requires"),
    (["runs/a", "--published", "1.0"], "ambiguous"),
    (["runs/a", "--published", ""], "must be a number"),
    (["runs/a", "--against", "runs/b", "--out", "runs"], "cannot write --out runs"),
    (["runs/a", "--against", "runs/b", "--out", "runs/a/arm.yaml/c.html"], "cannot write --out"),
    (["runs/a", "--against", "runs/b", "--metrics", "x"], "--metrics"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=[" ".join(argv) for argv, _ in MISTAKES])
def test_mistake_is_one_message_and_exit_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs()
    Path("empty").mkdir()
    assert main(["compare", *argv]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err and not printed.out


@pytest.mark.parametrize(
    "argv", [["runs/a"], ["--against", "x"], ["x", "--against", "y", "--published", "3"], ["x", "--margin", "much"]]
)
def test_wrong_usage_is_exit_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *argv])
    assert stop.value.code == 2


def test_no_torch_and_no_matplotlib_without_a_page() -> None:
    runs()
    code = (
        "import sys\nfrom reslab.cli import main\n"
        "assert main(['compare', 'runs/a', '--against', 'runs/b']) == 0\n"
        "heavy = {'torch', 'lightning', 'matplotlib', 'pandas', 'wandb'} & set(sys.modules)\nassert not heavy, heavy\n"
        "assert main(['compare', 'runs/a', '--against', 'runs/b', '--out', 'c.html']) == 0\n"
        "heavy = {'torch', 'lightning'} & set(sys.modules)\nassert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_json_has_the_documented_keys(report: Call, repo: Path) -> None:
    runs()
    documented = set(re.findall(r"`([a-z_]+)`", (repo / "docs/compare.md").read_text(encoding="utf-8")))
    for options in (["--against", "runs/b", "--out", "new/c.html"], ["--published", "91.25"]):
        out = report("runs/a", *options)
        images, group = out["per_image"], out["groups"][0]
        parts = [out, group, group["runs"][0], images, images.get("bootstrap") or {}, *images.get("pairs", [])]
        assert {key for part in parts for key in part} <= documented
    assert {"verdict", "p", "delta", "delta_ci_low", "delta_ci_high", "sentences", "groups"} <= {*out}


def test_page_shows_curves_and_loads_nothing(compare: Call) -> None:
    runs()
    path = Path("runs/a/seed-0/config.yaml")
    path.write_text(re.sub(r"lr: 0.21\d*", "lr: '<script>'", path.read_text()))
    text = compare("runs/a", "--against", "runs/b", "--out", "new/c.html")
    assert text.endswith("page  new/c.html\n")
    page = Path("new/c.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2  # val/acc and train/loss
    assert "Curves of val/acc" in page and "Curves of train/loss" in page
    assert not re.search(r"https?://|<script|<link (?!rel=\"icon\" href=\"data:,\")", page)
    words = unescape(page)
    assert all(f"runs/{group}/seed-{i}" in words for group in "ab" for i in range(5))
    for part in ("is better than b by", "model.optimizer.init_args.lr", "exact McNemar", "not replicates"):
        assert part in words
    assert not list(Path().glob("*.html"))


def test_curves_of_runs_that_logged_at_different_steps(compare: Call) -> None:
    runs()
    for i in range(5):
        path = Path(f"runs/a/seed-{i}/metrics.csv")
        header, *rows = path.read_text().splitlines()
        path.write_text("\n".join([header, *rows[i % 2 :: 2][: 10 + i]]) + "\n")
    Path("runs/b/seed-0/metrics.csv").unlink()
    compare("runs/a", "--against", "runs/b", "--out", "c.html")
    assert Path("c.html").read_text().count("data:image/png;base64,") == 2
    for path in Path("runs").glob("*/*/metrics.csv"):
        path.unlink()
    compare("runs/a", "--published", "91.25", "--out", "c.html")
    assert "data:image/png" not in Path("c.html").read_text()
