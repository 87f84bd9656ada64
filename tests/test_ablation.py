"""Studies: reading and checking the file; running, killing and resuming their cells."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from reslab.ablation import launch
from reslab.ablation.cells import cells, states
from reslab.ablation.statistics import min_detectable_delta, seeds_needed
from reslab.ablation.study import read_study
from reslab.ablation.study_file import KEYS
from reslab.cli import main
from reslab.config import Experiment
from reslab.errors import UserError
from reslab.host import CONFIGS
from reslab.resolve import Loader, check_key, full_key, merge, with_defaults
from reslab.signatures import ROOTS, parameters
from reslab.training import Classifier
from runner import manifest
from studies import make_study, run_study
from test_tracking import records

FAKE = Path(__file__).with_name("fake_fit.py")
STUDIES = sorted((CONFIGS / "ablation").glob("*.yaml"))
SHORTCUT = "model.net.init_args.shortcut"
PLAIN: dict = {
    "question": "Do shortcuts help?",
    "base": [str(CONFIGS / "experiment/digits.yaml")],
    "baseline": "A",
    "margin": 0.01,
    "arms": {"A": {}, "none": {SHORTCUT: "none"}},
    "seeds": [0, 1],
}
CROPS: dict = {"data.augment.crop_padding": [0, 1], SHORTCUT: {"with": "A", "without": "none"}}


def write(folder: Path, **changes: object) -> Path:
    """Write a study file: PLAIN with some keys changed, or removed if they are None."""
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in {**PLAIN, **changes}.items() if v is not None}, sort_keys=False))
    return file


# Reading


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in STUDIES])
def test_shipped_study_is_valid(path: Path) -> None:
    study = read_study(path)
    assert study.name == path.stem
    assert len(study.seeds) >= 3, "fewer seeds give no verdict"
    assert study.margin
    assert set(launch.typed_configs(study)) == set(study.arms)


@pytest.mark.parametrize(
    ("files", "options"),
    [
        (["experiment/digits.yaml"], []),
        (["experiment/cifar10_resnet20.yaml", "recipe/onecycle.yaml", "trainer/cpu.yaml"], ["--trainer.max_epochs=3"]),
        (["experiment/cifar10_resnet18.yaml", "recipe/adamw.yaml", "logger/wandb.yaml"], []),
        (["experiment/digits.yaml", "recipe/ema.yaml"], ["--model.net=NET", "--model.optimizer.init_args.lr=1e-2"]),
    ],
)
def test_arm_equals_the_config_that_fit_resolves(tmp_path: Path, files: list[str], options: list[str]) -> None:
    options = [option.replace("NET", str(CONFIGS / "net/resnet20.yaml")) for option in options]
    stacked = [word for file in files for word in ("--config", str(CONFIGS / file))]
    ours = read_study(write(tmp_path, base=[str(CONFIGS / file) for file in files], baseline="B", arms={
        "A": {SHORTCUT: "C"}, "B": {"data.split_seed": 3},
    }), options)  # fmt: skip
    by_fit = yaml.safe_load(Experiment([*stacked, *options, "--data.split_seed=3"]).dump())
    by_us = yaml.safe_load(launch.typed_configs(ours)["B"])
    run = by_us.pop("run"), by_fit.pop("run")
    assert by_us == by_fit
    assert run[0]["group"] == ours.name and run[0]["job_type"] == "B"


def test_changes_include_defaults_and_classes_from_files(tmp_path: Path) -> None:
    deeper = str(CONFIGS / "net/resnet20.yaml")
    adamw = {"class_path": "AdamW", "init_args": {"lr": 0.001}}
    arms = {"A": {}, "deep": {"model.net": deeper}, "adamw": {"model.optimizer": adamw}, "zero": {
        "model.net.init_args.zero_init": True
    }}  # fmt: skip
    study = read_study(write(tmp_path, arms=arms))
    assert study.arms["deep"].changes == (("model.net.init_args.layers", [1, 1, 1], [3, 3, 3]),)
    assert study.arms["zero"].changes == (("model.net.init_args.zero_init", False, True),)
    changed = {key: (there, here) for key, there, here in study.arms["adamw"].changes}
    assert changed["model.optimizer.class_path"] == ("SGD", "AdamW")
    assert (
        study.arms["adamw"].config["model"]["optimizer"]["init_args"]["weight_decay"] == 5e-4
    )  # both classes accept it


def test_factors_make_the_full_grid_except_exclusions(tmp_path: Path) -> None:
    first = {"data.augment.crop_padding": 0, SHORTCUT: "with"}
    study = read_study(write(tmp_path, arms=None, factors=CROPS, baseline=first))
    assert list(study.arms) == [
        f"crop_padding={crop}+shortcut={kind}" for crop in (0, 1) for kind in ("with", "without")
    ]
    assert study.baseline == "crop_padding=0+shortcut=with"
    assert study.arms["crop_padding=1+shortcut=without"].levels == {
        "data.augment.crop_padding": "1",
        SHORTCUT: "without",
    }
    holed = write(tmp_path, arms=None, factors=CROPS, baseline=first, exclude=[{SHORTCUT: "without", **{
        "data.augment.crop_padding": 1
    }}])  # fmt: skip
    assert len(read_study(holed).arms) == 3


def test_hash_covers_what_affects_the_results(tmp_path: Path) -> None:
    plain = read_study(write(tmp_path)).hash
    assert read_study(write(tmp_path, question="Do they?", minutes=3)).hash == plain
    assert read_study(write(tmp_path), ["--data.root", "elsewhere"]).hash == plain
    assert read_study(write(tmp_path, seeds=[0, 1, 2])).hash != plain
    assert read_study(write(tmp_path), ["--trainer.max_epochs=2"]).hash != plain
    for keys in ({"test": "pooled"}, {"sd": 0.002}, {"seeds": None, "looks": [3]}):
        assert read_study(write(tmp_path, **keys)).hash != plain


MISTAKES = [
    (
        {"arms": {"A": {}, "B": {"model.net.init_args.shortcutt": "none"}}},
        "arm B",
        "nearest: model.net.init_args.short",
    ),
    ({"arms": {"A": {}, "B": {"model.optimizer.init_args.momentun": 0}}}, "arm B", "optimizer.init_args.momentum"),
    ({"arms": {"A": {}, "B": {"trainer.max_epoch": 3}}}, "arm B", "trainer.max_epochs"),
    ({"arms": {"A": {}, "B": {"data.augment.crop": 3}}}, "arm B", "data.augment.crop_padding"),
    ({"arms": {"A": {}, "B": {"seed_everything": 3}}}, "arm B", "cannot change seed_everything"),
    ({"arms": {"A": {}, "B": {SHORTCUT: "A"}}}, "arm B is the same as A", "changes nothing"),
    ({"arms": {"A": {}, "B": {SHORTCUT: "C"}, "D": {SHORTCUT: "C"}}}, "arm D is the same as B", "study.yaml"),
    ({"arms": {"A": {}, "B": {"data.split_seed": 0}}}, "arm B is the same as A", ""),
    ({"arms": {"A": {}, "a/b": {SHORTCUT: "C"}}}, "'a/b'", "not a valid directory name"),
    ({"baseline": "Aa"}, "baseline 'Aa' is not an arm", "A"),
    ({"seeds": []}, "seeds must be", "seeds: 5 (got [])"),
    ({"seeds": 0}, "seeds must be", "seeds: 5 (got 0)"),
    ({"seeds": True}, "seeds must be", "seeds: 5 (got True)"),
    ({"seeds": [0, 0]}, "seeds must be", "different integers"),
    ({"seeds": [0, "x"]}, "seeds must be", "'x'"),
    ({"seeds": None}, "seeds is missing", "seeds: 5"),
    ({"seeds": None, "looks": [2, 5]}, "looks must be a list of increasing integers of at least 3", "looks: [3, 5, 8]"),
    ({"seeds": None, "looks": [5, 3]}, "looks must be", "got [5, 3]"),
    ({"seeds": None, "looks": [3, 3]}, "looks must be", "got [3, 3]"),
    ({"seeds": None, "looks": []}, "looks must be", "got []"),
    ({"seeds": None, "looks": 5}, "looks must be", "got 5"),
    ({"seeds": None, "looks": [3, 5], "test": "pooled"}, "test: pooled allows no planned looks", "use test: paired"),
    ({"looks": [3, 5]}, "looks ends at 5 seeds, but seeds has 2", "leave seeds out"),
    ({"test": "welch"}, "test must be paired or pooled", "test: paired"),
    ({"sd": 0}, "sd must be a number above 0", "sd: 0.002"),
    ({"sd": float("inf")}, "sd must be a number above 0", "inf"),
    ({"minutes": -1}, "minutes must be a number above 0", "minutes: 12"),
    ({"base": "experiment/digits.yaml"}, "base must be a list: base: [configs/experiment/digits.yaml]", "study.yaml"),
    ({"base": None}, "base is missing: base: [configs/experiment/digits.yaml]", "study.yaml"),
    ({"baseline": None}, "baseline is missing: baseline: A", ""),
    ({"baseline": ["A"]}, "baseline must be the name of an arm", "baseline: A"),
    ({"name": "a/b"}, "name must be a directory name", "name: shortcuts"),
    ({"mode": "most"}, "mode must be max or min", "mode: max"),
    ({"arms": ["A", "B"]}, "arms must be names with dotted keys and values", "arms: {A: {}"),
    ({"arms": {"A": {}, "B": 3}}, "arm B must hold keys and values: B: {model.optimizer.lr: 0.2}", "got 3"),
    ({"arms": {"A": {}, False: {SHORTCUT: "C"}}}, 'write "false"', "line "),
    ({"arms": {"A": {}, "B": {SHORTCUT: "C", "model.net.shortcut": "B"}}}, "are the same key", "arm B"),
    ({"arms": None, "factors": {3: [1, 2]}}, "3: no such key", ""),
    ({"arms": None, "factors": {SHORTCUT: ["A", "C"]}, "exclude": [{}]}, "nothing to compare", "second arm"),
    ({"exclude": "x"}, "exclude must be a list of factors and values", "exclude: [{"),
    ({"metric": "accuracy"}, "metric must be train/NAME, val/NAME or test/NAME", "'accuracy'"),
    ({"metric": "test/"}, "metric must be train/NAME, val/NAME or test/NAME", "'test/'"),
    ({"margin": 0}, "margin must be a number above 0", "margin: 0.002 (got 0)"),
    ({"test_weights": "final"}, "test_weights", "last or best"),
    ({"sedes": [1]}, "'sedes'", "nearest: seeds"),
    ({"question": 3}, "question must be text", "question: Which kind"),
    ({"arms": {"A": {}}}, "nothing to compare", "second arm"),
    ({"base": ["none.yaml"]}, "no config file", "none.yaml"),
    ({"base": ["digit"]}, "no config file", "nearest experiments: digits"),
    ({"factors": {SHORTCUT: ["A", "C"]}}, "either arms or factors", ""),
    ({"arms": None, "factors": {SHORTCUT: ["A"]}}, "at least two values", SHORTCUT),
    ({"arms": None, "factors": {SHORTCUT: ["A", "C"]}, "exclude": [{"x": 1}]}, "'x' is not a factor", SHORTCUT),
]


@pytest.mark.parametrize(("changes", "message", "more"), MISTAKES, ids=[str(message) for _, message, _ in MISTAKES])
def test_mistake_in_a_study_file_is_named(tmp_path: Path, changes: dict, message: str, more: str) -> None:
    with pytest.raises(UserError) as caught:
        read_study(write(tmp_path, **changes))
    assert message in str(caught.value)
    assert more in str(caught.value)
    assert "study.yaml" in str(caught.value)


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path, base="digits", seeds=[0, 0], margin="small", tset="pooled", baseline="C", metric="accuracy",
        arms={"A": {}, "B": 3, "a/b": {}, "lr": {"model.optimizer.lrr": 1}},
    )  # fmt: skip
    with file.open("a") as text:
        text.write("question: Twice?\n")
    with pytest.raises(UserError) as caught:
        read_study(file)
    first, *mistakes = str(caught.value).split("\n  ")
    assert first == f"{file} has 10 mistakes:", mistakes
    for start in ("line 16: question appears twice", "base must be", "seeds must be", "margin must be",
                  "no such key 'tset'; nearest: test", "metric must be", "arm B must hold", "'a/b' is not a valid",
                  "the baseline 'C' is not an arm", "arm lr: model.optimizer.init_args.lrr: no"):  # fmt: skip
        assert [mistake for mistake in mistakes if mistake.startswith(start)], start


@pytest.mark.parametrize(
    "content", [b"", b"- 1", b"name: \xff", b"minutes: 2020-13-45", b"a: [", b"? [1]\n: 2", b"name: {"]
)
def test_file_that_is_no_study_gives_one_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"study\.yaml "):
        read_study(tmp_path / "study.yaml")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.sampled_from(["", "A", "x.yaml", SHORTCUT]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["A", "none", SHORTCUT, "model", "model.net", "run.dir", 3, ""]), inner, max_size=3
    ),
    max_leaves=6,
)  # fmt: skip


@given(changes=st.dictionaries(st.sampled_from(sorted(KEYS)), VALUES, min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_any_content_gives_a_study_or_a_message(tmp_path_factory: pytest.TempPathFactory, changes: dict) -> None:
    try:
        study = read_study(write(tmp_path_factory.mktemp("study"), **changes))
    except UserError as error:
        assert "study.yaml" in str(error)
    else:
        assert study.baseline in study.arms and len(study.arms) > 1 and study.hash


@pytest.mark.parametrize(
    ("changes", "seeds", "looks"),
    [
        ({"seeds": 5}, [0, 1, 2, 3, 4], None),
        ({"seeds": [4, 2]}, [4, 2], None),
        ({"seeds": None, "looks": [3, 5]}, [0, 1, 2, 3, 4], [3, 5]),
        ({"seeds": [9, 8, 7, 6], "looks": [3, 4]}, [9, 8, 7, 6], [3, 4]),
    ],
)
def test_seeds_are_a_number_a_list_or_follow_from_looks(
    tmp_path: Path, changes: dict, seeds: list[int], looks: list[int] | None
) -> None:
    study = read_study(write(tmp_path, **changes))
    assert (study.seeds, study.looks) == (seeds, looks)
    assert (study.about()["seeds"], study.about()["looks"]) == (seeds, looks)


@pytest.mark.parametrize(
    ("arms", "question"),
    [
        ({"A": {}, "none": {SHORTCUT: "none"}}, "Does none differ from A in val/loss?"),
        ({"A": {}, "B": {SHORTCUT: "B"}, "C": {SHORTCUT: "C"}}, "Does any arm differ from A in val/loss?"),
    ],
)
def test_question_is_made_from_the_arms(tmp_path: Path, arms: dict, question: str) -> None:
    assert read_study(write(tmp_path, question=None, metric="val/loss", arms=arms)).question == question


@pytest.mark.parametrize("base", ["digits", "configs/experiment/digits.yaml"])
def test_base_is_an_experiment_or_a_file_of_the_repository(tmp_path: Path, base: str) -> None:
    assert read_study(write(tmp_path, base=[base])).hash == read_study(write(tmp_path)).hash


def test_baseline_may_be_a_number(tmp_path: Path) -> None:
    assert read_study(write(tmp_path, baseline=0.1, arms={0.1: {}, 0.2: {SHORTCUT: "C"}})).baseline == "0.1"


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("model.net.shortcut", SHORTCUT),
        ("model.optimizer.lr", "model.optimizer.init_args.lr"),
        ("model.objective.label_smoothing", "model.objective.init_args.label_smoothing"),
        ("data.augment.flip", "data.augment.flip"),
        ("model.optimizer.class_path", "model.optimizer.class_path"),
        ("model.optimizer", "model.optimizer"),
        ("model.net.no_such_key", "model.net.init_args.no_such_key"),
    ],
)
def test_keys_may_leave_out_init_args(tmp_path: Path, short: str, full: str) -> None:
    assert full_key(short, read_study(write(tmp_path)).arms["A"].config) == full
    assert full_key(full, read_study(write(tmp_path)).arms["A"].config) == full


def test_spelling_of_keys_changes_nothing(tmp_path: Path) -> None:
    def hashed(key: str, lr: str, *options: str) -> str:
        arms = {"A": {}, "none": {key: "none"}}
        return read_study(write(tmp_path, arms=arms, base=[*PLAIN["base"], {lr: 0.3}]), options).hash

    lr = "model.optimizer.init_args.lr"
    assert hashed(SHORTCUT, lr) == hashed("model.net.shortcut", "model.optimizer.lr")
    assert hashed(SHORTCUT, lr, "--model.net.width=8") == hashed(SHORTCUT, lr, "--model.net.init_args.width=8")
    factors = {"model.net.shortcut": ["A", "none"], "model.optimizer.lr": [0.1, 0.2]}
    grid = write(tmp_path, arms=None, factors=factors, baseline={SHORTCUT: "A", "model.optimizer.init_args.lr": 0.1})
    assert read_study(grid).baseline == "shortcut=A+lr=0.1"


def test_ambiguous_key_is_reported_with_both(module: None) -> None:
    config = {"model": {"loss": {"class_path": "mine.model.Loss", "dict_kwargs": {"smoothing": 1, "x": 2}}}}
    with pytest.raises(
        UserError, match=r"ambiguous: model\.loss\.init_args\.smoothing or model\.loss\.dict_kwargs\.smo"
    ):
        full_key("model.loss.smoothing", config)
    assert full_key("model.loss.x", config) == "model.loss.dict_kwargs.x"
    assert full_key("model.loss.smoothing", {"model": {}}) == "model.loss.init_args.smoothing"  # the default class


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "3"], "--minutes: minutes: no such key"),
        (["--trainer.max_epoch=3"], "nearest: trainer.max_epochs"),
        (["--trainer.max_epochs", "[1"], "is not valid YAML"),
        (["--trainer.max_epochs", "2020-13-45"], "is not valid YAML"),
        (["--model.net.shortcut", "C"], "would apply to all arms, but they differ"),
        (["3"], "'3' is not an option"),
    ],
)
def test_wrong_option_is_reported(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_study(write(tmp_path), options)


@pytest.mark.parametrize(
    ("value", "named"), [("nothing", "shortcut"), (7, "shortcut")], ids=["no such kind", "a number"]
)
def test_invalid_value_is_reported_before_the_first_cell(tmp_path: Path, value: object, named: str) -> None:
    study = read_study(write(tmp_path, arms={"A": {}, "B": {SHORTCUT: value}}))
    with pytest.raises(UserError, match=rf"arm B: .*{named}"):
        launch.run_local(study, tmp_path / "out", launch.LocalResources())
    assert not list((tmp_path / "out").glob("*/seed-*"))


def test_unlogged_metric_is_reported_before_the_first_cell(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, metric="test/accuracy"))
    with pytest.raises(UserError, match=r"arm A: metric 'test/accuracy' is not logged; nearest: test/acc"):
        launch.run_local(study, tmp_path / "out", launch.LocalResources())
    assert not list((tmp_path / "out").glob("*/seed-*"))


class Marked(Classifier):
    """A classifier with a metric of the user's."""

    @property
    def metric_names(self) -> list[str]:
        return [*super().metric_names, "test/f1"]


