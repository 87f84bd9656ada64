"""Weights & Biases as a second log of a run, which can never interrupt the training."""

import contextlib
import functools
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from pandas import DataFrame

from reslab.errors import UserError

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


class WandB(Logger):
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
    """

    def __init__(
        self,
        project: str = "reslab",
        entity: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        init_timeout: float = 15.0,
        finish_timeout: float = 30.0,
    ) -> None:
        super().__init__()
        if init_timeout <= 0 or finish_timeout <= 0:
            raise ValueError("init_timeout and finish_timeout must be more than 0 seconds")
        self.project, self.entity, self.mode = project, entity, mode
        self.init_timeout, self.finish_timeout = init_timeout, finish_timeout
        self._run: Any = None

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str | None:
        return self._run.id if self._run else None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb.Run; None before `start` and after W&B failed."""
        return self._run

    def check(self, **options: Any) -> None:
        """Raise UserError if W&B is not installed or would refuse its settings; start and write nothing.

        `options` are those of `start`: id, name, group, job_type, tags. W&B's environment variables and settings
        files are checked too.
        """
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"trainer.logger: WandB requires the package wandb: pip install wandb ({error})") from error
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
        remedy = f". {self._how_to_upload()}" if mode == "offline" else ""
        print(f"W&B: {mode}, {reason}{remedy}", flush=True)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `start` receives the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._run:
            with self._never_fatal():
                self._run.log(metrics if step is None else {**metrics, "step": step})

    @rank_zero_only
    def finish(
        self, results: dict[str, float], figures: Sequence[Path] = (), tables: Mapping[str, DataFrame] | None = None
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

    @contextlib.contextmanager
    def _never_fatal(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            remedy = f". {self._how_to_upload()}" if self._run else ""
            print(f"W&B logging stopped: {type(error).__name__}: {_first_line(error)}{remedy}", flush=True)
            self._run = None

    def _how_to_upload(self) -> str:
        command = ["wandb", "sync", "--include-online", str(Path(self._run.dir).parent)]
        return f"To upload this run: {shlex.join(command)}"


def _reason(error: Exception) -> str:
    """Return the cause of a refusal; pydantic prints its own around it."""
    causes = [f"{cause['loc'][0]}: {cause['msg']}" for cause in getattr(error, "errors", list)()]
    return "; ".join(dict.fromkeys(causes)).replace("Value error, ", "") or str(error)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
