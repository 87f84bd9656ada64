"""ImageData: the same batches for any number of workers, validation schedule, number of devices and interruption."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from reslab import Classifier, create_model
from reslab.data import CIFAR10, Augment, DataError, Digits, ImageData, ImageFolder, ImageSource
from reslab.data.augment import swap_pairs
from reslab.data.batches import Batch
from reslab.data.datasets import Arrays
from reslab.data.order import permutation
from reslab.data.samplers import BatchKey, EvalOrder, TrainOrder
from reslab.errors import UserError
from reslab.training import CrossEntropy

AUGMENT = Augment(crop_padding=1, flip="random", cutout=2, mixup=1.0, cutmix=1.0, erasing=0.5)
UNMIXED = Augment(crop_padding=1, flip="random", cutout=2, erasing=0.5)


def digits(**settings: Any) -> ImageData:
    return ImageData(Digits(), **{"batch_size": 100, "augment": AUGMENT, **settings})


def epochs(data: ImageData, count: int) -> list[Batch]:
    loader = data.train_dataloader()
    return [data.on_after_batch_transfer(batch) for _ in range(count) for batch in loader]


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_plain_loop_sees_each_training_image_once_per_epoch():
    data = digits(batch_size=1294 // 2, augment=UNMIXED)
    batches = epochs(data, 2)
    assert len(batches) == 4
    assert batches[0].images.shape == (647, 1, 8, 8)
    for first, second in (batches[:2], batches[2:]):
        assert sorted([*first.indices.tolist(), *second.indices.tolist()]) == data.split[0].tolist()
    assert not torch.equal(batches[0].indices, batches[2].indices)
    assert torch.equal(batches[0].labels, torch.from_numpy(data.train_data.labels)[batches[0].indices])


@pytest.mark.parametrize("workers", [1, 2])
def test_number_of_workers_does_not_change_batches(workers):
    assert_same(epochs(digits(num_workers=workers), 2), epochs(digits(), 2))


def test_seed_changes_order_and_augmentation():
    a, b = (next(iter(digits(seed=seed).train_dataloader())) for seed in (0, 1))
    assert not torch.equal(a.indices, b.indices)
    batches = [digits(seed=seed).train_dataloader().dataset for seed in (0, 1)]
    assert not torch.equal(
        batches[0][BatchKey(np.arange(9))].augment_params, batches[1][BatchKey(np.arange(9))].augment_params
    )


def test_loading_does_not_change_the_global_random_state():
    before = torch.random.get_rng_state()
    epochs(digits(num_workers=1), 1)
    assert torch.equal(torch.random.get_rng_state(), before)


class Recorder(LightningModule):
    """Record the training batches; request the length of training first, as learning-rate schedules do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained: list[Batch] = []
        self.evaluated: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.trained.append(batch)
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluated.append(batch)

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> torch.Tensor:
        return batch.indices

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SaveAfter(Callback):
    """Save a checkpoint after a number of batches and stop there."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if len(module.trained) == self.batches:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
            trainer.limit_train_batches = trainer.limit_val_batches = 0


def train(data: ImageData, resume: Path | None = None, *callbacks: Callback, **settings: Any) -> Recorder:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    model = Recorder()
    settings = {"max_epochs": 3, "accelerator": "cpu", "enable_model_summary": False, **quiet, **settings}
    trainer = Trainer(callbacks=[*callbacks], **settings)
    trainer.fit(model, data, ckpt_path=resume)
    return model


def interrupted(path: Path, after: int, workers: int, **settings: Any) -> list[Batch]:
    """Train for `after` batches, resume with new objects, and return all training batches."""
    checkpoint = path / "stop.ckpt"
    first = train(digits(num_workers=workers), None, SaveAfter(after, checkpoint), **settings)
    second = train(digits(num_workers=workers), checkpoint, **settings)
    return first.trained[:after] + second.trained


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("after", [1, 5, 12, 17, 24])
def test_resumed_training_continues_with_the_next_batch(tmp_path, after, workers):
    # 12 batches per epoch: inside and at the end of the first and second epoch
    assert_same(interrupted(tmp_path, after, workers), train(digits()).trained)


def test_resume_with_accumulated_and_limited_batches(tmp_path):
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "limit_train_batches": 8}
    whole = train(digits(), **settings).trained
    assert len(whole) == 24
    assert len(whole[0].images) == 50
    assert_same(interrupted(tmp_path, 10, 1, **settings), whole)
    assert not torch.equal(whole[0].indices, whole[8].indices)


@pytest.mark.parametrize(
    "settings", [{"limit_val_batches": 0}, {"val_check_interval": 5}, {"check_val_every_n_epoch": 3}]
)
def test_validation_schedule_does_not_change_batches(settings):
    assert_same(train(digits(), None, **settings).trained, train(digits()).trained)


@pytest.mark.parametrize("augment", [AUGMENT, UNMIXED])
def test_micro_batches_add_up_to_the_same_global_batch(augment):
    whole, halves = (
        train(digits(augment=augment), limit_train_batches=4),
        train(digits(augment=augment), accumulate_grad_batches=2, limit_train_batches=8),
    )
    for step, batch in enumerate(whole.trained):
        parts = halves.trained[2 * step : 2 * step + 2]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert all(torch.equal(part.mix, batch.mix) for part in parts)


def test_ranks_and_micro_batches_are_mixed_like_the_whole_batch():
    data = digits()
    whole = epochs(data, 2)
    batches = data.train_dataloader().dataset
    for accumulate, world in ((1, 2), (5, 1), (5, 10)):
        orders = [TrainOrder(data.split[0], 0, 100, accumulate, world, rank) for rank in range(world)]
        for epoch in range(2):
            ranks = [[data.on_after_batch_transfer(batches[key]) for key in order] for order in orders]
            parts = [part for micro in zip(*ranks, strict=True) for part in micro]
            images = torch.cat([part.images for part in parts]).split(100)
            mixes = [part.mix for part in parts[:: accumulate * world]]
            for k, batch in enumerate(whole[epoch * len(images) : (epoch + 1) * len(images)]):
                assert torch.equal(images[k], batch.images)
                assert torch.equal(mixes[k], batch.mix)


def test_images_are_mixed_within_their_batch():
    mixed, plain = epochs(digits(), 2), epochs(digits(augment=UNMIXED), 2)
    assert len({float(batch.mix) for batch in mixed}) > len(mixed) / 2
    for ours, batch in zip(mixed, plain, strict=True):
        assert len(batch.mix) == 0
        assert not torch.equal(ours.images, batch.images)
        torch.testing.assert_close(
            ours.images.mean(0), batch.images.mean(0)
        )  # the same pixels, distributed over other images


@pytest.mark.parametrize(("batch_size", "parts", "advice"), [(33, 1, 34), (66, 2, 68), (4, 4, 8)])
def test_batch_that_cannot_be_split_into_pairs_is_rejected(batch_size, parts, advice):
    with pytest.raises(UserError, match=f"an odd number of images .*: use {advice}"):
        train(digits(batch_size=batch_size), accumulate_grad_batches=parts, limit_train_batches=parts)
    train(digits(batch_size=batch_size, augment=UNMIXED), accumulate_grad_batches=parts, limit_train_batches=parts)
    train(digits(batch_size=advice), accumulate_grad_batches=parts, limit_train_batches=parts)


class Losses(Callback):
    """Record the loss and accuracy of each step, and those of torch's cross-entropy with soft labels."""

    def __init__(self) -> None:
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, model: Any, batch: Batch, batch_idx: int) -> None:
        hard = F.one_hot(batch.labels, 10).float()
        soft = batch.mix * hard + (1 - batch.mix) * swap_pairs(hard) if batch.mix.numel() else hard
        with torch.no_grad():
            logits = model.net(batch.images)
        loss = F.cross_entropy(logits, soft, label_smoothing=model.objective.label_smoothing)
        self.theirs += [float(loss), float((logits.argmax(1) == soft.argmax(1)).float().mean())]

    def on_train_batch_end(self, trainer: Trainer, model: Any, *args: Any) -> None:
        self.ours += [model.latest["train/loss"], model.latest["train/acc"]]


