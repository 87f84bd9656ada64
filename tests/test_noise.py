"""Shares of the variance by source of randomness, and the noise of a finite test set."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from reslab.ablation import noise
from reslab.ablation.report import read_report, write_report
from reslab.ablation.study import read_study
from studies import make_study, run_study


def test_share_and_interval_agree_with_the_f_distribution() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        row = noise.variance_share(rng.normal(0, 1, 8), rng.normal(0, 2, 20))  # the true share is 1/4
        covered += row["share_ci_low"] <= 0.25 <= row["share_ci_high"]  # type: ignore[operator]
    assert abs(covered / 2000 - 0.95) < 0.015
    x, y = rng.normal(size=5), rng.normal(size=9)
    row = noise.variance_share(x, y)
    assert row["share"] == pytest.approx(x.var(ddof=1) / y.var(ddof=1))
    assert row["share_ci_low"] == pytest.approx(row["share"] / stats.f.ppf(0.975, 4, 8))


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5]])
def test_without_spread_there_is_no_share(values: list[float]) -> None:
    assert noise.variance_share([0.1, 0.2], values)["share"] is None


def test_noise_of_a_finite_test_set_is_told_from_that_of_the_network() -> None:
    rng = np.random.default_rng(1)
    p = rng.uniform(0.2, 1, 4000)
    independent = rng.random((400, 4000)) < p  # the network is always as good, only the test set is finite
    split = noise.test_set_noise(independent)
    assert split["sd"] == pytest.approx(split["finite_test_sd"], rel=0.1)
    assert split["finite_test_sd"] == pytest.approx(np.sqrt((p * (1 - p)).sum()) / 4000, rel=0.02)
    better = np.repeat(rng.normal(0, 0.02, 400)[:, None], 4000, axis=1)  # some seeds are better on all images
    split = noise.test_set_noise(rng.random((400, 4000)) < (0.7 + better))
    assert split["distribution_sd"] == pytest.approx(0.02, rel=0.15)


def test_study_of_seeds_reports_shares_and_other_studies_do_not(tmp_path: Path) -> None:
    sources = {"all": {}, "init": {f"run.seeds.{name}": 1000 for name in ("order", "augment", "network")}}
    make_study(tmp_path / "a", arms=["all", "init"], seeds=5)
    file = tmp_path / "a/demo.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "arms": sources}))
    study = read_study(file, [])
    run_study(study, tmp_path / "out", {"all": 0.9, "init": 0.9})
    write_report(study, tmp_path / "out")
    report, _ = read_report(tmp_path / "out")
    assert report["noise"]["init"]["varies"] == ["init"] and report["noise"]["all"]["varies"] == [*noise.SOURCES]
    assert report["noise"]["all"]["share"] == 1 and report["noise"]["init"]["finite_test_sd"] >= 0
    for name in ("report.md", "report.html"):
        assert "Where the noise comes from" in (tmp_path / "out" / name).read_text()
    other = make_study(tmp_path / "b", seeds=3)
    run_study(other, tmp_path / "other", dict.fromkeys(other.arms, 0.9))
    write_report(other, tmp_path / "other")
    assert read_report(tmp_path / "other")[0]["noise"] == {}


def test_shipped_study_varies_one_source_per_arm() -> None:
    study = read_study("noise_sources", [])
    assert noise._varied(study) == {
        "all": [*noise.SOURCES],
        "init": ["init"],
        "order": ["order"],
        "augment": ["augment"],
    }
