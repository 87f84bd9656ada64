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
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from safetensors.torch import save

from reslab.config import Experiment
from reslab.data import ImageData
from reslab.data.samplers import BatchKey
from reslab.errors import Exit, UserError
from reslab.files import replacing
from reslab.runs.csv_logger import MetricsCSV
from reslab.runs.folder import RunFolder
from reslab.runs.metrics import cut
from reslab.runs.record import RunRecord
from reslab.runs.tracking import WandB
from reslab.training import Classifier, processes
from reslab.training.checkpoint import Checkpoints, VerifiedCheckpointIO, read_checkpoint, resume_point, weights_sha256
from reslab.training.classifier import Diverged
from reslab.training.lightning_internals import rank, saves_distributed_checkpoints
from reslab.training.log_rows import LogRows
from reslab.training.preemption import Preempted, Preemption
from reslab.training.processes import Failure, FailureMonitor, SkipRedundantSync, lost_contact
from reslab.training.progress import ProgressReport

EXIT = {"complete": Exit.OK, "failed": Exit.FAILED, "diverged": Exit.FAILED, "preempted": Exit.PREEMPTED}


def fit(argv: list[str]) -> int:
    """Run `reslab fit`: start a run, or resume the unfinished one in --run.dir; return the exit status."""
    experiment = Experiment(argv)
    built = experiment.build()  # first: a value refused at construction must leave no run directory behind
    experiment.check_trainer(built[2])
    built[1].objective.prepare(built[1].net)  # a missing teacher, too
    folder = RunFolder(experiment.run_dir())
    if rank() != 0:
        return Run(experiment, folder, argv).execute(*built)
    folder.probe()
    with folder.lock():
        return Run(experiment, folder, argv).execute(*built)


class Run:
    """Trains and tests one run in its run directory, which rank 0 has locked; `argv` is recorded in the manifest."""

    def __init__(self, experiment: Experiment, folder: RunFolder, argv: list[str]) -> None:
        self.experiment, self.folder, self.argv = experiment, folder, argv
        self.options = experiment.config.run
        self.record = RunRecord(folder, writes=rank() == 0)
        self.failures = FailureMonitor(folder.path, rank(), lambda failure: self._close("failed", failure.message))

    def execute(self, data: ImageData, model: Classifier, settings: dict[str, Any]) -> int:
        """Train and test; record in the manifest how the run ended; return the exit status."""
        if not self.record.open(self.experiment.dump(), self.argv):
            if self.record.writes and not self.folder.report.exists():  # killed after the run was complete
                self._draw(data)
            return Exit.OK
        try:
            self._train_and_test(data, model, settings)
        except (Preempted, SIGTERMException) as stop:
            return self._close("preempted", str(stop))
        except Diverged as error:
            return self._close("diverged", str(error))
        except Exception as error:
            return self._fail(error)
        return Exit.OK

    def _train_and_test(self, data: ImageData, model: Classifier, settings: dict[str, Any]) -> None:
        checkpoint, options, progress = self._resume_point(), self.options, ProgressReport()
        every = options.checkpoint_every_steps, options.checkpoint_every_minutes
        saver = Checkpoints(self.folder.checkpoints, options.monitor, options.mode, *every)
        with Preemption(saver) as preemption:
            columns = ["step", "epoch", *model.metric_names]
            # reslab's own callbacks. The order matters: a checkpoint holds what was logged at the same step.
            callbacks = [LogRows(test_follows=True), SkipRedundantSync(), progress, saver, preemption]
            trainer = self._trainer(settings, callbacks, MetricsCSV(self.folder.metrics, columns))
            self.failures.start(trainer)
            resumed = checkpoint is not None
            self.record.note_environment(trainer.world_size, resumed, options.allow_world_size_change)
            if self.record.writes:
                data.prepare_data()
                shape = {"class_names": data.class_names, "image_shape": data.image_shape}
                self.record.write(data={**data.fingerprint(), **shape})
                if objective := model.objective.prepare(model.net):
                    self.record.write(objective=objective)
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            self.record.manifest["samples_per_second"] = progress.images_per_second()
            self._test(trainer, model, data, saver)
        if self.record.writes:
            self._close("complete")
            pictures = self._draw(data)
            for logger in trainer.loggers:
                if isinstance(logger, WandB):
                    logger.finish(self.record.manifest["results"], pictures)

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

    def _trainer(self, settings: dict[str, Any], callbacks: list[Callback], metrics: MetricsCSV) -> Trainer:
        for logger in settings["logger"]:
            if isinstance(logger, WandB) and self.record.writes:
                config, options = yaml.safe_load(self.folder.config.read_text(encoding="utf-8")), self.options
                name = f"{options.name} seed {self.record.manifest['seed']}"
                group = {"group": options.group or options.name, "job_type": options.job_type, "tags": options.tags}
                logger.start(self.folder.path, self.record.manifest["id"], name, config, **group)
        if saves_distributed_checkpoints(settings["strategy"]):
            raise UserError("a checkpoint must be one file: set --trainer.strategy.save_distributed_checkpoint false")
        own: dict[str, Any] = {"callbacks": callbacks, "logger": [metrics], "plugins": [VerifiedCheckpointIO()]}
        lists = {name: [*settings[name], *added] for name, added in own.items()}
        return Trainer(**{**settings, **lists, "default_root_dir": str(self.folder.path)})

    def _test(self, trainer: Trainer, model: Classifier, data: ImageData, saver: Checkpoints) -> None:
        """Test once, with the weights chosen by run.test_weights, and save weights, predictions and results."""
        results, best = dict(model.latest), self.options.test_weights == "best"
        if best:
            processes.load_whole_state(model, read_checkpoint(self.folder.checkpoints / "best.ckpt")["state_dict"])
            results.update(saver.best_metrics)
        trainer.test(model, datamodule=data, verbose=False, weights_only=True)
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
        self.record.write(results=results, weights_sha256=weights_sha256(weights), tested_weights=f"{kind}, {epoch}")

    def _draw(self, data: ImageData) -> list[Path]:
        """Draw figures and report and print the test results; a failure here leaves the run complete."""
        from reslab.runs.figures import draw_figures
        from reslab.runs.report import write_report

        try:
            test, names = data.test_dataloader().dataset, data.class_names
            figures = draw_figures(self.folder.path, names, lambda i: test[BatchKey(np.array([i]))].images[0].numpy())
            report = write_report(self.folder.path)
        except Exception:
            traceback.print_exc()
            print(f"the run in {self.folder.path} is complete, but its figures or report could not be drawn: see above")
            return []
        results = self.record.manifest["results"].items()
        tested = [f"{name} {value:.4f}" for name, value in results if name.startswith("test/")]
        print(*tested, f"({self.options.test_weights} weights)", sep="  ")
        print(f"run     {self.folder.path}\nreport  {report}")
        return [*figures, report]

    def _close(self, status: str, reason: str = "") -> int:
        """Record the end of the attempt, once in all threads, and return the exit status."""
        self.failures.claim_shutdown()
        self.record.close(status, reason)
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
            cause = str(error) if wrong_use else explain_failure(error)
            if cause is None:
                traceback.print_exc()
            failure = Failure(cause or f"{type(error).__name__}: {error}", Exit.USAGE if wrong_use else Exit.FAILED)
            if not lost_contact(error):
                self.failures.note(failure)
        self._close("failed", failure.message)
        self.failures.end_others(failure.status)
        if failure.status == Exit.USAGE and self.record.writes:
            raise UserError(failure.message) from error
        return failure.status


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
