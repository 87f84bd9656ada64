"""Classifier without the command line: checkpoints, plain loaders, and calls without a Trainer."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from reslab import Classifier, ImageData, create_model
from reslab.data import Batch, Digits
from reslab.errors import UserError
from reslab.models import ResNet
from reslab.training import Distillation, Objective
from reslab.training.checkpoint import VerifiedCheckpointIO

Undisturbed = Callable[..., Path]


def tiny(**kwargs: Any) -> ResNet:
    return create_model("resnet8", **({"in_channels": 1, "num_classes": 10} | kwargs))


def trainer(**settings: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(accelerator="cpu", **{**quiet, "max_epochs": 1, "limit_train_batches": 3, **settings})


def plain_loader(channels: int = 1, size: int = 8, n: int = 48) -> DataLoader[Any]:
    images = torch.randn(n, channels, size, size)
    return DataLoader(TensorDataset(images, torch.randint(0, 10, (n,))), batch_size=16)


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def digits() -> ImageData:
    return ImageData(Digits(), batch_size=64)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(images())


class Weighted(Objective):
    """An objective with a buffer, which checkpoints hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("class_weights", torch.ones(10))

    def loss(self, net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        logits = net(batch[0])
        return nn.functional.cross_entropy(logits, batch[1], self.class_weights), logits


# ---- checkpoints

OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "ema": lambda: {"ema_decay": 0.9},
    "flip": lambda: {"flip_tta": True},
    "ema_views": lambda: {"ema_decay": 0.5, "flip_tta": True, "shift_tta": 1},
    "distillation": lambda: {"objective": Distillation(tiny()), "ema_decay": 0.9},
}


@pytest.fixture(scope="module", params=OPTIONS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Classifier]:
    """A checkpoint that a plain Trainer wrote, and its model."""
    model, ours = Classifier(tiny(), **OPTIONS[request.param]()), trainer(plugins=[VerifiedCheckpointIO()])
    ours.fit(model, datamodule=digits())
    file = tmp_path_factory.mktemp("saved") / "last.ckpt"
    ours.save_checkpoint(file)
    return file, model


def test_checkpoints_load_without_a_trainer(saved: tuple[Path, Classifier]) -> None:
    file, model = saved
    loaded = Classifier.load_from_checkpoint(file, net=tiny())
    assert torch.equal(outputs(loaded), outputs(model))  # with the EMA and all views
    assert loaded.ema_decay == model.ema_decay
    assert all(map(torch.equal, loaded.net.parameters(), model.net.parameters()))
    assert loaded.latest == model.latest


def test_loaded_models_train_on_and_are_tested(saved: tuple[Path, Classifier]) -> None:
    loaded = Classifier.load_from_checkpoint(saved[0], net=tiny())
    before = outputs(loaded)
    trainer(limit_val_batches=1).fit(loaded, datamodule=digits())
    assert not torch.equal(outputs(loaded), before)
    assert trainer().test(loaded, datamodule=digits(), verbose=False)[0]["test/loss"] > 0


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_ckpt_path_restores_the_average_in_a_model_without_ema_decay(
    run: str, saved: tuple[Path, Classifier], tmp_path: Path
) -> None:
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    model = Classifier(
        tiny(), weights=str(tmp_path / "w.pth"), flip_tta=saved[1].flip_tta, shift_tta=saved[1].shift_tta
    )
    getattr(trainer(), run)(model, datamodule=digits(), ckpt_path=saved[0], weights_only=True)
    assert torch.equal(outputs(model), outputs(saved[1]))
    getattr(trainer(), run)(model, datamodule=digits())  # does not load the pretrained weights after all
    assert torch.equal(outputs(model), outputs(saved[1]))


