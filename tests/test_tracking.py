"""W&B logging: offline runs are read back with W&B's own reader; server failures never stop a run."""

import csv
import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from PIL import Image
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

from reslab.config import Experiment
from reslab.errors import UserError
from reslab.experiment import fit
from reslab.runs.tracking import WandB

KEY = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"model": {"net": {"init_args": {"layers": [1, 1, 1]}}, "weights": None}, "seed_everything": 3}


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Remove W&B settings and logins, and stop W&B's service after the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    wandb.teardown()


class Server(BaseHTTPRequestHandler):
    """A minimal W&B server that lets a run start; it stops answering when `stopped` is set."""

    stopped: threading.Event
    queries: list[str]

    def do_POST(self) -> None:
        query = self.rfile.read(int(self.headers["Content-Length"]))
        self.queries.append(query.decode())
        if self.stopped.is_set():
            time.sleep(60)
        project = {"id": "p", "name": "reslab", "entity": {"id": "e", "name": "someone"}}
        bucket = {"id": "x", "name": "digits-1", "displayName": "digits", "config": "{}", "project": project}
        files = {"runID": "x", "uploadHeaders": [], "files": []}
        data = {"model": None, "upsertBucket": {"bucket": bucket, "inserted": True}, "createRunFiles": files}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        """Print nothing to stderr."""