def test_study_accepts_any_metric_that_the_model_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study(write(tmp_path, metric="test/f1"))
    with pytest.raises(UserError, match="'test/f1' is not logged"):
        launch.typed_configs(study)
    monkeypatch.setattr("reslab.config.Classifier", Marked)
    assert set(launch.typed_configs(study)) == {"A", "none"}


def test_missing_teacher_is_reported_before_the_first_cell(tmp_path: Path) -> None:
    distillation = {"class_path": "Distillation", "init_args": {"teacher": str(tmp_path / "nowhere")}}
    study = read_study(write(tmp_path, arms={"A": {}, "taught": {"model.objective": distillation}}))
    assert set(launch.typed_configs(study)) == {"A", "taught"}  # a plan needs no teacher yet
    with pytest.raises(UserError, match=r"arm taught: .*nowhere is not a run directory"):
        launch.prepare(study, tmp_path / "out")


def test_override_of_a_key_that_arms_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would apply to all arms, but they differ"):
        read_study(write(tmp_path), [f"--{SHORTCUT}", "C"])


def test_study_is_found_by_name_and_unknown_names_get_suggestions() -> None:
    assert read_study("digits_shortcuts").path == CONFIGS / "ablation/digits_shortcuts.yaml"
    with pytest.raises(UserError, match="digits_shortcuts"):
        read_study("digit_shortcut")


