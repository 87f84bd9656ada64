"""One run from start to end: claim the folder, train, test once, close the manifest, draw the report."""

import errno
import os
import secrets
import shutil
import socket
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from safetensors.torch import save

from reslab.config import Experiment, rank
from reslab.data import ImageData
from reslab.data.samplers import BatchKey
from reslab.diff import differences
from reslab.errors import Exit, UserError
from reslab.files import replacing, write_text
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder
from reslab.runs.metrics import MetricsCSV, cut
from reslab.runs.tracking import WandB
from reslab.training import Classifier
from reslab.training.checkpoint import Checkpoints, VerifiedCheckpointIO, read_checkpoint, resume_point, weights_sha256
from reslab.training.classifier import Diverged
from reslab.training.preemption import Preempted, Preemption
from reslab.training.processes import (
    Failure,
    FailureMonitor,
    SkipRedundantSync,
    load_whole_state,
    lost_contact,
    whole_state,
)
from reslab.training.progress import ProgressReport

EXIT = {"complete": Exit.OK, "failed": Exit.FAILED, "diverged": Exit.FAILED, "preempted": Exit.PREEMPTED}


def fit(argv: list[str]) -> int:
    """`reslab fit`: starts a run, or continues the unfinished one in --run.dir; returns the exit status."""
    experiment = Experiment(argv)
    built = experiment.build()  # first: a value that is refused at construction leaves no folder behind
    if experiment.config.run.test_weights == "best" and not built[0].val_split:
        raise UserError("run.test_weights best goes by validation: give data.val_split a share or a number of images")
    folder = RunFolder(experiment.run_dir())
    if rank() != 0:
        return Run(experiment, folder, argv).execute(*built)
    folder.probe()
    with folder.lock():
        return Run(experiment, folder, argv).execute(*built)


