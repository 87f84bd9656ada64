"""data.on_device: images that live on the device give the same bits as images that are copied with each batch."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reslab.data import Augment, ImageData, ImageFolder
from reslab.data.datasets import Arrays, ImageSource, Split
from reslab.errors import UserError
from runner import TRAINING, VALIDATION, Fault, fit, manifest, reslab, spawn, traces
from test_datamodule import SaveAfter, assert_same, digits, train
from test_processes import TWO

AUGMENTATIONS = {
    "none": Augment(),
    "crop of zeros": Augment(crop_padding=2),
    "crop of reflections": Augment(crop_padding=2, padding_mode="reflect"),
    "random flip": Augment(flip="random"),
    "alternating flip": Augment(flip="alternating"),
    "cutout and erasing": Augment(cutout=3, erasing=0.5),
    "mixup": Augment(mixup=0.4),
    "cutmix": Augment(cutmix=1.0),
    "repeats": Augment(crop_padding=1, repeats=3),
    "all": Augment(2, "reflect", "alternating", cutout=2, mixup=1.0, cutmix=1.0, erasing=0.3, repeats=2),
}
LOADERS: dict[str, dict[str, Any]] = {
    "no validation": {"val_split": 0},
    "validation": {"val_split": 150},
    "folds": {"folds": 3, "fold": 1},
    "a last batch that is smaller": {"eval_batch_size": 37},
    "a worker": {"num_workers": 1},
}


def batches(data: ImageData, *args: Any, **settings: Any) -> tuple[list[Any], list[Any]]:
    model = train(data, *args, **settings)
    return model.trained, model.evaluated


def both(**settings: Any) -> tuple[ImageData, ImageData]:
    return digits(on_device=True, **settings), digits(on_device=False, **settings)


@pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_same_batches_for_every_augmentation(augment: Augment) -> None:
    there, here = (batches(data) for data in both(augment=augment))
    assert_same(there[0], here[0])
    assert_same(there[1], here[1])


@pytest.mark.parametrize("settings", LOADERS.values(), ids=LOADERS)
def test_same_batches_for_every_loader(settings: dict[str, Any]) -> None:
    options = {"accumulate_grad_batches": 2, "limit_train_batches": 6}
    (trained, evaluated), here = (batches(data, **options) for data in both(**settings))
    assert_same(trained, here[0])
    if evaluated or here[1]:
        assert_same(evaluated, here[1])


def test_resumed_with_another_number_of_workers_and_place(tmp_path: Path) -> None:
    stop = tmp_path / "stop.ckpt"
    whole = train(digits(on_device=False)).trained
    first = train(digits(on_device=True), None, SaveAfter(17, stop)).trained[:17]
    second = train(digits(on_device=True, num_workers=2), stop).trained
    third = train(digits(on_device=False), stop).trained
    assert_same(first + second, whole)
    assert_same(second, third)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_padding_takes_the_same_image(world: int) -> None:
    from reslab.data.loader import gather
    from reslab.data.samplers import EvalOrder

    data = digits()
    test = data.test_dataloader().dataset
    resident = torch.from_numpy(data.test_data.images)
    for rank in range(world):
        for key in EvalOrder(np.arange(len(data.test_data)), 100, world, rank):
            assert torch.equal(gather(resident, test[key].indices), test[key].images)


class Views(ImageSource):
    """A user's data set whose images are a view: of reversed rows, of other strides, or read-only."""

    mean, std = (0.5,), (0.25,)
    image_size = resize = 6

    def __init__(self, view: Callable[[np.ndarray], np.ndarray]) -> None:
        self.view = view

    def classes(self, root: Path) -> list[str]:
        return ["a", "b"]

    def load(self, root: Path, split: Split) -> Arrays:
        images = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 1), dtype=np.uint8)
        images.flags.writeable = False
        return Arrays(self.view(images), np.arange(40) % 2)


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
@pytest.mark.parametrize(
    "view",
    [np.asarray, np.asfortranarray, lambda x: x[::-1], lambda x: x[:, :, ::-1], lambda x: x.transpose(0, 2, 1, 3)],
    ids=["read-only", "Fortran", "reversed", "mirrored", "transposed"],
)
def test_arrays_of_any_layout(view: Any) -> None:
    options: dict[str, Any] = {"batch_size": 8, "augment": Augment(flip="random", crop_padding=1)}
    there, here = (batches(ImageData(Views(view), on_device=place, **options)) for place in (True, False))
    assert_same(there[0], here[0])
    assert_same(there[1], here[1])


def test_images_are_on_the_device_once_and_in_no_batch_of_the_loader() -> None:
    data = digits(on_device=True)
    train(data)
    loaders = [data.train_dataloader(), data.val_dataloader(), data.train_dataloader(), data.test_dataloader()]
    first, *others, test = [loader.images for loader in loaders]
    assert first is not None and len(first) == len(data.train_data) and all(images is first for images in others)
    assert len(test) == len(data.test_data)
    for loader in loaders:
        assert loader.dataset[next(iter(loader.sampler))].images.numel() == 0


