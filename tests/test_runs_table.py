"""The table of runs: what it lists, selects and shows; its page in a browser; and the removal of checkpoints."""

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from reslab.cli import main
from reslab.errors import UserError
from reslab.runs import table
from reslab.runs.clean import clean
from reslab.runs.folder import RunFolder
from reslab.runs.listing import FACTS, find_runs, read_run
from reslab.runs.listing_page import curves, thinned
from reslab.runs.listing_text import text_table
from reslab.runs.query import default_columns, resolve, select
from runner import REPO, fit, manifest, reslab

# Arguments of the runs of the fixture `runs`: directory, changes of the config, changes of the manifest.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a/seed-2": ({}, {"seed": 2, "results": {"val/acc": 0.9, "test/acc": 0.91}}),
    "a/seed-10": ({"seed_everything": 10}, {"seed": 10, "results": {"val/acc": 0.95, "test/acc": 0.93}}),
    "b/wide": ({"model.net.init_args.width": 32}, {"results": {"test/acc": 0.95, "test/loss": 1e-5}}),
    "b/fast": ({"model.optimizer.init_args.lr": 1e-05, "trainer.max_epochs": 30}, {"results": {"test/acc": 0.5}}),
    "c/cifar": ({"data.dataset.class_path": "reslab.data.CIFAR10"}, {"name": "other", "results": {"test/acc": 0.7}}),
    "c/failed": ({}, {"status": "failed", "results": {}, "how": "failed: out of memory (CUDA): use less"}),
    "c/stopped": ({}, {"status": "preempted", "results": {}, "how": "preempted: SIGTERM at step 40"}),
    "c/diverged": ({}, {"status": "diverged", "results": {}, "how": "diverged: the loss is nan at step 3"}),
    "c/killed": ({}, {"status": "running", "results": {}}),
}


def write_run(folder: Path, model: Path, config: dict[str, Any], record: dict[str, Any]) -> None:
    """Write a run directory like that of a real run, with some keys of its config and manifest changed."""
    folder.mkdir(parents=True)
    values = yaml.safe_load((model / "config.yaml").read_text())
    for key, value in config.items():
        *parts, last = key.split(".")
        node = values
        for part in parts:
            node = node[part]
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    entries = {**manifest(model), "name": "digits", **record}
    how = entries.pop("how", None)
    entries["attempts"] = [{**entries["attempts"][0], "started": f"2026-11-{10 + len(folder.name)}T03:00:00+00:00"}]
    entries["attempts"][-1] |= {"how": how} if how else {}
    (folder / "manifest.json").write_text(json.dumps(entries))
    shutil.copy(model / "metrics.csv", folder)
    (folder / "report.html").write_text("<title>report</title>")


@pytest.fixture(scope="session")
def model(undisturbed: Callable[..., Path]) -> Path:
    """A real finished run."""
    return undisturbed()


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("listed") / "runs"
    for name, (config, record) in RUNS.items():
        write_run(top / name, model, config, record)
    return top


def names(listed: list[Any], top: Path) -> list[str]:
    return [os.path.relpath(run.path, top) for run in listed]


def status_of(path: Path) -> tuple[str, str]:
    """Return status and reason of the only directory listed below a path."""
    [run] = find_runs([path])
    return run.facts["status"], run.facts["reason"]


# What is listed


def test_a_real_run_is_listed_with_the_values_of_its_manifest_and_config(model: Path) -> None:
    [run] = find_runs([model])
    record = manifest(model)
    assert (run.facts["status"], run.facts["seed"], run.facts["name"]) == ("complete", 0, "digits")
    assert run.facts["time"] == record["wall_seconds"]
    assert run.facts["start"] == record["attempts"][0]["started"]
    assert run.results == record["results"]
    assert run.config["model.optimizer"] == "SGD"
    assert run.config["trainer.max_epochs"] == 3
    assert run.config["data.dataset"] == "digits"


def test_statuses_and_reasons(runs: Path) -> None:
    listed = {os.path.relpath(run.path, runs): run.facts for run in find_runs([runs])}
    unfinished = {"c/failed": "failed", "c/stopped": "preempted", "c/diverged": "diverged", "c/killed": "killed"}
    expected = dict.fromkeys(RUNS, "complete") | unfinished
    assert {name: facts["status"] for name, facts in listed.items()} == expected
    assert listed["c/failed"]["reason"] == "out of memory (CUDA): use less"
    assert listed["c/stopped"]["reason"] == "SIGTERM at step 40"
    assert listed["a/seed-2"]["reason"] is None


def test_an_unfinished_run_shows_its_latest_metrics(runs: Path) -> None:
    run = read_run(str(runs / "c/stopped"))
    with (runs / "c/stopped/metrics.csv").open() as file:
        values = [row["val/acc"] for row in csv.DictReader(file) if row["val/acc"]]
    assert run.results["val/acc"] == float(values[-1])
    assert "test/acc" not in run.results


