"""Image sizes in training and evaluation, and progressive resizing."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reslab.data import Augment, Digits, ImageData, ImageFolder, ProgressiveResizing, ResizeConfig, loader
from reslab.data.batches import Batch
from reslab.data.loader import LazyLoader, prefetch_to_device
from reslab.errors import UserError
from test_datamodule import SaveAfter, assert_same, train


def data_of(pets: Path, workers: int = 0, **resize: Any) -> ImageData:
    augment = Augment(flip="random", cutout=4, mixup=1.0)
    settings: dict[str, Any] = {"batch_size": 4, "val_split": 2, "num_workers": workers, "augment": augment}
    return ImageData(ImageFolder(str(pets), image_size=32), resize=ResizeConfig(**resize), **settings)


GROWING: dict[str, Any] = {"progressive": ProgressiveResizing(8, until=0.7, multiple=8), "train_size": 24}


def test_progressive_sizes_match_ffcv():
    # rn50_configs/rn50_88_epochs.yaml of github.com/libffcv/ffcv-imagenet: 160 until epoch 65, 192 from epoch 76
    sizes = ProgressiveResizing(160, begin=65 / 88, until=76 / 88).sizes(192, 88)
    ramp = [int(np.round(np.interp(e, [65, 76], [160, 192]) / 32)) * 32 for e in range(88)]
    assert list(sizes) == ramp
    assert (sizes[70], sizes[71], sizes[-1]) == (160, 192, 192)


def test_progressive_sizes_start_and_end_exactly_and_grow_in_multiples():
    sizes = ProgressiveResizing(100, until=0.8, multiple=32).sizes(180, 10)
    assert sizes == (100, 96, 128, 128, 128, 160, 160, 160, 180, 180)
    assert ProgressiveResizing(8).sizes(32, 1) == (8,)


@pytest.mark.parametrize(
    "invalid", [{"start": 0}, {"start": 8, "multiple": 0}, {"start": 8, "begin": 0.5, "until": 0.5}]
)
def test_invalid_progressive_resizing_is_rejected(invalid):
    with pytest.raises(UserError, match=r"data\.resize\.progressive: "):
        ProgressiveResizing(**invalid)


def shapes(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(batch.images.shape) for batch in batches]


@pytest.mark.parametrize("settings", [{}, {"max_steps": 6}, {"accumulate_grad_batches": 2}])
def test_images_grow_during_training_and_evaluation_has_a_fixed_size(pets, settings):
    model = train(data_of(pets, test_size=40, **GROWING), **settings)  # 3 epochs of 2 steps
    parts = settings.get("accumulate_grad_batches", 1)
    assert shapes(model.trained) == [(4 // parts, 3, n, n) for n in (8, 16, 24) for _ in range(2 * parts)]
    assert {shape[2:] for shape in shapes(model.evaluated)} == {(40, 40)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("after", [1, 3, 4])
def test_progressive_batches_are_the_same_for_any_workers_and_interruption(pets, tmp_path, after, workers):
    checkpoint = tmp_path / "stop.ckpt"
    first = train(data_of(pets, workers, **GROWING), None, SaveAfter(after, checkpoint)).trained[:after]
    assert_same(
        first + train(data_of(pets, workers, **GROWING), checkpoint).trained, train(data_of(pets, **GROWING)).trained
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_overwrite_batches_in_use(pets, workers):
    settings: dict[str, Any] = {"batch_size": 2, "val_split": 2, "augment": Augment(repeats=2)}
    with_workers, without = (
        ImageData(ImageFolder(str(pets), image_size=4), num_workers=n, eval_batch_size=1, **settings)
        for n in (workers, 0)
    )
    for data in (with_workers, without):
        data.setup("fit")
        data.split = np.tile(data.split[0], 12), np.tile(data.split[1], 12)  # many batches that load quickly
    for epoch in range(2):
        slow = []
        for batch in with_workers.train_dataloader():
            time.sleep(0.01 * (epoch == 0))  # let the workers get as far ahead as they can
            slow.append(batch)
        assert_same(slow, list(without.train_dataloader()))
    assert_same(list(with_workers.val_dataloader()), list(without.val_dataloader()))


def test_without_a_trainer_images_have_the_final_training_size(pets):
    data = data_of(pets, **GROWING)
    assert next(iter(data.train_dataloader())).images.shape == (4, 24, 24, 3)
    assert data.preview(2, 2)[0].shape == (2, 2, 24, 24, 3)


def test_evaluation_is_resized_and_cropped_as_configured(pets):
    for config, resize, size in (({}, 37, 32), ({"test_size": 28}, 32, 28), ({"test_resize": 34}, 34, 32)):
        data = data_of(pets, **config)
        assert data.image_shape == (3, size, size)
        assert data.test_dataloader().dataset.resize == resize
        assert next(iter(data.test_dataloader())).images.shape[1:3] == (size, size)
        assert next(iter(data.folder_dataloader(pets / "val"))).batch.images.shape[1:3] == (size, size)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"test_size": 0}, r"data\.resize\.test_size must be at least 1"),
        ({"test_size": 64, "test_resize": 60}, "test_resize 60 is below the test size 64"),
        ({"test_resize": 20}, "test_resize 20 is below the test size 32"),
        ({"scaled_decode": 0.0}, "must be above 0"),
    ],
)
def test_invalid_resize_configs_are_rejected(pets, config, message):
    with pytest.raises(UserError, match=message):
        data_of(pets, **config).setup("fit")


def test_resize_is_rejected_for_data_in_memory():
    with pytest.raises(UserError, match=r"data\.resize requires a data set of image files"):
        ImageData(Digits(), resize=ResizeConfig(train_size=16)).setup("fit")


class FakeCuda:
    """Record the stream operations in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def Stream(self, device: torch.device) -> "FakeCuda":
        return self

    def stream(self, side: "FakeCuda") -> "FakeCuda":
        return self

    def __enter__(self) -> None:
        self.log.append("[")

    def __exit__(self, *args: Any) -> None:
        self.log.append("]")

    def record_event(self) -> str:
        return f"event after {self.log[-1]}"

    def current_stream(self, device: torch.device) -> "FakeCuda":
        return self

    def wait_event(self, event: str) -> None:
        self.log.append(f"wait for {event}")


