"""Artefacts do not spoil provenance: binary files are named, not stored, and git ignores what commands write."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from reslab.runs import manifest as manifests

BINARIES = {
    "onnx": b"\x08\x07\0\x12" + bytes(range(256)) * 9,
    "a picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "a NUL after 7,999 bytes": b"x" * 7999 + b"\0",
    "UTF-16": "import torch\n".encode("utf-16"),
    "large": bytes(2**20 + 1),
}


def git(folder: Path, *args: str | Path) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *map(str, args)], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def clean(tmp_path: Path, repo: Path) -> Path:
    """A committed checkout with the shipped .gitignore."""
    checkout = tmp_path / "checkout"
    git(tmp_path, "init", "-q", checkout)
    shutil.copy(repo / ".gitignore", checkout)
    (checkout / "code.py").write_text("a = 1\n")
    (checkout / "tracked.bin").write_bytes(b"\0\1")
    (checkout / "weights").mkdir()
    (checkout / "weights/net.safetensors").write_bytes(bytes(range(256)) * 2**13)
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    return checkout


def git_state(checkout: Path) -> dict[str, Any]:
    state = manifests.git_state(checkout, keep=checkout.parent / "kept.diff")
    assert state
    return state


def described(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("kind", BINARIES)
@pytest.mark.parametrize("name", ["new.bin", "ein Ordner/größe", ":(top)*"])
def test_untracked_binary_file_is_named_and_not_stored(clean: Path, kind: str, name: str) -> None:
    (clean / name).parent.mkdir(exist_ok=True)
    (clean / name).write_bytes(BINARIES[kind])
    state = git_state(clean)
    assert not state["dirty"] and state["diff"] is None and state["untracked"] == state["left_out"] == []
    assert state["binaries"] == [described(name, BINARIES[kind])]
    assert not (clean.parent / "kept.diff").exists()


def test_binary_files_leave_the_diff_of_the_code_alone(clean: Path) -> None:
    (clean / "code.py").write_text("a = 2\n")
    (clean / "new.py").write_text("b = 3\n")
    before = git_state(clean)
    for kind, data in BINARIES.items():
        (clean / kind).write_bytes(data)
    after = git_state(clean)
    assert len(after["binaries"]) == len(BINARIES)
    assert after["dirty"] and {**after, "binaries": []} == before
    assert (clean.parent / "kept.diff").stat().st_size < 1000


def test_small_change_of_a_tracked_binary_file_is_stored(clean: Path, tmp_path: Path) -> None:
    (clean / "tracked.bin").write_bytes(b"\0\2")
    state = git_state(clean)
    assert state["dirty"] and state["binaries"] == []
    git(tmp_path, "clone", "-q", clean, "clone")
    git(tmp_path / "clone", "apply", tmp_path / "kept.diff")
    assert (tmp_path / "clone/tracked.bin").read_bytes() == b"\0\2"


@pytest.mark.parametrize("change", ["other bytes", "deleted", "staged"])
def test_large_change_of_a_tracked_binary_file_is_named(clean: Path, change: str) -> None:
    path = clean / ("staged:*.bin" if change == "staged" else "weights/net.safetensors")
    data = b"" if change == "deleted" else hashlib.shake_128(b"noise").digest(2**21)
    if change == "staged":
        path.write_bytes(data)
        git(clean, "add", ":(literal)staged:*.bin")
    elif change == "deleted":
        path.write_bytes(hashlib.shake_128(b"noise").digest(2**21))
        git(clean, "commit", "-qam", "noise")
        path.unlink()
    else:
        path.write_bytes(data)
    (clean / "code.py").write_text("a = 2\n")
    state = git_state(clean)
    [entry] = state["binaries"]
    assert entry == described(str(path.relative_to(clean)), data) | ({"sha256": None} if change == "deleted" else {})
    assert state["dirty"] and "code.py" in (kept := (clean.parent / "kept.diff").read_text()) and len(kept) < 1000


def test_lists_and_hashing_are_limited(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "HASHED_BYTES", 150)
    for i in range(120):
        (clean / f"{i:03}.bin").write_bytes(bytes(10))
    binaries = git_state(clean)["binaries"]
    assert len(binaries) == 100 and [b["sha256"] is not None for b in binaries] == [True] * 15 + [False] * 85


# What the commands of the documentation write


def outputs() -> list[str]:
    """Return every output path in a command of README.md and docs/, with the names that commands choose themselves."""
    repo = Path(__file__).resolve().parents[1]
    files = [repo / "README.md", *(repo / "docs").glob("*.md")]
    commands = "\n".join(file.read_text(encoding="utf-8") for file in files)
    named = re.findall(r"(?:--out|--output|--run\.dir|tee)[ =]+([\w./-]*[a-z][\w./-]*)", commands)
    exports = [f"mine.{suffix}" for suffix in ("onnx", "pt2", "safetensors")]
    names = ["preview-lr.png", "preview-augment.png", "slurm-1234.txt", "wandb/run-1/x", "lightning_logs/x", "data/x"]
    return sorted({*named, *exports, *names, *(f"{name}.json" for name in exports), "mine.onnx.data"})


@pytest.mark.parametrize("path", outputs())
def test_git_ignores_what_documented_commands_write(path: str, clean: Path) -> None:
    git(clean, "check-ignore", path)


def test_documented_outputs_are_found() -> None:
    assert {"runs/mine"} <= set(outputs())


def test_exports_and_tables_leave_a_checkout_clean(clean: Path) -> None:
    for name in ("mine.onnx", "mine.onnx.json", "answers.csv", "preview-lr.png", "weights.safetensors"):
        (clean / name).write_bytes(b"\0" if "onnx" in name else b"text\n")
    state = git_state(clean)
    assert not state["dirty"] and state["untracked"] == state["binaries"] == []


def test_no_tracked_file_is_ignored(repo: Path, clean: Path) -> None:
    if (repo / ".git").exists():  # not in an unpacked archive
        assert git(repo, "ls-files", "-ci", "--exclude-standard") == ""
    assert git(clean, "ls-files", "-ci", "--exclude-standard") == ""