@pytest.mark.parametrize("run", ["validate", "test", "predict", "fit", "forward"])
def test_weights_do_not_replace_those_of_a_checkpoint(run: str, saved: tuple[Path, Classifier], tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    sgd = lambda params: torch.optim.SGD(params, lr=0.0)  # noqa: E731
    freeze = {"optimizer": sgd} if run == "fit" else {}
    loaded = Classifier.load_from_checkpoint(saved[0], net=tiny(), weights=str(tmp_path / "w.pth"), **freeze)
    if run != "forward":
        getattr(trainer(limit_val_batches=0), run)(loaded, datamodule=digits())
    assert all(map(torch.equal, loaded.net.parameters(), saved[1].net.parameters()))


def test_a_checkpoint_without_ema_starts_an_average(tmp_path: Path) -> None:
    model, ours = Classifier(tiny()), trainer()
    ours.fit(model, datamodule=digits())
    ours.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt", net=tiny(), ema_decay=0.9)
    assert loaded.ema is not None and torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("options", [(), ("--model.ema_decay=0.9", "--model.flip_tta=true", "--trainer.max_epochs=1")])
@pytest.mark.parametrize("name", ["last", "best"])
def test_checkpoints_of_runs_load_without_a_network(
    name: str, options: tuple[str, ...], undisturbed: Undisturbed
) -> None:
    run = undisturbed(*options)
    loaded = Classifier.load_from_checkpoint(run / "checkpoints" / f"{name}.ckpt")
    if name == "last":  # the weights that the run tested
        net = create_model("resnet8", in_channels=1, num_classes=10, weights=run).eval()
        both = images(), images().flip(3)
        with torch.no_grad():
            expected = sum(net(x) for x in both) / 2 if options else net(images())
        torch.testing.assert_close(outputs(loaded), expected)
    (metrics,) = trainer().test(loaded, datamodule=digits(), verbose=False)
    assert metrics["test/acc"] > 0.3


def test_objectives_with_state_are_asked_for(tmp_path: Path) -> None:
    model, ours = Classifier(tiny(), objective=Weighted()), trainer()
    ours.fit(model, plain_loader())
    ours.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"objective\.class_weights, which CrossEntropy lacks: pass its objective="):
        Classifier.load_from_checkpoint(tmp_path / "a.ckpt", net=tiny())
    loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt", net=tiny(), objective=Weighted())
    assert torch.equal(outputs(loaded), outputs(model))


def test_missing_arguments_are_named(tmp_path: Path, undisturbed: Undisturbed) -> None:
    model, ours = Classifier(tiny()), trainer()
    ours.fit(model, plain_loader())
    ours.save_checkpoint(tmp_path / "a.ckpt")
    content = io.BytesIO((tmp_path / "a.ckpt").read_bytes())
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    config = (undisturbed() / "config.yaml").read_text().replace("reslab.models.ResNet", "mine.Net")
    (run.parent / "config.yaml").write_text(config)
    (run.parent / "manifest.json").write_bytes((undisturbed() / "manifest.json").read_bytes())
    for path, message in (
        (tmp_path / "a.ckpt", "is not in a run directory"),
        (content, "does not know the network"),
        (run / "last.ckpt", "'mine.Net' is not a class of reslab"),
    ):
        with pytest.raises(UserError, match=rf"{message}.*pass net="):
            Classifier.load_from_checkpoint(path)
    assert torch.equal(outputs(Classifier.load_from_checkpoint(content, net=tiny())), outputs(model))


def test_a_checkpoint_of_another_network_is_described_in_one_line(undisturbed: Undisturbed) -> None:
    with pytest.raises(UserError) as caught:
        Classifier.load_from_checkpoint(undisturbed() / "checkpoints/last.ckpt", net=create_model("resnet18"))
    assert "[1, 1, 1], width 16" in str(caught.value) and "\n" not in str(caught.value)


# ---- plain loaders

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "reslab": tiny,
    "torchvision": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
    "own": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_plain_loaders_train_and_evaluate_any_network(name: str) -> None:
    loader = plain_loader(3, 32) if name == "torchvision" else plain_loader()
    model = Classifier(NETWORKS[name](), ema_decay=0.9)  # type: ignore[arg-type]
    trainer().fit(model, loader, loader)
    assert trainer().validate(model, loader, verbose=False)[0]["val/loss"] > 0
    assert trainer().test(model, loader, verbose=False)[0]["test/loss"] > 0
    predictions = trainer().predict(model, loader)
    torch.testing.assert_close(torch.cat(predictions).sum(1), torch.ones(48))  # type: ignore[arg-type]


