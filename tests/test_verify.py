"""Provenance: verify finds changed files, reproduce repeats a run bit for bit, and no file holds a secret."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reslab.cli import main
from reslab.diff import differences
from reslab.errors import UserError
from reslab.files import sha256_file
from reslab.runs import manifest as manifests
from reslab.runs.masking import mask_command
from reslab.runs.verify import Divergence, divergences, reproduce, verify
from runner import reslab

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def original(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run, trained with an API key in the environment."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    config = repo / "configs/experiment/digits.yaml"
    options = ["--run.dir", folder, "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "5"]
    ended = reslab("fit", "--config", config, *options, WANDB_API_KEY=KEY)
    assert ended.status == 0, ended.output
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of the run for one test to damage, with a diff as of a dirty tree."""
    folder = Path(shutil.copytree(original, tmp_path / "a run"))
    diff = folder / "uncommitted.diff"
    diff.write_text("diff --git a/README.md b/README.md\n")
    digest = sha256_file(diff)
    git = {"sha": "f00d", "dirty": True, "diff": diff.name, "diff_sha256": digest}
    edit_manifest(folder, git=git)
    return folder


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_a_weight(path: Path) -> None:
    weights = load_file(path)
    weights[next(iter(weights))] += 1
    save_file(weights, path)


# Verify


def test_verify_accepts_untouched_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    *items, conclusion = capsys.readouterr().out.splitlines()
    checkpoints = ["checkpoints/best.ckpt", "checkpoints/last.ckpt"]
    data = ["data: files", "data: split", "data: classes"]
    names = ["config.yaml", "uncommitted.diff", *checkpoints, "weights.safetensors", *data]
    assert items == [f"ok       {name}" for name in names] and conclusion.startswith("all 8 are as recorded")


DAMAGES = {
    "config.yaml": [flip_a_byte, Path.unlink],
    "uncommitted.diff": [flip_a_byte, Path.unlink],
    "checkpoints/last.ckpt": [flip_a_byte, Path.unlink],
    "checkpoints/SHA256SUMS": [Path.unlink],
    "weights.safetensors": [change_a_weight, lambda path: os.truncate(path, 100), Path.unlink],
}


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name, all in DAMAGES.items() for damage in all])
def test_verify_names_damaged_file(
    run: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / name)
    assert verify(str(run)) == 1
    *items, conclusion = capsys.readouterr().out.splitlines()
    wrong = [line for line in items if not line.startswith("ok ")]
    state = "missing" if damage is Path.unlink else "differs"
    assert wrong[0].startswith(f"{state:<8} {name}") and f"{name} ({state})" in conclusion
    consequences = {
        "config.yaml": ["data"],
        "checkpoints/SHA256SUMS": ["checkpoints/best.ckpt", "checkpoints/last.ckpt"],
    }
    assert [line.split()[1].rstrip(":") for line in wrong[1:]] == consequences.get(name, [])


def test_verify_detects_other_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(str(run), ["--data.split_seed", "1"]) == 1
    assert "not as recorded: data: split (differs)" in capsys.readouterr().out
    assert verify(str(run), ["--data.dataset", "reslab.data.CIFAR10", "--data.root", str(tmp_path)]) == 1
    assert f"missing  data: {tmp_path}" in capsys.readouterr().out


