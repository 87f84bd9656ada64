"""plan.jsonl: what was planned, when, and how many results existed; the labels and warnings that follow from it."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from reslab.ablation import plan_log
from reslab.ablation.cells import cells
from reslab.ablation.plan import describe
from reslab.ablation.plan_log import PlanHistory, append_plan, read_plan, read_plans
from reslab.ablation.report import sentences, write_report
from reslab.ablation.study import Study, read_study
from reslab.errors import UserError
from studies import REPO, make_study, run_cell
from test_ablation_report import text

PLANNED, ARMS = "planned before any result", ("identity", "plain")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    return out


@pytest.fixture(autouse=True)
def commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reslab.runs.manifest.git_state", lambda folder: {"sha": "f00d", "dirty": True})


def planned(out: Path, seeds: int, arms: Iterable[str] = ARMS, done: int | None = None, **keys: Any) -> Study:
    """Log a plan, and finish its cells for the first `done` seeds (default: for all)."""
    study = make_study(out.parent, arms, seeds, **keys)
    append_plan(study, out)
    for cell in cells(study, out):
        if study.seeds.index(cell.seed) < (len(study.seeds) if done is None else done):
            run_cell(study, cell, (0.95 if cell.arm == "identity" else 0.93 - cell.seed % 3 / 500))
    return study


def reported(study: Study, out: Path) -> dict[str, Any]:
    write_report(study, out)
    return json.loads((out / "report.json").read_text())


# The file


def test_line_states_the_plan_and_the_results_that_existed(out: Path) -> None:
    study = planned(out, 3, done=2)
    planned(out, 4, looks=[3, 4])
    first, second = read_plans(out)
    assert (first["results"], first["complete"]) == (0, [])
    assert (second["results"], second["complete"][:2]) == (4, ["identity/seed-0", "identity/seed-1"])
    assert first["hash"] == study.hash and first["seeds"] == [0, 1, 2] and first["looks"] is None
    assert second["looks"] == [3, 4] and second["test"] == "paired" and second["metric"] == "test/acc"
    assert second["margin"] == 0.002 and second["arms"]["plain"]["changes"][0][0] == "model.optimizer.init_args.lr"
    assert (first["commit"], first["dirty"]) == ("f00d", True) and first["time"].startswith("20")
    assert read_plan(out) == second


def test_same_plan_is_logged_once(out: Path) -> None:
    study = planned(out, 3)
    append_plan(study, out, {"plain": {"files": "aa"}})
    append_plan(study, out, {"plain": {"files": "aa"}})
    append_plan(study, out)  # on a machine without the data
    assert [plan["data"] for plan in read_plans(out)] == [{}, {"plain": {"files": "aa"}}]


def test_no_line_is_ever_changed(out: Path) -> None:
    before = b""
    for seeds in (1, 2, 3, 4):
        planned(out, seeds)
        content = (out / "plan.jsonl").read_bytes()
        assert content.startswith(before) and content.count(b"\n") == seeds
        before = content


def test_line_cut_off_anywhere_is_repaired(out: Path) -> None:
    planned(out, 1)
    first = (out / "plan.jsonl").read_bytes()
    study = planned(out, 2)
    third = make_study(out.parent, ARMS, seeds=3)
    second = (out / "plan.jsonl").read_bytes()[len(first) :]
    for length in [*range(0, len(second), 41), len(second) - 2, len(second) - 1]:
        (out / "plan.jsonl").write_bytes(first + second[:length])
        complete = length == len(second) - 1  # all but the newline
        assert len(read_plans(out)) == 1 + complete, length
        append_plan(study, out)
        assert [plan["seeds"] for plan in read_plans(out)] == [[0], [0, 1]]
        append_plan(third, out)
        content = (out / "plan.jsonl").read_bytes()
        assert content.startswith(first) and content.endswith(b"\n") and content.count(b"\n") == 3
        assert [len(json.loads(line)["seeds"]) for line in content.splitlines()] == [1, 2, 3]


def test_cut_off_first_line_is_no_plan(out: Path) -> None:
    (out / "plan.jsonl").write_bytes(b'{"time": "20')
    assert read_plans(out) == []
    planned(out, 3)
    assert len(read_plans(out)) == 1


EDITS = {
    "a value": lambda lines: [lines[0].replace(b'"results": 0', b'"results": 9'), *lines[1:]],
    "a line removed": lambda lines: [lines[0], lines[2]],
    "the first line removed": lambda lines: lines[1:],
    "lines swapped": lambda lines: [lines[1], lines[0], lines[2]],
    "a damaged line": lambda lines: [lines[0], lines[1][:50], lines[2]],
    "another value": lambda lines: [lines[0], b"[3]", lines[2]],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edited_log_is_reported_and_never_extended(out: Path, edit: Any) -> None:
    for seeds in (3, 4, 5):
        study = planned(out, seeds)
    log = out / "plan.jsonl"
    log.write_bytes(b"\n".join(edit(log.read_bytes().splitlines())) + b"\n")
    content = log.read_bytes()
    with pytest.raises(UserError, match=r"plan\.jsonl: (the lines before )?line \d (is damaged|were changed)"):
        append_plan(study, out)
    assert log.read_bytes() == content
    report = reported(study, out)
    assert not report["plan"]["matches"] and report["arms"]["plain"]["verdict"] == "worse"
    assert any("plan log cannot be trusted" in warning for warning in report["warnings"])


def test_plan_of_an_earlier_version_becomes_the_first_line(out: Path) -> None:
    study = planned(out, 3)
    old = {key: value for key, value in read_plan(out).items() if key in ("name", "hash", "metric", "seeds", "margin")}
    old |= {"arms": {arm.name: {"levels": {}, "changes": arm.changes} for arm in study.arms.values()}, "data": {}}
    (out / "plan.jsonl").unlink()
    (out / "plan.json").write_text(json.dumps({**old, "hash": "0" * 64, "cells": [{}]}))
    assert [plan["imported"] for plan in read_plans(out)] == ["plan.json"]
    later = planned(out, 5)
    first, second = read_plans(out)
    assert first["imported"] == "plan.json" and first["results"] is None and first["hash"] == "0" * 64
    assert "imported" not in second and second["results"] == 6
    history = PlanHistory(later, read_plans(out))
    assert history.arm("plain") == "planned before the plan log began"
    assert [history.seed(seed) for seed in (2, 3)] == ["planned before the plan log began", "added after 6 results"]
    (out / "plan.json").unlink()
    assert read_plans(out) == [first, second]


def test_append_is_one_write(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(out, 3)
    synced = []
    monkeypatch.setattr(plan_log.os, "fsync", lambda handle: synced.append(handle))
    planned(out, 4, done=0)
    assert len(synced) == 2, "file and directory"


# Labels


def test_study_extended_twice_is_labelled(out: Path) -> None:
    planned(out, 3)
    planned(out, 5, done=4)
    study = planned(out, 6, arms=(*ARMS, "late"))
    report = reported(study, out)
    assert {name: arm["planned"] for name, arm in report["arms"].items()} == {
        "identity": PLANNED, "plain": PLANNED, "late": "added after 8 results",
    }  # fmt: skip
    assert report["seeds_planned"] == {
        **{"0": PLANNED, "1": PLANNED, "2": PLANNED},
        **{"3": "added after 6 results", "4": "added after 6 results", "5": "added after 8 results"},
    }
    assert report["looks_taken"] == [3, 4, 6]
    assert [plan["results"] for plan in report["plan_log"]] == [0, 6, 8]
    for document in (text(out), (out / "report.md").read_text()):
        assert "verdicts could be seen at 3, 4 and 6 seeds" in document and "exploratory" in document
        assert "planned looks" in document and "fresh seeds (such as 6 to 11)" in document
        assert "added after 8 results" in document and PLANNED in document
    assert sentences(report)["plain"].startswith("plain is worse than identity (exploratory): ")
    assert "Exploratory" in (out / "table.tex").read_text()


def test_arm_with_another_definition_is_a_new_arm(out: Path) -> None:
    planned(out, 3)
    longer = [str(REPO / "configs/experiment/digits.yaml"), {"trainer.max_epochs": 7}]
    study = make_study(out.parent, ARMS, seeds=3, base=longer)
    append_plan(study, out)
    assert PlanHistory(study, read_plans(out)).arm("plain") == "added after 6 results"


def test_circumstances_do_not_change_an_arm(out: Path) -> None:
    study = planned(out, 3)
    same = read_study(study.path, ["--data.num_workers=2", "--data.root=elsewhere", "--trainer.devices=2"])
    append_plan(same, out)
    assert PlanHistory(same, read_plans(out)).arm("plain") == PLANNED


CHANGES = [
    ({"margin": 0.01}, "margin changed from 0.002 to 0.01 after 6 results"),
    ({"metric": "test/loss"}, "metric changed from test/acc to test/loss after 6 results"),
    ({"baseline": "plain"}, "baseline changed from identity to plain after 6 results"),
    ({"mode": "min"}, "mode changed from max to min after 6 results"),
    ({"test": "pooled"}, "test changed from paired to pooled after 6 results"),
    ({"looks": [3]}, "looks changed from none to [3] after 6 results"),
]


@pytest.mark.parametrize(("keys", "change"), CHANGES, ids=[change.split()[0] for _, change in CHANGES])
def test_change_of_how_verdicts_are_reached_is_reported(out: Path, keys: dict[str, Any], change: str) -> None:
    planned(out, 3)
    study = planned(out, 3, **keys)
    assert any(change in warning for warning in reported(study, out)["warnings"])


def test_removed_arms_and_seeds_are_reported(out: Path) -> None:
    planned(out, 4, arms=(*ARMS, "loser"))
    report = reported(planned(out, 3), out)
    [warning] = [w for w in report["warnings"] if "was changed when results existed" in w]
    assert "arms removed after 12 results: loser" in warning and "seeds removed after 12 results: 3" in warning


def test_changes_before_any_result_are_free(out: Path) -> None:
    planned(out, 3, done=0)
    planned(out, 5, done=0, margin=0.01)
    report = reported(planned(out, 4, arms=(*ARMS, "late"), looks=[3, 4]), out)
    assert report["warnings"] == [] and report["exploratory"] is None
    assert {arm["planned"] for arm in report["arms"].values()} | {*report["seeds_planned"].values()} == {PLANNED}


@pytest.mark.parametrize(
    ("plans", "looks", "exploratory"),
    [
        ([(3, 3, None), (5, 5, None)], [3, 5], True),
        ([(2, 2, None), (5, 5, None)], [5], False),  # 2 seeds give no verdict
        ([(3, 0, None), (5, 5, None)], [5], False),
        ([(5, 3, None), (8, 8, None)], [3, 8], True),
        ([(5, 5, None), (8, 5, None)], [5], False),  # the added seeds have no results yet
        ([(5, 3, [3, 5]), (5, 5, [3, 5])], [5], False),
        ([(3, 3, None), (5, 5, [3, 5])], [3, 5], True),  # looks stated too late
        ([(5, 5, [3, 5]), (8, 8, [3, 5, 8])], [5, 8], True),  # looks extended
        ([(3, 3, None), (5, 5, None), (6, 6, None)], [3, 5, 6], True),
    ],
)
def test_looks_are_counted(out: Path, plans: list, looks: list[int], exploratory: bool) -> None:
    for seeds, done, stated in plans:
        study = planned(out, seeds, done=done, looks=stated)
    report = reported(study, out)
    assert (report["looks_taken"], bool(report["exploratory"])) == (looks, exploratory)


def test_a_failing_arm_hides_no_look(out: Path) -> None:
    study = planned(out, 3, arms=(*ARMS, "broken"))
    for seed in study.seeds:
        shutil.rmtree(out / f"broken/seed-{seed}")
    assert reported(planned(out, 5, arms=(*ARMS, "broken")), out)["looks_taken"] == [3, 5]


def test_chance_of_a_false_verdict_is_printed_if_it_is_known(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(out, 3)
    study = planned(out, 5)
    report = reported(study, out)
    chance = report["false_verdict_chance"]
    assert 0.05 < chance < 0.15, "two looks with the tests of one"
    assert f"the chance of a false verdict is {100 * chance:.1f} %" in report["exploratory"]
    monkeypatch.setattr("reslab.ablation.analysis.false_verdict_chance", lambda looks, arms: None)
    assert "the chance of a false verdict is above 5 %" in reported(study, out)["exploratory"]


def test_plan_states_what_would_become_exploratory(out: Path) -> None:
    study = planned(out, 3)
    assert "note " not in describe(study, out)
    more = make_study(out.parent, ARMS, seeds=5, margin=0.01)
    plan = describe(more, out)
    assert "note       seeds 3, 4 added after 6 results: without planned looks, verdicts are exploratory" in plan
    assert "note       margin changed from 0.002 to 0.01 after 6 results" in plan
    assert len(read_plans(out)) == 1
