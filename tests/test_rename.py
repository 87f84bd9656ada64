"""Rename the package in a copy of the repository: the copy works and does not contain the old name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NEW = "frostlab"
PARSES = f"from {NEW}.config import Experiment; Experiment(['--config', 'configs/experiment/digits.yaml'])"


@pytest.fixture
def copy(repo: Path, tmp_path: Path) -> Path:
    """Return a new git repository with a copy of this working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=repo, check=True, capture_output=True, text=True).stdout
    for name in files.split("\0"):
        if (repo / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repo / name, tmp_path / name)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def run(copy: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(copy / "src"), "PATH": tools, **environ}
    return subprocess.run([sys.executable, *args], cwd=copy, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "name",
    [
        "2fast",
        "My-Lab",
        "mylab_",
        "class",
        "match",
        "torch",
        "json",
        "data",
        "config",
        "runner",
        "configs",
        "reslab",
        "",
    ],
)
def test_unusable_name_is_refused(copy: Path, name: str) -> None:
    result = run(copy, "scripts/rename.py", name)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1 and (repr(name) in result.stderr or not name)
    assert (copy / "src" / "reslab" / "cli.py").exists()


def test_checkout_without_git_is_refused(copy: Path) -> None:
    shutil.rmtree(copy / ".git")
    result = run(copy, "scripts/rename.py", NEW)
    assert result.returncode == 1 and "must be a git repository" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("new", ["pinelab", "myreslab", "reslab2"])
def test_no_file_keeps_the_old_name(copy: Path, new: str) -> None:
    """Checks all spellings, in contents and paths, also of ignored files, and new names that contain the old one."""
    (copy / "notes.md").write_text("Reslab's RESLAB_DATA; github.com/me/reslab, reslab/reslab")
    for left in ("src/reslab/__pycache__", "src/reslab/runs/__pycache__", "src/reslab.egg-info"):
        (copy / left).mkdir(parents=True, exist_ok=True)
        (copy / left / "left.pyc").touch()
    assert run(copy, "scripts/rename.py", new).returncode == 0
    title, upper = new.capitalize(), new.upper()
    assert (copy / "notes.md").read_text() == f"{title}'s {upper}_DATA; github.com/me/{new}, {new}/{new}"
    files = [path for path in copy.rglob("*") if ".git" not in path.relative_to(copy).parts]
    texts = {path: str(path.relative_to(copy)) for path in files}
    texts |= {path: texts[path] + path.read_text(errors="replace") for path in files if path.is_file()}
    old = re.compile("reslab", re.IGNORECASE)
    left = [path.name for path, text in texts.items() if old.search(re.sub(new, "", text, flags=re.IGNORECASE))]
    assert left == ["LICENSE"]


@pytest.mark.parametrize("new", ["zoo9", "averylongname"])  # in other places among the imports, shorter and longer
def test_renamed_copy_passes_lint(copy: Path, new: str) -> None:
    pytest.importorskip("ruff")
    assert run(copy, "scripts/rename.py", new).stdout.endswith("make setup\n")
    for command in (["check", "."], ["format", "--check", "."]):
        lint = run(copy, "-m", "ruff", *command, "--no-cache")
        assert lint.returncode == 0, lint.stdout


def test_without_ruff_the_next_step_formats(copy: Path) -> None:
    git = Path(str(shutil.which("git"))).parent
    assert not (git / "ruff").exists()
    assert run(copy, "scripts/rename.py", NEW, PATH=str(git)).stdout.endswith("make format\n")


def test_renamed_copy_works(copy: Path) -> None:
    old = (copy / "scripts" / "rename.py").read_text().partition('OLD = "')[2].partition('"')[0]
    assert run(copy, "scripts/rename.py", NEW).returncode == 0
    assert "digits" in run(copy, "-m", NEW, "list", "experiments").stdout
    assert run(copy, "-c", PARSES).stderr == ""
    pytest = ["-m", "pytest", "-p", "no:cacheprovider", "-n0", "-k", "header or belong"]
    tests = run(copy, *pytest, "tests/test_configs.py", "tests/test_shipped_weights.py")
    assert tests.returncode == 0, tests.stdout
    files = [path for path in copy.rglob("*") if path.is_file() and ".git" not in path.parts]
    unchanged = [p for p in files if old in str(p.relative_to(copy)) or old.encode() in p.read_bytes().lower()]
    assert {path.name for path in unchanged if "__pycache__" not in path.parts} <= {"LICENSE"}
