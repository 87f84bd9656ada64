"""Rename the package in a copy of the repository: the copy works and does not contain the old name."""

import os
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


def run(copy: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(copy / "src")}
    return subprocess.run([sys.executable, *args], cwd=copy, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["2fast", "My-Lab", "class", "torch", ""])
def test_invalid_name_is_refused(copy: Path, name: str) -> None:
    result = run(copy, "scripts/rename.py", name)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert (copy / "src" / "reslab" / "cli.py").exists()


def test_renamed_copy_works(copy: Path) -> None:
    old = (copy / "scripts" / "rename.py").read_text().partition('OLD = "')[2].partition('"')[0]
    assert run(copy, "scripts/rename.py", NEW).returncode == 0
    assert "digits" in run(copy, "-m", NEW, "list", "experiments").stdout
    assert run(copy, "-c", PARSES).stderr == ""
    files = [path for path in copy.rglob("*") if path.is_file() and ".git" not in path.parts]
    unchanged = [p for p in files if old in str(p.relative_to(copy)) or old.encode() in p.read_bytes().lower()]
    assert {path.name for path in unchanged if "__pycache__" not in path.parts} <= {"LICENSE"}