@pytest.mark.parametrize("augment", [AUGMENT, UNMIXED])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_cross_entropy_with_mixed_labels(augment, smoothing):
    net, losses = create_model("resnet8", in_channels=1, num_classes=10), Losses()
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=6,
        log_every_n_steps=1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses],
    )
    trainer.fit(Classifier(net, objective=CrossEntropy(smoothing)), digits(augment=augment))
    assert losses.ours == pytest.approx(losses.theirs, rel=1e-5)
    assert len(losses.ours) == 12


def test_evaluation_sees_each_image_once_without_augmentation():
    data = digits(eval_batch_size=60)
    model = train(data, num_sanity_val_steps=0, limit_train_batches=1)
    val = model.evaluated[:3]
    assert [len(batch.labels) for batch in val] == [60, 60, 24]
    assert torch.cat([batch.indices for batch in val]).tolist() == data.split[1].tolist()
    plain = digits(augment=Augment(), eval_batch_size=60)
    assert_same(val, [plain.on_after_batch_transfer(batch) for batch in plain.val_dataloader()])
    model.evaluated.clear()
    model.trainer.test(model, data, verbose=False)
    assert torch.cat([batch.indices for batch in model.evaluated]).tolist() == list(range(359))


def test_lightning_predicts_on_the_test_set():
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    assert torch.cat(trainer.predict(Recorder(), digits())).tolist() == list(range(359))


