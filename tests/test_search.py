"""Hyperparameter search: the search file, proposals, resuming after a kill, and what it writes at the end."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from reslab.ablation import launch
from reslab.ablation.study import read_study
from reslab.cli import main
from reslab.errors import UserError
from reslab.search import run
from reslab.search.search_file import Search, grid, read_search
from reslab.search.trials import LOG, Result, Trial, TrialLog, best_first, importances, propose
from runner import REPO, manifest

FAKE = Path(__file__).with_name("fake_fit.py")
LR = "model.optimizer.lr"
PLAIN: dict[str, Any] = {
    "base": [str(REPO / "configs/experiment/digits.yaml")],
    "space": {LR: {"log": [0.01, 1]}, "model.net.width": [8, 16]},
    "trials": 6,
}


def write(folder: Path, **changes: Any) -> Path:
    """Write a search file: PLAIN with some keys changed, or removed if they are None."""
    file = folder / "search.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in {**PLAIN, **changes}.items() if v is not None}, sort_keys=False))
    return file


# The search file


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"metric": "test/acc"}, ["metric must be val/NAME (the test set is not used in a search)", "metric: val/acc"]),
        ({"metric": "train/loss"}, ["metric must be val/NAME"]),
        ({"trial": 3}, ["no such key 'trial'; nearest: trials", "trials: 20"]),
        ({"trials": None}, ["trials is missing: trials: 20"]),
        ({"space": None}, ["space is missing: space: {model.optimizer.lr"]),
        ({"sampler": "bayes"}, ["sampler must be tpe, random or grid: sampler: tpe (got 'bayes')"]),
        ({"seeds": []}, ["seeds must be a number of seeds"]),
        ({"space": {"model.optimizer.lrr": [1, 2]}}, ["model.optimizer.init_args.lrr: no such key", "init_args.lr"]),
        ({"space": {LR: [0.1]}}, [f"space: {LR} requires at least two different values", f"{LR}: [16, 32]"]),
        ({"space": {LR: [0.1, 0.1]}}, ["two different values"]),
        ({"space": {LR: 0.1}}, ["must be a list of values, {log: [low, high]}", f"{LR}: {{log: [0.01, 1]}}"]),
        ({"space": {LR: {"logg": [0.1, 1]}}}, ["must be a list of values"]),
        ({"space": {LR: {"log": [0.1, 1], "float": [0, 1]}}}, ["must be a list of values"]),
        ({"space": {LR: {"log": [0, 1]}}}, ["requires 0 < low < high"]),
        ({"space": {LR: {"float": [1, 0.1]}}}, ["requires low < high"]),
        ({"space": {LR: {"float": [0, "x"]}}}, ["requires two numbers"]),
        ({"space": {"model.net.width": {"int": [8, 16.5]}}}, ["requires two integers", "{int: [1, 4]}"]),
        ({"space": {LR: {"float": [0, 1], "step": 0.3}}}, ["a step above 0 that divides the range"]),
        ({"space": {LR: {"log": [0.1, 1], "step": 0.1}}}, ["cannot have a step on a log scale"]),
        ({"sampler": "grid"}, ["space: model.optimizer.lr has no end of values for sampler: grid"]),
        ({"space": {"data.val_split": [0.1, 0.2]}}, ["data.val_split cannot be searched: trials must be judged by"]),
        ({"space": {"data.fold": [0, 1]}}, ["cannot be searched"]),
        ({"space": {"run.test_weights": ["last", "best"]}}, ["cannot be searched"]),
        ({"space": {"seed_everything": [0, 1]}}, ["cannot be searched"]),
        ({"space": {LR: [0.1, 0.2], "model.optimizer.init_args.lr": [0.1, 0.3]}}, ["are the same key"]),
        ({"base": ["digit"]}, ["base: no config file", "digits"]),
    ],
)
def test_invalid_file_is_refused_with_an_example(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        read_search(write(tmp_path, **changes))
    for part in parts:
        assert part in str(error.value)


def test_wandb_sweep_is_refused_with_the_command_that_starts_it() -> None:
    with pytest.raises(UserError, match=r"not a search file: wandb sweep .*wandb\.yaml"):
        read_search("wandb")


def test_all_mistakes_are_reported_at_once_without_torch(tmp_path: Path) -> None:
    file = write(tmp_path, metric="test/acc", trials=0, space={LR: [1], "model.nett.width": [1, 2]})
    code = f"import sys; from reslab.cli import main; s = main(['search', {str(file)!r}, '--check'])\n"
    code += "assert 'torch' not in sys.modules and 'optuna' not in sys.modules; sys.exit(s)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    for part in ("4 mistakes", "metric must be", "trials must be", f"{LR} requires", "model.nett.width: no such key"):
        assert part in ended.stderr


@pytest.mark.parametrize("path", sorted((REPO / "configs/sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_search_is_valid(path: Path) -> None:
    if path.stem != "wandb":  # of W&B's own format
        assert read_search(path).name == path.stem and path.name in path.read_text()
        run.check_values(read_search(path.stem))


def test_a_value_of_the_wrong_type_is_found_before_the_first_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"width"):
        run.check_values(read_search(write(tmp_path, space={"model.net.width": [8, "wide"]})))
    with pytest.raises(UserError, match=r"metric val/acc requires validation"):
        run.check_values(read_search(write(tmp_path), ["--data.val_split", "0"]))


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["search", str(write(tmp_path))]) == 2
    assert "pip install 'reslab[hpo]'" in capsys.readouterr().err


def test_no_run_uses_the_test_set(tmp_path: Path) -> None:
    search = read_search(write(tmp_path), ["--run.skip_test", "false"])
    assert search.arm("trial-000", {LR: 0.3, "model.net.width": 8}).config["run"]["skip_test"] is True


# Proposals


def results_of(search: Search, n: int, value: Callable[[Any], float]) -> list[Result]:
    results: list[Result] = []
    for i in range(n):
        params = propose(search, results)
        results.append(Result(Trial(i, params, f"trial-{i:03}"), "complete", value(params)))
    return results


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_proposals_lie_in_the_space_and_follow_from_the_seed(tmp_path: Path, sampler: str) -> None:
    space = {LR: {"log": [0.01, 1]}, "data.augment.crop_padding": {"int": [0, 4], "step": 2},
             "model.objective.label_smoothing": {"float": [0, 0.3], "step": 0.1},
             "model.net.layers": [[1, 1, 1], [2, 2, 2]], "model.ema_decay": [None, 0.9]}  # fmt: skip
    searches = [read_search(write(tmp_path, space=space, sampler=sampler, seed=seed)) for seed in (0, 0, 1)]
    runs = [[r.trial.params for r in results_of(s, 15, lambda p: -abs(p[LR] - 0.2))] for s in searches]
    assert runs[0] == runs[1] != runs[2]
    for params in runs[0]:
        assert 0.01 <= params[LR] <= 1 and params["data.augment.crop_padding"] in (0, 2, 4)
        assert params["model.objective.label_smoothing"] in (0, 0.1, 0.2, 0.3)
        assert params["model.net.layers"] in ([1, 1, 1], [2, 2, 2]) and params["model.ema_decay"] in (None, 0.9)


def test_tpe_finds_the_optimum_better_than_chance(tmp_path: Path) -> None:
    distance = {}
    for sampler in ("tpe", "random"):
        search = read_search(write(tmp_path, sampler=sampler, space={LR: {"log": [1e-4, 1]}}))
        results = results_of(search, 40, lambda p: -abs(p[LR] - 0.02))
        distance[sampler] = sum(abs(r.trial.params[LR] - 0.02) for r in results[20:])
    assert distance["tpe"] < 0.5 * distance["random"]


def test_grid_has_every_combination_once(tmp_path: Path) -> None:
    space = {LR: [0.1, 0.2], "data.augment.crop_padding": {"int": [0, 2]}, "model.optimizer.momentum": {
        "float": [0.8, 0.9], "step": 0.1}}  # fmt: skip
    search = read_search(write(tmp_path, space=space, sampler="grid", trials=None))
    assert search.trials == 12 and len({str(params) for params in grid(search.space)}) == 12
    assert [r.trial.params for r in results_of(search, 12, lambda p: 0)] == grid(search.space)
    assert read_search(write(tmp_path, space=space, sampler="grid", trials=5)).trials == 5


def test_importance_is_that_of_the_setting_that_matters(tmp_path: Path) -> None:
    search = read_search(write(tmp_path))
    assert importances(search, results_of(search, 5, lambda p: p[LR])) == {}
    shares = importances(search, results_of(search, 25, lambda p: -abs(p[LR] - 0.2)))
    assert shares[LR] > 0.7 and sum(shares.values()) == pytest.approx(1)


# Running


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace training and the check of types; `fake({cell name: [outcome, ...]})` sets outcomes."""
    real = launch.command
    monkeypatch.setattr(launch, "command", lambda cell: [sys.executable, str(FAKE), *real(cell)[3:]])
    monkeypatch.setattr(launch, "is_supported", lambda: False)  # a fork would run the real one
    plain = lambda study, *_, **__: {a.name: yaml.safe_dump(a.config) for a in study.arms.values()}  # noqa: E731
    monkeypatch.setattr(launch, "typed_configs", plain)
    monkeypatch.setattr(launch, "POLL", 0.01)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("FAKE_VAL", "1")
    return lambda outcomes: monkeypatch.setenv("FAKE", json.dumps(outcomes))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()][1:]


