"""External failures are reported with their cause, lose no data, and do not change the result."""

import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from reslab.experiment import explain_failure
from reslab.files import sha256_file
from reslab.training.checkpoint import checksum_matches
from runner import TRAINING, Fault, fit, manifest, metrics, reslab, traces

Undisturbed = Callable[..., Path]
KILLED_AT_11 = Fault(TRAINING, call=11)  # checkpoints of steps 9 (last) and 6 (previous)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    assert fit(folder, fault=KILLED_AT_11).status == -signal.SIGKILL
    return folder


@pytest.fixture
def unfinished(killed: Path, tmp_path: Path) -> Path:
    """A copy, for one test, of a run that was killed in its eleventh step."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


# Damaged and malicious checkpoints


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1  # in a tensor: torch would load it silently
    path.write_bytes(contents)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit])
def test_damaged_checkpoint_is_quarantined_and_previous_one_used(
    undisturbed: Undisturbed, unfinished: Path, damage: Callable[[Path], None]
) -> None:
    damage(unfinished / "checkpoints/last.ckpt")
    ended = fit(unfinished)
    assert ended.status == 0, ended.output
    assert f"{unfinished}/checkpoints/last.ckpt is damaged" in ended.output
    assert "renamed to last.ckpt.damaged" in ended.output and "resuming at step 6 from" in ended.output
    assert (unfinished / "checkpoints/last.ckpt.damaged").exists()
    assert traces(unfinished) == traces(undisturbed())


def test_run_stops_if_no_checkpoint_is_intact(unfinished: Path) -> None:
    before = metrics(unfinished)
    for name in ("last.ckpt", "previous.ckpt"):
        flip_a_bit(unfinished / "checkpoints" / name)
    ended = fit(unfinished)
    assert ended.status == 2 and "no intact checkpoint is left" in ended.output
    assert "last.ckpt is damaged" in ended.output and "previous.ckpt is damaged" in ended.output
    assert "Traceback" not in ended.output
    assert manifest(unfinished)["status"] == "failed" and metrics(unfinished) == before


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("forced", ["0", "1"])
def test_code_in_checkpoint_is_not_executed(unfinished: Path, tmp_path: Path, forced: str) -> None:
    last, mark = unfinished / "checkpoints/last.ckpt", tmp_path / "executed"
    torch.save({"global_step": 3, "state_dict": Payload(mark)}, last)
    (last.parent / "SHA256SUMS").write_text(f"{sha256_file(last)}  last.ckpt\n")  # an attacker can do this too
    ended = fit(unfinished, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=forced)
    assert ended.status == 2 and f"{last} holds more than tensors" in ended.output
    assert "Traceback" not in ended.output and not mark.exists()


@pytest.mark.parametrize("forced", ["0", "1"])
@pytest.mark.parametrize("write", [torch.save, lambda payload, path: path.write_bytes(pickle.dumps(payload))])
def test_code_in_weights_file_is_not_executed(tmp_path: Path, forced: str, write: Any) -> None:
    file, mark = tmp_path / "weights.pth", tmp_path / "executed"
    write({"conv1.weight": Payload(mark)}, file)
    ended = fit(tmp_path / "run", f"--model.weights={file}", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=forced)
    assert ended.status == 2 and f"{file} is not a file of weights only" in ended.output
    assert "Traceback" not in ended.output and not mark.exists()


# The disk and the run directory


def test_full_disk_loses_no_checkpoint(undisturbed: Undisturbed, unfinished: Path) -> None:
    last = unfinished / "checkpoints/last.ckpt"
    before = sha256_file(last)
    ended = fit(unfinished, largest_file=last.stat().st_size // 2)
    assert ended.status == 1 and "the disk is full" in ended.output and "Traceback" not in ended.output
    assert manifest(unfinished)["status"] == "failed"
    assert sha256_file(last) == before and checksum_matches(last) and not list(unfinished.rglob("*.part"))
    assert fit(unfinished).status == 0
    assert traces(unfinished) == traces(undisturbed())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("mounting a small file system requires root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_disk_without_a_free_byte(undisturbed: Undisturbed, small_disk: Path) -> None:
    run, filler = small_disk / "run", small_disk / "filler"
    ended = fit(run, fault=Fault(TRAINING, "fill_disk", 17), FILLER=str(filler))
    assert ended.status == 1 and "the disk is full" in ended.output
    assert checksum_matches(run / "checkpoints/last.ckpt")
    ended = fit(run)
    assert ended.status == 2 and "cannot write to the run directory" in ended.output
    filler.unlink()
    assert fit(run).status == 0
    assert traces(run) == traces(undisturbed())


def test_unwritable_run_directory_is_reported_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ended = fit(tmp_path / "file" / "run")
    assert ended.status == 2 and f"cannot write to the run directory {tmp_path}/file/run" in ended.output
    assert "Traceback" not in ended.output


def test_locked_run_directory_names_its_holder(unfinished: Path) -> None:
    before = (unfinished / "manifest.json").read_bytes()
    with (unfinished / ".lock").open("r+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # as the first run does
        holder = json.load(lock)
        ended = fit(unfinished)
    assert ended.status == 2 and "is in use by another run" in ended.output
    assert f"pid {holder['pid']} on {holder['host']}, since {holder['since']}" in ended.output
    assert (unfinished / "manifest.json").read_bytes() == before


def test_killed_run_leaves_no_lock_and_no_partial_files(undisturbed: Undisturbed, unfinished: Path) -> None:
    assert (unfinished / ".lock").read_text()  # the lock file of the run that was killed
    (unfinished / ".manifest.json.part").write_text("{")
    (unfinished / "checkpoints/.last.ckpt.part").write_bytes(b"half a checkpoint")
    with (unfinished / "metrics.csv").open("a") as file:
        file.write("10,0,2.1")  # a row cut off by the kill
    assert fit(unfinished).status == 0
    assert not list(unfinished.rglob("*.part"))
    assert traces(unfinished) == traces(undisturbed())


# The processes


def test_killed_loader_process_is_reported(undisturbed: Undisturbed, tmp_path: Path) -> None:
    ended = fit(tmp_path, "--data.num_workers=2", fault=Fault(TRAINING, "kill_worker", 12))
    assert ended.status == 1 and "a loader process died" in ended.output and "Traceback" not in ended.output
    assert manifest(tmp_path)["status"] == "failed"
    assert fit(tmp_path, "--data.num_workers=2").status == 0
    assert traces(tmp_path) == traces(undisturbed())


def test_signal_to_loaders_too_preempts_the_run(undisturbed: Undisturbed, tmp_path: Path) -> None:
    ended = fit(tmp_path, "--data.num_workers=2", fault=Fault(TRAINING, "terminate_all", 11))
    assert ended.status == 75, ended.output
    assert manifest(tmp_path)["attempts"][0]["how"].startswith("preempted: SIGTERM at step 11")
    assert fit(tmp_path, "--data.num_workers=2").status == 0
    assert traces(tmp_path) == traces(undisturbed())


def test_diverged_run_keeps_its_last_finite_checkpoint(tmp_path: Path) -> None:
    ended = fit(tmp_path, "--trainer.log_every_n_steps=100", fault=Fault(TRAINING, "spoil", 14))
    assert ended.status == 1 and "lower the learning rate" in ended.output and "Traceback" not in ended.output
    assert manifest(tmp_path)["status"] == "diverged"
    last = torch.load(tmp_path / "checkpoints/last.ckpt")
    assert last["global_step"] == 12 and all(tensor.isfinite().all() for tensor in last["state_dict"].values())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "accumulate_grad_batches"),
        (MemoryError(), "out of memory (of the host)"),
        (OSError(errno.ENOSPC, "No space left on device"), "the last checkpoint is intact"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a loader process died"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)
def test_explain_failure_names_cause_and_remedy(error: Exception, message: str) -> None:
    assert message in str(explain_failure(error))
    assert explain_failure(RuntimeError("a bug")) is None  # printed with its traceback


# The data


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """An image folder data set: twelve JPEG files in two classes, in train and in val."""
    for split in ("train", "val"):
        for i in range(12):
            file = tmp_path / "pictures" / split / "ab"[i % 2] / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((40, 40), 50).convert("RGB").save(file)
    return tmp_path / "pictures"


def fit_pictures(root: Path, *options: str) -> Any:
    sizes = ["--data.dataset.init_args.image_size=16", "--data.batch_size=4", "--data.val_split=4"]
    shape = ["--data.dataset.class_path=ImageFolder", "--data.dataset.init_args.folder=."]
    return fit(root.parent / "run", f"--data.root={root}", *shape, *sizes, *options)


def test_truncated_image_is_reported(pictures: Path) -> None:
    for file in (pictures / "train/a").iterdir():
        os.truncate(file, 300)
    ended = fit_pictures(pictures)
    assert ended.status != 0 and manifest(pictures.parent / "run")["status"] == "failed"
    assert f"{pictures}/train/a/" in ended.output and "cannot be read" in ended.output


def test_missing_class_is_reported_before_training(pictures: Path) -> None:
    shutil.rmtree(pictures / "val/b")
    ended = fit_pictures(pictures)
    assert ended.status == 2 and "Traceback" not in ended.output
    assert f"class directories in {pictures}/train and in val differ. Only in train: b." in ended.output
    assert not (pictures.parent / "run/metrics.csv").exists()


def test_wrong_number_of_classes_is_refused(tmp_path: Path) -> None:
    ended = fit(tmp_path, "--model.net.init_args.num_classes=7")
    assert ended.status == 2 and "num_classes" in ended.output and "Traceback" not in ended.output


def test_corrupt_cifar_batch_is_reported(shared_data: Path, repo: Path, tmp_path: Path) -> None:
    shutil.copytree(shared_data / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py")
    flip_a_bit(tmp_path / "cifar-10-batches-py/data_batch_2")
    config = repo / "configs/experiment/cifar10_resnet20.yaml"
    options = ["--data.root", tmp_path, "--data.download=false", "--run.dir", tmp_path / "run"]
    ended = reslab("fit", "--config", config, *options)
    assert ended.status == 2 and "data_batch_2" in ended.output and "Traceback" not in ended.output
    assert not (tmp_path / "run/metrics.csv").exists()


def test_run_directory_without_its_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"status": "preempted", "seed": 0, "attempts": []}')
    ended = fit(tmp_path)
    assert ended.status == 2 and "no config.yaml" in ended.output and "Traceback" not in ended.output