HOLD = """
import sys
from pathlib import Path
from reslab.runs.folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def locked_by_another_process(folder: Path) -> Iterator[None]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], **pipes) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        try:
            yield
        finally:
            process.communicate("")


def test_a_run_is_running_while_a_process_holds_its_lock(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "c/killed", tmp_path / "run"))
    stopped = Path(shutil.copytree(runs / "c/stopped", tmp_path / "resumed"))
    with locked_by_another_process(folder), locked_by_another_process(stopped):
        assert status_of(folder) == ("running", None)
        assert status_of(stopped)[0] == "running"
        assert read_run(str(folder)).facts["time"] > 1e5  # since 2026-11, or the test's clock is wrong
    assert status_of(folder)[0] == "killed"
    assert status_of(stopped)[0] == "preempted"


def test_listing_a_run_from_its_own_process_keeps_its_lock(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "c/killed", tmp_path / "run"))
    probe = f"from reslab.runs.folder import RunFolder\nprint(RunFolder({str(folder)!r}).busy())"
    with RunFolder(folder).lock():
        assert status_of(folder)[0] == "running"
        assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "True\n"


def test_a_run_without_write_permission_can_be_probed(runs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = Path(shutil.copytree(runs / "c/killed", tmp_path / "run"))
    original = Path.open

    def read_only(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wa+"):
            raise PermissionError(13, "Permission denied")
        return original(path, mode, *args, **kwargs)

    with locked_by_another_process(folder):
        monkeypatch.setattr(Path, "open", read_only)
        assert status_of(folder)[0] == "running"


def _write(name: str, content: str | bytes) -> Callable[[Path], Any]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).unlink(missing_ok=True) or (folder / name).write_bytes(data)


def _edit(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / "manifest.json").write_text(json.dumps({**manifest(folder), **changes}))


def _replace_by_directory(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink() or (folder / name).mkdir()


def _replace_by_pipe(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink() or os.mkfifo(folder / name)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "empty manifest": (_write("manifest.json", ""), "damaged", "manifest.json: Expecting value"),
    "half a manifest": (_write("manifest.json", '{"status": "comp'), "damaged", "manifest.json: Unterminated string"),
    "binary manifest": (_write("manifest.json", b"\xff\xfe\x00"), "damaged", "manifest.json: 'utf-8' codec"),
    "manifest of a web page": (_write("manifest.json", '{"name": "app"}'), "damaged", "not the manifest of a run"),
    "manifest is a list": (_write("manifest.json", "[1]"), "damaged", "not the manifest of a run"),
    "deep manifest": (_write("manifest.json", "[" * 100_000), "damaged", "nested too deeply"),
    "manifest is a directory": (_replace_by_directory("manifest.json"), "damaged", "manifest.json: not a file"),
    "manifest is a pipe": (_replace_by_pipe("manifest.json"), "damaged", "manifest.json: not a file"),
    "huge number": (_edit(wall_seconds=10**400), "damaged", "manifest.json: "),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "no run", "a part of the run is missing"),
    "attempts are a text": (_edit(attempts="x"), "complete", ""),
    "results are a list": (_edit(results=[1], seed={}, name=3, wall_seconds="x"), "complete", ""),
    "start is no time": (_edit(attempts=[{"started": "yesterday"}, 3]), "complete", ""),
    "unknown status": (_edit(status="\x1b[31modd\n"), "\x1b[31modd\n", ""),
    "no config": (lambda folder: (folder / "config.yaml").unlink(), "complete", "config.yaml: No such file"),
    "broken config": (_write("config.yaml", "a: [1,"), "complete", "config.yaml: while parsing"),
    "config is a list": (_write("config.yaml", "- 1"), "complete", "config.yaml: it must hold keys and values"),
    "recursive config": (_write("config.yaml", "a: &x\n  b: *x\n"), "complete", "config.yaml: "),
    "exploding config": (
        _write("config.yaml", "".join(f"k{i}: &k{i} {{{', '.join(f'a{j}: *k{i - 1}' for j in range(9))}}}\n"
                              if i else "k0: &k0 {a: 1}\n" for i in range(9))),
        "complete", "config.yaml: it has more than 10000 keys",
    ),
    "config is a pipe": (_replace_by_pipe("config.yaml"), "complete", "config.yaml: not a file"),
    "init_args is a text": (_write("config.yaml", "a: {class_path: x, init_args: y}"), "complete", "config.yaml: "),
    "binary config": (_write("config.yaml", b"\xff\xff"), "complete", "config.yaml: 'utf-8' codec"),
    "binary metrics": (_write("metrics.csv", b"\x00\xff\n" * 9), "complete", ""),
    "metrics are a directory": (_replace_by_directory("metrics.csv"), "complete", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_run_is_listed_with_the_reason(kind: str, runs: Path, tmp_path: Path, capsys: Any) -> None:
    damage, status, reason = DAMAGE[kind]
    top = tmp_path / "runs"
    shutil.copytree(runs / "a/seed-2", top / "good")
    damage(Path(shutil.copytree(runs / "a/seed-10", top / "bad")))
    listed = {Path(run.path).name: run.facts for run in find_runs([top])}
    assert listed["bad"]["status"] == status
    assert reason in (listed["bad"]["reason"] or "")
    assert listed["good"]["status"] == "complete"
    for options in ([], ["--csv"], ["--json"], ["--html", str(tmp_path / "page.html")], ["--sort", "-time"]):
        assert main(["runs", str(top), *options]) == 0
    assert "\x1b" not in capsys.readouterr().out.replace(r"\u001b", "").replace("\x1b[31modd\n", "")
    assert main(["runs", "clean", str(top), "--dry-run"]) == 0


@given(st.sampled_from(["manifest.json", "config.yaml", "metrics.csv"]), st.binary(max_size=60), st.integers(0, 9999))
def test_no_bytes_in_a_file_break_the_list(runs: Path, name: str, data: bytes, at: int) -> None:
    folder = runs.parent / "fuzzed"
    shutil.copytree(runs / "c/stopped", folder, dirs_exist_ok=True)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:at] + data + content[at + len(data) :])
    [run] = find_runs([folder])
    text_table([run], default_columns([run]))


def test_directories_that_hold_no_run_are_listed_once_with_the_reason(runs: Path, tmp_path: Path) -> None:
    top = tmp_path / "runs"
    shutil.copytree(runs / "a/seed-2", top / "study/arm/seed-0")
    for path in ("study/arm/seed-1", "study/figures", "notes/old/older", "digits/1/checkpoints", ".hidden", "empty"):
        (top / path).mkdir(parents=True)
    (top / "study/arm/seed-1/log.txt").write_text("KeyboardInterrupt\n")
    (top / "study/plan.jsonl").touch()
    (top / "digits/1/config.yaml").touch()
    (top / "study/arm/seed-0/inside").mkdir()
    others = {
        os.path.relpath(r.path, top): r.facts["reason"] for r in find_runs([top]) if r.facts["status"] == "no run"
    }
    assert others == {
        "study/arm/seed-1": "no manifest.json: it was stopped before it began to train",
        "notes": "no manifest.json",
        "digits/1": "no manifest.json: a part of the run is missing",
        "empty": "no manifest.json",
    }


def test_each_run_is_listed_once_in_spite_of_links_and_overlapping_directories(runs: Path, tmp_path: Path) -> None:
    top = tmp_path / "runs"
    shutil.copytree(runs / "a", top / "a")
    (top / "0 latest").symlink_to(top / "a/seed-2")
    (top / "loop").symlink_to(top)
    (top / "nowhere").symlink_to(tmp_path / "missing")
    (top / "self").symlink_to(top / "self")
    shutil.copytree(runs / "b/wide", tmp_path / "scratch/wide")
    (top / "elsewhere").symlink_to(tmp_path / "scratch")
    listed = names(find_runs([top, top / "a", top / "a/seed-2", f"{top}/"]), top)
    assert sorted(listed) == ["a/seed-10", "a/seed-2", "elsewhere/wide"]


def test_a_run_inside_a_run_directory_is_listed(runs: Path, tmp_path: Path) -> None:
    top = Path(shutil.copytree(runs / "a/seed-2", tmp_path / "run"))
    shutil.copytree(runs / "a/seed-10", top / "again")
    assert sorted(names(find_runs([top]), top)) == [".", "again"]


def test_names_that_are_not_text_are_listed(runs: Path, tmp_path: Path, capsys: Any) -> None:
    top = tmp_path / "runs"
    shutil.copytree(runs / "a/seed-2", top / os.fsdecode(b"caf\xe9\n\x1b[31m"))
    for options in ([], ["--csv"], ["--json"], ["--html", str(tmp_path / "page.html")]):
        assert main(["runs", str(top), *options]) == 0
        assert "caf" in capsys.readouterr().out or "--html" in options


@pytest.mark.parametrize(
    ("path", "message"),
    [("rums", "did you mean .*runs?"), ("runs/a/seed-2/config.yaml", "is not a directory"), ("x/y", "`reslab fit`")],
)
def test_a_wrong_directory_is_reported(path: str, message: str, runs: Path) -> None:
    with pytest.raises(UserError, match=message):
        find_runs([runs.parent / path])


keys = st.text(st.characters(codec="utf-8", exclude_characters="\x85"), min_size=1, max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=80)
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4))


@example({"\xa0": None}, False, False)
@given(st.dictionaries(keys, trees, max_size=5), st.sampled_from([False, None]), st.booleans())
def test_reading_a_config_block_by_block_equals_yaml(
    tmp_path_factory: Any, config: dict[str, Any], style: bool | None, shared: bool
) -> None:
    from reslab.runs.listing import _flat_mapping, _read_config

    if shared and config:  # an anchor in one block, an alias in another
        config = {**config, "model": {"x": [1, 2]}, "trainer": {"y": next(iter(config.values()))}}
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(text := "# a comment\n" + yaml.dump(config, default_flow_style=style, allow_unicode=True))
    assert _read_config(str(path)) == dict(_flat_mapping(yaml.load(text, yaml.CSafeLoader)))


# Selecting and sorting

COMPLETE = {"a/seed-2", "a/seed-10", "b/wide", "b/fast", "c/cifar"}
CONDITIONS = {
    "data.dataset=cifar10": {"c/cifar"},
    "data.dataset=CIFAR10": {"c/cifar"},
    "data.dataset=reslab.data.CIFAR10": {"c/cifar"},
    "data.dataset=configs/data/cifar10.yaml": {"c/cifar"},
    "data.dataset.class_path = cifar10": {"c/cifar"},
    "dataset=cifar10": {"c/cifar"},
    "model.net=ResNet": set(RUNS),
    "model.net=resnet8": set(RUNS) - {"b/wide"},
    "model.net!=resnet8": {"b/wide"},
    "model.optimizer.init_args.lr=1e-5": {"b/fast"},
    "model.optimizer.lr<0.001": {"b/fast"},
    "lr=0.1": set(RUNS) - {"b/fast"},
    "lr==0.10": set(RUNS) - {"b/fast"},
    "epochs=30": {"b/fast"},
    "batch_size>=64": set(RUNS),
    "model.net.layers=[1,1,1]": set(RUNS),
    "width>16": {"b/wide"},
    "model.weights=null": set(RUNS),
    "model.optimizer.nesterov=true": set(RUNS),
    "seed=10": {"a/seed-10"},
    "seed_everything>=2": {"a/seed-2", "a/seed-10"},
    "status=complete": COMPLETE,
    "status!=complete": set(RUNS) - COMPLETE,
    "status~^(failed|diverged)$": {"c/failed", "c/diverged"},
    "run~seed-": {"a/seed-2", "a/seed-10"},
    "name=other": {"c/cifar"},
    "reason~memory": {"c/failed"},
    "test/acc>0.92": {"a/seed-10", "b/wide"},
    "test/acc>92%": {"a/seed-10", "b/wide"},
    "test/acc<=0.7": {"b/fast", "c/cifar"},
    "test/acc=0.5": {"b/fast"},
    "test/acc!=0.5": set(RUNS) - {"b/fast"},  # a run without the metric is not equal to a number
    "test/loss<1": {"b/wide"},
    "time>=0": set(RUNS),
    "start<2026-11-14T20": {"b/wide", "b/fast"},
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions(condition: str, runs: Path) -> None:
    assert set(names(select(find_runs([runs]), [condition], None), runs)) == CONDITIONS[condition]


def test_all_conditions_must_hold(runs: Path) -> None:
    selected = select(find_runs([runs]), ["status=complete", "test/acc>0.6", "seed=0"], None)
    assert set(names(selected, runs)) == {"b/wide", "c/cifar"}


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("data.datset=cifar10", "no run has data.datset; nearest: data.dataset"),
        ("acc>0.9", "acc is ambiguous: test/acc, val/acc, train/acc"),
        ("status", "write KEY=VALUE"),
        ("=x", "write KEY=VALUE"),
        ("test/acc>good", "'good' is not a number"),
        ("test/acc>92", "test/acc is a share in [0, 1]: write 0.92 or 92%"),
        ("run~[", "'[' is not a regular expression"),
    ],
)
def test_a_wrong_condition_is_reported_in_one_message(condition: str, message: str, runs: Path, capsys: Any) -> None:
    assert main(["runs", str(runs), "--where", condition]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("sort", "first", "last"),
    [
        ("test/acc", "b/fast", None),
        ("-test/acc", "b/wide", None),
        ("-seed,-test/acc", "a/seed-10", None),
        ("lr", "b/fast", None),
        ("data.dataset,-seed", "c/cifar", None),
        ("-start", "c/diverged", None),
        ("test/loss", "b/wide", None),
    ],
)
def test_order(sort: str, first: str, last: str | None, runs: Path, capsys: Any) -> None:
    assert names(select(find_runs([runs]), [], sort), runs)[0] == first
    assert main(["runs", str(runs), "--sort", sort, "--json"]) == 0  # argparse must not take -test/acc for an option
    assert os.path.relpath(json.loads(capsys.readouterr().out)[0]["run"], runs) == first


def test_runs_without_a_value_come_last_in_either_order(runs: Path) -> None:
    for sort in ("test/acc", "-test/acc"):
        order = [run.get("test/acc") for run in select(find_runs([runs]), [], sort)]
        assert None not in order[: len(COMPLETE)]
        assert set(order[len(COMPLETE) :]) == {None}


def test_by_default_the_oldest_run_comes_first_and_seed_2_before_seed_10(runs: Path, tmp_path: Path) -> None:
    for name in ("seed-10", "seed-2"):
        shutil.copytree(runs / "b/wide", tmp_path / name)
    assert names(find_runs([tmp_path]), tmp_path) == ["seed-2", "seed-10"]
    assert names(find_runs([runs]), runs)[0] == "b/fast"


# What is shown


def test_the_default_columns_hold_the_keys_that_differ(runs: Path) -> None:
    listed = find_runs([runs])
    assert default_columns(listed) == [
        *("status", "run", "name", "seed", "test/acc", "val/acc", "data.dataset", "model.net", "model.optimizer.lr"),
        *("trainer.max_epochs", "model.net.width", "time", "start", "reason"),
    ]
    same = select(listed, ["run~a/seed"], None)
    assert default_columns(same) == ["status", "run", "name", "seed", "test/acc", "val/acc", "time", "start"]


@given(st.integers(1, 240), st.data())
def test_every_line_fits_the_terminal(runs: Path, width: int, data: Any) -> None:
    listed = find_runs([runs])
    columns = data.draw(st.just(default_columns(listed)) | st.permutations([*FACTS, "lr", "test/acc", "model.net"]))
    columns = [resolve(column, listed) for column in columns]
    lines, hidden = text_table(listed, columns, width)
    assert len(lines) == 1 + len(RUNS)
    assert max(map(len, lines)) <= width
    assert not hidden or width < 250
    assert set(hidden) < set(columns)


def test_a_narrow_terminal_keeps_what_tells_runs_apart(runs: Path) -> None:
    listed = find_runs([runs])
    lines, hidden = text_table(listed, default_columns(listed), 80)
    assert [word for word in ("status", "run", "test/acc") if word not in lines[0].split()] == []
    assert "start" in hidden
    assert any("b/wide" in line for line in lines)


def test_a_pipe_gets_the_whole_table_and_nothing_else(runs: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "reslab", "runs", runs], capture_output=True, text=True)
    assert done.returncode == 0
    header, *lines = done.stdout.splitlines()
    assert header.split()[:4] == ["status", "run", "name", "seed"]
    assert len(lines) == len(RUNS)
    assert all(str(runs / name) in done.stdout for name in RUNS)
    assert done.stderr == "9 runs: 5 complete, 1 preempted, 1 failed, 1 diverged, 1 killed\n"


def test_csv_and_json_hold_all_digits_and_the_same_columns(runs: Path, capsys: Any) -> None:
    assert main(["runs", str(runs), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert main(["runs", str(runs), "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [*rows[0]] == [*records[0]]
    by_run = {Path(row["run"]).name: row for row in records}
    assert by_run["wide"]["test/loss"] == 1e-5
    assert by_run["wide"]["val/acc"] is None
    for row, record in zip(rows, records, strict=True):
        assert row["test/acc"] == ("" if record["test/acc"] is None else str(record["test/acc"]))
        assert row["status"] == record["status"]


def test_chosen_columns(runs: Path, capsys: Any) -> None:
    assert main(["runs", str(runs), "--columns", "run,lr,test/acc", "--where", "seed=10", "--csv"]) == 0
    assert capsys.readouterr().out == f"run,model.optimizer.lr,test/acc\n{runs}/a/seed-10,0.1,0.93\n"


def test_no_runs(tmp_path: Path, runs: Path, capsys: Any) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert main(["runs", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    assert main(["runs", str(runs), "--where", "seed=77"]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"no run in {tmp_path}\nno run in {runs} satisfies seed=77\n"


def test_the_table_as_a_data_frame(runs: Path) -> None:
    frame = table(runs, where=["status=complete"], sort="-test/acc")
    assert [*frame.columns[: len(FACTS)]] == [*FACTS]
    assert frame["test/acc"].tolist() == [0.95, 0.93, 0.91, 0.7, 0.5]
    assert frame["model.optimizer.lr"].tolist() == [0.1, 0.1, 0.1, 0.1, 1e-5]
    assert str(frame["start"].dtype).startswith("datetime64") and "UTC" in str(frame["start"].dtype)
    assert frame["time"].dtype == float
    empty = table(runs, where=["seed=77"])
    assert len(empty) == 0
    assert [*empty.columns] == [*FACTS]


def test_listing_imports_nothing_heavy(runs: Path) -> None:
    heavy = ["torch", "lightning", "numpy", "pandas", "matplotlib", "jinja2"]
    code = f"import sys; from reslab.cli import main; main(['runs', {str(runs)!r}]); print([*sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [name for name in heavy if f"'{name}'" in done.stdout.splitlines()[-1]] == []


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(REPO / "benchmarks"))
    from runs_table import generate

    top = tmp_path_factory.mktemp("thousand")
    generate(top / "runs", epochs=20)
    return top


def test_page_of_a_thousand_runs_fits_in_3_mb(thousand: Path) -> None:
    page = thousand / "page.html"
    assert main(["runs", str(thousand / "runs"), "--html", str(page)]) == 0
    assert 500_000 < page.stat().st_size < 3_000_000


# The page


@given(st.integers(1, 500), st.integers(2, 60))
def test_thinned_curves_keep_their_ends(length: int, points: int) -> None:
    x, y = thinned(np.arange(length), np.arange(length) ** 2, points)
    assert len(x) <= max(points, 2)
    assert (x[0], x[-1]) == (0, length - 1)
    assert (y == x**2).all()


def test_more_runs_have_fewer_points() -> None:
    run = {"val/acc": (np.arange(500.0), np.random.default_rng(0).random(500))}
    for count in (1, 1000, 20_000):
        packed = curves([run] * count)
        assert len(packed["steps"]) == 1
        assert len(json.dumps(packed["runs"])) < 4_000_000
        assert 8 <= len(packed["runs"][0][0][1]) <= 60


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("the page is tested in chromium, which is not installed")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(runs: Path) -> Path:
    """The page of the runs, with one whose name and reason are HTML."""
    hostile = runs / "d/<img src=x onerror=alert(1)>"
    write_run(hostile, runs / "a/seed-2", {}, {"status": "failed", "how": "failed: </script><script>alert(1)</script>"})
    try:
        assert main(["runs", str(runs), "--html", str(runs.parent / "page.html")]) == 0
    finally:
        shutil.rmtree(hostile.parent)
    return runs.parent / "page.html"


@pytest.fixture(params=[1200, 420])
def page(request: Any, browser: Any, page_file: Path) -> Iterator[Any]:
    """The page in a browser; afterwards, there must be no error and no request other than for the page."""
    opened = browser.new_page(viewport={"width": request.param, "height": 900})
    problems: list[str] = []
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("dialog", lambda dialog: problems.append(dialog.message) or dialog.dismiss())
    opened.on("request", lambda sent: problems.append(sent.url) if sent.url != page_file.as_uri() else None)
    opened.goto(page_file.as_uri())
    yield opened
    assert opened.evaluate("document.documentElement.scrollWidth") <= request.param
    opened.close()
    assert [p for p in problems if not p.startswith("data:")] == []


def shown_runs(page: Any) -> list[str]:
    return [text.strip() for text in page.locator("tbody tr:visible th").all_text_contents()]


def test_a_header_sorts(page: Any) -> None:
    accuracies = page.locator("tbody tr").evaluate_all("rows => rows.map(row => row.cells[3].textContent)")
    assert "93.00 %" in accuracies
    button = page.get_by_role("button", name="test/acc")
    button.click()
    assert shown_runs(page)[:2] == ["b/fast", "c/cifar"]
    assert page.locator("th[data-key='test/acc']").get_attribute("aria-sort") == "ascending"
    button.press("Enter")
    assert shown_runs(page)[:2] == ["b/wide", "a/seed-10"]
    assert page.locator("th[data-key='test/acc']").get_attribute("aria-sort") == "descending"
    assert set(shown_runs(page)[5:]) >= {"c/failed", "c/killed"}  # no value
    page.locator("th[data-key=run] button").click()
    assert shown_runs(page)[:2] == ["a/seed-2", "a/seed-10"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed-", {"a/seed-2", "a/seed-10"}),
        ("CIFAR10 complete", {"c/cifar"}),
        ("test/acc>0.92", {"a/seed-10", "b/wide"}),
        ("test/acc>92%", {"a/seed-10", "b/wide"}),
        ("status=preempted", {"c/stopped"}),
        ("lr<0.01", {"b/fast"}),
        ("alert", {"d/<img src=x onerror=alert(1)>"}),
        ("nothing has this", set()),
    ],
)
def test_the_filter_narrows(page: Any, text: str, expected: set[str]) -> None:
    page.get_by_label("Filter the runs").fill(text)
    assert set(shown_runs(page)) == expected
    assert page.locator("#count").text_content() == f"{len(expected)} of 10 shown"
    page.get_by_label("Filter the runs").fill("")
    assert len(shown_runs(page)) == 10


def test_two_chosen_runs_draw_two_curves(page: Any) -> None:
    curves_drawn = page.locator("#chart polyline")
    assert not page.locator("#chart").is_visible()
    boxes = page.locator("tbody input")
    boxes.nth(0).check()
    boxes.nth(1).focus()
    page.keyboard.press("Space")
    assert curves_drawn.count() == 2
    assert page.locator("#legend li").count() == 2
    assert len({curves_drawn.nth(i).get_attribute("stroke") for i in range(2)}) == 2
    before = curves_drawn.nth(0).get_attribute("points")
    page.get_by_label("metric").select_option(label="train/loss")
    assert curves_drawn.count() == 2
    assert curves_drawn.nth(0).get_attribute("points") != before
    page.get_by_label("Filter the runs").fill("seed-10")
    assert curves_drawn.count() == 2  # the filter does not change the choice
    page.get_by_role("button", name="Clear").click()
    assert not page.locator("#chart").is_visible()
    assert page.locator("tbody input:checked").count() == 0


def test_all_runs_shown_can_be_chosen(page: Any) -> None:
    page.get_by_label("Filter the runs").fill("seed-")
    page.get_by_label("Choose all runs shown").check()
    assert page.locator("#legend li").count() == 2


def test_pointing_at_a_run_shows_its_curve(page: Any) -> None:
    page.locator("tbody tr").nth(2).locator("th").hover()
    assert page.locator("#peek polyline").count() == 1
    assert page.locator("#peek").is_visible()
    page.locator("h1").hover()
    assert not page.locator("#peek").is_visible()
    page.locator("tbody input").nth(0).focus()
    page.keyboard.press("Tab")  # the keyboard shows it, too
    assert page.locator("#peek").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#peek").is_visible()


def test_each_run_links_to_its_report(page: Any, page_file: Path) -> None:
    links = page.locator("tbody th a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    assert len(links) == 10
    assert "runs/a/seed-2/report.html" in links
    assert not any(link.startswith(("/", "http", "file")) for link in links)
    assert all((page_file.parent / link).is_file() for link in links if "%3C" not in link)


# Removing checkpoints


@pytest.fixture
def finished(model: Path, tmp_path: Path, monkeypatch: Any) -> Path:
    """A copy of a real finished run, in a working directory without other runs."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(model, tmp_path / "runs/digits/one"))


