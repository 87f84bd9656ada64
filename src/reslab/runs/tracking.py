"""Logs of a run beside metrics.csv: Weights & Biases, TensorBoard, MLflow. Their errors never stop the training."""

import contextlib
import functools
import importlib.util
import math
import os
import shlex
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from reslab.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame

# Arguments of wandb.init: where the config sets them, their name in W&B's settings, and the longest text that W&B's
# server accepts. The client checks no length of these: an offline run would be refused when it is uploaded.
OPTIONS: dict[str, tuple[str, str, float]] = {
    "project": ("trainer.logger.project", "project", 128),
    "entity": ("trainer.logger.entity", "entity", 128),
    "id": ("the run's id", "run_id", 128),
    "name": ("run.name", "run_name", 128),
    "group": ("run.group", "run_group", 128),
    "job_type": ("run.job_type", "run_job_type", 64),
    "tags": ("run.tags", "run_tags", math.inf),  # checked by the client
}


class RunLogger(Logger):
    """A logger with the life of a run: reslab calls `check` before the run starts, then `start` and `finish`.

    An error after `start` is printed in one line, and the training continues without this logger.

    Args:
        package: The name under which its package is imported.
        extra: The extra of reslab that installs the package.
    """

    def __init__(self, package: str, extra: str = "") -> None:
        super().__init__()
        self._run: Any = None  # None before `start` and after a failure
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a folder of this name in the working directory has no origin
            install = f"pip install -e '.[{extra}]'" if extra else f"pip install {package}"
            raise UserError(f"requires the package {package}, which is not installed: {install}")

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def version(self) -> str | None:
        return None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The library's own object, such as wandb.Run; None before `start` and after a failure."""
        return self._run

    def check(self, **options: Any) -> None:
        """Raise UserError if `start` with these options (id, name, group, job_type, tags) would be refused."""

    @abstractmethod
    def start(self, dir: Path, id: str, name: str, config: dict[str, Any], **options: Any) -> None:
        """Start the log of the run in `dir`, or continue the log with this id."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `start` receives the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._run is not None:
            with self._never_fatal():
                self._log(metrics, step)

    @abstractmethod
    def _log(self, metrics: dict[str, float], step: int | None) -> None: ...

    def log_weights(self, weights: Path, metadata: dict[str, Any]) -> None:
        """Log the file of tested weights, where the logger is configured to do so."""

    @abstractmethod
    def finish(self, results: dict[str, float], figures: Sequence[Path] = ()) -> None:
        """Log the final metrics, figures (PNG) and the report (HTML), and end the log."""

    @contextlib.contextmanager
    def _never_fatal(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            remedy = f". {self._remedy()}" if self._run is not None and self._remedy() else ""
            print(f"{self._title} logging stopped: {type(error).__name__}: {_first_line(error)}{remedy}", flush=True)
            self._run = None

    @property
    def _title(self) -> str:
        return type(self).__name__

    def _remedy(self) -> str:
        return ""


class WandB(RunLogger):
    """Logs a run to W&B: online if there is a login and the server answers, else offline.

    An error here is printed in one line, and the training continues. The x axis of every metric is the logged
    column `step` (optimizer steps taken), because W&B's own step counter can only increase: it would drop the rows
    that a run logs again after it resumed from an earlier step.

    Args:
        project: The project in W&B.
        entity: The user or team that owns the project (default: that of the login).
        mode: Overrides $WANDB_MODE and W&B's settings files.
        init_timeout: Seconds to wait for the server at the start, before the run is logged offline.
        finish_timeout: Seconds to wait for the upload at the end.
        weights_artifact: Log weights.safetensors as a version of the artifact with this name, with the manifest as
            metadata (default: do not).
    """

    _title = "W&B"

    def __init__(
        self,
        project: str = "reslab",
        entity: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        init_timeout: float = 15.0,
        finish_timeout: float = 30.0,
        weights_artifact: str | None = None,
    ) -> None:
        super().__init__("wandb")
        if init_timeout <= 0 or finish_timeout <= 0:
            raise ValueError("init_timeout and finish_timeout must be more than 0 seconds")
        self.project, self.entity, self.mode = project, entity, mode
        self.init_timeout, self.finish_timeout = init_timeout, finish_timeout
        self.weights_artifact = weights_artifact

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str | None:
        return self._run.id if self._run else None

    def check(self, **options: Any) -> None:
        """Raise UserError if W&B would refuse its settings; start and write nothing.

        `options` are those of `start`: id, name, group, job_type, tags. W&B's environment variables and settings
        files are checked too.
        """
        import wandb

        settings, refused = wandb.Settings(), (ValueError, TypeError, wandb.errors.UsageError)
        try:
            settings.update_from_system_settings()
            settings.update_from_env_vars(dict(os.environ))
        except refused as error:
            source = "its environment variables (WANDB_*) or settings file"
            raise UserError(f"trainer.logger: W&B refuses {source}: {_reason(error)}") from error
        for option, value in {"project": self.project, "entity": self.entity, **options}.items():
            key, setting, longest = OPTIONS[option]
            try:
                if isinstance(value, str) and len(value) > longest:
                    raise ValueError(f"it has {len(value)} characters, and at most {longest} are allowed")
                setattr(settings, setting, value)
            except refused as error:
                raise UserError(f"trainer.logger: W&B refuses {key}: {_reason(error)}") from error
        if self.weights_artifact is not None:
            try:
                wandb.Artifact(self.weights_artifact, type="model")
            except refused as error:
                raise UserError(f"trainer.logger: W&B refuses weights_artifact: {_reason(error)}") from error

    def start(self, dir: Path, id: str, name: str, config: dict[str, Any], **options: Any) -> None:
        """Start the run in W&B, or resume the one with this id; its files are written to `dir`/wandb.

        `id` has at most 64 characters, without / : ? # %; `options` are further arguments of wandb.init.
        """
        # W&B's error reporting delays the exit by 10 s if the server hangs.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        options |= {"dir": str(dir.resolve()), "id": id, "name": name, "config": config, "reinit": "finish_previous"}
        with self._never_fatal():
            self._start({"project": self.project, "entity": self.entity, **options})
            self._run.define_metric("step", hidden=True)
            self._run.define_metric("*", step_metric="step")

    def _start(self, options: dict[str, Any]) -> None:
        import wandb

        quiet: Any = {"silent": True, "console": "off"}  # this class prints what a user must know
        timeouts: Any = {"init_timeout": self.init_timeout, "finish_timeout": self.finish_timeout}
        settings = functools.partial(wandb.Settings, **quiet, **timeouts, finish_timeout_raises=True)
        mode: Any = self.mode or wandb.setup(settings()).settings.mode
        reason = "as requested"
        if mode == "online":
            try:
                if not wandb.login(prompt=False, verify=False):
                    raise UserError("no login (run `wandb login`, or set WANDB_API_KEY)")
                self._run = wandb.init(mode=mode, resume="allow", settings=settings(), **options)
                print(f"W&B: {self._run.url}", flush=True)
                return
            except Exception as error:
                mode, reason = "offline", _first_line(error)
                wandb.teardown()  # frees the id
        self._run = wandb.init(mode=mode, settings=settings(), **options)
        remedy = f". {self._remedy()}" if mode == "offline" else ""
        print(f"W&B: {mode}, {reason}{remedy}", flush=True)

    def _log(self, metrics: dict[str, float], step: int | None) -> None:
        self._run.log(metrics if step is None else {**metrics, "step": step})

    @rank_zero_only
    def log_weights(self, weights: Path, metadata: dict[str, Any]) -> None:
        if self._run and self.weights_artifact is not None:
            import wandb

            with self._never_fatal():
                artifact = wandb.Artifact(self.weights_artifact, type="model", metadata=metadata)
                # The file stays as it is, so W&B uploads it from the run directory and makes no copy.
                artifact.add_file(str(weights.resolve()), policy="immutable", skip_cache=True)
                self._run.log_artifact(artifact)

    @rank_zero_only
    def finish(
        self, results: dict[str, float], figures: Sequence[Path] = (), tables: "Mapping[str, DataFrame] | None" = None
    ) -> None:
        """Log final metrics to the summary, figures (PNG), report (HTML) and tables, and finish the run."""
        if self._run:
            import wandb

            with self._never_fatal():
                classes = {".html": wandb.Html, ".png": wandb.Image}
                media: dict[str, Any] = {f"figures/{path.stem}": classes[path.suffix](str(path)) for path in figures}
                media |= {f"tables/{name}": wandb.Table(dataframe=table) for name, table in (tables or {}).items()}
                self._run.log(media)
                self._run.summary.update(results)
                self._run.finish()
            self._run = None

    def _remedy(self) -> str:
        command = ["wandb", "sync", "--include-online", str(Path(self._run.dir).parent)]
        return f"To upload this run: {shlex.join(command)}"


class TensorBoard(RunLogger):
    """Writes event files for TensorBoard, by default to RUN/tensorboard.

    Args:
        save_dir: Write to save_dir/ID instead, where ID is the id in the run's manifest.
    """

    def __init__(self, save_dir: str | None = None) -> None:
        super().__init__("tensorboard", extra="tensorboard")
        self.directory = Path(save_dir) if save_dir else None

    def start(self, dir: Path, id: str, name: str, config: dict[str, Any], **options: Any) -> None:
        folder = self.directory / id if self.directory else dir / "tensorboard"
        self._run = _EventFiles(folder, {"name": name, "config": f"```yaml\n{yaml.safe_dump(config)}```"})
        print(f"TensorBoard: tensorboard --logdir {shlex.quote(str(folder))}", flush=True)

    def _log(self, metrics: dict[str, float], step: int | None) -> None:
        self._run.log(metrics, step)

    @rank_zero_only
    def finish(self, results: dict[str, float], figures: Sequence[Path] = ()) -> None:
        if self._run is not None:
            with self._never_fatal():
                self._run.images([path for path in figures if path.suffix == ".png"])
            self._run = None


class _EventFiles:
    """The event files of one run. A resumed run hides the events that it logs again."""

    def __init__(self, folder: Path, texts: Mapping[str, str]) -> None:
        self.folder, self.texts, self.step = folder, texts, 0
        self.writer: Any = None

    def log(self, metrics: dict[str, float], step: int | None) -> None:
        self.step = self.step if step is None else step
        if self.writer is None:  # not earlier: the first step of this attempt must be known
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=self.step)
            for tag, text in self.texts.items():
                self.writer.add_text(tag, text, self.step)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, self.step)
        self.writer.flush()

    def images(self, paths: Sequence[Path]) -> None:
        from PIL import Image

        self.log({}, None)
        for path in paths:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            self.writer.add_image(f"figures/{path.stem}", pixels, self.step, dataformats="HWC")
        self.writer.close()


class MLflow(RunLogger):
    """Logs a run to an MLflow tracking server, by default to files in RUN/mlruns.

    Args:
        experiment_name: The experiment in MLflow, which is created if it does not exist.
        tracking_uri: The server or database (default: $MLFLOW_TRACKING_URI, else files in RUN/mlruns).
    """

    def __init__(self, experiment_name: str = "reslab", tracking_uri: str | None = None) -> None:
        super().__init__("mlflow", extra="mlflow")
        self.experiment_name, self.tracking_uri = experiment_name, tracking_uri
        self._id = ""

    @property
    def version(self) -> str | None:
        return self._id or None

    def start(self, dir: Path, id: str, name: str, config: dict[str, Any], **options: Any) -> None:
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes 40 s to create
            uri = (dir.resolve() / "mlruns").as_uri()
        # A server that does not answer would be tried again for minutes in every step.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        with self._never_fatal():
            from mlflow import MlflowClient

            client = MlflowClient(uri)
            self._id = self._find(client, id) or self._create(client, id, name, config, options)
            client.update_run(self._id, status="RUNNING")
            self._run = client
            print(f"MLflow: run {self._id} in {uri}", flush=True)

    def _find(self, client: Any, id: str) -> str | None:
        """Return MLflow's id of the run with this id in its manifest."""
        experiment = client.get_experiment_by_name(self.experiment_name)
        runs = client.search_runs([experiment.experiment_id], f"tags.`reslab.id` = '{id}'") if experiment else []
        return runs[0].info.run_id if runs else None

    def _create(self, client: Any, id: str, name: str, config: dict[str, Any], options: dict[str, Any]) -> str:
        from mlflow.entities import Param

        experiment = client.get_experiment_by_name(self.experiment_name)
        number = experiment.experiment_id if experiment else client.create_experiment(self.experiment_name)
        tags = {key: ", ".join(value) if isinstance(value, list) else str(value) for key, value in options.items()}
        run = client.create_run(number, run_name=name, tags={"reslab.id": id, **tags}).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in _flat(config)]
        for first in range(0, len(params), 100):  # at most 100 in one request
            client.log_batch(run, params=params[first : first + 100])
        return run

    def _log(self, metrics: dict[str, float], step: int | None) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._run.log_batch(self._id, [Metric(name, float(value), now, step or 0) for name, value in metrics.items()])

    @rank_zero_only
    def finish(self, results: dict[str, float], figures: Sequence[Path] = ()) -> None:
        if self._run is not None:
            with self._never_fatal():
                for path in figures:
                    self._run.log_artifact(self._id, str(path), "figures")
                self._run.set_terminated(self._id, "FINISHED")
            self._run = None


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a nested config and their values."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _reason(error: Exception) -> str:
    """Return the cause of a refusal; pydantic prints its own around it."""
    causes = [f"{cause['loc'][0]}: {cause['msg']}" for cause in getattr(error, "errors", list)()]
    return "; ".join(dict.fromkeys(causes)).replace("Value error, ", "") or str(error)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
