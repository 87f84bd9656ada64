"""One run from start to end: lock the run directory, train, test once, record the end, draw the report."""

import errno
import os
import shutil
import subprocess
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from safetensors.torch import save

from reslab.config import Experiment
from reslab.data import ImageData
from reslab.errors import Exit, UserError
from reslab.files import replacing
from reslab.header import print_rows, print_run
from reslab.host import handling_signals
from reslab.interrupt import resume_hint
from reslab.models.zoo import find_weights
from reslab.runs.csv_logger import MetricsCSV
from reslab.runs.folder import RunFolder
from reslab.runs.metrics import cut
from reslab.runs.record import RunRecord
from reslab.runs.tracking import RunLogger
from reslab.training import Classifier, processes
from reslab.training.checkpoint import Checkpoints, VerifiedCheckpointIO, read_checkpoint, resume_point, weights_sha256
from reslab.training.classifier import Diverged
from reslab.training.launchers import check_trainer
from reslab.training.lightning_internals import rank
from reslab.training.log_rows import LogRows
from reslab.training.preemption import Preempted, Preemption
from reslab.training.processes import Failure, FailureMonitor, SkipRedundantSync, lost_contact
from reslab.training.progress import ProgressReport
from reslab.training.rehearsal import Steps, rehearse

EXIT = {"complete": Exit.OK, "failed": Exit.FAILED, "diverged": Exit.FAILED, "preempted": Exit.PREEMPTED}


def fit(argv: list[str]) -> int:
    """Run `reslab fit`: start a run, or resume the unfinished one in --run.dir; return the exit status."""
    experiment = Experiment(argv)
    folder = RunFolder(experiment.run_dir())
    experiment.keep_precision(folder)
    built = experiment.build()  # first: a value refused at construction must leave no run directory behind
    resume_hint(lambda: "run the same command again to resume" if folder.holds_checkpoint() else "")
    if rank() != 0:
        return Run(experiment, folder, argv, *built).execute()
    with folder.claimed():
        return Run(experiment, folder, argv, *built).execute()