MANIFESTS = {
    "truncated": (lambda text: text[: len(text) // 2], "cannot read the manifest"),
    "not a mapping": (lambda text: "[]", "it is not the manifest of a run"),
    "missing key": (lambda text: text.replace('"weights_sha256"', '"weights"'), "it lacks weights_sha256"),
    "unfinished": (lambda text: text.replace('"complete"', '"preempted"'), "not finished (status: preempted)"),
}


@pytest.mark.parametrize("case", MANIFESTS)
@pytest.mark.parametrize("command", [verify, reproduce])
def test_unfinished_run_or_damaged_manifest_is_refused(run: Path, command: Callable[[str], int], case: str) -> None:
    change, message = MANIFESTS[case]
    manifest = run / "manifest.json"
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(UserError) as error:
        command(str(run))
    assert message in str(error.value)


# Reproduce


@pytest.mark.slow
def test_reproduce_is_identical_after_interruption(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    again = run.with_name("a run-reproduced")
    command = [sys.executable, "-m", "reslab", "reproduce", str(run), "--data.num_workers", "1"]
    with subprocess.Popen(command) as process:
        while not (again / "metrics.csv").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 75
    out = capfd.readouterr().out
    assert "the code has changed since the run" in out and "git.sha" not in out and "  sha: f00d (run) != " in out
    assert f"git checkout f00d && git apply '{run}/uncommitted.diff'" in out

    assert reproduce(str(run)) == 0
    assert "identical: the weights, and every logged metric" in capfd.readouterr().out
    manifest = manifests.read(again / "manifest.json")
    assert [attempt["how"].partition(":")[0] for attempt in manifest["attempts"]] == ["preempted", "complete"]


def test_reproduce_always_runs_and_compares_with_an_earlier_run_only_on_request(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    earlier = Path(shutil.copytree(run, run.with_name("a run-reproduced")))
    change_a_weight(earlier / "weights.safetensors")  # what an earlier reproduction holds must not matter
    with pytest.raises(UserError, match=r"holds a finished run.*--compare"):
        reproduce(str(run), out=str(earlier))
    assert reproduce(str(run)) == 0
    new = run.with_name("a run-reproduced-2")
    assert "identical" in capfd.readouterr().out
    assert manifests.read(new / "manifest.json")["attempts"][0]["started"] >= manifests.now()[:10]
    before = {path.name for path in run.parent.iterdir()}
    edit_manifest(new, weights_sha256="0" * 64)
    assert main(["reproduce", str(run), "--compare", str(new)]) == 1
    out = capfd.readouterr().out
    assert f"nothing is run: {new} finished at " in out and "the weights differ" in out
    assert before == {path.name for path in run.parent.iterdir()}


def test_unfinished_reproduction_by_other_code_is_left_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = Path(shutil.copytree(run, run.with_name("a run-reproduced")))
    edit_manifest(unfinished, status="preempted")  # its code is that of `run`: f00d
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UserError, match="unfinished run of other code"):
        reproduce(str(run), out=str(unfinished))
    assert reproduce(str(run)) == 1
    assert manifests.read(unfinished / "manifest.json")["status"] == "preempted"


def test_reproduce_reports_first_difference_and_possible_causes(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = manifests.read(run / "manifest.json")["environment"]
    edit_manifest(run, environment={**environment, "packages": {**environment["packages"], "torch": "1.0"}})
    options = ["--seed_everything", "1", "--trainer.max_epochs", "1"]
    assert main(["reproduce", str(run), "--out", str(tmp_path / "other"), *options]) == 1
    out = capfd.readouterr().out
    first, second = (next(csv.DictReader((f / "metrics.csv").open())) for f in (run, tmp_path / "other"))
    losses = f"{first['train/loss']} (run) != {second['train/loss']} (reproduction)"
    assert "the weights differ\nthe metrics differ from step 5 on:\n" in out
    assert f"  train/loss   from step 5: {losses}\n" in out and "val/acc      from step 20: " in out
    assert "images_per_second" not in out
    version = environment["packages"]["torch"]
    assert f"environment.packages.torch: 1.0 (run) != {version} (reproduction)" in out
    assert "git.sha: f00d (run)" in out and "config.seed_everything: 0 (run) != 1 (reproduction)" in out


def test_failed_reproduction_reports_no_difference(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert reproduce(str(run)) == 1
    assert "the reproduction did not finish (exit status 1)" in capsys.readouterr().out


def test_reproduce_refuses_same_directory_and_changed_config(run: Path) -> None:
    with pytest.raises(UserError, match="is the run itself"):
        reproduce(str(run), out=f"{run}/../a run")
    flip_a_byte(run / "config.yaml")
    with pytest.raises(UserError, match="is no longer the config of this run"):
        reproduce(str(run))


NAMES = st.sampled_from(["train/loss", "val/acc"])
METRICS = st.dictionaries(NAMES, st.dictionaries(st.integers(1, 5), st.sampled_from("01"), min_size=1))


@given(METRICS, METRICS)
def test_divergence_is_the_first_differing_step(first: dict, second: dict) -> None:
    diverging = {d.metric: d for d in divergences(first, second)}
    for name in {*first, *second}:
        a, b = first.get(name, {}), second.get(name, {})
        if name not in diverging:
            assert a == b
            continue
        step = diverging[name].step
        assert diverging[name] == Divergence(name, step, a.get(step), b.get(step))
        assert a.get(step) != b.get(step) and all(a.get(s) == b.get(s) for s in range(step))


def test_differences_have_dotted_keys() -> None:
    first, second = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2]}, "e": None, "f": 0}
    assert list(differences(first, second)) == [("a.c", [1], [2]), ("d", 2, None), ("f", None, 0)]


# The code


def git(folder: Path, *args: str | Path) -> str:
    names = ["-c", "user.name=n", "-c", "user.email=e"]
    return subprocess.run(["git", "-C", folder, *names, *args], capture_output=True, text=True, check=True).stdout


def tree(folder: Path) -> dict[str, tuple[bytes | str, bool]]:
    """Return all files of a directory: contents or link target, and whether they are executable."""
    paths = {str(p.relative_to(folder)): p for p in folder.rglob("*") if ".git" not in p.relative_to(folder).parts}
    files = {name: p for name, p in paths.items() if p.is_symlink() or p.is_file()}
    return {
        name: (str(p.readlink()) if p.is_symlink() else p.read_bytes(), os.access(p, os.X_OK))
        for name, p in files.items()
    }


@pytest.fixture
def dirty(tmp_path: Path) -> Path:
    """A checkout with every kind of uncommitted change."""
    repo = tmp_path / "repo"
    git(tmp_path, "init", "-q", repo)
    before = {"a.py": b"a = 1\n", "crlf": b"x\r\ny\r\n", "latin-1": b"caf\xe9\n", "bin": b"\0\1", "gone": b""}
    for name, data in {**before, ".gitignore": b"*.log\n"}.items():
        (repo / name).write_bytes(data)
    git(repo, "add", ".")
    git(repo, "commit", "-qm", "first")
    after = {"a.py": b"a = 2\n", "crlf": b"x\r\nz\r\n", "latin-1": b"th\xe9\n", "bin": b"\0\2"}
    for name, data in after.items():
        (repo / name).write_bytes(data)
    (repo / "gone").unlink()
    (repo / "ein Ordner").mkdir()
    (repo / "ein Ordner" / "größe.py").write_text("print()\n")
    (repo / "empty").touch()
    (repo / "run.sh").write_text("#!/bin/sh\n")
    (repo / "run.sh").chmod(0o755)
    (repo / "link").symlink_to("a.py")
    (repo / "staged").write_text("staged\n")
    git(repo, "add", "staged")
    git(repo, "config", "diff.noprefix", "true")
    return repo


def test_saved_diff_restores_the_tree_in_a_clean_clone(dirty: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in (dirty / ".git").rglob("*") if p.is_file()}
    state = manifests.git_state(dirty / "ein Ordner", keep=tmp_path / "kept.diff")
    assert {p: p.read_bytes() for p in (dirty / ".git").rglob("*") if p.is_file()} == before
    assert state and state["dirty"] and state["diff"] == "kept.diff" and state["left_out"] == []
    git(tmp_path, "clone", "-q", dirty, "clone")
    git(tmp_path / "clone", "apply", tmp_path / "kept.diff")
    assert tree(tmp_path / "clone") == tree(dirty)


def test_diff_leaves_out_large_files_secrets_and_runs(dirty: Path, tmp_path: Path) -> None:
    clean = manifests.git_state(dirty)
    (dirty / "big").write_bytes(b"x" * (2**20 + 1))
    (dirty / ".env").write_text("A=1")
    (dirty / "api_key.txt").write_text("1")
    (dirty / "noise.log").write_text("ignored")
    (dirty / "runs").mkdir()
    (dirty / "runs" / ".lock").touch()
    (dirty / "runs" / "metrics.csv").touch()
    state = manifests.git_state(dirty)
    assert state and clean and state["diff_sha256"] == clean["diff_sha256"] and state["diff"] is None
    assert state["left_out"] == [".env", "api_key.txt", "big"] and state["untracked"] == clean["untracked"]


def test_git_state_of_clean_tree_and_outside_git(dirty: Path, tmp_path: Path) -> None:
    git(dirty, "add", ".")
    git(dirty, "commit", "-qm", "second")
    state = manifests.git_state(dirty, keep=tmp_path / "kept.diff")
    assert state and not state["dirty"] and state["diff"] is None and not (tmp_path / "kept.diff").exists()
    assert manifests.git_state(tmp_path) is None


# Secrets


def test_no_file_of_a_run_holds_a_key_of_the_environment(original: Path) -> None:
    assert not [path for path in original.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    "words",
    [
        ["--x.api_key=hunter2"],
        ["--token", "hunter2"],
        ["--x.password", "hunter2 hunter2"],
        ["--x.secret=hunter2 hunter2"],
        ["WANDB_API_KEY=hunter2"],
        ["--data", '{"dataset": {"token": "hunter2", "folder": "there"}}'],
        ["--data", "{api-key: hunter2, folder: there}"],
        ["--url", "https://me:hunter2@example.org/there?access_token=hunter2&x=1"],
        ["--note", "a variable's value: correct horse"],
    ],
)
def test_command_line_is_masked(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "correct horse")
    masked = mask_command(["reslab", "fit", *words, "--seed_everything", "7"])
    assert "hunter2" not in masked and "correct horse" not in masked and "***" in masked
    assert masked.startswith("reslab fit ") and masked.endswith(" --seed_everything 7")
    assert "there" not in " ".join(words) or "there" in masked


def test_key_in_an_error_is_masked_in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_PASSWORD", 'a "quoted" one')
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    how = f'failed: no access to https://x/{KEY} with a "quoted" one'
    manifests.write(tmp_path / "manifest.json", {"attempts": [{"how": how}]})
    assert (
        manifests.read(tmp_path / "manifest.json")["attempts"][0]["how"]
        == "failed: no access to https://x/*** with ***"
    )


def test_unknown_option_with_a_key_is_refused_without_printing_it(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(repo / "configs/experiment/digits.yaml")
    assert main(["fit", "--config", config, "--run.dir", str(tmp_path / "r"), f"--x.api_key={KEY}"]) == 2
    out, err = capsys.readouterr()
    assert "x: no such key" in err and KEY not in out + err and not (tmp_path / "r").exists()
