"""ImageNet recipes: their constants are the published ones, and they train."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from reslab.config import Experiment

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# (epochs, batch size, lr, weight decay, label smoothing), (train, test, resize size), (mixup, repeats, drop_path)
PUBLISHED = {
    "torchvision_v1": ((90, 256, 0.1, 1e-4, 0.0), (224, 224, 256), (0.0, 1, 0.0)),
    "torchvision_v2": ((600, 1024, 0.5, 2e-5, 0.1), (176, 224, 232), (0.2, 4, 0.0)),
    "timm_a1": ((600, 2048, 5e-3, 0.01, 0.1), (224, 224, 236), (0.2, 3, 0.05)),
    "timm_a2": ((300, 2048, 5e-3, 0.02, 0.0), (224, 224, 236), (0.1, 3, 0.05)),
    "timm_a3": ((100, 2048, 8e-3, 0.02, 0.0), (160, 224, 236), (0.1, 1, 0.0)),
    "ffcv": ((88, 4096, 1.7, 1e-4, 0.1), (192, 256, 293), (0.0, 1, 0.0)),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data root with an `imagenet` directory: 24 + 8 small JPEGs in two classes."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 4)):
        for name in ("n01440764", "n02102040"):
            directory = root / "imagenet" / split / name
            directory.mkdir(parents=True)
            for i in range(n):
                coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((80, 60)).save(directory / f"{i}.JPEG")
    return root


def recipe(name: str, root: Path, *options: str) -> Experiment:
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="timm recipes require timm")
    files = ("experiment/imagenet_resnet18.yaml", f"recipe/{name}.yaml")
    configs = [arg for file in files for arg in ("--config", str(CONFIGS / file))]
    return Experiment([*configs, "--data.root", str(root), *options])


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_has_the_published_constants(name: str, root: Path) -> None:
    config = recipe(name, root).config
    optimizer, augment, resize = config.model.optimizer.init_args, config.data.augment, config.data.resize
    training = (config.trainer.max_epochs, config.data.batch_size, optimizer.lr, optimizer.weight_decay)
    sizes = (resize.train_size or 224, resize.test_size or 224, resize.test_resize or 256)
    smoothing = config.model.objective.init_args.label_smoothing
    regularization = (augment.mixup, augment.repeats, config.model.net.init_args.drop_path)
    assert ((*training, smoothing), sizes, regularization) == PUBLISHED[name]


def test_ffcv_sizes_and_learning_rates_match_its_script(root: Path) -> None:
    data, model, _ = recipe("ffcv", root).build()
    assert data.resize.progressive.sizes(192, 88) == (160,) * 71 + (192,) * 17  # epoch 71: 177.5 rounds to 192
    factors = [model.schedule.factor(epoch * 100 - 1, 8800, 100) for epoch in (1, 2, 45, 88)]
    assert factors == pytest.approx([0.5, 1.0, 0.5, 0.0], abs=2e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_trains(name: str, root: Path) -> None:
    small = ["--data.resize.train_size=32", "--data.resize.test_size=40", "--data.resize.test_resize=48"]
    if name == "ffcv":
        small.append("--data.resize.progressive.start=16")
    short = ["--data.batch_size=8", "--data.val_split=8", "--data.num_workers=0", "--trainer.max_steps=2"]
    data, model, settings = recipe(name, root, *small, *short, "--trainer.precision=32-true").build()
    before = {name: p.detach().clone() for name, p in model.net.named_parameters()}
    overrides: dict[str, Any] = {"accelerator": "cpu", "logger": False}
    trainer = Trainer(**settings | overrides)
    trainer.fit(model, datamodule=data)  # one epoch with validation (flip TTA for FFCV)
    assert trainer.global_step == 2
    assert 0 <= trainer.callback_metrics["val/acc"] <= 1
    for name, p in model.net.named_parameters():
        assert p.isfinite().all() and (not torch.equal(p, before[name]) or not p.grad.any()), name