class Run:
    """Trains and tests one run in its run directory, which rank 0 has locked; `argv` is recorded in the manifest."""

    def __init__(
        self, experiment: Experiment, folder: RunFolder, argv: list[str],
        data: ImageData, model: Classifier, settings: dict[str, Any],
    ) -> None:  # fmt: skip
        self.experiment, self.folder, self.options = experiment, folder, experiment.config.run
        self.data, self.model, self.settings = data, model, settings
        self.record = RunRecord(folder, experiment.dump(), argv, writes=rank() == 0)
        self.failures = FailureMonitor(folder.path, rank(), lambda failure: self._close("failed", failure.message))
        self.progress = ProgressReport()
        self.steps: Steps | None = None  # known to rank 0, once it has rehearsed
        every = self.options.checkpoint_every_steps, self.options.checkpoint_every_minutes
        self.saver = Checkpoints(folder.checkpoints, self.options.monitor, self.options.mode, *every)
        self.preemption = Preemption(self.saver)
        self.pretrained: dict[str, str] = {}  # entry of the manifest

    def execute(self) -> int:
        """Train and test; record in the manifest how the run ended; return the exit status."""
        if self.record.is_finished():
            self._report_finished()
            return Exit.OK
        try:
            trainer = self._trainer()
            objective = self._rehearse(trainer)
            self._open(trainer, objective)
            if self.steps:
                new = None if self.options.dir else self.folder.path  # the header has it otherwise
                net = self.experiment.config.model.net.as_dict()
                print_run(self.model, net, self.data, trainer, self.steps, new)
            with handling_signals(self.preemption.note):
                self._train_and_test(trainer)
            self._finish()
        except (Preempted, SIGTERMException) as stop:
            return self._close("preempted", str(stop))
        except Diverged as error:
            return self._close("diverged", str(error))
        except Exception as error:
            return self._fail(error)
        return Exit.OK

    def _report_finished(self) -> None:
        if self.record.writes:
            print(f"{self.folder.path} holds a finished run: nothing to do. Report: {self.folder.report}")
            if not self.folder.report.exists():  # killed after the run was complete
                self._draw()

    def _trainer(self) -> Trainer:
        """Build the Trainer, with reslab's callbacks, logger and checkpoint I/O added to the user's."""
        columns = ["step", "epoch", *self.model.metric_names]
        # The order of callbacks matters: a checkpoint holds what was logged at the same step.
        callbacks = [LogRows(test_follows=True), SkipRedundantSync(), self.progress, self.saver, self.preemption]
        metrics = MetricsCSV(self.folder.metrics, columns)
        required: dict[str, Any] = {"callbacks": callbacks, "logger": [metrics], "plugins": [VerifiedCheckpointIO()]}
        lists = {name: [*self.settings[name], *added] for name, added in required.items()}
        trainer = self.experiment.build_trainer({**self.settings, **lists, "default_root_dir": str(self.folder.path)})
        check_trainer(trainer)
        return trainer

    def _rehearse(self, trainer: Trainer) -> dict[str, Any]:
        """Find errors before the run directory is claimed; return the objective's entry of the manifest, if any."""
        objective = self.model.objective.prepare(self.model.net)  # a missing teacher, too
        if self.record.writes:
            if not self.folder.holds_checkpoint():  # else the checkpoint has the weights
                self._load_pretrained()
            self.steps = rehearse(trainer, self.model, self.data, self._needed_metrics())
            for logger in self._loggers():
                logger.check(id="00000000", **self._logger_options())
            notes = [*self.experiment.notes(), *self.data.notes()]
            print(*(f"note: {note}\n" for note in notes), sep="", end="", flush=True)
        return objective

    def _load_pretrained(self) -> None:
        """Load pretrained weights, and note which: those behind an address may change."""
        if self.model.weights is not None:
            source = find_weights(self.model.weights)
            self.model.weights = source.name
            self.model.load_pretrained()
            self.pretrained = source.record()

    def _needed_metrics(self) -> list[str]:
        best = [self.options.monitor] if self.options.test_weights == "best" else []
        monitors = [getattr(callback, "monitor", None) for callback in self.settings["callbacks"]]
        return best + [name for name in monitors if name and name.startswith("val/")]

    def _open(self, trainer: Trainer, objective: dict[str, Any]) -> None:
        """Check that this run may be started or resumed here, and claim the run directory."""
        self.failures.start(trainer)
        data: dict[str, Any] = {}
        identity = self.data.identity() if self.record.writes else None
        if identity:
            shape = {"class_names": self.data.class_names, "image_shape": self.data.image_shape}
            data = {**identity.hashes, **shape}
        self.record.open(data, identity, trainer.world_size)
        if objective:
            self.record.write(objective=objective)
        if self.pretrained:
            self.record.write(pretrained=self.pretrained)
        for logger in self._loggers():
            config = yaml.safe_load(self.folder.config.read_text(encoding="utf-8"))
            logger.start(self.folder.path, id=self.record.manifest["id"], config=config, **self._logger_options())

    def _loggers(self) -> list[RunLogger]:
        return [logger for logger in self.settings["logger"] if isinstance(logger, RunLogger) and self.record.writes]

    def _logger_options(self) -> dict[str, Any]:
        options = self.options
        return {
            "name": f"{options.name} seed {self.record.values['seed_everything']}",
            "group": options.group or options.name,
            "job_type": options.job_type,
            "tags": options.tags,
        }

    def _train_and_test(self, trainer: Trainer) -> None:
        checkpoint = self._resume_point()
        if checkpoint is not None:
            self.model.expect_weights()
        trainer.fit(self.model, datamodule=self.data, ckpt_path=checkpoint, weights_only=True)
        self.record.manifest["samples_per_second"] = self.progress.images_per_second()
        self.record.manifest["ended_early"] = ended_early(trainer)
        self._test(trainer)
        self._close("complete")

    def _resume_point(self) -> Path | None:
        checkpoint, messages = resume_point(self.folder.checkpoints, quarantine=self.record.writes)
        step = 0
        if checkpoint:
            step = self.record.attempt["from_step"] = read_checkpoint(checkpoint)["global_step"]
            messages.append(f"resuming at step {step} from {checkpoint}")
        if self.record.writes:
            print(*messages, sep="\n", end="\n" if messages else "", flush=True)
            cut(self.folder.metrics, step)
        return checkpoint

    def _finish(self) -> None:
        if self.record.writes:
            pictures = self._draw()
            for logger in self._loggers():
                logger.log_weights(self.folder.weights, self.record.manifest)
                logger.finish(self.record.manifest["results"], pictures)

    def _test(self, trainer: Trainer) -> None:
        """Test the weights chosen by run.test_weights, unless run.skip_test; save weights, predictions and results."""
        model, best = self.model, self.options.test_weights == "best"
        results = dict(model.latest)
        if best:
            if self.saver.best is None:
                raise UserError(
                    f"no validation had a finite {self.options.monitor}, so there are no best weights to test"
                )
            processes.load_whole_state(model, read_checkpoint(self.folder.checkpoints / "best.ckpt")["state_dict"])
            results.update(self.saver.best_metrics)
        if not self.options.skip_test:
            trainer.test(model, datamodule=self.data, verbose=False, weights_only=True)
        results.update({name: value for name, value in model.latest.items() if name.startswith("test/")})
        state = processes.whole_state(model.evaluated_net())  # a collective: every rank takes part
        if not self.record.writes:
            return
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        with replacing(self.folder.weights) as part:
            part.write_bytes(save(weights))
        if model.predictions:
            with replacing(self.folder.predictions) as part, part.open("wb") as file:
                columns: dict[str, Any] = {name: column.numpy() for name, column in model.predictions.items()}
                np.savez_compressed(file, **columns)
        kind = "trained weights" if model.ema is None else "EMA"
        epoch = f"the epoch with the best {self.options.monitor}" if best else "the last epoch"
        tested = None if self.options.skip_test else f"{kind}, {epoch}"
        self.record.write(results=results, weights_sha256=weights_sha256(weights), tested_weights=tested)

    def _draw(self) -> list[Path]:
        """Print the test results, then draw figures and report; a failure here leaves the run complete."""
        from reslab.runs.result import result_rows

        try:
            print()
            width = print_rows(result_rows(self.folder))
            from reslab.runs.figures import draw_figures  # import matplotlib once the result is shown
            from reslab.runs.report import write_report

            test, names = self.data.test_images, self.data.class_names
            figures = draw_figures(self.folder.path, names, lambda i: test(np.array([i]))[0].numpy())
            report = write_report(self.folder.path)
            print_rows({"report": str(report)}, width)
        except Exception:
            traceback.print_exc()
            print(f"the run in {self.folder.path} is complete, but its figures or report could not be drawn: see above")
            return []
        return [*figures, report]

    def _close(self, status: str, reason: str = "", quiet: bool = False) -> int:
        """Record the end of the attempt, once in all threads, and return the exit status."""
        self.failures.claim_shutdown()
        outcome = self.record.close(status, reason)
        if status != "complete" and self.record.writes and not quiet:
            print(outcome, flush=True)
        if status == "preempted" and self.record.writes:
            requeue()
        if status in ("preempted", "diverged") and dist.is_available() and dist.is_initialized():
            dist.barrier()  # all ranks come here, and Slurm and torchrun end all processes with the first
        return EXIT[status]

    def _fail(self, error: Exception) -> int:
        """Report the cause of a failure and end all ranks; a rank that only lost its peer is not the cause."""
        wrong_use = isinstance(error, UserError | MisconfigurationException)
        failure = None if wrong_use else self.failures.first_failure()
        if failure is None:
            message = str(error) if wrong_use else explain_failure(error)
            if message is None:
                traceback.print_exc()
            failure = Failure(message or f"{type(error).__name__}: {error}", Exit.USAGE if wrong_use else Exit.FAILED)
            if not lost_contact(error):
                self.failures.note(failure)
        usage = failure.status == Exit.USAGE and self.record.writes
        self._close("failed", failure.message, quiet=usage)  # the command line prints a UserError
        self.failures.end_others(failure.status)
        if usage:
            raise UserError(failure.message) from error
        return failure.status


