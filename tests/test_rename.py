"""A copy of the template under another name works, and nothing in it remembers the old one."""

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
    """A checkout of its own of this working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=repo, check=True, capture_output=True, text=True).stdout
    for name in listed.split("\0"):
        if (repo / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repo / name, tmp_path / name)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def run(copy: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(copy / "src")}
    return subprocess.run([sys.executable, *args], cwd=copy, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["2fast", "My-Lab", "class", "torch", ""])
def test_a_name_that_cannot_be_is_refused(copy: Path, name: str) -> None:
    done = run(copy, "scripts/rename.py", name)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (copy / "src" / "reslab" / "cli.py").exists()


def test_the_copy_works_under_its_name(copy: Path) -> None:
    old = (copy / "scripts" / "rename.py").read_text().partition('OLD = "')[2].partition('"')[0]
    assert run(copy, "scripts/rename.py", NEW).returncode == 0
    assert "digits" in run(copy, "-m", NEW, "list", "experiments").stdout
    assert run(copy, "-c", PARSES).stderr == ""
    files = [path for path in copy.rglob("*") if path.is_file() and ".git" not in path.parts]
    left = [p for p in files if old in str(p.relative_to(copy)) or old.encode() in p.read_bytes().lower()]
    assert {path.name for path in left if "__pycache__" not in path.parts} <= {"LICENSE"}
