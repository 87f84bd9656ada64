"""How large images are: the sizes of training and evaluation, and sizes that grow with training."""

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


def of(pets: Path, workers: int = 0, **view: Any) -> ImageData:
    augment = Augment(flip="random", cutout=4, mixup=1.0)
    settings: dict[str, Any] = {"batch_size": 4, "val_split": 2, "num_workers": workers, "augment": augment}
    return ImageData(ImageFolder(str(pets), image_size=32), resize=ResizeConfig(**view), **settings)


GROWING: dict[str, Any] = {"progressive": ProgressiveResizing(8, until=0.7, multiple=8), "train_size": 24}


def test_the_law_is_ffcvs():
    # rn50_configs/rn50_88_epochs.yaml of github.com/libffcv/ffcv-imagenet: 160 until epoch 65, 192 from 76 on
    sizes = ProgressiveResizing(160, begin=65 / 88, until=76 / 88).sizes(192, 88)
    ramp = [int(np.round(np.interp(e, [65, 76], [160, 192]) / 32)) * 32 for e in range(88)]
    assert list(sizes) == ramp
    assert (sizes[70], sizes[71], sizes[-1]) == (160, 192, 192)


def test_sizes_begin_and_end_as_asked_and_grow_by_multiples():
    sizes = ProgressiveResizing(100, until=0.8, multiple=32).sizes(180, 10)
    assert sizes == (100, 96, 128, 128, 128, 160, 160, 160, 180, 180)
    assert ProgressiveResizing(8).sizes(32, 1) == (8,)


@pytest.mark.parametrize("wrong", [{"start": 0}, {"start": 8, "multiple": 0}, {"start": 8, "begin": 0.5, "until": 0.5}])
def test_impossible_growth_is_refused(wrong):
    with pytest.raises(UserError, match=r"data\.resize\.progressive: "):
        ProgressiveResizing(**wrong)


def shapes(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(batch.images.shape) for batch in batches]


@pytest.mark.parametrize("settings", [{}, {"max_steps": 6}, {"accumulate_grad_batches": 2}])
def test_images_grow_with_training_and_evaluation_has_its_own_size(pets, settings):
    model = train(of(pets, test_size=40, **GROWING), **settings)  # 3 epochs of 2 steps
    parts = settings.get("accumulate_grad_batches", 1)
    assert shapes(model.seen) == [(4 // parts, 3, n, n) for n in (8, 16, 24) for _ in range(2 * parts)]
    assert {shape[2:] for shape in shapes(model.evaluated)} == {(40, 40)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("after", [1, 3, 4])
def test_growing_images_are_the_same_for_any_workers_and_interruption(pets, tmp_path, after, workers):
    checkpoint = tmp_path / "stop.ckpt"
    first = train(of(pets, workers, **GROWING), None, SaveAfter(after, checkpoint)).seen[:after]
    assert_same(first + train(of(pets, workers, **GROWING), checkpoint).seen, train(of(pets, **GROWING)).seen)


@pytest.mark.parametrize("workers", [1, 3])
def test_loader_processes_write_over_no_batch_that_is_kept(pets, workers):
    settings: dict[str, Any] = {"batch_size": 2, "val_split": 2, "augment": Augment(repeats=2)}
    some, none = (
        ImageData(ImageFolder(str(pets), image_size=4), num_workers=n, eval_batch_size=1, **settings)
        for n in (workers, 0)
    )
    for data in (some, none):
        data.setup("fit")
        data.split = np.tile(data.split[0], 12), np.tile(data.split[1], 12)  # many, and made in no time
    for epoch in range(2):
        slow = []
        for batch in some.train_dataloader():
            time.sleep(0.01 * (epoch == 0))  # they are as far ahead as they can be
            slow.append(batch)
        assert_same(slow, list(none.train_dataloader()))
    assert_same(list(some.val_dataloader()), list(none.val_dataloader()))


def test_without_a_trainer_images_have_the_size_that_is_trained_for(pets):
    data = of(pets, **GROWING)
    assert next(iter(data.train_dataloader())).images.shape == (4, 24, 24, 3)
    assert data.preview(2, 2)[0].shape == (2, 2, 24, 24, 3)


def test_evaluation_is_resized_and_cut_as_asked(pets):
    for view, resize, size in (({}, 37, 32), ({"test_size": 28}, 32, 28), ({"test_resize": 34}, 34, 32)):
        data = of(pets, **view)
        assert data.image_shape == (3, size, size)
        assert data.test_dataloader().dataset.resize == resize
        assert next(iter(data.test_dataloader())).images.shape[1:3] == (size, size)
        assert next(iter(data.folder_dataloader(pets / "val"))).batch.images.shape[1:3] == (size, size)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"test_size": 0}, r"data\.resize\.test_size must be 1 or more"),
        ({"test_size": 64, "test_resize": 60}, "test_resize 60 is less than test_size 64"),
        ({"test_resize": 20}, "test_resize 20 is less than the test size 32"),
        ({"scaled_decode": 0.0}, "share of the training size, above 0"),
    ],
)
def test_impossible_views_are_refused(pets, view, message):
    with pytest.raises(UserError, match=message):
        of(pets, **view).setup("fit")


def test_data_in_memory_have_their_size():
    with pytest.raises(UserError, match=r"data\.resize is for data sets of image files"):
        ImageData(Digits(), resize=ResizeConfig(train_size=16)).setup("fit")


class FakeCuda:
    """Notes what is asked of streams, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def Stream(self, device: torch.device) -> "FakeCuda":
        return self

    def stream(self, side: "FakeCuda") -> "FakeCuda":
        return self

    def __enter__(self) -> None:
        self.said.append("[")

    def __exit__(self, *args: Any) -> None:
        self.said.append("]")

    def record_event(self) -> str:
        return f"event after {self.said[-1]}"

    def current_stream(self, device: torch.device) -> "FakeCuda":
        return self

    def wait_event(self, event: str) -> None:
        self.said.append(f"wait for {event}")


class FakeBatch(tuple):
    """A batch of one tensor, which is itself."""

    cuda: FakeCuda

    def __iter__(self) -> Any:
        return iter([self])

    def to(self, device: torch.device) -> "FakeBatch":
        self.cuda.said.append(f"copy {self[0]}")
        return self

    def record_stream(self, user: FakeCuda) -> None:
        self.cuda.said.append(f"keep {self[0]}")


def test_copies_run_one_batch_ahead_and_are_waited_for_one_by_one(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(loader.torch, "cuda", cuda)
    FakeBatch.cuda = cuda
    for batch in prefetch_to_device(iter([FakeBatch([i]) for i in range(3)]), torch.device("cuda")):
        cuda.said.append(f"use {batch[0]}")
    copied = ["[ copy 0 ]", "[ copy 1 ]", "[ copy 2 ]"]
    used = [f"wait for event after copy {i} keep {i} use {i}" for i in range(3)]
    assert " ".join(cuda.said) == " ".join([copied[0], copied[1], used[0], copied[2], used[1], used[2]])
    assert list(prefetch_to_device(iter([]), torch.device("cuda"))) == []


@pytest.mark.gpu
def test_batches_arrive_on_the_device_unchanged_and_without_a_sync(pets):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    sampler = [(epoch, np.arange(12)) for epoch in range(20)]
    batches = of(pets)._train_batches()
    options: dict[str, Any] = {"batch_size": None, "sampler": sampler, "pin_memory": True, "num_workers": 1}
    there = LazyLoader(batches, device=torch.device("cuda"), **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        arrived = [[tensor.clone() for tensor in batch] for batch in there]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, key in zip(arrived, sampler, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(batch, batches[key], strict=True))