class Run:
    """A run in its folder, and the manifest that it keeps.

    Args:
        experiment: The parsed configuration.
        folder: The run's folder, claimed by this process.
        argv: The command line, for the record.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, argv: list[str]) -> None:
        self.experiment, self.folder, self.argv = experiment, folder, argv
        self.options = experiment.config.run
        self.manifest: dict[str, Any] = {}
        self._began = time.monotonic()
        self.writes = rank() == 0  # one process keeps the folder
        self.watch = FailureMonitor(folder.path, rank(), lambda failure: self._close("failed", failure.message))

    def execute(self, data: ImageData, model: Classifier, settings: dict[str, Any]) -> int:
        """Trains and tests; whatever happens, the manifest says how it ended."""
        if not self._open():
            if self.writes and not self.folder.report.exists():  # killed after the last word of the manifest
                self._draw(data)
            return EXIT["complete"]
        try:
            self._train_and_test(data, model, settings)
        except (Preempted, SIGTERMException) as stop:
            return self._close("preempted", str(stop))
        except Diverged as error:
            return self._close("diverged", str(error))
        except Exception as error:
            return self._fail(error)
        return EXIT["complete"]

    def _fail(self, error: Exception) -> int:
        """Says why, and ends all processes; of several, those whose connection breaks are not the ones to blame."""
        wrong_use = isinstance(error, UserError | MisconfigurationException)
        failure = None if wrong_use else self.watch.first_failure()
        if failure is None:
            cause = str(error) if wrong_use else explain_failure(error)
            if cause is None:
                traceback.print_exc()
            failure = Failure(cause or f"{type(error).__name__}: {error}", Exit.USAGE if wrong_use else Exit.FAILED)
            if not lost_contact(error):
                self.watch.note(failure)
        self._close("failed", failure.message)
        self.watch.end_others(failure.status)
        if failure.status == Exit.USAGE and self.writes:
            raise UserError(failure.message) from error
        return failure.status

    # The manifest

    def _open(self) -> bool:
        """Opens the manifest, of a new run or of an unfinished one; False where the run is finished already."""
        text = self.experiment.dump()
        if self.folder.manifest.exists():
            self.manifest = manifests.read(self.folder.manifest)
            self._refuse_other_config(text)
            if self.manifest["status"] == "complete":
                print(f"{self.folder.path} holds this run, finished: nothing to do. Report: {self.folder.report}")
                return False
            for attempt in self.manifest["attempts"]:
                attempt.setdefault("ended", None)
                attempt.setdefault("how", "killed")
        else:
            self.manifest = self._new_manifest(text)
            if self.writes:
                write_text(self.folder.config, text)
        started = {"started": manifests.now(), "host": socket.gethostname(), "pid": os.getpid()}
        self.manifest["attempts"].append(started)
        if self.writes:
            self.folder.clear_leftovers()
        self._write(status="running")
        return True

    def _new_manifest(self, config: str) -> dict[str, Any]:
        diff = self.folder.path / "uncommitted.diff" if self.writes else None
        return {
            "status": "running",
            "id": secrets.token_hex(4),
            "name": self.options.name,
            "seed": self.experiment.config.seed_everything,
            "command": manifests.command(["fit", *self.argv]),
            "config_sha256": manifests.config_sha256(config),
            "rule": self.options.test_weights,
            "git": manifests.git_state(Path(__file__).parent, keep=diff),
            "attempts": [],
            "results": {},
            "weights_sha256": None,
            "wall_seconds": 0.0,
            "samples_per_second": None,
        }

    def _refuse_other_config(self, text: str) -> None:
        found = differences(yaml.safe_load(self.folder.config.read_text()), yaml.safe_load(text))
        if other := [row for row in found if not row[0].startswith(manifests.NOT_IDENTITY)]:
            rows = "\n".join(f"  {key}: {there} there, {here} here" for key, there, here in other)
            remedy = "give another --run.dir, or the same config"
            raise UserError(f"{self.folder.path} holds a run with another config; {remedy}:\n{rows}")

    def _write(self, **changes: Any) -> None:
        self.manifest.update(changes)
        if self.writes:
            manifests.write(self.folder.manifest, self.manifest)

    def _close(self, status: str, how: str) -> int:
        self.watch.claim_shutdown()
        attempt = self.manifest["attempts"][-1]
        attempt.update(ended=manifests.now(), how=status if status == "complete" else f"{status}: {how}")
        self.manifest["wall_seconds"] += round(time.monotonic() - self._began, 1)
        if status != "complete" and self.writes:
            print(f"{status}: {how}", flush=True)
        try:
            self._write(status=status)
        except OSError as error:  # a full disk takes the manifest's last word, but not the exit status
            print(f"the manifest could not be closed: {error}", flush=True)
        if status == "preempted" and self.writes:
            requeue()
        together = status in ("preempted", "diverged")
        if together and dist.is_available() and dist.is_initialized():  # Slurm and torchrun end all with the first
            dist.barrier()
        return EXIT[status]

    # The work

    def _train_and_test(self, data: ImageData, model: Classifier, settings: dict[str, Any]) -> None:
        checkpoint = self._resume_point()
        options = self.options
        every = options.checkpoint_every_steps, options.checkpoint_every_minutes
        progress, saver = ProgressReport(), Checkpoints(self.folder.checkpoints, options.monitor, options.mode, *every)
        with Preemption(saver) as preemption:
            # In this order: what is saved at a step's end knows what was logged in it.
            trainer = self._trainer(settings, [SkipRedundantSync(), progress, saver, preemption])
            self.watch.start(trainer)
            self._note_environment(trainer, resumed=checkpoint is not None)
            if self.writes:
                data.prepare_data()
                self._write(data={**data.fingerprint(), "class_names": data.class_names})
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            self.manifest["samples_per_second"] = progress.images_per_second()
            self._test(trainer, model, data, saver)
        if self.writes:
            self._close("complete", "")
            pictures = self._draw(data)
            for tracker in self.trackers:
                tracker.finish(self.manifest["results"], pictures)

    def _resume_point(self) -> Path | None:
        checkpoint, messages = resume_point(self.folder.checkpoints, quarantine=self.writes)
        step = read_checkpoint(checkpoint)["global_step"] if checkpoint else 0
        if checkpoint:
            messages.append(f"resuming at step {step} from {checkpoint}")
            self.manifest["attempts"][-1]["from_step"] = step
        if self.writes:
            print(*messages, sep="\n", end="\n" if messages else "", flush=True)
            cut(self.folder.metrics, step)
        return checkpoint

    def _trainer(self, settings: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        self.trackers = [logger for logger in settings["logger"] if isinstance(logger, WandB)]
        if self.writes:
            self._attach_wandb()
        if getattr(settings["strategy"], "_save_distributed_checkpoint", False):
            raise UserError("a checkpoint is one file here: --trainer.strategy.save_distributed_checkpoint false")
        return Trainer(
            **{
                **settings,
                "callbacks": [*settings["callbacks"], *callbacks],
                "logger": [*settings["logger"], MetricsCSV(self.folder.metrics)],
                "plugins": [*settings["plugins"], VerifiedCheckpointIO()],
                "default_root_dir": str(self.folder.path),
            }
        )

    def _note_environment(self, trainer: Trainer, resumed: bool) -> None:
        """Reads back what is in force, and refuses to go on with another number of processes unless told to."""
        before = self.manifest.get("environment", {}).get("world_size", trainer.world_size)
        if resumed and before != trainer.world_size:
            if not self.options.allow_world_size_change:
                raise UserError(
                    f"this run was trained by {before} processes, not {trainer.world_size}: the order of the images "
                    "would stay the same, the bits might not. Use as many again, or allow it: --run.allow_world_size_change true"
                )
            self.manifest["elastic"] = f"resumed by {trainer.world_size} processes after {before}: bits may differ"
        self._write(environment={**manifests.environment(), "world_size": trainer.world_size})

    def _attach_wandb(self) -> None:
        config = yaml.safe_load(self.folder.config.read_text())
        for tracker in self.trackers:
            tracker.start(
                dir=self.folder.path,
                id=self.manifest["id"],
                name=f"{self.options.name} seed {self.manifest['seed']}",
                config=config,
                group=self.options.group or self.options.name,
                job_type=self.options.job_type,
                tags=self.options.tags,
            )

    def _test(self, trainer: Trainer, model: Classifier, data: ImageData, saver: Checkpoints) -> None:
        """Tests the weights that the protocol names, once, and keeps them with what they answered."""
        results = dict(model.latest)
        if self.options.test_weights == "best":
            load_whole_state(model, read_checkpoint(self.folder.checkpoints / "best.ckpt")["state_dict"])
            results.update(saver.best_metrics)
        trainer.test(model, datamodule=data, verbose=False, weights_only=True)
        results.update({name: model.latest[name] for name in model.latest if name.startswith("test/")})
        state = whole_state(model.evaluated_net())
        if not self.writes:
            return
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        with replacing(self.folder.weights) as part:
            part.write_bytes(save(weights))
        with replacing(self.folder.predictions) as part, part.open("wb") as file:
            columns: dict[str, Any] = {name: column.numpy() for name, column in model.predictions.items()}
            np.savez_compressed(file, **columns)
        kind = "EMA" if model.ema is not None else "trained weights"
        which = (
            "the last epoch"
            if self.options.test_weights == "last"
            else f"the epoch with the best {self.options.monitor}"
        )
        self._write(results=results, weights_sha256=weights_sha256(weights), tested_weights=f"{kind}, {which}")

    def _draw(self, data: ImageData) -> list[Path]:
        """Figures and report; should they fail, the run is complete all the same."""
        from reslab.runs.figures import draw_figures
        from reslab.runs.report import write_report

        try:
            figures = draw_figures(self.folder.path, data.class_names, _test_images(data))
            report = write_report(self.folder.path)
        except Exception:
            traceback.print_exc()
            print(f"the run is complete, but its figures or report could not be drawn: see above. {self.folder.path}")
            return []
        results = self.manifest["results"]
        print(
            f"test/acc {results['test/acc']:.4f}  test/loss {results['test/loss']:.4f}  ({self.options.test_weights} weights)"
        )
        print(f"run     {self.folder.path}\nreport  {report}")
        return [*figures, report]


def explain_failure(error: Exception) -> str | None:
    """The cause of a failure that has nothing to do with the code, and what to do; None where it is not known."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        remedy = "--trainer.accumulate_grad_batches N takes each step in N parts"
        return f"out of memory ({text.partition('.')[0] or 'of the host'}): {remedy}"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "PytorchStreamWriter failed" in text or "unexpected pos" in text:
        return f"the disk is full ({text}): the last checkpoint is intact, make room and run the same command again"
    # One that dies as it hands over a batch shows as a broken connection.
    if "DataLoader worker" in text or isinstance(error, ConnectionError | EOFError):
        remedy = "run the same command again to go on, with fewer --data.num_workers if memory was short"
        return f"a loader process died ({text or type(error).__name__}): {remedy}"
    if lost_contact(error):
        return f"another process of the run is gone ({text.splitlines()[0]}): see what it said last"
    return None


def requeue() -> None:
    """Under Slurm, puts the job back into the queue: it will go on from its checkpoint. Not one that was cancelled."""
    if "SLURM_JOB_ID" not in os.environ or not shutil.which("scontrol"):
        return
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
    if task := os.environ.get("SLURM_ARRAY_TASK_ID"):
        job = f"{job}_{task}"
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False).stdout
    if "JobState=COMPLETING" not in shown:  # scancel asks with SIGTERM, too, and would be asked again and again
        subprocess.run(["scontrol", "requeue", job], check=False)


def _test_images(data: ImageData) -> Callable[[int], np.ndarray]:
    """The test images by index, uint8 (H, W, C), as the network saw them before normalisation."""
    batches = data.test_dataloader().dataset
    return lambda index: batches[BatchKey(np.array([index]))].images[0].numpy()
