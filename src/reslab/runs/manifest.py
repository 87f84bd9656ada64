"""manifest.json: where a run came from and how it ended."""

import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from reslab.errors import UserError
from reslab.files import write_text

PACKAGES = (
    "reslab",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "numpy",
    "jsonargparse",
    "safetensors",
    "wandb",
)
SECRET = re.compile(r"(?i)\b([\w.]*(?:key|token|secret|password)[\w.]*)([= ])(\S+)")


def read(path: Path) -> dict[str, Any]:
    """The manifest in `path`; raises UserError where it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the manifest {path}: {error}") from error


def write(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest atomically."""
    write_text(path, json.dumps(manifest, indent=2, default=str, allow_nan=False) + "\n")


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command(argv: list[str]) -> str:
    """The command line as it was given, anything that looks like a secret left out."""
    return SECRET.sub(r"\1\2***", " ".join(["reslab", *argv]))


def config_sha256(text: str) -> str:
    """SHA-256 of a resolved config's YAML text."""
    return hashlib.sha256(text.encode()).hexdigest()


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that the code is at and its uncommitted changes (`diff`, to be kept in a file); None outside git."""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True).stdout

    try:
        folder = Path(git("rev-parse", "--show-toplevel").strip())
        sha, diff = git("rev-parse", "HEAD").strip(), git("diff", "HEAD", "--binary")
        untracked = git("ls-files", "--others", "--exclude-standard").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"sha": sha, "dirty": bool(diff or untracked), "untracked": untracked[:100], "diff": diff or None}


def environment() -> dict[str, Any]:
    """Software and hardware, and the flags that decide about bits, read back from where they take effect."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "cpu": _cpu_name(),
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


def _cpu_name() -> str:
    if sys.platform == "linux":
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if match:
            return match.group(1)
    return platform.processor() or platform.machine()
