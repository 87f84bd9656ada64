"""Checkpoints that can be trusted: written whole, hashed, checked before they are loaded."""

import contextlib
import hashlib
import io
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

SUMS = "SHA256SUMS"  # beside the checkpoints, in the format of `sha256sum -c`
AGREE_EVERY = 8  # steps between two agreements of several processes


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_sums(folder: Path) -> dict[str, set[str]]:
    """The digests on record for each file of a checkpoints folder; several while a write is under way."""
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
    """Whether the file is, bit for bit, one that was written here."""
    # Any digest on record will do: a crash between two renames may leave a good file under its neighbour's name.
    known = set().union(*read_sums(path.parent).values())
    return sha256_file(path) in known


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's contents; raises UserError if the file is not whole. Never executes code from it."""
    if not checksum_matches(path):
        raise UserError(f"{path} is damaged: its SHA-256 is not the one in {SUMS}")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0]
        raise UserError(
            f"{path} holds more than tensors and plain values, and nothing in it was run ({reason}): "
            "no run wrote it; remove it to go on from the one before"
        ) from None


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's door to checkpoint files: atomic writes, digests on record, weights-only loads.

    A write keeps the file that it replaces as `previous.ckpt`, if it replaces `last.ckpt`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        contents = io.BytesIO()  # torch's own writer hides why a write failed, such as a full disk
        torch.save(checkpoint, contents)
        new = hashlib.sha256(contents.getbuffer()).hexdigest()
        with replacing(path) as part:
            part.write_bytes(contents.getbuffer())
            sums = read_sums(path.parent)
            before = sums.get(path.name, set())
            replaced = {"previous.ckpt": before} if path.name == "last.ckpt" and path.exists() else {}
            # On record under either name before it is moved: a kill in between leaves no whole file without digest.
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
    """The newest whole checkpoint to resume from, and what had to be set aside to find it.

    A damaged file is renamed to `<name>.damaged`, never deleted; of several processes, one has to `mend`, and all
    come to the same answer. Returns None where no checkpoint was ever written. Raises UserError where there were
    some and none is whole.
    """
    messages: list[str] = []
    for name in ("last.ckpt", "previous.ckpt"):
        path = folder / name
        if not path.exists():
            continue
        with contextlib.suppress(FileNotFoundError):  # set aside by the process that mends
            if checksum_matches(path):
                return path, messages
        aside = path.with_name(name + ".damaged")
        if quarantine:
            path.replace(aside)
        messages.append(f"{path} is damaged (its SHA-256 is not the one on record): set aside as {aside.name}")
    if messages:
        raise UserError(
            "\n".join([*messages, f"no whole checkpoint is left in {folder}: start the run anew in another folder"])
        )
    return None, messages


def at_step_end(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this batch completed an optimizer step; within an accumulation there are gradients nobody saves."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def max_over_ranks(trainer: Trainer, value: int, count: int) -> int:
    """The greatest `value` of all processes, who ask each other every few counts; 0 in between."""
    if trainer.world_size == 1:
        return value
    if count % AGREE_EVERY:
        return 0
    return int(trainer.strategy.reduce(torch.tensor(value, device=trainer.strategy.root_device), reduce_op="max"))


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the batch just done, or is under way."""
    loop = trainer.fit_loop
    return trainer.validating or loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


def resume_after_step(trainer: Trainer, loops: dict[str, Any]) -> None:
    """Sets the loops' counters in a checkpoint so that a run resumed from it does next what this one does next.

    Left as they are, Lightning 2.6 takes a validation that was to follow for done, goes on in the middle of one
    that was interrupted, and miscounts from an epoch's last step on, so that a second resume loses its place.
    """
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    if validation_is_due(trainer):
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        loops["epoch_loop.val_loop.batch_progress"].update(total=begun, current={**begun}, is_last_batch=False)
        for count in (batch["total"], batch["current"]):
            count["completed"] = count["processed"]
    elif trainer.is_last_batch:
        batch["total"]["completed"] = batch["total"]["processed"]
        batch.update(current=dict.fromkeys(batch["current"], 0), is_last_batch=False)
        for count in (epoch["total"], epoch["current"]):
            count["processed"] = count["completed"] = count["ready"]
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


class Checkpoints(Callback):
    """Writes last.ckpt, to resume from, and best.ckpt, the weights with the best validation metric.

    Args:
        folder: Where they are written.
        monitor: The metric that best.ckpt goes by.
        mode: Whether more or less of it is better.
        every_steps: Write last.ckpt every so many optimizer steps.
        every_minutes: Write last.ckpt whenever so many minutes have passed.
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
        self.best_metrics: dict[str, float] = {}  # of the validation that best.ckpt is from
        self._ended = False
        self._written_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_metrics": self.best_metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_metrics = state_dict["best"], state_dict["best_metrics"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["ended"] = self._ended
        if not self._ended:
            resume_after_step(trainer, checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        trainer.should_stop = checkpoint["ended"]  # an early stop, too, is for good

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._written_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_step_end(trainer, batch_idx) and self._due(trainer):
            self.write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = True
        self.write(trainer)

    def _due(self, trainer: Trainer) -> bool:
        if self.every_steps is not None and trainer.global_step % self.every_steps == 0:
            return True
        late = time.monotonic() - self._written_at >= 60 * self.every_minutes
        return bool(max_over_ranks(trainer, late, trainer.global_step))

    def write(self, trainer: Trainer) -> None:
        """Writes last.ckpt as of now; the one before it is kept."""
        if trainer.global_step == trainer.max_steps and not self._ended and validation_is_due(trainer):
            return  # resumed at max_steps, Lightning would leave out the last validation
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self._written_at = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self.monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.monitor])
        if self.best is None or (value > self.best if self.mode == "max" else value < self.best):
            self.best = value
            metrics = trainer.callback_metrics
            self.best_metrics = {name: float(metrics[name]) for name in metrics if name.startswith("val/")}
            trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=True)