def checkpoints(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()} - {"SHA256SUMS"}


def clean_all(top: Path, **options: bool) -> int:
    return clean([str(top)], [], **{"best": False, "yes": True, "dry_run": False, **options})


def test_clean_removes_what_a_finished_run_no_longer_needs(finished: Path, capsys: Any) -> None:
    sizes = {path.name: path.stat().st_size for path in (finished / "checkpoints").iterdir()}
    assert clean_all(finished.parent, dry_run=True, yes=False) == 0
    assert checkpoints(finished) == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    capsys.readouterr()
    assert clean_all(finished.parent) == 0
    assert checkpoints(finished) == {"best.ckpt"}
    output = capsys.readouterr().out
    assert f"{(sizes['last.ckpt'] + sizes['previous.ckpt']) / 1e6:.1f} MB in 2 files of 1 run\n" in output
    assert "kept: best.ckpt of 1 run: the only copy of the best weights (--best removes it, too)" in output
    record = manifest(finished)["checkpoints_removed"]
    assert record["files"] == ["last.ckpt", "previous.ckpt"]
    assert clean_all(finished.parent, best=True) == 0
    assert checkpoints(finished) == set()
    assert manifest(finished)["checkpoints_removed"]["files"] == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert clean_all(finished.parent, best=True) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_after_clean_a_run_is_verified_and_tested(finished: Path) -> None:
    assert clean_all(finished.parent, best=True) == 0
    assert checkpoints(finished) == set()
    verified, tested = reslab("verify", finished), reslab("test", finished)
    assert verified.status == 0, verified.output
    assert "ok       checkpoints/last.ckpt: removed by `reslab runs clean`" in verified.output
    assert f"test/acc {manifest(finished)['results']['test/acc']:.6f}" in tested.output