# New study files


def new(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    status = main(["ablate", "new", *map(str, words)])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_new_study_in_the_configs_is_called_by_its_name(tmp_path: Path, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    status, printed = new(capsys, "mine", "--base", "digits", "--out", "configs/ablation/mine.yaml")
    assert (status, printed) == (0, "wrote configs/ablation/mine.yaml; next: reslab ablate plan mine\n")
    assert "#   reslab ablate run mine " in Path("configs/ablation/mine.yaml").read_text()
    assert main(["ablate", "plan", "mine"]) == 0


@pytest.mark.parametrize(
    ("options", "arms"),
    [
        (["--base", "digits"], {"baseline": {}, "double_lr": {"model.optimizer.lr": 0.2}}),
        (["--base", CONFIGS / "experiment/digits.yaml", "--arm", f"B:{SHORTCUT}=none"], {"B": {SHORTCUT: "none"}}),
        (
            ["--base", "cifar10_resnet20", "--base", "configs/trainer/cpu.yaml",
             "--arm", "no:model.net.layers=[1, 1, 1]",
             "--arm", "b:model.optimizer.lr=1e-3", "--arm", "b:model.objective.label_smoothing=0.1"],
            {"no": {"model.net.layers": [1, 1, 1]},
             "b": {"model.optimizer.lr": 0.001, "model.objective.label_smoothing": 0.1}},
        ),
        (["--base", "digits", "--arm", "x:model.ema_decay=0.9"], {"x": {"model.ema_decay": 0.9}}),
    ],
)  # fmt: skip
def test_new_study_passes_plan_at_once(tmp_path: Path, capsys, options: list, arms: dict) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "new/mine.yaml"
    status, printed = new(capsys, "mine", "--out", file, *options)
    assert (status, printed) == (0, f"wrote {file}; next: reslab ablate plan {file}\n")
    assert main(["ablate", "plan", str(file)]) == 0
    text = file.read_text()
    content = yaml.load(text, Loader)
    assert {**content["arms"], **arms} == content["arms"]
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 100
    for key in KEYS:  # each with a line of explanation above
        assert re.search(rf"\n# [A-Z][^\n]+\.\n(# )?{key}:", text), key
    content_before = file.read_bytes()
    status, printed = new(capsys, "mine", "--out", file, *options)
    assert status == 2 and f"{file} exists" in printed and file.read_bytes() == content_before


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ("base", "baseline", "arms", "seeds")])
def test_optional_key_of_a_new_study_works_without_its_hash(tmp_path: Path, capsys, key: str) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "mine.yaml"
    new(capsys, "mine", "--base", "digits", "--out", file)
    text = file.read_text().replace(f"# {key}: ", f"{key}: ")
    if key in ("factors", "exclude"):  # instead of the arms
        text = re.sub(r"\narms:\n(  .*\n)+", "\n", text).replace("# factors: ", "factors: ")
        text = text.replace("baseline: baseline", "baseline: {model.net.shortcut: A}")
        text = text.replace("[A, none]", "[A, B, none]")
    file.write_text(text.replace("seeds: 5\n", "\n") if key in ("looks", "folds") else text)
    assert read_study(file).name == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mine", "--base", "digts"], "nearest experiments: digits"),
        (["my/mine", "--base", "digits"], "'my/mine' is not a valid directory name"),
        (["mine", "--base", "digits", "--arm", "none"], "--arm must be NAME:KEY=VALUE, got 'none'"),
        (["mine", "--base", "digits", "--arm", "a:model.net.shorcut=none"], "nearest: model.net.init_args.shortcut"),
        (["mine", "--base", "digits", "--arm", "baseline:a=b"], "the arm baseline is the unchanged base"),
        (["mine", "--base", "digits", "--arm", "a:model.net.shortcut=[1"], "not valid YAML"),
        (["mine", "--base", "digits", "--arm", "a:model.net.shortcut=A"], "arm a is the same as baseline"),
        (["mine", "--base", "digits", "--jobs", "2"], "unrecognized arguments: --jobs 2"),
    ],
)
def test_invalid_new_study_is_not_written(tmp_path: Path, capsys, words: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    status, printed = new(capsys, *words, "--out", tmp_path / "mine.yaml")
    assert status == 2 and message in printed
    assert not (tmp_path / "mine.yaml").exists()


def test_base_of_a_new_study_is_relative_to_its_file(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    optimizer = {"class_path": "SGD", "init_args": {"lr": 0.1}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": {"optimizer": optimizer}}))
    assert new(capsys, "mine", "--base", tmp_path / "mine.yaml", "--out", tmp_path / "a/b/c/study.yaml")[0] == 0
    assert "\nbase: [../../../mine.yaml]\n" in (tmp_path / "a/b/c/study.yaml").read_text()


def test_name_of_a_new_study_may_differ_from_its_file(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    new(capsys, "mine", "--base", "digits", "--out", tmp_path / "yours.yaml")
    assert read_study(tmp_path / "yours.yaml").name == "mine"


# Power


def plan_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["ablate", "plan", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_plan_states_what_the_seeds_can_find(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    arms = {"A": {}, "B": {SHORTCUT: "B"}, "none": {SHORTCUT: "none"}}
    plan = plan_of(capsys, write(tmp_path, seeds=5, arms=arms, minutes=3), "--find", 0.003)
    detectable = 100 * min_detectable_delta(0.002 * 2**0.5, 5, 0.05 / 2)
    assert f"finds      differences of {detectable:.3g} points at 80 % power: 5 seeds, 2 comparisons (Holm)" in plan
    assert "√2 × 0.2 points if arms do not correlate; the default for accuracies" in plan
    n = seeds_needed(0.002 * 2**0.5, 0.003, 0.05 / 2)
    assert f"to find 0.3 points: {n} seeds per arm, {3 * n} cells, 1 h 48 min one after the other" in plan
    assert "equivalence within ±1 points: 4 seeds per arm" in plan
    stated = plan_of(capsys, write(tmp_path, seeds=5, sd=0.004))
    assert "sd of a paired difference: 0.566 points, √2 × 0.4 points if arms do not correlate; as stated" in stated
    assert "unknown: set `sd`" in plan_of(capsys, write(tmp_path, metric="test/loss"))
    pooled = plan_of(capsys, write(tmp_path, seeds=5, test="pooled"))
    assert "test       pooled, judged once, after all seeds" in pooled


def test_plan_of_looks_states_expected_seeds_and_hours(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    plan = plan_of(capsys, write(tmp_path, seeds=None, looks=[3, 8], minutes=3), "--find", 0.03)
    assert "test       paired, judged after 3, 8 seeds" in plan and "× at most 8 seeds" in plan
    assert "6 cells to the next look, 18 min 00 s one after the other; at most 16, 48 min 00 s" in plan
    rows = {row: float(seeds) for row, seeds in re.findall(r"(no difference|\d sd): ([\d.]+) seeds per arm", plan)}
    assert set(rows) == {"no difference", "1 sd", "2 sd", "3 sd"} and all(3 <= n <= 8 for n in rows.values())
    power, seeds = re.search(r"to find 3 points: (\d+) % power, ([\d.]+) seeds", plan).groups()  # type: ignore[union-attr]
    assert int(power) >= 80 and 3 <= float(seeds) <= 8


def test_power_is_measured_on_finished_cells_of_the_same_config(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    study, out = make_study(tmp_path, ("A", "B")), tmp_path / "out"
    run_study(study, out, {"A": 0.95, "B": 0.94})
    by_arm = [
        [manifest(c.folder)["results"]["test/acc"] for c in cells(study, out) if c.arm == arm] for arm in ("A", "B")
    ]
    sd = statistics.stdev(b - a for a, b in zip(*by_arm, strict=True))
    words = study.path, "--out", out
    assert f"sd of a paired difference: {100 * sd:.3g} points, measured on the finished cells" in plan_of(
        capsys, *words
    )
    assert "the default for accuracies" in plan_of(capsys, *words, "--trainer.max_epochs=99")
    shutil.rmtree(out / "B")
    sd = 2**0.5 * statistics.stdev(by_arm[0])
    assert f"difference: {100 * sd:.3g} points, √2 × that of the finished baseline cells" in plan_of(capsys, *words)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x"])
def test_find_requires_a_positive_number(tmp_path: Path, value: str, capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as stop:
        main(["ablate", "plan", str(write(tmp_path)), f"--find={value}"])
    assert stop.value.code == 2 and "invalid positive value" in capsys.readouterr().err


# Resolving groups and classes


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package `mine` with classes as a user writes them; nothing imports it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("")
    (tmp_path / "mine/options.py").write_text(
        "from dataclasses import dataclass, field\n\n"
        "@dataclass(frozen=True)\nclass Inner:\n    depth: int = 2\n\n"
        "@dataclass\nclass Options:\n    rate: float = 0.1\n    inner: Inner = field(default_factory=Inner)\n"
    )
    (tmp_path / "mine/model.py").write_text(
        "import torch_that_does_not_exist\nfrom .options import Options\n\n"
        "class Loss:\n    def __init__(self, smoothing: float = 0.0): ...\n\n"
        "class Other:\n    def __init__(self, smoothing: float = 0.0, threshold: float = 0.5): ...\n\n"
        "class Model:\n    def __init__(self, loss: Loss = Loss(), options: Options = Options(),"
        " maybe: Options | None = None, **kwargs): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(ROOTS, "model", "mine.model.Model")
    parameters.cache_clear()
    yield
    parameters.cache_clear()


@pytest.mark.parametrize(
    "key",
    [
        "model.options.rate",
        "model.options.inner.depth",
        "model.maybe.rate",
        "model.loss.init_args.smoothing",
        "model.loss.dict_kwargs.anything.at_all",
        "data.augment.flip",
    ],
)
def test_key_of_a_nested_group_is_accepted(module: None, key: str) -> None:
    check_key(key, {"model": {"loss": {"class_path": "mine.model.Loss"}}})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("model.option.rate", "model.options"),
        ("model.options.rat", "model.options.rate"),
        ("model.options.inner.dept", "model.options.inner.depth"),
        ("model.loss.init_args.smooth", "model.loss.init_args.smoothing"),
        ("model.loss.init_arg", "model.loss.init_args"),
        ("data.augment.flipp", "data.augment.flip"),
    ],
)
def test_wrong_key_of_a_nested_group_gets_the_nearest(module: None, key: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: no such key; nearest: .*{nearest}"):
        check_key(key, {"model": {"loss": {"class_path": "mine.model.Loss"}}})


@pytest.mark.parametrize("class_path", ["nowhere.Loss", "mine.model.Nothing", "Nothing", 3, None])
def test_unknown_class_accepts_any_key(module: None, class_path: object) -> None:
    config = {"model": {"loss": {"class_path": class_path, "init_args": {"x": 1}}}}
    check_key("model.loss.init_args.x", config)
    assert with_defaults(config)["model"]["loss"]["init_args"] == {"x": 1}
    assert merge(config, {"model": {"loss": {"class_path": "mine.model.Other"}}})["model"]["loss"]["init_args"] == {}


def test_missing_root_class_accepts_any_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROOTS, "model", "reslab.training.missing.Model")
    parameters.cache_clear()
    check_key("model.objective.init_args.label_smoothing", {"model": {"objective": {}}})
    parameters.cache_clear()


def test_defaults_fill_groups_and_classes_that_the_config_omits(module: None) -> None:
    model = with_defaults({"model": {"options": {"rate": 0.5}}})["model"]
    assert model["options"] == {"rate": 0.5, "inner": {"depth": 2}}
    assert model["loss"]["class_path"] == "Loss" and model["maybe"] is None


def test_class_change_keeps_common_arguments_only() -> None:
    old = {"class_path": "SGD", "init_args": {"lr": 0.1, "momentum": 0.9}, "dict_kwargs": {"x": 1}}
    new = merge(old, {"class_path": "AdamW", "init_args": {"weight_decay": 0.01}})
    assert new == {"class_path": "AdamW", "init_args": {"lr": 0.1, "weight_decay": 0.01}}
    assert merge(old, {"dict_kwargs": {"y": 2}})["dict_kwargs"] == {"x": 1, "y": 2}


# Running, with a fake `fit`


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Set the outcomes of cells instead of training them: fake({cell name: [outcome, …]})."""
    real = launch.command
    monkeypatch.setattr(launch, "command", lambda cell: [sys.executable, str(FAKE), *real(cell)[3:]])
    monkeypatch.setattr(launch, "is_supported", lambda: False)  # a fork would run the real one
    monkeypatch.setattr(launch, "POLL", 0.01)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda acts: monkeypatch.setenv("FAKE", json.dumps(acts))


def tries(out: Path) -> dict[str, int]:
    return {"/".join(p.parts[-3:-1]): len(p.read_text().split()) for p in out.glob("*/seed-*/tries")}


def test_failed_cell_is_retried_and_then_reported(tmp_path: Path, fake, capfd) -> None:  # type: ignore[no-untyped-def]
    fake({"A/seed-0": ["failed", "complete"], "none/seed-0": ["failed"], "none/seed-1": ["usage"], "A/seed-1": ["die"]})
    study, out = read_study(write(tmp_path)), tmp_path / "out"
    assert launch.run_local(study, out, launch.LocalResources(jobs=2), retries=2) == 1
    assert tries(out) == {"A/seed-0": 2, "none/seed-0": 3, "none/seed-1": 1, "A/seed-1": 3}
    ended = {s.cell.name: (s.status, s.detail) for s in states(study, out)}
    assert ended["A/seed-0"] == ("complete", "")
    assert ended["none/seed-0"] == ("failed", "as requested")
    assert ended["none/seed-1"] == ("missing", "reslab: data: no such folder")
    assert ended["A/seed-1"][0] == "preempted" and "killed" in ended["A/seed-1"][1]
    printed = capfd.readouterr().out
    assert "A/seed-0: failed: as requested; will be retried" in printed
    assert "[1/4]" in printed
    assert "outcome of this cell" not in printed and "outcome of this cell" in (out / "A/seed-0/log.txt").read_text()


def test_complete_cells_are_not_run_again(tmp_path: Path, fake) -> None:  # type: ignore[no-untyped-def]
    fake({"none/seed-1": ["diverged", "complete"]})
    study, out = read_study(write(tmp_path)), tmp_path / "out"
    assert launch.run_local(study, out, launch.LocalResources(jobs=4), retries=5) == 1
    assert tries(out)["none/seed-1"] == 1, "a diverged cell would diverge again"
    assert launch.run_local(study, out, launch.LocalResources()) == 0
    assert tries(out) == {"A/seed-0": 1, "A/seed-1": 1, "none/seed-0": 1, "none/seed-1": 2}
    more = read_study(write(tmp_path, seeds=[0, 1, 2]))
    assert launch.run_local(more, out, launch.LocalResources()) == 0
    assert sum(tries(out).values()) == 7


def test_cell_with_a_changed_config_is_never_reused(tmp_path: Path, fake) -> None:  # type: ignore[no-untyped-def]
    fake({})
    study, out = read_study(write(tmp_path)), tmp_path / "out"
    launch.run_local(study, out, launch.LocalResources())
    before = {file: file.read_bytes() for file in out.rglob("*.yaml")}
    other = read_study(write(tmp_path, arms={"A": {}, "none": {SHORTCUT: "C"}}))
    with pytest.raises(UserError, match=r"none/seed-0: .*shortcut is none in the run, C in the plan"):
        launch.run_local(other, out, launch.LocalResources())
    assert {file: file.read_bytes() for file in out.rglob("*.yaml")} == before
    shutil.move(out / "A/seed-0", tmp_path / "kept")
    shutil.copytree(out / "none/seed-0", out / "A/seed-0")
    with pytest.raises(UserError, match="A/seed-0"):
        launch.run_local(study, out, launch.LocalResources())
    assert [s.status for s in states(study, out)] == ["mismatched", "complete", "complete", "complete"]


def test_corrupt_manifest_affects_its_cell_only(tmp_path: Path, fake, capfd) -> None:  # type: ignore[no-untyped-def]
    fake({})
    study, out = read_study(write(tmp_path)), tmp_path / "out"
    (out / "A/seed-1").mkdir(parents=True)
    (out / "A/seed-1/manifest.json").write_text('{"status": "comp')
    assert launch.run_local(study, out, launch.LocalResources()) == 1
    assert tries(out) == {"A/seed-0": 1, "none/seed-0": 1, "none/seed-1": 1}
    [damaged] = [s for s in states(study, out) if s.status != "complete"]
    assert damaged.cell.name == "A/seed-1" and "manifest.json is damaged" in damaged.detail


def test_threads_are_divided_and_a_resumed_cell_keeps_its_count(
    tmp_path: Path, fake, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    fake({"A/seed-0": ["failed", "complete"]})
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(launch, "available_cores", lambda: 8)
    study, out = read_study(write(tmp_path)), tmp_path / "out"
    launch.run_local(study, out, launch.LocalResources(jobs=2), retries=0)
    launch.run_local(study, out, launch.LocalResources(jobs=4), retries=0)
    assert (out / "A/seed-0/tries").read_text().split() == ["4", "4"]


@pytest.mark.parametrize(
    ("resources", "devices", "expected"),
    [
        (launch.LocalResources(), 1, ["0", "1", "2", "3"]),
        (launch.LocalResources(jobs=2), 1, ["0", "1"]),
        (launch.LocalResources(jobs_per_gpu=2), 2, ["0,1", "2,3", "0,1", "2,3"]),
    ],
)
def test_gpus_are_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resources: launch.LocalResources, devices: int, expected: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    study = read_study(write(tmp_path), [f"--trainer.devices={devices}"])
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in resources.slots(study.arms[study.baseline].config)] == expected
    with pytest.raises(UserError, match="--jobs-per-gpu"):
        launch.LocalResources(jobs=9).slots(study.arms[study.baseline].config)


def test_second_run_in_the_same_directory_is_refused(tmp_path: Path, fake) -> None:  # type: ignore[no-untyped-def]
    study, out = read_study(write(tmp_path)), tmp_path / "out"
    out.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl,time; f=open({str(out / '.lock')!r},'a+'); "
         "fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="in use by another run"):
            launch.run_local(study, out, launch.LocalResources())
    finally:
        holder.kill()
        holder.wait()
    fake({})  # the lock died with its process: nothing to clean up
    assert launch.run_local(study, out, launch.LocalResources(jobs=4)) == 0


# Running, from the command line


def ablate(*words: str | Path, **environ: str) -> list[str]:
    return [sys.executable, "-m", "reslab", "ablate", *map(str, words)]


def test_plan_prints_cells_changes_and_hash_without_torch(tmp_path: Path) -> None:
    code = "import sys; from reslab.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    words = ["ablate", "plan", str(write(tmp_path, minutes=3)), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert "2 arms × 2 seeds (0, 1) = 4; 0 done" in done.stdout
    assert "finds      nothing: a verdict requires at least 3 seeds" in done.stdout
    assert f"none  {SHORTCUT}: A → none" in done.stdout
    assert "4 cells to run, 12 min 00 s" in done.stdout
    assert read_study(write(tmp_path, minutes=3)).hash in done.stdout
    assert not (tmp_path / "out").exists()


def test_signal_reaches_the_cells_and_the_next_call_resumes(tmp_path: Path, fake, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    fake({"A/seed-0": ["wait", "complete"], "none/seed-0": ["wait", "complete"]})
    study, out = read_study(write(tmp_path)), tmp_path / "out"

    def interrupt(*args: object) -> None:
        if len(list(out.glob("*/seed-0/manifest.json"))) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("reslab.ablation.progress.StudyProgress.refresh", interrupt)
    assert launch.run_local(study, out, launch.LocalResources(jobs=2)) == 75
    assert {s.status for s in states(study, out)} == {"preempted", "missing"}
    assert launch.run_local(study, out, launch.LocalResources(jobs=2)) in (0, 75)


@pytest.mark.slow
def test_study_killed_five_times_gives_the_same_results(tmp_path: Path) -> None:
    study = write(tmp_path, seeds=[0, 1, 2])
    short = ["--trainer.max_epochs=12", "--trainer.accelerator=cpu", "--run.checkpoint_every_steps=20", "--jobs", "2"]
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    words = ablate("run", study, "--out", disturbed, *short)
    subprocess.run(ablate("run", study, "--out", undisturbed, *short), check=True)
    finished: dict[str, str] = {}
    for delay in (0, 0.2, 0.5, 1, 2):
        killed_in_a_cell(words, disturbed, delay)
        for s in states(read_study(study, short[:3]), disturbed):
            if s.status == "complete":
                started = manifest(s.cell.folder)["attempts"][-1]["started"]
                assert finished.setdefault(s.cell.name, started) == started, "a finished cell was run again"
    subprocess.run(words, check=True)
    assert (disturbed / "results.csv").read_bytes() == (undisturbed / "results.csv").read_bytes()
    attempts = [len(manifest(c.folder)["attempts"]) for c in cells(read_study(study), disturbed)]
    assert sum(attempts) >= len(attempts) + 3, "hardly a cell was hit"


def killed_in_a_cell(words: list[str], out: Path, delay: float) -> None:
    """Run a study; kill its processes `delay` seconds after a cell that is running has written a checkpoint."""
    began = time.time()
    process = subprocess.Popen(words, start_new_session=True)
    while process.poll() is None:
        new = [path for path in out.glob("*/seed-*/checkpoints/last.ckpt") if path.stat().st_mtime > began]
        if any(manifest(path.parents[1])["status"] == "running" for path in new):
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    time.sleep(0.5)  # the cells notice it


@pytest.mark.slow  # CI runs a real study with `make ablation-demo`
@pytest.mark.timeout(600)
def test_real_study_runs_reports_and_is_grouped_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    short = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--config", CONFIGS / "logger/wandb.yaml"]
    words = [write(tmp_path, name="tiny", seeds=[0]), "--out", tmp_path / "out", "--jobs", "2", *short]
    done = subprocess.run(ablate("run", *words), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"report  {tmp_path / 'out/report.html'}" in done.stdout
    study = read_study(words[0], list(map(str, short)))
    assert [s.status for s in states(study, tmp_path / "out")] == ["complete", "complete"]
    arms = json.loads((tmp_path / "out/report.json").read_text())["arms"]
    assert arms["none"]["verdict"] is None and "seed" in arms["none"]["reason"], "one seed gives no verdict"
    [run] = (tmp_path / "out/none/seed-0/wandb").glob("offline-run-*/*.wandb")
    [about] = records(run.parent, "run")
    assert (about["run_group"], about["job_type"], about["tags"]) == ("tiny", "none", ["seed 0"])
    [summary] = (tmp_path / "out/wandb").glob("offline-run-*")
    assert records(summary, "run")[0]["job_type"] == "report"
    assert subprocess.run(ablate("run", *words), capture_output=True, text=True, check=False).returncode == 0
    assert [len(manifest(c.folder)["attempts"]) for c in cells(study, tmp_path / "out")] == [1, 1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_irrelevant_settings_do_not_change_results(tmp_path: Path) -> None:
    short = ["--trainer.max_epochs=8", "--trainer.accelerator=cpu"]
    words = ["digits_null", "--out", tmp_path, "--jobs", "2", *short]
    assert subprocess.run(ablate("run", *words), capture_output=True, check=False).returncode == 0
    hashes: dict[int, set[str]] = {}
    for s in states(read_study("digits_null", short), tmp_path):
        hashes.setdefault(s.cell.seed, set()).add(s.manifest["weights_sha256"])
    assert len(hashes) == 5 and all(len(same) == 1 for same in hashes.values())
    arms = json.loads((tmp_path / "report.json").read_text())["arms"]
    others = [arm for name, arm in arms.items() if name != "as_it_is"]
    assert [(arm["verdict"], arm["delta"]) for arm in others] == [("equivalent", 0)] * 3