class FakeBatch(tuple):
    """A batch of one tensor: itself."""

    cuda: FakeCuda

    def __iter__(self) -> Any:
        return iter([self])

    def to(self, device: torch.device) -> "FakeBatch":
        self.cuda.log.append(f"copy {self[0]}")
        return self

    def record_stream(self, user: FakeCuda) -> None:
        self.cuda.log.append(f"keep {self[0]}")


def test_prefetch_copies_one_batch_ahead_and_waits_for_each_copy(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(loader.torch, "cuda", cuda)
    FakeBatch.cuda = cuda
    for batch in prefetch_to_device(iter([FakeBatch([i]) for i in range(3)]), torch.device("cuda")):
        cuda.log.append(f"use {batch[0]}")
    copied = ["[ copy 0 ]", "[ copy 1 ]", "[ copy 2 ]"]
    used = [f"wait for event after copy {i} keep {i} use {i}" for i in range(3)]
    assert " ".join(cuda.log) == " ".join([copied[0], copied[1], used[0], copied[2], used[1], used[2]])
    assert list(prefetch_to_device(iter([]), torch.device("cuda"))) == []


@pytest.mark.gpu
def test_prefetch_to_gpu_keeps_batches_unchanged_without_a_sync(pets):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    sampler = [(np.arange(12), epoch, epoch) for epoch in range(20)]
    batches = data_of(pets).train_dataloader().dataset
    options: dict[str, Any] = {"batch_size": None, "sampler": sampler, "pin_memory": True, "num_workers": 1}
    loader = LazyLoader(batches, device=torch.device("cuda"), **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        arrived = [[tensor.clone() for tensor in batch] for batch in loader]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, key in zip(arrived, sampler, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(batch, batches[key], strict=True))