@pytest.mark.slow
def test_after_clean_all_commands_answer_as_before(
    finished: Path, pets: Path, undisturbed: Callable[..., Path]
) -> None:
    other = undisturbed("--seed_everything=1")
    commands: list[list[str | Path]] = [
        ["test", finished],
        ["validate", finished],
        ["predict", finished, "--images", pets / "val", "--out", "predictions.csv"],
        ["compare", finished, "--against", other, "--json"],
        ["reproduce", finished, "--compare", undisturbed("--trainer.max_epochs=3")],
        ["export", finished, "--format", "safetensors", "--out", "net.safetensors"],
        ["fit", "--config", finished / "config.yaml", "--run.dir", finished],
    ]
    before = [_answer(*command) for command in commands]
    assert [status for status, _ in before] == [0] * len(commands), before
    assert clean_all(finished.parent, best=True) == 0
    assert [_answer(*command) for command in commands] == before


def _answer(*command: str | Path) -> tuple[int, list[str]]:
    """Return the exit status and the output, without speed."""
    ended = reslab(*command)
    return ended.status, [line for line in ended.output.splitlines() if "/s" not in line]


@pytest.mark.slow
def test_after_clean_a_run_is_reproduced(finished: Path) -> None:
    assert clean_all(finished.parent, best=True) == 0
    reproduced = reslab("reproduce", finished, "--out", "copy")
    assert reproduced.status == 0, reproduced.output
    assert "identical" in reproduced.output