def ended_early(trainer: Trainer) -> str | None:
    """Return why training took fewer steps than configured; None if it took all of them."""
    step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
    if step >= total:
        return None
    remaining = [timer.time_remaining() for timer in trainer.callbacks if isinstance(timer, Timer)]  # type: ignore[attr-defined]
    if any(seconds is not None and seconds <= 0 for seconds in remaining):
        return f"at step {step} of {total}: the time limit was reached (trainer.max_time or a Timer)"
    stops = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]
    by = f"EarlyStopping on {stops[0].monitor}" if stops else "a callback asked for it"
    return f"at step {step} of {total}: {by}"


def explain_failure(error: Exception) -> str | None:
    """Return the cause of a failure outside the code, and its remedy; None for an unknown failure."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        remedy = "--trainer.accumulate_grad_batches N splits each batch into N smaller ones"
        return f"out of memory ({text.partition('.')[0] or 'of the host'}): {remedy}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full ({text}): the last checkpoint is intact; free space and run the same command again"
    # A worker that dies while it hands over a batch shows up as a broken connection.
    if "DataLoader worker" in text or isinstance(error, ConnectionError | EOFError):
        remedy = "run the same command again to resume, with fewer --data.num_workers if memory was short"
        return f"a loader process died ({text or type(error).__name__}): {remedy}"
    if lost_contact(error):
        return f"another process of the run is gone ({text.splitlines()[0]}): see its last messages"
    return None


def requeue() -> None:
    """Requeue the job under Slurm, to resume from its checkpoint, unless it was cancelled."""
    if "SLURM_JOB_ID" not in os.environ or not shutil.which("scontrol"):
        return
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
    if task := os.environ.get("SLURM_ARRAY_TASK_ID"):
        job = f"{job}_{task}"
    state = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False).stdout
    if "JobState=COMPLETING" not in state:  # scancel sends SIGTERM too: a cancelled job must not come back
        subprocess.run(["scontrol", "requeue", job], check=False)