def test_no_validation_without_a_validation_split():
    data = digits(val_split=0)
    assert train(data, limit_train_batches=1).evaluated == []
    assert len(data.split[0]) == 1438


def test_half_precision_networks_get_the_same_images_in_their_dtype():
    half, full = (train(digits(), precision=p, limit_train_batches=2) for p in ("bf16-true", "32-true"))
    for a, b in zip(half.trained, full.trained, strict=True):
        assert a.images.dtype == torch.bfloat16
        assert torch.equal(a.images, b.images.bfloat16())


def ranks(subset: np.ndarray, world: int, accumulate: int) -> list[list[np.ndarray]]:
    samplers = [TrainOrder(subset, 0, 24, accumulate, world, rank) for rank in range(world)]
    return [[key.indices for key in sampler] for sampler in samplers]


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (3, 2), (4, 3)])
def test_ranks_split_the_global_batches(world, accumulate):
    subset = np.arange(1000, 1100)
    expected = subset[permutation(0, 0, 100)][: 4 * 24].reshape(4, 24)
    steps = zip(*ranks(subset, world, accumulate), strict=True)
    together = np.concatenate([np.concatenate(parts) for parts in steps]).reshape(4, 24)
    np.testing.assert_array_equal(together, expected)


def test_evaluation_padding_has_label_minus_one():
    data = digits()
    batches = data.test_dataloader().dataset
    shares = [[batches[key] for key in EvalOrder(np.arange(10), 3, world=4, rank=rank)] for rank in range(4)]
    assert [[len(batch.labels) for batch in share] for share in shares] == [[3]] * 4
    last = shares[3][0]
    assert last.indices.tolist() == [3, 7, -1]
    assert last.labels.tolist() == [*data.test_data.labels[[3, 7]], -1]


@pytest.mark.parametrize(
    ("settings", "accumulate", "message"),
    [
        ({"batch_size": 100}, 3, r"batch_size 100 is not a multiple of 1 devices × 3 .*: use 99 or 102"),
        ({"batch_size": 2}, 3, r"use 3$"),
        (
            {"batch_size": 2000},
            1,
            r"batch_size 2000 is larger than the number of training images \(1294\): use at most 1294",
        ),
        ({"val_split": 1438}, 1, r"data\.val_split 1438 does not fit 1438 images of 10 classes: .* at most 1428"),
        ({"val_split": 0.9999}, 1, r"would hold out all \d+ images of class \d: use less or 0"),
    ],
)
def test_sizes_that_do_not_fit_are_rejected_before_the_first_step(settings, accumulate, message):
    with pytest.raises(UserError, match=message):
        train(digits(**settings), accumulate_grad_batches=accumulate)


def test_batch_size_below_one_and_overfit_batches_are_rejected():
    with pytest.raises(UserError, match=r"data\.batch_size must be at least 1, got 0"):
        digits(batch_size=0)
    with pytest.raises(UserError, match="limit_train_batches"):
        train(digits(), overfit_batches=2)


def test_shape_and_classes_are_known_without_loading(tmp_path, monkeypatch):
    monkeypatch.setenv("RESLAB_DATA", str(tmp_path))
    data = ImageData(CIFAR10())
    assert (data.num_classes, data.channels, data.image_shape, data.root) == (10, 3, (3, 32, 32), tmp_path)


def test_preview_returns_images_by_epochs():
    rows, _ = digits().preview(n_images=5, n_epochs=4)
    assert rows.shape == (5, 4, 8, 8, 1)
    assert rows.dtype == np.uint8
    assert not np.array_equal(rows[:, 0], rows[:, 1])
    plain = digits(augment=Augment())
    unchanged, names = plain.preview(5, 2)
    np.testing.assert_array_equal(unchanged[:, 0], unchanged[:, 1])
    data = plain.train_data
    names_of_images = {
        bytes(image): plain.class_names[label] for image, label in zip(data.images, data.labels, strict=True)
    }
    assert [names_of_images[bytes(image)] for image in unchanged[:, 0]] == names


class Colours(ImageSource):
    """A user's data set: 12 images of noise, 8×8."""

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    image_size = resize = 8

    def classes(self, root: Path) -> list[str]:
        return ["a", "b"]

    def load(self, root: Path, split: str) -> Arrays:
        images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
        return Arrays(images, np.arange(12) % 2)


