"""Read and write manifest.json; collect the provenance of a run: code, software, hardware."""

import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from reslab.errors import UserError
from reslab.files import replacing, sha256_file, write_text
from reslab.runs.masking import keeps_secrets, mask

PACKAGES = (
    "reslab", "torch", "torchvision", "lightning", "torchmetrics", "numpy", "jsonargparse", "safetensors", "wandb",
)  # fmt: skip
# Config keys that say where and how a run is executed; a run resumes although they change.
NOT_IDENTITY = (
    "run.dir", "run.group", "run.job_type", "run.tags", "run.skip_test", "run.allow_world_size_change",
    "run.allow_data_change", "trainer.logger", "trainer.devices", "trainer.num_nodes", "data.root", "data.download",
    "data.num_workers", "data.on_device",
)  # fmt: skip
LARGEST_CHANGE = 2**20  # bytes: a larger untracked file, or patch of a binary file, is not code
HASHED_BYTES = 2**28  # of binary files, at most: hashing them delays the start of a run
LISTED = 100  # files of each kind, at most


def read(path: Path) -> dict[str, Any]:
    """Read a manifest; raise UserError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the manifest {path}: {error}") from error


def write(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest atomically, with the secrets of the environment masked."""
    write_text(path, mask(json.dumps(manifest, indent=2, default=str, allow_nan=False)) + "\n")


def now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def duration(seconds: float) -> str:
    """Format seconds for readers: 41.2 s, 12 min 34 s, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def git_state(folder: Path, keep: Path | None = None) -> dict[str, Any] | None:
    """Return the commit and the uncommitted changes of a repository; None outside git.

    `git apply` restores the changes in a clean clone. They include untracked text files, except files that git ignores,
    files in run directories, and those listed in `left_out`, which are too large, unreadable, or hold secrets. The
    changes are written to the file `keep`, if there are any.

    `binaries` lists untracked binary files, and changed tracked ones whose patch would be too large, with their size
    and SHA-256: the diff does not hold them. `dirty` means that the code differs from the commit: untracked binary
    files are exports, pictures and archives, so they alone do not make it true.
    """
    try:
        root = Path(os.fsdecode(_git(folder, "rev-parse", "--show-toplevel")).rstrip("\n"))
        sha = _git(root, "rev-parse", "HEAD").decode().strip()
        new, binaries, left_out = _new_files(root)
        diff, large = _diff(root, new)
        described = _describe(root, [*large, *binaries][:LISTED])
    except (OSError, subprocess.CalledProcessError):
        return None
    if keep and diff:
        with replacing(keep) as part:
            part.write_bytes(diff)
    return {
        "sha": sha,
        "dirty": bool(diff or large or left_out),
        "untracked": new[:LISTED],
        "left_out": left_out[:LISTED],
        "binaries": described,
        "diff": keep.name if keep and diff else None,
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
    }


def _git(folder: Path, *args: str, stdin: bytes = b"", **variables: Any) -> bytes:
    command, environment = ["git", "-C", str(folder), *args], {**os.environ, **variables}
    return subprocess.run(command, input=stdin, capture_output=True, check=True, env=environment).stdout


def _new_files(root: Path) -> tuple[list[str], list[str], list[str]]:
    """List the files that git neither tracks nor ignores: text files to keep, binary files, and those to leave out."""
    new: list[str] = []
    binaries: list[str] = []
    left_out: list[str] = []
    for name in os.fsdecode(_git(root, "ls-files", "--others", "--exclude-standard", "-z")).split("\0"):
        if not name or any((root / d / ".lock").exists() for d in Path(name).parents):
            continue
        # A name that ends in / is a nested repository.
        if name.endswith("/") or keeps_secrets(name) or not _is_readable(root / name):
            left_out.append(name)
        elif _is_binary(root / name):
            binaries.append(name)
        else:
            (new if (root / name).lstat().st_size <= LARGEST_CHANGE else left_out).append(name)
    return new, binaries, left_out


def _is_readable(path: Path) -> bool:
    return path.is_symlink() or os.access(path, os.R_OK)


def _is_binary(path: Path) -> bool:
    """Whether git takes a file for a binary one: there is a NUL among its first 8,000 bytes."""
    if path.is_symlink():
        return False
    with path.open("rb") as file:
        return b"\0" in file.read(8000)


def _describe(root: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return name, size and SHA-256 of files; the SHA-256 is None for a deleted file, and after HASHED_BYTES."""
    files, left = [], HASHED_BYTES
    for name in names:
        path = root / name
        size = path.stat().st_size if path.exists() else 0
        hashed = path.is_file() and size <= left
        left -= size * hashed
        files.append({"name": name, "bytes": size, "sha256": sha256_file(path) if hashed else None})
    return files


def _diff(root: Path, new: list[str]) -> tuple[bytes, list[str]]:
    """Return `git diff HEAD` as if the new files were tracked, whatever the user's diff settings are.

    Also return the tracked binary files that it leaves out, because their patches are larger than LARGEST_CHANGE.
    """
    index, objects = (os.fsdecode(_git(root, "rev-parse", "--git-path", x)).rstrip("\n") for x in ("index", "objects"))
    with tempfile.TemporaryDirectory() as scratch:  # leave the repository untouched
        variables: dict[str, Any] = {
            "GIT_INDEX_FILE": str(shutil.copy2(root / index, Path(scratch, "index"))),
            "GIT_OBJECT_DIRECTORY": scratch,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(root / objects),
        }
        if new:
            from_stdin = ("--pathspec-from-file=-", "--pathspec-file-nul")
            literal = {**variables, "GIT_LITERAL_PATHSPECS": "1"}
            _git(root, "add", "--intent-to-add", *from_stdin, stdin=os.fsencode("\0".join(new)), **literal)

        def diff(*arguments: str) -> bytes:
            return _git(root, "diff", "HEAD", "--no-renames", "--no-ext-diff", "--no-textconv", *arguments, **variables)

        plain = ("--binary", "--full-index", "--no-color", "--src-prefix=a/", "--dst-prefix=b/", "-U3", "--")
        counts = os.fsdecode(diff("--numstat", "-z")).split("\0")
        binaries = [line.removeprefix("-\t-\t") for line in counts if line.startswith("-\t-\t")]
        large = [name for name in binaries if len(diff(*plain, f":(top,literal){name}")) > LARGEST_CHANGE]
        text = diff(*plain, ":(top)", *(f":(top,exclude,literal){name}" for name in large))
    return mask(text.decode(errors="surrogateescape")).encode(errors="surrogateescape"), large


def environment() -> dict[str, Any]:
    """Return software, hardware and determinism flags, as they are in effect in this process."""
    import torch

    info = Path("/proc/cpuinfo")  # on Linux
    cpu = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "threads": torch.get_num_threads(),
        "determinism": {
            "use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
            "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        },
    }