def test_images_of_the_host_are_still_there() -> None:
    data = digits(on_device=True)
    train(data)
    np.testing.assert_array_equal(data.test_images(np.array([3, 1])), data.test_data.images[[3, 1]])
    np.testing.assert_array_equal(data.preview(4, 2)[0], digits().preview(4, 2)[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_data_can_be_copied(copied: Any) -> None:
    data = digits(on_device=True)
    train(data)
    data.trainer = None
    again = copied(data)
    assert again.train_data is not data.train_data
    assert_same(*(batches(each)[0] for each in (again, data)))


# Which data sets live on the device


@pytest.mark.parametrize(
    ("settings", "free", "there"),
    [
        ({}, 10**9, True),
        ({}, 920_000, False),  # 1,438 images of 64 bytes: 92,032 bytes
        ({}, 921_000, True),
        ({"on_device": False}, 10**9, False),
        ({"on_device": True}, 0, True),
        ({"augment": Augment(transforms=[torch.nn.Identity()])}, 10**9, False),
    ],
)
def test_auto_uses_the_memory_of_a_gpu_that_is_free(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], free: int, there: bool
) -> None:
    data = digits(**settings)
    assert not data.trains_on_device  # without a Trainer
    monkeypatch.setattr(ImageData, "_device", torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**11))
    assert data.trains_on_device is there


def test_auto_stays_on_the_host_on_a_cpu() -> None:
    data = digits()
    train(data, limit_train_batches=1, limit_val_batches=1)
    assert not data.trains_on_device and data.train_dataloader().images is None


def test_files_cannot_be_on_the_device(pets: Path) -> None:
    data = ImageData(ImageFolder(str(pets)), batch_size=4, val_split=2, on_device=True)
    with pytest.raises(UserError, match=r"data\.on_device true requires images in memory, but ImageFolder reads files"):
        data.setup("fit")
    ImageData(ImageFolder(str(pets)), batch_size=4, val_split=2, on_device="auto").setup("fit")


# Whole runs

RECIPE = [
    *("--data.augment.crop_padding=1", "--data.augment.padding_mode=reflect", "--data.augment.flip=alternating"),
    *("--data.augment.mixup=0.2", "--data.augment.cutmix=1", "--data.augment.erasing=0.25", "--data.val_split=150"),
    *("--model.ema_decay=0.9", "--trainer.accumulate_grad_batches=2", "--data.eval_batch_size=50"),
]


@pytest.mark.slow
def test_same_run_killed_and_resumed(undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    for workers, fault in enumerate([Fault(TRAINING, call=21), Fault(VALIDATION, call=4), None]):
        ended = fit(tmp_path, *RECIPE, "--data.on_device=true", f"--data.num_workers={workers}", fault=fault)
        assert (ended.status == 0) is (fault is None), ended.output
        assert "; on the device" in ended.output
    whole = undisturbed(*RECIPE, "--data.on_device=false")
    assert traces(tmp_path) == traces(whole)
    sizes = [(run / "checkpoints" / "last.ckpt").stat().st_size for run in (tmp_path, whole)]
    assert abs(sizes[0] - sizes[1]) < 1000  # the images alone are 92 KB


def test_option_is_no_part_of_a_runs_identity(tmp_path: Path) -> None:
    ended = fit(tmp_path, "--data.on_device=true", fault=Fault(TRAINING, call=9))
    assert ended.status != 0
    ended = fit(tmp_path, "--data.on_device=false")
    assert ended.status == 0 and len(manifest(tmp_path)["attempts"]) == 2, ended.output


def test_figures_are_drawn(tmp_path: Path) -> None:
    ended = fit(tmp_path, "--data.on_device=true", "--trainer.max_epochs=1", FIGURES="1")
    assert ended.status == 0 and "could not be drawn" not in ended.output, ended.output
    assert (tmp_path / "figures" / "mistakes.png").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.on_device=maybe", "data.on_device"),
        ("--data.augment.transforms=[{class_path: torchvision.transforms.v2.RandAugment}]", "data.augment.transforms"),
    ],
)
def test_wrong_use_is_reported_before_the_run_directory_exists(tmp_path: Path, option: str, message: str) -> None:
    ended = fit(tmp_path / "run", "--data.on_device=true", option)
    assert ended.status == 2 and message in ended.output and "Traceback" not in ended.output, ended.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_same_run_on_two_ranks(tmp_path: Path) -> None:
    for place in ("true", "false"):
        options = ["--data.eval_batch_size=50", f"--data.on_device={place}", "--run.dir", tmp_path / place]
        ended = spawn("fit", "digits", "--trainer.max_epochs=2", *TWO, *options)
        assert ended.status == 0, ended.output
    assert traces(tmp_path / "true") == traces(tmp_path / "false")


@pytest.mark.slow
def test_same_run_on_cifar10(shared_data: Path, tmp_path: Path) -> None:
    for place in ("true", "false"):
        options = ["--trainer.accelerator=cpu", "--trainer.max_steps=20", "--trainer.limit_test_batches=2"]
        ended = reslab(
            "fit", "cifar10_fast", *options, "--data.root", shared_data, "--trainer.precision=32-true",
            f"--data.on_device={place}", "--run.dir", tmp_path / place,
        )  # fmt: skip
        assert ended.status == 0, ended.output
    first, second = (manifest(tmp_path / place)["weights_sha256"] for place in ("true", "false"))
    assert first == second


@pytest.mark.gpu
def test_gpu_gathers_the_same_images_without_a_sync() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    there, here = (batches(data, accelerator="gpu", devices=1) for data in both())
    assert_same(there[0], here[0])
    assert_same(there[1], here[1])
    data = digits(on_device=True)
    train(data, accelerator="gpu", devices=1)
    loader = iter(data.train_dataloader())
    next(loader)  # the first batch starts the stream
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            next(loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
