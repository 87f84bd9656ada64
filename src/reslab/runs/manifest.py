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
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from reslab.errors import UserError
from reslab.files import replacing, write_text
from reslab.runs.masking import keeps_secrets, mask

PACKAGES = (
    "reslab", "torch", "torchvision", "lightning", "torchmetrics", "numpy", "jsonargparse", "safetensors", "wandb",
)  # fmt: skip
# Config keys that say where and how a run is executed; a run resumes although they change.
NOT_IDENTITY = (
    "run.dir", "run.group", "run.job_type", "run.tags", "run.allow_world_size_change", "run.allow_data_change",
    "trainer.logger", "trainer.devices", "trainer.num_nodes", "data.root", "data.download", "data.num_workers",
)  # fmt: skip
LARGEST_NEW_FILE = 2**20  # bytes: a larger untracked file is not code


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

    `git apply` restores the changes in a clean clone. They include untracked files, except files that git ignores,
    files in run directories, and those listed in `left_out`, which are too large or hold secrets. The changes are
    written to the file `keep`, if there are any.
    """
    try:
        root = Path(os.fsdecode(_git(folder, "rev-parse", "--show-toplevel")).rstrip("\n"))
        sha = _git(root, "rev-parse", "HEAD").decode().strip()
        new, left_out = _new_files(root)
        diff = _diff(root, new)
    except (OSError, subprocess.CalledProcessError):
        return None
    if keep and diff:
        with replacing(keep) as part:
            part.write_bytes(diff)
    return {
        "sha": sha,
        "dirty": bool(diff or left_out),
        "untracked": new[:100],
        "left_out": left_out[:100],
        "diff": keep.name if keep and diff else None,
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
    }


def _git(folder: Path, *args: str, stdin: bytes = b"", **variables: Any) -> bytes:
    command, environment = ["git", "-C", str(folder), *args], {**os.environ, **variables}
    return subprocess.run(command, input=stdin, capture_output=True, check=True, env=environment).stdout


def _new_files(root: Path) -> tuple[list[str], list[str]]:
    """List the files that git neither tracks nor ignores: those to keep, and those to leave out."""
    listed = os.fsdecode(_git(root, "ls-files", "--others", "--exclude-standard", "-z")).split("\0")
    names = [name for name in listed if name and not any((root / d / ".lock").exists() for d in Path(name).parents)]
    # A name that ends in / is a nested repository.
    left_out = [
        n for n in names if n.endswith("/") or keeps_secrets(n) or (root / n).lstat().st_size > LARGEST_NEW_FILE
    ]
    return [name for name in names if name not in left_out], left_out


def _diff(root: Path, new: list[str]) -> bytes:
    """Return `git diff HEAD` as if the new files were tracked, whatever the user's diff settings are."""
    index, objects = (os.fsdecode(_git(root, "rev-parse", "--git-path", x)).rstrip("\n") for x in ("index", "objects"))
    with tempfile.TemporaryDirectory() as scratch:  # leave the repository untouched
        variables: dict[str, Any] = {
            "GIT_INDEX_FILE": str(shutil.copy2(root / index, Path(scratch, "index"))),
            "GIT_OBJECT_DIRECTORY": scratch,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(root / objects),
            "GIT_LITERAL_PATHSPECS": "1",
        }
        if new:
            from_stdin = ("--pathspec-from-file=-", "--pathspec-file-nul")
            _git(root, "add", "--intent-to-add", *from_stdin, stdin=os.fsencode("\0".join(new)), **variables)
        plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/", "-U3")
        diff = _git(root, "diff", "HEAD", "--binary", "--full-index", *plain, **variables)
    return mask(diff.decode(errors="surrogateescape")).encode(errors="surrogateescape")


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
