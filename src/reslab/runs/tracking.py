"""Weights & Biases beside the run's own folder: never in the training's way."""

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from pandas import DataFrame

from reslab.errors import UserError


class WandB(Logger):
    """Follows a run in W&B: online where a login or key is there and the server answers, else offline.

    Nothing that goes wrong here reaches the training: it is said in one line, and the training goes on. The x
    axis of every metric is the logged column `step` (optimizer steps taken). W&B's own counter only ever
    rises: by it, the rows that a run logs again after resuming from an earlier step would be dropped.

    Args:
        project: The project in W&B.
        entity: The user or team that the project belongs to; the login's default without it.
        mode: Overrides $WANDB_MODE and W&B's settings files.
        init_timeout: Seconds to wait for the server at the start before going on offline.
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
            raise ValueError("init_timeout and finish_timeout are seconds and must be more than 0")
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
        """The wandb.Run; None before `attach`, and where W&B had to be given up."""
        return self._run

    def start(
        self,
        dir: Path,
        id: str,
        name: str,
        config: dict[str, Any],
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        """Starts the run in W&B, or continues the one with this id; its files go to `dir`/wandb.

        Args:
            dir: The run's folder.
            id: The run's own, unlike any other's in the project; at most 64 characters, without / : ? # %.
            name: What W&B shows.
            config: The whole resolved config.
            group: Such as a study.
            job_type: Such as an arm.
            tags: Any words.
        """
        # W&B's telemetry about itself holds up the exit for 10 s when the server hangs.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        about: dict[str, Any] = {"dir": str(dir.resolve()), "id": id, "name": name, "config": config}
        about |= {"group": group, "job_type": job_type, "tags": list(tags)}
        about |= {"project": self.project, "entity": self.entity}
        with self._never_fatal():
            self._start(about)
            self._run.define_metric("step", hidden=True)
            self._run.define_metric("*", step_metric="step")

    def _start(self, about: dict[str, Any]) -> None:
        import wandb

        mode: Any = self.mode or wandb.setup(self._settings()).settings.mode
        why = "as asked"
        if mode == "online":
            try:
                self._run = self._init_online(about)
                print(f"W&B: {self._run.url}", flush=True)
                return
            except Exception as error:
                mode, why = "offline", _brief(error)
                wandb.teardown()  # until then the id is taken
        self._run = wandb.init(mode=mode, settings=self._settings(), reinit="finish_previous", **about)
        remedy = f". {self._how_to_upload()}" if mode == "offline" else ""
        print(f"W&B: {mode}, {why}{remedy}", flush=True)

    def _init_online(self, about: dict[str, Any]) -> Any:
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise UserError("no login here (wandb login, or WANDB_API_KEY)")
        settings = self._settings()
        return wandb.init(mode="online", resume="allow", settings=settings, reinit="finish_previous", **about)

    def _settings(self) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,  # what a user has to know is said here, in one line
            console="off",
            init_timeout=self.init_timeout,
            finish_timeout=self.finish_timeout,
            finish_timeout_raises=True,
        )
        if self.mode:
            settings.mode = self.mode
        return settings

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The whole resolved config was given to `attach`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._run:
            with self._never_fatal():
                self._run.log(metrics if step is None else {**metrics, "step": step})

    @rank_zero_only
    def finish(
        self, results: dict[str, float], figures: Sequence[Path] = (), tables: Mapping[str, DataFrame] | None = None
    ) -> None:
        """Puts the final metrics in the summary, adds figures (PNG), report (HTML) and tables, and ends the run."""
        if self._run:
            with self._never_fatal():
                media = {f"figures/{path.stem}": _media(path) for path in figures}
                self._run.log(media | {f"tables/{name}": _table(table) for name, table in (tables or {}).items()})
                self._run.summary.update(results)
                self._run.finish()
            self._run = None

    @contextlib.contextmanager
    def _never_fatal(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            remedy = f". {self._how_to_upload()}" if self._run else ""
            print(f"W&B is given up for this run: {type(error).__name__}: {_brief(error)}{remedy}", flush=True)
            self._run = None

    def _how_to_upload(self) -> str:
        command = ["wandb", "sync", "--include-online", str(Path(self._run.dir).parent)]
        return f"To upload what is here: {shlex.join(command)}"


def _brief(error: Exception) -> str:
    """The first line of the message, without a full stop."""
    return str(error).partition("\n")[0].rstrip(".")


def _media(path: Path) -> Any:
    import wandb

    return wandb.Html(str(path)) if path.suffix == ".html" else wandb.Image(str(path))


def _table(table: DataFrame) -> Any:
    import wandb

    return wandb.Table(dataframe=table)
