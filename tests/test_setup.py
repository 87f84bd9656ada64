"""Setting up from a clone: pip's settings reach uv, output never pauses for long, the container fits pyproject.toml."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from runner import REPO


@pytest.fixture
def venv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Return scripts/venv.py as a module, on a machine without settings of pip and uv."""
    for name in [n for n in os.environ if n.startswith(("UV_", "PIP_")) or n.endswith(("PROXY", "CA_BUNDLE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    spec = importlib.util.spec_from_file_location("venv_script", REPO / "scripts" / "venv.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


A, B, C = "https://a.example/simple", "https://user:word@b.example/simple", "https://c.example/simple"
BEST = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
SETTINGS: list[tuple[dict[str, str], dict[str, str], list[str]]] = [
    ({"index-url": A}, {"UV_DEFAULT_INDEX": A}, []),
    ({"extra-index-url": B}, {"UV_INDEX": B, **BEST}, []),
    ({"index-url": A, "extra-index-url": f"{B}\n{C}"}, {"UV_DEFAULT_INDEX": A, "UV_INDEX": f"{B} {C}", **BEST}, []),
    ({"find-links": f"/nowhere {A} {REPO}"}, {"UV_FIND_LINKS": f"{A},{REPO}"}, []),
    ({"no-index": "true"}, {}, ["--no-index"]),
    ({"no-index": "false", "pre": "yes"}, {"UV_PRERELEASE": "allow"}, []),
    ({"trusted-host": "a.example\nb.example:80"}, {"UV_INSECURE_HOST": "a.example b.example:80"}, []),
    ({"timeout": "15.5"}, {"UV_HTTP_TIMEOUT": "15"}, []),
    ({"proxy": "http://p:3128"}, {"HTTP_PROXY": "http://p:3128", "HTTPS_PROXY": "http://p:3128"}, []),
    ({"cert": "/ca.pem", "client-cert": "/me.pem"}, {"SSL_CERT_FILE": "/ca.pem", "SSL_CLIENT_CERT": "/me.pem"}, []),
    ({"keyring-provider": "subprocess"}, {"UV_KEYRING_PROVIDER": "subprocess"}, []),
]


@pytest.mark.parametrize(("pip", "expected", "options"), SETTINGS)
def test_uv_gets_the_settings_of_pip(
    venv: ModuleType, pip: dict[str, str], expected: dict[str, str], options: list[str]
) -> None:
    env, more = venv.uv_settings(pip, {})
    assert {k: v for k, v in env.items() if k != "UV_SYSTEM_CERTS"} == expected and more == options


def test_settings_of_uv_come_first(venv: ModuleType, tmp_path: Path) -> None:
    pip = {"index-url": A, "extra-index-url": B, "timeout": "9"}
    env, _ = venv.uv_settings(pip, {"UV_DEFAULT_INDEX": C, "UV_HTTP_TIMEOUT": "1"})
    assert (env["UV_DEFAULT_INDEX"], env["UV_HTTP_TIMEOUT"], "UV_INDEX" in env) == (C, "1", False)
    (tmp_path / "uv").mkdir()
    for text, names_index in [("[pip]\nextra-index-url = ['x']", True), ("offline = true", False)]:
        (tmp_path / "uv" / "uv.toml").write_text(text)
        env, _ = venv.uv_settings(pip, {"XDG_CONFIG_HOME": str(tmp_path)})
        assert ("UV_DEFAULT_INDEX" in env) is not names_index


def test_pip_files_and_environment_are_read_in_the_order_of_pip(
    venv: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.conf").write_text(
        f"[global]\nindex-url = {A}\ntimeout = 5\nextra-index-url =\n  {B}\n  {C}\n[install]\ntimeout = 6\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_INDEX_URL", C)
    settings = venv.pip_settings(Path(sys.executable))
    assert settings["extra-index-url"].split() == [B, C]
    assert (settings["index-url"], settings["timeout"]) == (C, "6")
    assert venv.pip_settings(tmp_path / "no-python") is None


FAKE_UV = '#!/bin/sh\n[ "$1" = --version ] && echo \'uv VERSION (today)\' && exit\necho "$@" >&2\n'


@pytest.mark.parametrize(
    ("version", "accepted"), [("0.9.0", True), ("0.13.9", True), ("0.8.22", False), ("1.0.0", False)]
)
def test_uv_on_path_is_used_if_its_version_is_known(
    venv: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, accepted: bool
) -> None:
    uv = tmp_path / "uv"
    uv.write_text(FAKE_UV.replace("VERSION", version))
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert venv.find_uv(tmp_path / "no-venv") == (str(uv) if accepted else None)


def test_silent_command_prints_a_line_and_keeps_its_status(venv: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    venv.HEARTBEAT = 0.2
    code = (
        "import time, sys; print('first'); sys.stdout.flush(); time.sleep(0.7); sys.stderr.write('last'); sys.exit(75)"
    )
    assert venv.run([sys.executable, "-c", code], dict(os.environ)) == 75
    out = capfd.readouterr().out
    assert out.startswith("first\n") and out.endswith("last")
    assert re.search(r"still running: python\S*, \d+ s", out)


def test_interrupted_command_ends_before_the_script(tmp_path: Path) -> None:
    done = tmp_path / "done"
    code = f"""import signal, sys, time
def end(*args): time.sleep(0.3); open({str(done)!r}, 'w'); sys.exit(130)
signal.signal(signal.SIGINT, end); print('ready', flush=True); time.sleep(60)"""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    command = [sys.executable, str(REPO / "scripts" / "venv.py"), str(tmp_path), "python", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert b"Run the same command again" in process.stderr.read()
    assert process.returncode == 130 and done.exists()


def test_make_installs_only_what_is_missing(tmp_path: Path) -> None:
    """Read make's plan: each target installs its extras once, and an edited constraints.txt installs again."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((REPO / name).read_bytes())

    def extras(*words: str) -> list[str]:
        command = ["make", "--dry-run", *words]
        plan = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        for stamps in re.findall(r"^touch (.*)$", plan, re.MULTILINE):  # as if make had run
            for stamp in stamps.split():
                (tmp_path / stamp).parent.mkdir(exist_ok=True)
                (tmp_path / stamp).touch()
        return re.findall(r"uv pip install -c constraints.txt -e '\.(.*)'", plan)

    assert extras("demo", "ablation-demo") == [""]
    assert extras("demo") == []
    assert extras("lint", "docs", "test") == ["[dev]"]
    assert extras("notebooks") == ["[dev,notebooks]"]
    assert extras("demo", "test", "notebooks") == []
    later = time.time() + 10
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert extras("demo") == [""]


def test_torch_selects_the_build_of_pytorch() -> None:
    command = ["make", "--dry-run", "--always-make", "demo", "TORCH=cpu"]
    plan = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout
    assert "-e '.' --torch-backend cpu" in plan


def project() -> dict[str, Any]:
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_containers_fit_the_project() -> None:
    dockerfile = (REPO / "Dockerfile").read_text(encoding="utf-8")
    container = json.loads((REPO / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    build = container["build"]
    assert (REPO / ".devcontainer" / build["dockerfile"]).resolve() == REPO / "Dockerfile"
    extras = {*re.findall(r"--extra (\w+)", build["args"]["EXTRAS"])}
    assert extras == {*re.findall(r"\w+", container["postCreateCommand"].partition(".[")[2])}
    assert extras <= {*project()["optional-dependencies"]}
    assert {*build["args"]} <= {*re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE)}
    [release] = re.findall(r"^FROM nvidia/cuda:[\d.]+-base-ubuntu([\d.]+)$", dockerfile, re.MULTILINE)
    python = {"24.04": (3, 12)}[release]  # of Ubuntu
    assert python >= tuple(map(int, project()["requires-python"].removeprefix(">=").split(".")))
    assert re.findall(r"^USER (.*)$", dockerfile, re.MULTILINE)[-1] not in ("root", "0")
    assert dockerfile.rstrip().endswith('CMD ["reslab", "--help"]')
    assert dockerfile.index("COPY --chown=ubuntu:ubuntu pyproject.toml") < dockerfile.index(
        "COPY --chown=ubuntu:ubuntu . ."
    )


def test_versions_agree() -> None:
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project()["version"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # required by CFF 1.2
    assert f"## [{project()['version']}]" in (REPO / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [".ci/run", ".github/workflows/ci.yml", ".github/workflows/docs.yml"])
def test_ci_runs_targets_that_exist(path: str) -> None:
    targets = {*re.findall(r"^([a-z-]+)(?= .*:|:)", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)}
    called = {*re.findall(r"(?:^|run: )make ([a-z-]+)", (REPO / path).read_text(encoding="utf-8"), re.MULTILINE)}
    assert called and called <= targets
