"""Planned looks: a study runs to the next look, drops decided arms, and stops by itself."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from reslab.ablation import launch
from reslab.ablation.plan_log import read_decisions, read_plans
from reslab.ablation.report import read_report, sentences, write_report
from reslab.ablation.study import Study, read_study
from test_ablation import FAKE, ablate, fake, tries, write  # noqa: F401 - a fixture

LR = "model.optimizer.init_args.lr"
ARMS = {"base": {}, "far": {LR: 0.2}, "near": {LR: 0.3}, "noisy": {LR: 0.4}, "late": {LR: 0.5}}
NOISE = [0.0, 0.004, -0.003, 0.001, 0.003, -0.002, 0.0025, -0.001]
WIGGLE = [0.001, -0.001, 0.0005, -0.0004, 0.0008, -0.0002, 0.0003, -0.0006]
RESULTS = {
    "base": [0.9 + x for x in NOISE],
    "far": [0.8 + x + y for x, y in zip(NOISE, WIGGLE, strict=True)],
    "near": [0.9 + x + y / 20 for x, y in zip(NOISE, WIGGLE, strict=True)],
    "noisy": [0.9 + x + 40 * y for x, y in zip(NOISE, WIGGLE, strict=True)],
    "late": [0.9015 + x + 0.8 * y for x, y in zip(NOISE, WIGGLE, strict=True)],
}


@pytest.fixture
def study(tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch) -> Study:  # noqa: F811
    fake({})
    monkeypatch.setenv("FAKE_RESULTS", json.dumps(RESULTS))
    looks = {"arms": ARMS, "baseline": "base", "looks": [3, 5, 8], "seeds": None, "margin": 0.002}
    return read_study(write(tmp_path, **looks))


def run(study: Study, out: Path, jobs: int = 2) -> int:
    return launch.run_local(study, out, launch.LocalResources(jobs=jobs), retries=0)


def seeds_run(out: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in tries(out):
        counts[name.partition("/")[0]] = counts.get(name.partition("/")[0], 0) + 1
    return counts


def test_study_stops_by_itself_and_drops_decided_arms(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(study, out) == 0
    counts = seeds_run(out)
    assert counts["far"] == 3 and counts["near"] == 3, "decided at the first look"
    assert counts["base"] == max(counts.values()) and counts["late"] > 3
    write_report(study, out)
    report, _ = read_report(out)
    verdicts = {name: arm["verdict"] for name, arm in report["arms"].items() if name != "base"}
    assert verdicts["far"] == "worse" and verdicts["near"] == "equivalent" and verdicts["noisy"] == "inconclusive"
    assert report["cells"]["not needed"] == 5 * 8 - sum(counts.values()) and not report["missing"]
    assert report["arms"]["far"]["look"] == 3 and report["arms"]["far"]["stopped"] == "decided"
    assert report["exploratory"] is None and not report["warnings"]
    assert "were not needed" in (out / "report.html").read_text()
    assert "worse" in sentences(report)["far"]


def test_second_run_changes_nothing_and_decisions_are_logged(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(study, out) == 0
    before, decisions = tries(out), read_decisions(study, out)
    log = (out / "plan.jsonl").read_bytes()
    assert set(decisions) == set(ARMS) - {"base"} and decisions["far"]["look"] == 3
    assert len(read_plans(out)) == 1, "decisions are no plans"
    assert run(study, out) == 0
    assert tries(out) == before and (out / "plan.jsonl").read_bytes() == log


def test_decision_is_never_taken_back(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(study, out) == 0
    for seed in range(3):  # results that would no longer decide
        path = out / f"far/seed-{seed}/manifest.json"
        manifest = json.loads(path.read_text())
        manifest["results"]["test/acc"] = RESULTS["noisy"][seed]
        path.write_text(json.dumps(manifest))
    before = tries(out)
    assert run(study, out) == 0 and tries(out) == before
    write_report(study, out)
    warnings = read_report(out)[0]["warnings"]
    assert any(warning.startswith("far was decided as worse after 3 seeds") for warning in warnings)


def test_failed_cell_holds_up_its_look_only_once(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE", json.dumps({"late/seed-1": ["failed", "complete"]}))
    assert run(study, out) == 1
    assert max(seeds_run(out).values()) == 3 and not read_decisions(study, out)
    assert run(study, out) == 0, "the next command retries it, and the study continues"
    assert set(read_decisions(study, out)) == set(ARMS) - {"base"}


@pytest.mark.slow
def test_interrupted_study_ends_with_the_same_decisions(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(study, whole) == 0
    for cells in ({"late/seed-3": ["wait", "complete"]}, {"base/seed-1": ["wait", "complete"]}):
        monkeypatch.setenv("FAKE", json.dumps(cells))
        [name] = cells
        process = os.fork()
        if not process:
            os._exit(run(study, stopped, jobs=1))
        while not (stopped / name / "manifest.json").exists() and not os.waitpid(process, os.WNOHANG)[0]:
            time.sleep(0.02)
        if (stopped / name / "manifest.json").exists():
            os.kill(process, signal.SIGTERM)
            os.waitpid(process, 0)
        monkeypatch.setenv("FAKE", "{}")
    assert run(study, stopped) == 0
    assert read_decisions(study, stopped) == read_decisions(study, whole)
    assert set(tries(stopped)) == set(tries(whole))


def test_study_without_looks_runs_all_seeds(study: Study, tmp_path: Path) -> None:
    plain = read_study(write(tmp_path, arms=ARMS, baseline="base", seeds=4, margin=0.002))
    assert run(plain, tmp_path / "plain") == 0
    assert set(seeds_run(tmp_path / "plain").values()) == {4}


def test_seeds_added_after_looking_are_exploratory_with_the_chance_of_a_false_verdict(
    study: Study, tmp_path: Path
) -> None:
    out = tmp_path / "plain"
    for seeds in (3, 5, 8):
        plain = read_study(write(tmp_path, arms=ARMS, baseline="base", seeds=seeds, margin=0.002))
        assert run(plain, out) == 0
    write_report(plain, out)
    report, _ = read_report(out)
    assert report["looks_taken"] == [3, 5, 8]
    assert 0.06 < report["false_verdict_chance"] < 0.2 and "exploratory" in report["exploratory"]