@pytest.mark.slow
def test_after_clean_a_study_is_reported_and_nothing_runs_again(tmp_path: Path) -> None:
    from studies import make_study

    make_study(tmp_path / "study", seeds=2)
    out, file = tmp_path / "out", tmp_path / "study/demo.yaml"
    fast = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    done = reslab("ablate", "run", file, "--out", out, *fast)
    assert done.status == 0, done.output
    report = (out / "report.json").read_text()
    assert clean_all(out, best=True) == 0
    assert not any(out.rglob("*.ckpt"))
    assert reslab("ablate", "report", file, "--out", out, *fast).status == 0
    assert (out / "report.json").read_text() == report
    again = reslab("ablate", "run", file, "--out", out, *fast)
    assert again.status == 0, again.output
    assert not any(out.rglob("*.ckpt"))  # no cell ran again


@pytest.mark.parametrize("status", ["running", "preempted", "failed", "diverged"])
def test_clean_never_touches_an_unfinished_run(status: str, finished: Path, capsys: Any) -> None:
    (finished / "manifest.json").write_text(json.dumps({**manifest(finished), "status": status}))
    before = checkpoints(finished)
    assert clean_all(finished.parent, best=True) == 0
    assert checkpoints(finished) == before
    assert "not touched: 1 " in capsys.readouterr().out


