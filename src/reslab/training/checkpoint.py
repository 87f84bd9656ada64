"""Checkpoints: written atomically, hashed, and verified before they are loaded."""

import contextlib
import hashlib
import io
import math
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from reslab.errors import UserError
from reslab.files import replacing, sha256_file, write_text
from reslab.training.lightning_internals import resume_after_step, validation_is_due

SUMS = "SHA256SUMS"  # beside the checkpoints, in the format of `sha256sum -c`
SYNC_EVERY = 8  # steps between two exchanges of flags among ranks


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of all tensors, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_sums(folder: Path) -> dict[str, set[str]]:
    """Return the recorded digests of each file in a checkpoints directory; several per file during a write."""
    sums: dict[str, set[str]] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / SUMS).read_text(errors="replace").splitlines():
            digest, _, name = line.partition("  ")
            sums.setdefault(name, set()).add(digest)
    return sums


def _write_sums(folder: Path, sums: Mapping[str, set[str]]) -> None:
    lines = [f"{digest}  {name}\n" for name in sorted(sums) for digest in sorted(sums[name])]
    write_text(folder / SUMS, "".join(lines))


def checksum_matches(path: Path) -> bool:
    """Return whether the file has a recorded digest, so is intact."""
    # Accept the digest of any file: a crash between two renames may leave a good file under its neighbour's name.
    known = set().union(*read_sums(path.parent).values())
    return sha256_file(path) in known


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint; raise UserError if it is damaged. Never executes code from the file."""
    if not checksum_matches(path):
        raise UserError(f"{path} is damaged: its SHA-256 is not in {SUMS}")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0]
        remedy = "no run wrote it: remove it to resume from the previous checkpoint"
        raise UserError(f"{path} holds more than tensors and was not loaded ({reason}); {remedy}") from None


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's checkpoint I/O with atomic writes, recorded digests and weights-only loads.

    A write to `last.ckpt` keeps the file it replaces as `previous.ckpt`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        contents = io.BytesIO()  # torch's own writer hides why a write failed (disk full)
        torch.save(checkpoint, contents)
        new = hashlib.sha256(contents.getbuffer()).hexdigest()
        with replacing(path) as part:
            part.write_bytes(contents.getbuffer())
            sums = read_sums(path.parent)
            before = sums.get(path.name, set())
            replaced = {"previous.ckpt": before} if path.name == "last.ckpt" and path.exists() else {}
            # Record it under both names before the move: a kill in between must not leave a good file without digest.
            both = {name: digests | sums.get(name, set()) for name, digests in replaced.items()}
            _write_sums(path.parent, {**sums, **both, path.name: before | {new}})
            if replaced:
                path.replace(path.with_name("previous.ckpt"))
        _write_sums(path.parent, {**sums, **replaced, path.name: {new}})

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def resume_point(folder: Path, quarantine: bool = True) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint to resume from, and messages about damaged ones.

    A damaged file is renamed to `<name>.damaged`, never deleted. With several ranks, one must `quarantine`; all find
    the same checkpoint. Return None if no checkpoint was ever written.

    Raises:
        UserError: There are checkpoints and none is intact.
    """
    messages: list[str] = []
    for name in ("last.ckpt", "previous.ckpt"):
        path = folder / name
        if not path.exists():
            continue
        with contextlib.suppress(FileNotFoundError):  # moved aside by the rank that quarantines
            if checksum_matches(path):
                return path, messages
        aside = path.with_name(name + ".damaged")
        if quarantine:
            path.replace(aside)
        messages.append(f"{path} is damaged (its SHA-256 is not in {SUMS}): renamed to {aside.name}")
    if messages or any(folder.glob("*.ckpt.damaged")):
        remedy = f"no intact checkpoint is left in {folder}: start the run again in another directory"
        raise UserError("\n".join([*messages, remedy]))
    return None, messages


def at_step_end(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether this batch completed an optimizer step; between steps of an accumulation nothing can be saved."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def max_over_ranks(trainer: Trainer, value: int, count: int) -> int:
    """Return the maximum of `value` over all ranks, exchanged every SYNC_EVERY counts; 0 in between."""
    if trainer.world_size == 1:
        return value
    if count % SYNC_EVERY:
        return 0
    return int(trainer.strategy.reduce(torch.tensor(value, device=trainer.strategy.root_device), reduce_op="max"))


class Checkpoints(Callback):
    """Write last.ckpt, to resume from, and best.ckpt, the weights with the best validation metric.

    last.ckpt is written every `every_steps` optimizer steps, every `every_minutes` minutes and at the end; best.ckpt
    whenever `monitor` has a new best value.
    """

    def __init__(
        self,
        folder: Path,
        monitor: str = "val/acc",
        mode: Literal["max", "min"] = "max",
        every_steps: int | None = None,
        every_minutes: float = 5.0,
    ) -> None:
        self.folder, self.monitor, self.mode = folder, monitor, mode
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.best: float | None = None
        self.best_metrics: dict[str, float] = {}  # of the validation that wrote best.ckpt
        self._ended = False
        self._written_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_metrics": self.best_metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_metrics = state_dict["best"], state_dict["best_metrics"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["ended"] = self._ended
        if not self._ended:
            resume_after_step(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        trainer.should_stop = checkpoint["ended"]  # an early stop is final, too

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._written_at = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not at_step_end(trainer, batch_idx):
            return
        due = self.every_steps is not None and trainer.global_step % self.every_steps == 0
        late = time.monotonic() - self._written_at >= 60 * self.every_minutes
        if due or max_over_ranks(trainer, late, trainer.global_step):
            self.write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = True
        self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        """Write last.ckpt now and keep the one before it as previous.ckpt."""
        if trainer.global_step == trainer.max_steps and not self._ended and validation_is_due(trainer):
            return  # resumed at max_steps, Lightning would skip the last validation
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self._written_at = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self.monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.monitor])
        better = self.best is None or (value > self.best if self.mode == "max" else value < self.best)
        if better and not math.isnan(value):  # NaN is never better
            self.best = value
            metrics = trainer.callback_metrics
            self.best_metrics = {name: float(metrics[name]) for name in metrics if name.startswith("val/")}
            trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=True)
