"""Objectives: losses with and without mixing, metrics and their names, distillation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassF1Score

from reslab import Classifier, ImageData, create_model
from reslab.data import Augment, Batch, Digits
from reslab.errors import UserError
from reslab.training import BinaryCrossEntropy, CrossEntropy, Distillation, Objective
from reslab.training.objectives import PADDING, Labels


class Logits(nn.Module):
    """A network whose logits are its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def mixed_batch(logits: torch.Tensor, labels: torch.Tensor, lam: float | None) -> Batch:
    mix = torch.empty(0) if lam is None else torch.tensor(lam)
    return Batch(logits, labels, torch.arange(len(labels)), torch.empty(len(labels), 0), mix)


def loss_of(objective: Objective, logits: torch.Tensor, labels: torch.Tensor, lam: float | None = None) -> float:
    return float(objective.loss(Logits(), mixed_batch(logits, labels, lam))[0])


def metrics(num_classes: int) -> MetricCollection:
    return MetricCollection(CrossEntropy().evaluation_metrics(num_classes), prefix="val/", compute_groups=False)


def quiet_trainer(**settings: Any) -> Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(accelerator="cpu", **{**dict.fromkeys(quiet, False), **settings})


# Losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lam", [None, 0.7])
def test_cross_entropy_weighs_both_labels_of_a_mixed_image(lam: float | None, smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 1, 2, 3, 0])
    targets = F.one_hot(labels, 4).double()
    targets = targets if lam is None else lam * targets + (1 - lam) * targets[[1, 0, 3, 2, 5, 4]]
    expected = F.cross_entropy(logits.double(), targets, label_smoothing=smoothing)
    assert loss_of(CrossEntropy(smoothing), logits, labels, lam) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("lam", "threshold"), [(None, None), (0.7, None), (0.7, 0.2), (0.9, 0.2)])
def test_binary_cross_entropy_treats_every_class_as_yes_or_no(
    lam: float | None, threshold: float | None, smoothing: float
) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 1, 2, 3, 0])
    loss = loss_of(BinaryCrossEntropy(threshold, smoothing), logits, labels, lam)
    total = 0.0
    for i, row in enumerate(logits.tolist()):
        for c, logit in enumerate(row):
            target = (lam or 1) * (labels[i] == c) + (1 - (lam or 1)) * (labels[i ^ 1] == c)
            target = target * (1 - smoothing) + smoothing / 4
            target = target if threshold is None else float(target > threshold)
            total += math.log1p(math.exp(-logit)) * target + math.log1p(math.exp(logit)) * (1 - target)
    assert loss == pytest.approx(float(total) / 24, rel=1e-5)


@pytest.mark.parametrize("lam", [None, 0.3, 0.7])
def test_training_accuracy_counts_the_label_of_greater_weight(lam: float | None) -> None:
    logits, labels = torch.eye(4)[[1, 0, 3, 2]], torch.tensor([0, 1, 2, 3])  # each predicts its partner's label
    batch = mixed_batch(logits, labels, lam)
    sums = CrossEntropy().training_sums(torch.tensor(2.0), logits, batch)
    assert float(sums["acc"]) == (4 if lam == 0.3 else 0) and float(sums["loss"]) == 8.0
    assert Labels.of((logits, labels)).lam is None  # batches of other loaders


OUT_OF_RANGE = [
    ("label_smoothing", lambda: CrossEntropy(1.0)),
    ("label_smoothing", lambda: BinaryCrossEntropy(label_smoothing=-0.1)),
    ("target_threshold", lambda: BinaryCrossEntropy(1.0)),
    ("temperature", lambda: Distillation("runs/teacher", temperature=0)),
    ("alpha", lambda: Distillation("runs/teacher", alpha=1.5)),
]


@pytest.mark.parametrize(("name", "make"), OUT_OF_RANGE)
def test_values_out_of_range_are_refused_by_name(name: str, make: Any) -> None:
    with pytest.raises(ValueError, match=name):
        make()


# Metrics


def test_padding_counts_in_no_metric() -> None:
    logits, labels = torch.randn(40, 10), torch.randint(0, 10, (40,))
    padded = metrics(10)
    padded.update(torch.cat([logits, torch.randn(7, 10)]), torch.cat([labels, torch.full((7,), -1)]))
    values = padded.compute()
    assert float(values["val/acc"]) == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert float(values["val/loss"]) == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean()
    assert float(values["val/acc5"]) == pytest.approx(float(top5))


@given(size=st.integers(1, 100), by=st.permutations(range(100)))
def test_evaluation_loss_is_identical_in_any_order_and_batching(size: int, by: list[int]) -> None:
    logits, labels = torch.randn(100, 10, generator=torch.Generator().manual_seed(0)), torch.arange(100) % 10
    whole, parts = metrics(10).to("cpu"), metrics(10).to("cpu")  # as trainers do
    whole.update(logits, labels)
    for start in range(0, 100, size):
        parts.update(logits[by][start : start + size], labels[by][start : start + size])
    assert whole.compute()["val/loss"].item() == parts.compute()["val/loss"].item()