def test_clean_never_touches_a_run_in_use(finished: Path, capsys: Any) -> None:
    before = checkpoints(finished)
    with locked_by_another_process(finished):
        assert clean_all(finished.parent, best=True) == 1
    assert checkpoints(finished) == before
    assert "is in use by another run" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_clean_keeps_the_checkpoints_of_a_run_whose_weights_are_not_intact(
    damage: str, finished: Path, capsys: Any
) -> None:
    weights = finished / "weights.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    before = checkpoints(finished)
    assert clean_all(finished.parent, best=True) == 1
    assert checkpoints(finished) == before
    assert "weights.safetensors is missing or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("where", ["run", "arm", "configs"])
def test_clean_keeps_a_checkpoint_that_a_config_names(relative: bool, where: str, finished: Path) -> None:
    name = "runs/digits/one/checkpoints/last.ckpt"
    text = yaml.safe_dump(
        {"model": {"objective": {"init_args": {"weights": name if relative else str(Path(name).resolve())}}}}
    )
    places = {"run": "runs/student/x", "arm": "runs/study/arm", "configs": "configs/ablation"}
    folder = Path(places[where])
    folder.mkdir(parents=True)
    (folder / {"run": "config.yaml", "arm": "arm.yaml", "configs": "my.yaml"}[where]).write_text(text)
    assert clean_all(finished.parent, best=True) == 0
    assert checkpoints(finished) == {"last.ckpt"}