def tries(out: Path) -> dict[str, int]:
    return {"/".join(p.parts[-3:-1]): len(p.read_text().split()) for p in out.glob("*/seed-*/tries")}


def test_search_reports_and_proposes_a_study_of_fresh_seeds(
    tmp_path: Path, fake: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, file = tmp_path / "out", write(tmp_path, seeds=2, trials=12, top=2, margin=0.01)
    assert main(["search", str(file), "--out", str(out), "--trainer.max_epochs", "2"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert [line["trial"] for line in lines(out)] == list(range(12)) == [r["trial"] for r in report["results"]]
    assert set(tries(out).values()) == {1}
    values = {r["trial"]: r["value"] for r in report["results"] if r["value"] is not None}
    assert report["best"][0] == max(values, key=lambda n: values[n])
    assert report["trials"]["complete"] + report["trials"]["diverged"] == 12 and report["trials"]["diverged"]
    assert "importance" in printed and "optimistic" in printed
    assert "next: reslab ablate run out/confirm.yaml" in printed
    study = read_study(out / "confirm.yaml")
    assert study.metric == "test/acc" and study.margin == 0.01 and study.looks == [3, 5, 8]
    assert study.seeds == list(range(2, 10)), "the search used seeds 0 and 1"
    assert list(study.arms) == ["base", *(f"trial_{n}" for n in report["best"][:2])]
    best = study.arms[f"trial_{report['best'][0]}"].config
    assert best["model"]["optimizer"]["init_args"]["lr"] == report["results"][report["best"][0]]["params"][LR]
    assert best["trainer"]["max_epochs"] == 2 and not best["run"].get("skip_test")


def test_study_that_confirms_is_kept_if_it_was_edited(tmp_path: Path, fake: Any) -> None:
    out, file = tmp_path / "out", write(tmp_path, trials=4)
    assert main(["search", str(file), "--out", str(out)]) == 0
    study = out / "confirm.yaml"
    study.write_text(study.read_text().replace("margin: 0.002", "margin: 0.005"))
    assert main(["search", str(file), "--out", str(out)]) == 0
    assert read_study(study).margin == 0.005


def test_base_among_the_best_is_no_arm_against_itself(tmp_path: Path, fake: Any, capsys: Any) -> None:
    out, file = tmp_path / "out", write(tmp_path, space={LR: [0.1, 0.9]}, sampler="grid", trials=None)
    assert main(["search", str(file), "--out", str(out)]) == 0
    assert "no study to confirm: the base has the best settings" in capsys.readouterr().out
    assert not (out / "confirm.yaml").exists()


def test_files_named_in_space_and_base_are_found_from_the_study(tmp_path: Path, fake: Any) -> None:
    for name, width in (("narrow", 8), ("wide", 32)):
        net = yaml.safe_load((REPO / "configs/net/resnet8.yaml").read_text())
        net["init_args"]["width"] = width
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(net))
    shutil.copy(REPO / "configs/recipe/ema.yaml", tmp_path / "ema.yaml")
    space = {"model.net": ["narrow.yaml", "wide.yaml"], LR: [0.2, 0.3]}
    file, out = write(tmp_path, base=[*PLAIN["base"], "ema.yaml"], space=space), tmp_path / "deep/er/out"
    assert main(["search", str(file), "--out", str(out), "--config", str(tmp_path / "ema.yaml")]) == 0
    study = read_study(out / "confirm.yaml")
    assert {arm.config["model"]["net"]["init_args"]["width"] for arm in study.arms.values()} == {16, 8, 32}
    assert all(arm.config["model"]["ema_decay"] for arm in study.arms.values())


class Killed(BaseException):
    """Ends the search where a kill would."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, after: bool) -> None:
    """Raise Killed before or after the call-th call of a function."""
    real, calls = getattr(owner, name), 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise Killed
        value = real(*args, **kwargs)
        if calls == call:
            raise Killed
        return value

    monkeypatch.setattr(owner, name, wrapper)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("owner", "name"), [(TrialLog, "_append"), (run.SearchProgress, "_write"), (launch, "start"),
                        (run.SearchProgress, "ended"), (run, "propose")],
)  # fmt: skip
def test_killed_anywhere_and_resumed_a_search_has_the_same_trials(
    tmp_path: Path, fake: Any, owner: Any, name: str, after: bool
) -> None:
    whole, out, file = tmp_path / "whole", tmp_path / "out", write(tmp_path, trials=5)
    assert main(["search", str(file), "--out", str(whole)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, owner, name, 3, after)
        with pytest.raises(Killed):
            main(["search", str(file), "--out", str(out)])
    assert main(["search", str(file), "--out", str(out)]) == 0
    assert lines(out) == lines(whole)
    for name in ("report.json", "confirm.yaml"):
        same = [(folder / name).read_text().replace(str(folder), "DIR") for folder in (whole, out)]
        assert same[0] == same[1]


def test_a_log_cut_at_any_byte_is_resumed(tmp_path: Path) -> None:
    search = read_search(write(tmp_path))
    log = TrialLog(search, tmp_path)
    params = [{LR: x, "model.net.width": 8} for x in (0.1, 0.2, 0.1)]
    for p in params:
        log.add(p)
    text = (tmp_path / LOG).read_bytes()
    for end in range(len(text) + 1):
        (tmp_path / LOG).write_bytes(text[:end])
        resumed = TrialLog(search, tmp_path)
        n = len(resumed.trials)
        assert [t.params for t in resumed.trials] == params[:n] and n == max(text[:end].count(b"\n") - 1, 0)
        if end and not text[:end].count(b"\n"):
            continue  # even the first line is cut off
        for p in params[n:]:
            resumed.add(p)
        assert (tmp_path / LOG).read_bytes() == text or not end


def test_a_longer_search_continues_and_another_one_is_refused(tmp_path: Path, fake: Any, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["search", str(write(tmp_path, trials=3)), "--out", str(out)]) == 0
    before = lines(out)
    assert main(["search", str(write(tmp_path, trials=5)), "--out", str(out)]) == 0
    assert lines(out)[:3] == before and len(lines(out)) == 5 and set(tries(out).values()) == {1}
    for changes, name in (({"seed": 1}, "seed"), ({"space": {LR: [0.1, 0.2]}}, "space"), ({"mode": "min"}, "mode")):
        assert main(["search", str(write(tmp_path, **changes)), "--out", str(out)]) == 2
        assert f"trials of another search (changed: {name})" in capsys.readouterr().err
    assert main(["search", str(write(tmp_path)), "--out", str(out), "--trainer.max_epochs=2"]) == 2
    assert "changed: base or options" in capsys.readouterr().err


def test_settings_proposed_again_share_the_runs(tmp_path: Path, fake: Any) -> None:
    file, out = write(tmp_path, space={LR: [0.1, 0.3]}, sampler="random", trials=8), tmp_path / "out"
    assert main(["search", str(file), "--out", str(out), "--jobs", "2"]) == 0
    assert len(lines(out)) == 8 and len(tries(out)) == 2 and set(tries(out).values()) == {1}
    assert json.loads((out / "report.json").read_text())["trials"]["complete"] == 8


def test_failed_trials_are_retried_and_reported(tmp_path: Path, fake: Any, capsys: Any) -> None:
    file, out = write(tmp_path, trials=4, space={LR: {"log": [0.01, 0.5]}}), tmp_path / "out"
    fake({"trial-001/seed-0": ["failed", "complete"], "trial-002/seed-0": ["failed"]})
    assert main(["search", str(file), "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "1 trial failed" in printed and "trial 2: as requested (see" in printed
    assert tries(out)["trial-001/seed-0"] == tries(out)["trial-002/seed-0"] == 2
    fake({})
    assert main(["search", str(file), "--out", str(out)]) == 0, "the failed trial runs again"


def test_a_search_in_which_everything_fails_ends_early(tmp_path: Path, fake: Any, capsys: Any) -> None:
    file, out = write(tmp_path, trials=50, space={LR: {"log": [0.01, 0.5]}}), tmp_path / "out"
    fake({f"trial-{i:03}/seed-0": ["usage"] for i in range(50)})
    assert main(["search", str(file), "--out", str(out)]) == 1
    assert len(lines(out)) == run.FAILURES
    assert "reslab: data: no such folder" in capsys.readouterr().out


def test_no_trial_starts_after_the_time_is_spent(tmp_path: Path, fake: Any) -> None:
    file, out = write(tmp_path, trials=50, minutes=0.25 / 60), tmp_path / "out"  # a fake run states 0.1 s
    assert main(["search", str(file), "--out", str(out)]) == 0
    assert len(lines(out)) == 3
    assert main(["search", str(file), "--out", str(out)]) == 0
    assert len(lines(out)) == 3, "the time of earlier attempts counts"


def test_best_are_different_settings_in_the_order_of_the_mode(tmp_path: Path) -> None:
    trials = [Trial(i, {LR: x}, f"trial-{x}") for i, x in enumerate((0.1, 0.2, 0.1, 0.3))]
    results = [Result(t, "complete", v) for t, v in zip(trials, (0.5, 0.9, 0.5, 0.5), strict=True)]
    for mode, order in (("max", [1, 0, 3]), ("min", [0, 3, 1])):
        assert [r.trial.number for r in best_first(read_search(write(tmp_path, mode=mode)), results)] == order


@pytest.mark.slow
def test_killed_search_of_real_runs_resumes(tmp_path: Path) -> None:
    file, out = write(tmp_path, trials=3, space={LR: {"log": [0.05, 0.5]}}), tmp_path / "out"
    command = [sys.executable, "-m", "reslab", "search", str(file), "--out", str(out), "--trainer.max_epochs=2",
               "--trainer.accelerator=cpu"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (out / "trial-001/seed-0/manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line["trial"] for line in lines(out)] == [0, 1, 2]
    for i in range(3):
        results = manifest(out / f"trial-{i:03}/seed-0")["results"]
        assert "val/acc" in results and "test/acc" not in results