def test_one_infinite_loss_makes_the_mean_nan() -> None:
    of_two = metrics(2)
    of_two.update(torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), torch.tensor([0, 1]))
    assert of_two.compute()["val/loss"].isnan()


def test_top_5_exists_from_six_classes_on() -> None:
    assert [("acc5" in CrossEntropy().evaluation_metrics(n)) for n in (5, 6)] == [False, True]


class WithF1(CrossEntropy):
    """A user's metric: one line beside the loss."""

    def evaluation_metrics(self, num_classes: int) -> dict[str, Any]:
        f1 = MulticlassF1Score(num_classes, average="macro", ignore_index=PADDING)
        return {**super().evaluation_metrics(num_classes), "f1": f1}


def test_metric_of_a_users_objective_is_named_logged_and_tested() -> None:
    model, data = Classifier(create_model("resnet8", in_channels=1, num_classes=10), objective=WithF1()), digits()
    assert {"train/loss", "train/acc", "val/f1", "test/f1", "test/acc5", "lr"} <= set(model.metric_names)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, datamodule=data)
    assert "val/f1" in trainer.callback_metrics and "val/f1" in model.latest
    (results,) = trainer.test(model, datamodule=data, verbose=False)
    assert set(model.latest) == set(model.metric_names) - {"images_per_second"} and 0 <= results["test/f1"] <= 1


# Distillation


def digits(**options: Any) -> ImageData:
    return ImageData(Digits(), batch_size=64, **options)


def network(**options: Any) -> nn.Module:
    return create_model("resnet8", in_channels=1, num_classes=10, **options)


@given(
    alpha=st.sampled_from([0.0, 0.3, 1.0]), temperature=st.sampled_from([1.0, 4.0]), lam=st.sampled_from([None, 0.6])
)
def test_distillation_loss_is_hintons(alpha: float, temperature: float, lam: float | None) -> None:
    torch.manual_seed(0)
    logits, labels, teacher = torch.randn(4, 5), torch.tensor([0, 1, 2, 4]), nn.Linear(5, 5)
    objective = Distillation(teacher, temperature, alpha)  # type: ignore[arg-type]
    objective.prepare(Logits())
    p = (teacher(logits) / temperature).double().softmax(1)
    kl = (p * (p.log() - (logits / temperature).double().log_softmax(1))).sum(1).mean()
    expected = alpha * temperature**2 * float(kl) + (1 - alpha) * loss_of(CrossEntropy(), logits, labels, lam)
    assert loss_of(objective, logits, labels, lam) == pytest.approx(expected, rel=1e-4)


def test_teacher_is_frozen_and_part_of_nothing_that_is_saved() -> None:
    teacher = network(drop_path=0.5)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model = Classifier(network(), objective=Distillation(teacher), ema_decay=0.9)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, datamodule=digits(augment=Augment(mixup=0.4, flip="random")))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    plain = Classifier(network(), ema_decay=0.9)
    plain.ema = model.ema
    assert set(model.state_dict()) == set(plain.state_dict())
    in_optimizer = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert in_optimizer.isdisjoint({id(p) for p in teacher.parameters()})


def test_teacher_sees_the_augmented_images_of_the_student() -> None:
    images: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    networks = {"student": network(), "teacher": network()}
    for name, net in networks.items():
        net.register_forward_pre_hook(lambda _, args, name=name: images[name].append(args[0].clone()))
    model = Classifier(networks["student"], objective=Distillation(networks["teacher"]))  # type: ignore[arg-type]
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=0)
    trainer.fit(model, datamodule=digits(augment=Augment(mixup=0.4, crop_padding=1)))
    assert len(images["teacher"]) == 3
    assert all(map(torch.equal, images["student"], images["teacher"]))


def test_teacher_with_other_classes_is_refused_before_training() -> None:
    objective = Distillation(create_model("resnet8", in_channels=1, num_classes=7))
    with pytest.raises(UserError, match="the teacher has 7 classes, the network has 10"):
        objective.prepare(network())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "nowhere"}, "nowhere is not a run directory"),
        ({"teacher": "resnet9000", "weights": "x.pth"}, "resnet9000"),
        ({"teacher": "resnet8", "weights": "nowhere.pth"}, r"nowhere\.pth"),
    ],
)
def test_missing_teacher_is_reported(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Distillation(**options).prepare(network())


def test_teacher_by_model_name_and_weights(tmp_path: Path) -> None:
    net = network()
    torch.save(net.state_dict(), tmp_path / "teacher.pth")
    objective = Distillation("resnet8", weights=str(tmp_path / "teacher.pth"))
    record = objective.prepare(network())
    assert record["teacher"] == "resnet8" and len(record["teacher_sha256"]) == 64
    assert objective.prepare(network()) == record  # loaded once