def folder_of(data: ImageData, path: Path) -> Path:
    (path / "deeper").mkdir(parents=True)
    for i, image in enumerate(data.test_data.images):
        Image.fromarray(image).save(path / ("deeper" if i % 2 else "") / f"{i:02}.png")
    return path


def batches_of(data: ImageData, folder: Path, **settings: Any) -> Iterator[Any]:
    return iter(data.folder_dataloader(folder, **settings))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_a_directory_are_preprocessed_as_in_evaluation(tmp_path, workers):
    data = ImageData(Colours(), batch_size=5, val_split=0, num_workers=workers)
    batches = list(batches_of(data, folder_of(data, tmp_path / "some images")))
    paths = [path for batch in batches for path in batch.paths]
    assert paths == sorted([f"{i:02}.png" for i in range(0, 12, 2)] + [f"deeper/{i:02}.png" for i in range(1, 12, 2)])
    images = torch.cat([data.on_after_batch_transfer(batch.batch.to("cpu")).images for batch in batches])
    test = torch.cat([data.on_after_batch_transfer(batch).images for batch in data.test_dataloader()])
    assert torch.equal(images, test[[int(Path(path).stem) for path in paths]])


def test_any_image_is_converted_to_the_size_and_channels_of_the_data_set(tmp_path):
    Image.effect_noise((60, 40), 50).save(tmp_path / "grey.jpg")
    for data, shape in ((ImageData(Colours()), (1, 8, 8, 3)), (digits(), (1, 8, 8, 1))):
        (loaded,) = batches_of(data, tmp_path)
        assert loaded.batch.images.shape == shape


@pytest.mark.parametrize("apply_exif_orientation", [True, False])
def test_images_of_a_directory_are_rotated_as_in_evaluation(tmp_path, apply_exif_orientation):
    exif, rng = Image.Exif(), np.random.default_rng(0)
    exif[0x0112] = 6
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        noise = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
        noise.save(tmp_path / part / "cat" / "rotated.png", exif=exif)
    source = ImageFolder(str(tmp_path), image_size=16, apply_exif_orientation=apply_exif_orientation)
    data = ImageData(source, batch_size=1, val_split=0, num_workers=0)
    (predicted,) = batches_of(data, tmp_path / "val")
    (evaluated,) = data.test_dataloader()
    assert torch.equal(predicted.batch.images, evaluated.images)


def test_unreadable_images_of_a_directory_are_reported_or_an_error(tmp_path):
    data = ImageData(Colours(), batch_size=4, num_workers=0)
    folder = folder_of(data, tmp_path / "images")
    for name in ("0bad.png", "0empty.jpg"):
        (folder / name).write_bytes(b"not an image" if "bad" in name else b"")
    batches = list(batches_of(data, folder, skip_unreadable=True))
    unreadable = [file for batch in batches for file in batch.unreadable]
    assert [name for name, _ in unreadable] == ["0bad.png", "0empty.jpg"]
    assert all("not a readable image" in reason for _, reason in unreadable)
    assert sum(len(batch.paths) for batch in batches) == 12
    with pytest.raises(DataError, match=r"0bad\.png"):
        list(batches_of(data, folder))
    with pytest.raises(DataError, match="is not a directory or does not exist"):
        data.folder_dataloader(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains no image files"):
        list(batches_of(data, tmp_path / "empty"))


def test_number_of_workers_does_not_change_batches_of_files(pets):
    source = ImageFolder(str(pets), image_size=16)
    settings: dict[str, Any] = {"batch_size": 4, "val_split": 2, "augment": Augment(flip="random", cutout=4, mixup=1.0)}
    two_workers, none = (epochs(ImageData(source, num_workers=n, **settings), 2) for n in (2, 0))
    assert_same(two_workers, none)
    val = list(ImageData(source, num_workers=0, **settings).val_dataloader())
    assert [len(batch.labels) for batch in islice(val, 2)] == [2]


@pytest.mark.gpu
def test_gpu_gives_the_same_images_without_a_sync():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    data = digits(augment=Augment(crop_padding=1, padding_mode="reflect", flip="random", cutout=2, mixup=1.0))
    batch = next(iter(data.train_dataloader()))
    on_cpu = data.on_after_batch_transfer(batch)
    on_gpu = batch.to("cuda")
    data.on_after_batch_transfer(on_gpu)  # the first call copies constants to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        finished = data.on_after_batch_transfer(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(finished.images.cpu(), on_cpu.images, rtol=0, atol=1e-6)