ITEMS: dict[str, Callable[[int], Any]] = {
    "images": lambda i: images()[0],
    "list": lambda i: [images()[0]],
    "labelled": lambda i: (images()[0], 3),
    "names": lambda i: (images()[0], 3, f"{i}.png"),
    "weights": lambda i: (images()[0], 3, 0.5),
}


@pytest.mark.parametrize("kind", ITEMS)
def test_batches_of_any_length_are_predicted(kind: str) -> None:
    loader: Any = DataLoader([ITEMS[kind](i) for i in range(6)], batch_size=3)  # type: ignore[arg-type]
    model = Classifier(tiny())
    predictions = trainer().predict(model, loader)
    assert [p.shape for p in predictions] == [(3, 10)] * 2  # type: ignore[union-attr]
    if kind in ("images", "list"):
        with pytest.raises(UserError, match=r"a batch must be a tuple \(images, labels, ...\), got a"):
            trainer().validate(model, loader, verbose=False)
    else:
        assert "test/loss" in trainer().test(model, loader, verbose=False)[0]


UNFIT: dict[str, Callable[[], Any]] = {
    "train": lambda: digits().train_dataloader(),
    "test": lambda: digits().test_dataloader(),
    "uint8": lambda: DataLoader(TensorDataset(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.zeros(8).long())),
    "channels_last": lambda: DataLoader(TensorDataset(torch.zeros(8, 8, 8, 1), torch.zeros(8).long())),
    "dict": lambda: DataLoader([{"image": images()[0], "label": 1}] * 4),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("run", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("kind", UNFIT)
def test_loaders_that_do_not_fit_are_refused_with_the_remedy(kind: str, run: str) -> None:
    message = {"dict": "a batch must be", "channels_last": r"with C = 1, got"}.get(kind, r"pass datamodule=data")
    loader = UNFIT[kind]()
    with pytest.raises(UserError, match=message):
        getattr(trainer(), run)(Classifier(tiny()), loader)


# ---- without a Trainer


def test_calls_without_a_trainer_work() -> None:
    model = Classifier(tiny(), objective=Distillation(tiny()), ema_decay=0.9)
    labels = torch.arange(4)
    assert model(images()).shape == (4, 10)
    assert model.training_step((images(), labels), 0).requires_grad
    model.eval()
    model.validation_step((images(), labels), 0)
    model.on_validation_epoch_end()
    model.test_step((images(), labels), 0)
    assert model.latest["val/loss"] > 0
    for batch in (images(), [images()], (images(), labels), Batch(images(), labels, labels, torch.empty(4, 0))):
        torch.testing.assert_close(model.predict_step(batch).sum(1), torch.ones(4))
    with pytest.raises(UserError, match="pass datamodule=data"):
        model(torch.zeros(2, 8, 8, 1, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        model.configure_optimizers()  # the schedule requires the number of steps


def test_a_loop_of_the_users_own_trains_on_batches_of_image_data() -> None:
    data, model = digits(), Classifier(tiny())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step, batch in zip(range(12), data.train_dataloader(), strict=False):
        loss = model.training_step(data.on_after_batch_transfer(batch), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("call", ["forward", "predict_step", "training_step"])
def test_weights_are_loaded_before_the_first_use(call: str, tmp_path: Path) -> None:
    trained = tiny()
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    model = Classifier(tiny(), weights=str(tmp_path / "w.pth"))
    getattr(model, call)(*{"forward": [images()]}.get(call, [(images(), torch.arange(4)), 0]))
    assert all(map(torch.equal, model.net.parameters(), trained.parameters()))


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_copies_compute_the_same(way: str, options: str, attached: bool) -> None:
    model = Classifier(tiny(), **OPTIONS[options]())
    if attached:
        trainer().fit(model, datamodule=digits())
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(outputs(other), outputs(model))
    assert {p.data_ptr() for p in other.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    trainer().fit(other, datamodule=digits())