def test_clean_removes_best_ckpt_where_weights_safetensors_holds_the_best_weights(finished: Path) -> None:
    config = (finished / "config.yaml").read_text()
    (finished / "config.yaml").write_text(config.replace("test_weights: last", "test_weights: best"))
    assert clean_all(finished.parent) == 0
    assert checkpoints(finished) == set()


def test_the_record_is_written_before_a_checkpoint_is_removed(finished: Path, monkeypatch: Any) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(5, "injected")

    monkeypatch.setattr(Path, "unlink", fail)
    clean_all(finished.parent)
    monkeypatch.undo()
    assert (finished / "checkpoints/last.ckpt").exists()
    assert reslab("verify", finished).status == 0


def test_verify_still_reports_a_checkpoint_that_somebody_else_removed(finished: Path) -> None:
    assert clean_all(finished.parent) == 0
    (finished / "checkpoints/best.ckpt").unlink()
    verified = reslab("verify", finished)
    assert verified.status == 1
    assert "not as recorded: checkpoints/best.ckpt (missing)" in verified.output


def test_other_files_beside_the_checkpoints_stay(finished: Path) -> None:
    (finished / "checkpoints/notes.txt").write_text("mine")
    (finished / "checkpoints/last.ckpt.damaged").write_text("old")
    (finished / "checkpoints/.last.ckpt.part").write_text("half")
    assert clean_all(finished.parent, best=True) == 0
    assert checkpoints(finished) == {"notes.txt"}


@pytest.mark.parametrize(("answer", "left"), [("y", 1), ("YES", 1), ("", 3), ("n", 3), ("yesterday", 3)])
def test_clean_asks(answer: str, left: int, finished: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("builtins.input", lambda question: answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert clean_all(finished.parent, yes=False) == 0
    assert len(checkpoints(finished)) == left


def test_clean_without_a_terminal_requires_yes(finished: Path) -> None:
    ended = reslab("runs", "clean", finished.parent)
    assert ended.status == 2
    assert "--yes removes the files" in ended.output
    assert len(checkpoints(finished)) == 3
    assert reslab("runs", "clean", finished.parent, "--where", "seed=5", "--yes").status == 0
    assert len(checkpoints(finished)) == 3
    assert reslab("runs", "clean", finished.parent, "--where", "seed=0", "--yes").status == 0
    assert len(checkpoints(finished)) == 1


def test_fit_is_still_the_way_to_run(finished: Path) -> None:
    """A cleaned directory still belongs to its run: another config is refused."""
    assert clean_all(finished.parent, best=True) == 0
    ended = fit(finished, "--seed_everything=7")
    assert ended.status == 2
    assert "holds a run with a different config" in ended.output