@pytest.fixture
def answering_server() -> Iterator[tuple[str, type[Server]]]:
    handler = type("Handler", (Server,), {"stopped": threading.Event(), "queries": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def start_run(folder: Path, **options: Any) -> WandB:
    folder.mkdir(exist_ok=True)
    logger = WandB(**options)
    logger.start(folder, "digits-1", "digits", CONFIG, group="shortcuts", job_type="plain", tags=["a", "b"])
    return logger


def figure(folder: Path, name: str = "confusion") -> Path:
    path = folder / f"{name}.png"
    Image.new("RGB", (4, 3)).save(path)
    return path


def upload(run: Path) -> str:
    return f"To upload this run: wandb sync --include-online {run}"


def offline_runs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


@functools.cache
def read_back(run: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of one type in a finished offline run, read with `wandb leet inspect`."""
    return [record[kind] for record in read_back(run) if record["type"] == kind]


def history(run: Path, metric: str) -> list[tuple[int, float]]:
    rows = [row["item"] for row in records(run, "history")]
    return [(row["step"], row[metric]) for row in rows if metric in row]


def summary(run: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for record in records(run, "summary"):
        merged.update(record["update"])
    return merged


def test_offline_run_holds_metrics_config_and_media(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = start_run(tmp_path, mode="offline", project="p", entity="e")
    logger.log_metrics({"train/loss": 2.0, "epoch": 0}, step=10)
    logger.log_metrics({"images_per_second": 500.0}, step=10)
    logger.log_metrics({"train/loss": 1.0, "epoch": 1}, step=20)
    (tmp_path / "report.html").write_text("<h1>report</h1>")
    logger.finish({"test/acc": 0.97, "val/acc": 0.95}, [figure(tmp_path), tmp_path / "report.html"])

    [run] = offline_runs(tmp_path)
    assert capsys.readouterr().out == f"W&B: offline, as requested. {upload(run)}\n"
    [about] = records(run, "run")
    assert {k: v for k, v in about["config"]["update"].items() if k != "_wandb"} == CONFIG
    assert (about["run_id"], about["display_name"], about["project"]) == ("digits-1", "digits", "p")
    assert (about["run_group"], about["job_type"], about["tags"]) == ("shortcuts", "plain", ["a", "b"])
    assert history(run, "train/loss") == [(10, 2.0), (20, 1.0)]
    assert history(run, "images_per_second") == [(10, 500.0)]
    assert {"glob_name": "*", "step_metric": "step"}.items() <= records(run, "metric")[1].items()
    assert {"test/acc": 0.97, "val/acc": 0.95}.items() <= summary(run).items()
    for name, extension in [("confusion", "png"), ("report", "html")]:
        [media] = run.glob(f"files/media/*/figures/{name}_*.{extension}")
        assert summary(run)[f"figures/{name}.path"] == str(media.relative_to(run / "files"))
    assert [end["exit_code"] for end in records(run, "exit")] == [0]


def test_resumed_run_keeps_its_wandb_id(tmp_path: Path) -> None:
    logger = start_run(tmp_path, mode="offline")
    for step in (10, 20, 30):
        logger.log_metrics({"train/loss": 1 / step}, step)
    wandb.teardown(exit_code=75)  # as at the end of a preempted process
    logger = start_run(tmp_path, mode="offline")
    for step in (20, 30, 40):
        logger.log_metrics({"train/loss": 1 / step}, step)
    logger.finish({})

    first, second = offline_runs(tmp_path)
    assert [records(run, "run")[0]["run_id"] for run in (first, second)] == ["digits-1", "digits-1"]
    assert records(first, "exit")[0]["exit_code"] == 75
    assert history(first, "train/loss") == [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30)]
    assert history(second, "train/loss") == [(20, 1 / 20), (30, 1 / 30), (40, 1 / 40)]


def test_run_without_login_is_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_run(tmp_path).finish({})
    [run] = offline_runs(tmp_path)
    out, err = capsys.readouterr()
    assert out == f"W&B: offline, no login (run `wandb login`, or set WANDB_API_KEY). {upload(run)}\n"
    assert err == ""


@pytest.mark.parametrize(("mode", "runs"), [("offline", 1), ("disabled", 0)])
def test_wandb_mode_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, runs: int) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    logger = start_run(tmp_path)
    logger.log_metrics({"lr": 0.1}, 1)
    logger.finish({"test/acc": 0.5}, [figure(tmp_path)])
    assert len(offline_runs(tmp_path)) == runs


@pytest.mark.parametrize("server", ["unreachable", "hanging"])
def test_unanswered_start_falls_back_to_offline_after_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], silent_server: str, server: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", silent_server if server == "hanging" else "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    began = time.monotonic()
    logger = start_run(tmp_path, init_timeout=2)
    logger.log_metrics({"train/loss": 2.0}, step=10)
    logger.finish({"test/acc": 0.97}, [figure(tmp_path)])
    wandb.teardown()
    seconds = time.monotonic() - began

    assert seconds < 60  # W&B would wait for 90
    [run] = offline_runs(tmp_path)
    assert history(run, "train/loss") == [(10, 2.0)]
    assert summary(run)["test/acc"] == 0.97
    out, err = capsys.readouterr()
    assert out.startswith("W&B: offline, ") and out.count("\n") == 1 and err == ""
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert KEY not in out and not any(KEY.encode() in text for text in texts)


def test_server_that_stops_answering_delays_the_end_by_the_timeout(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answering_server: tuple[str, type[Server]],
) -> None:
    address, server = answering_server
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    logger = start_run(tmp_path, finish_timeout=2)
    assert capsys.readouterr().out == f"W&B: {address}/someone/reslab/runs/digits-1\n"
    assert any("RunResumeStatus" in query and "digits-1" in query for query in server.queries)
    server.stopped.set()
    began = time.monotonic()
    for step in range(1, 501):
        logger.log_metrics({"train/loss": 1 / step}, step)
    logger.finish({"test/acc": 0.97}, [figure(tmp_path)])

    assert time.monotonic() - began < 60  # W&B would never stop waiting
    [run] = (tmp_path / "wandb").glob("run-*")
    assert history(run, "train/loss") == [(step, 1 / step) for step in range(1, 501)]
    assert summary(run)["test/acc"] == 0.97
    out = capsys.readouterr().out
    assert out.startswith("W&B logging stopped: TimeoutError: ") and out.count("\n") == 1
    assert out.endswith(f" wandb sync --include-online {run}\n")


def test_error_during_the_run_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = start_run(tmp_path, mode="offline")
    logger.log_metrics({"train/loss": 2.0}, step=10)
    logger.experiment.finish()
    capsys.readouterr()
    for step in (20, 30):
        logger.log_metrics({"train/loss": 1.0}, step)
    logger.finish({"test/acc": 0.9}, [tmp_path / "missing.png"])
    out = capsys.readouterr().out
    assert out.startswith("W&B logging stopped: ") and out.count("\n") == 1
    assert str(offline_runs(tmp_path)[0]) in out


def test_fit_logs_to_wandb(
    tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    configs = [repo / "configs/experiment/digits.yaml", repo / "configs/logger/wandb.yaml"]
    argv = [arg for path in configs for arg in ("--config", str(path))]
    options = ["--trainer.max_epochs", "1", "--run.dir", str(tmp_path), "--run.group", "g", "--run.tags", "[t]"]
    assert fit([*argv, *options]) == 0

    [run] = offline_runs(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    [about] = records(run, "run")
    assert (about["run_id"], about["run_group"], about["tags"]) == (manifest["id"], "g", ["t"])
    assert about["config"]["update"]["trainer"]["max_epochs"] == 1
    assert manifest["results"].items() <= summary(run).items()
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    logged = {int(row["step"]): float(row["train/loss"]) for row in rows}
    assert dict(history(run, "train/loss")) == pytest.approx(logged)
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    sent = {path.name.rsplit("_", 2)[0] for path in run.glob("files/media/images/figures/*.png")}
    assert drawn and drawn == sent


REFUSED: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"tags": ["short", "t" * 65]}, {}, r"run.tags: .*65 characters"),
    ({"tags": [""]}, {}, "run.tags: .*empty"),
    ({"tags": [3]}, {}, "run.tags: .*string"),
    ({"project": "a/b"}, {}, "trainer.logger.project: .*'a/b'.*cannot contain"),
    ({"project": "p" * 129}, {}, "trainer.logger.project: .*129 characters, and at most 128"),
    ({"project": 3}, {}, "trainer.logger.project: .*string"),
    ({"id": "a/b"}, {}, "the run's id: .*cannot contain"),
    ({"id": ""}, {}, "the run's id: .*empty"),
    ({"group": "g" * 129}, {}, "run.group: .*129 characters"),  # these four by the server
    ({"name": "n" * 129}, {}, "run.name: .*129 characters"),
    ({"entity": "e" * 129}, {}, "trainer.logger.entity: .*129 characters"),
    ({"job_type": "j" * 65}, {}, "run.job_type: .*65 characters, and at most 64"),
    ({}, {"WANDB_MODE": "onlin"}, "environment variables .*mode"),
    ({}, {"WANDB_BASE_URL": "nowhere"}, "environment variables .*base_url"),
    ({}, {"WANDB_TAGS": "t" * 65}, "environment variables .*65 characters"),
    ({}, {"WANDB_PROJECT": "a/b"}, "environment variables .*cannot contain"),
]
OPTIONS = {"id": "digits-1", "name": "digits", "group": "shortcuts", "job_type": None, "tags": ["a", "t" * 64]}


@pytest.mark.parametrize(("options", "environ", "message"), REFUSED)
def test_refused_settings_are_found_before_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    environ: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    logger = WandB(**{name: value for name, value in options.items() if name in ("project", "entity")})
    others = {name: value for name, value in options.items() if name not in ("project", "entity")}
    with pytest.raises(UserError, match=f"^trainer.logger: W&B refuses .*{message}"):
        logger.check(**OPTIONS | others)
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_accepted_settings_start_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    monkeypatch.chdir(tmp_path)
    logger = WandB(project="p" * 128, mode=mode)
    logger.check(**OPTIONS)
    assert not list(tmp_path.iterdir())
    if mode == "offline":
        logger.start(tmp_path, config=CONFIG, **OPTIONS)
        logger.finish({})
        assert len(offline_runs(tmp_path)) == 1


def test_missing_wandb_is_found_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        WandB()


@pytest.mark.parametrize("name", ["a/b", "a b", ""])
def test_refused_artifact_name_is_found_before_the_run(name: str) -> None:
    with pytest.raises(UserError, match=r"^trainer\.logger: W&B refuses weights_artifact: "):
        WandB(weights_artifact=name).check(**OPTIONS)


@pytest.mark.parametrize("name", [None, "digits-weights"])
def test_weights_are_an_artifact_of_an_offline_run_if_it_has_a_name(tmp_path: Path, name: str | None) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"weights")
    logger = start_run(tmp_path, mode="offline", weights_artifact=name)
    logger.log_weights(weights, {"seed": 3, "results": {"test/acc": 0.97}})
    logger.finish({})
    [run] = offline_runs(tmp_path)
    artifacts = [record["logArtifact"] for record in records(run, "request") if "logArtifact" in record]
    artifacts += records(run, "artifact")
    assert [artifact["name"] for artifact in artifacts] == ([name] if name else [])
    for artifact in artifacts:
        assert json.loads(artifact["metadata"]) == {"seed": 3, "results": {"test/acc": 0.97}}
        [entry] = artifact["manifest"]["contents"]
        assert (entry["path"], entry["local_path"]) == (weights.name, str(weights))  # uploaded from here, no copy


def test_logger_that_was_not_started_logs_nothing() -> None:
    logger = WandB()
    logger.log_metrics({"train/loss": 1.0}, step=1)
    logger.finish({})
    with pytest.raises(ValueError, match="more than 0"):
        WandB(init_timeout=0)


def test_wandb_is_imported_on_first_use(repo: Path) -> None:
    code = "import sys, reslab.runs.tracking as t; t.WandB(); print('wandb' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=repo)
    assert out.stdout == "False\n"


def test_wandb_config_adds_the_logger(repo: Path) -> None:
    configs = [repo / "configs/experiment/digits.yaml", repo / "configs/logger/wandb.yaml"]
    experiment = Experiment([arg for path in configs for arg in ("--config", str(path))])
    [logger] = experiment.build()[2]["logger"]
    assert isinstance(logger, WandB) and logger.project == "reslab"


def test_sweep_values_make_valid_commands(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    sweep = load_sweep_config("configs/sweep/wandb.yaml")
    assert sweep["method"] in ("grid", "random", "bayes")
    assert sweep["metric"] == {"name": "val/acc", "goal": "maximize"}  # never the test set
    for pick in (_first, _last):
        values = {key: pick(parameter) for key, parameter in sweep["parameters"].items()}
        command = agent_command(sweep["command"], values)
        assert command[:5] == ["${env}", "${interpreter}", "-m", "reslab", "fit"]
        config = yaml.safe_load(Experiment(command[command.index("fit") + 1 :]).dump())
        for key, value in values.items():
            assert _at(config, key) == value
        assert config["trainer"]["logger"]["class_path"] == "reslab.runs.tracking.WandB"


def agent_command(template: list[str], values: dict[str, Any]) -> list[str]:
    """Return the command that `wandb agent` would run, built with W&B's own functions."""
    arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    command: list[str] = []
    for word in create_sweep_command(template):
        command += arguments["args"] if word == "${args}" else [word]
    return command


def _first(parameter: dict[str, Any]) -> Any:
    return parameter["values"][0] if "values" in parameter else parameter["min"]


def _last(parameter: dict[str, Any]) -> Any:
    return parameter["values"][-1] if "values" in parameter else parameter["max"]


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config
