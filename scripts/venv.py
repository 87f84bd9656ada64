"""Run a command in a virtual environment: python scripts/venv.py .venv uv pip install -e .

Creates the environment if it is missing. For the command uv, also installs uv into it unless a suitable uv is on PATH,
and passes pip's indexes, proxy and certificates to uv in environment variables, because uv does not read pip's
configuration. Prints a line whenever a command that shows no progress bar has been silent for a few seconds.
"""

from __future__ import annotations

import ast
import os
import re
import selectors
import shutil
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

OLDEST, TOO_NEW = (0, 9), (1, 0)  # versions of uv
HEARTBEAT = 5.0  # seconds
INDEX_VARIABLES = ("UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS")
INDEX_KEYS = {"index", "index-url", "extra-index-url", "find-links", "no-index"}  # of uv.toml


def main(venv: Path, command: list[str]) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 (make runs this file with any python3)
        print("reslab requires Python 3.11 or newer: name one, as in make PYTHON=python3.12 demo", file=sys.stderr)
        return 2
    python = venv / "bin" / "python"
    if command[0] != "uv":
        env = dict(os.environ)
        return run([str(venv / "bin" / command[0]), *command[1:]], env, shows_progress=command[0] != "python")
    settings = pip_settings(python)
    if settings is None:
        print(f"Creating the virtual environment {venv}", flush=True)
        if status := run([sys.executable, "-m", "venv", str(venv)], dict(os.environ)):
            return status
        settings = pip_settings(python)
    return run_uv(venv, settings or {}, command[1:])


def run_uv(venv: Path, settings: dict[str, str], arguments: list[str]) -> int:
    """Run uv with pip's settings in the virtual environment; install it there first if needed."""
    uv = find_uv(venv)
    if uv is None:
        print(f"Installing uv into {venv}", flush=True)
        requirement = f"uv>={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, TOO_NEW))}"
        install = [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", requirement]
        if status := run(install, dict(os.environ), shows_progress=True):
            return status
        uv = str(venv / "bin" / "uv")
    env, options = uv_settings(settings, dict(os.environ))
    return run([uv, *arguments, *options], {**env, "VIRTUAL_ENV": str(venv.absolute())}, shows_progress=True)


def find_uv(venv: Path) -> str | None:
    """Return the uv on PATH, else that of the virtual environment; None if neither has a suitable version."""
    for uv in filter(None, (shutil.which("uv"), shutil.which("uv", path=str(venv / "bin")))):
        output = subprocess.run([uv, "--version"], capture_output=True, text=True).stdout
        version = re.match(r"uv (\d+)\.(\d+)", output)
        if version and OLDEST <= tuple(map(int, version.groups())) < TOO_NEW:
            return uv
    return None


def pip_settings(python: Path) -> dict[str, str] | None:
    """Return the options of `pip install` set in pip's configuration files and environment; None without pip."""
    try:
        result = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True)
    except OSError:
        return None
    if result.returncode:
        return None
    values = dict(line.split("=", 1) for line in result.stdout.splitlines())
    settings = {}
    for section in ("global", "install", ":env:"):  # pip's order: later sections override earlier ones
        for key, value in values.items():
            name, _, option = key.rpartition(".")
            if name == section and ast.literal_eval(value):
                settings[option.replace("default-timeout", "timeout")] = ast.literal_eval(value)
    return settings


def uv_settings(pip: dict[str, str], env: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the environment and the options with which uv uses pip's settings; settings of uv itself come first."""
    options, added = [], {}
    if not any(env.get(name) for name in INDEX_VARIABLES) and not uv_has_indexes(env):
        added, options = index_settings(pip)
    bundle = pip.get("cert") or env.get("REQUESTS_CA_BUNDLE") or env.get("CURL_CA_BUNDLE")
    if bundle:
        added["SSL_CERT_DIR" if Path(bundle).is_dir() else "SSL_CERT_FILE"] = bundle
    elif any(ssl.get_default_verify_paths()[:2]):
        added["UV_SYSTEM_CERTS"] = "true"  # as pip does
    if "client-cert" in pip:
        added["SSL_CLIENT_CERT"] = pip["client-cert"]
    if "trusted-host" in pip:
        added["UV_INSECURE_HOST"] = " ".join(pip["trusted-host"].split())
    if "timeout" in pip:
        added["UV_HTTP_TIMEOUT"] = str(max(1, int(float(pip["timeout"]))))
    if pip.get("keyring-provider") == "subprocess":
        added["UV_KEYRING_PROVIDER"] = "subprocess"
    proxy = {name: pip["proxy"] for name in ("HTTP_PROXY", "HTTPS_PROXY") if "proxy" in pip}
    return {**added, **env, **proxy}, options


def index_settings(pip: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the environment and the options that give uv the indexes of pip."""
    env = {}
    if "index-url" in pip:
        env["UV_DEFAULT_INDEX"] = pip["index-url"]
    if "extra-index-url" in pip:
        # pip takes the best version of all indexes; uv's default is the first index that has the package.
        env |= {"UV_INDEX": " ".join(pip["extra-index-url"].split()), "UV_INDEX_STRATEGY": "unsafe-best-match"}
    # pip ignores a folder that does not exist; uv ends with an error.
    links = [link for link in pip.get("find-links", "").split() if "://" in link or Path(link).exists()]
    if links:
        env["UV_FIND_LINKS"] = ",".join(links)
    if pip.get("pre", "").lower() in ("1", "true", "yes", "on"):
        env["UV_PRERELEASE"] = "allow"
    return env, ["--no-index"] if pip.get("no-index", "").lower() in ("1", "true", "yes", "on") else []


def uv_has_indexes(env: dict[str, str]) -> bool:
    """Return whether one of uv's own configuration files names an index."""
    import tomllib

    home = Path(env.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    for path in (env.get("UV_CONFIG_FILE"), home / "uv" / "uv.toml", "/etc/uv/uv.toml"):
        if path and Path(path).is_file():
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            if INDEX_KEYS & {*table, *table.get("pip", {})}:
                return True
    return False


def run(command: list[str], env: dict[str, str], shows_progress: bool = False) -> int:
    """Run a command and return its exit status.

    The output is passed on, with a line whenever it pauses for HEARTBEAT seconds; on a terminal, a command that
    `shows_progress` writes to it directly.
    """
    pipe = None if shows_progress and sys.stderr.isatty() else subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe and subprocess.STDOUT) as process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command too, which decides how to end
        if pipe:
            pass_on(process)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if process.returncode in (-signal.SIGINT, 130):
        raise KeyboardInterrupt
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def pass_on(process: subprocess.Popen[bytes]) -> None:
    """Copy the output of a process to stdout until it ends."""
    assert process.stdout
    name, begin = Path(process.args[0]).name, time.monotonic()  # type: ignore[index,arg-type]
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    while True:
        if not selector.select(HEARTBEAT):
            print(f"still running: {name}, {time.monotonic() - begin:.0f} s{written(process.pid)}", flush=True)
        elif chunk := os.read(process.stdout.fileno(), 65536):
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
        else:
            return


def written(pid: int) -> str:
    """Return how much a process has written so far; empty where the operating system does not tell."""
    try:
        counters = Path(f"/proc/{pid}/io").read_text()
    except OSError:
        return ""
    size = int(counters.partition("wchar: ")[2].split()[0]) / 1e9
    return f", {size:.1f} GB written" if size >= 0.05 else ""


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to continue.", file=sys.stderr)
        sys.exit(130)
