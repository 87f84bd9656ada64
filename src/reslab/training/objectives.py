"""Objectives: the loss a run minimises, the metrics it reports, and their names."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from reslab.data.augment import swap_pairs
from reslab.errors import UserError
from reslab.models.network import Network
from reslab.models.zoo import create_model, find_weights, network_of_run
from reslab.training.checkpoint import weights_sha256

PADDING = -1  # label of an image that only fills up a batch; no metric counts it


class Labels(NamedTuple):
    """Labels of a training batch; with mixup or CutMix each image also shows its partner's class."""

    labels: Tensor  # int64 (N,)
    lam: Tensor | None = None  # mixup lambda, float32 (): the own label's weight, the partner's is the rest

    @classmethod
    def of(cls, batch: Any) -> "Labels":
        """Take the labels from a batch of ours, or from any loader's (images, labels, …)."""
        lam = getattr(batch, "mix", None)
        return cls(batch[1], lam if lam is not None and lam.numel() else None)

    def average(self, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Average a loss of labels (N,) over both labels of each image, by their weights."""
        if self.lam is None:
            return loss(self.labels)
        return self.lam * loss(self.labels) + (1 - self.lam) * loss(swap_pairs(self.labels))

    def distribution(self, num_classes: int) -> Tensor:
        """Return the weight of every class, float32 (N, num_classes)."""
        targets = F.one_hot(self.labels, num_classes).float()
        return targets if self.lam is None else swap_pairs(targets).lerp_(targets, self.lam)

    @property
    def dominant(self) -> Tensor:
        """The label of greater weight, int64 (N,): training accuracy counts it."""
        return self.labels if self.lam is None else torch.where(self.lam >= 0.5, self.labels, swap_pairs(self.labels))


class EvaluationLoss(Metric):
    """Mean cross-entropy over images, without smoothing or padding; bit-identical in any order and batching.

    Losses are summed as integers, in units of 2^-24 (float32's resolution at 1). log_softmax rounds a row differently
    depending on its place in the batch; in float64 that is far below the unit.
    """

    total: Tensor
    images: Tensor
    infinite: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "images", "infinite"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        losses = F.cross_entropy(logits.double(), labels, ignore_index=PADDING, reduction="none")
        self.total += (losses * 2**24).round().long().sum()
        self.images += (labels != PADDING).sum()
        self.infinite += (~losses.isfinite()).sum()

    def compute(self) -> Tensor:
        mean = self.total.double() / self.images / 2**24
        return torch.where(self.infinite > 0, torch.nan, mean)


class Objective(nn.Module, ABC):
    """What a run minimises and reports. Your own is a subclass, named in a config file as `model.objective`:

        class Focal(Objective):
            def loss(self, net, batch):
                logits = net(batch[0])
                log_p = logits.log_softmax(1)
                return Labels.of(batch).average(lambda y: F.nll_loss((1 - log_p.exp()) ** 2 * log_p, y)), logits

    Its metrics appear as train/NAME, val/NAME and test/NAME in metrics.csv, the progress line, the manifest, the report
    and all loggers, and can be a run's monitor or a study's metric.

    Attributes:
        training_metrics: The keys of `training_sums`.
    """

    training_metrics: tuple[str, ...] = ("loss", "acc")

    @abstractmethod
    def loss(self, net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the mean loss over the batch, (), and the logits (N, num_classes); in the training step.

        `batch` is (images float (N, C, H, W), labels int64 (N,), …), see reslab.data.Batch. Nothing here may read a
        number from the device (`.item()`): that would wait for it in every step.
        """

    def training_sums(self, loss: Tensor, logits: Tensor, batch: Any) -> dict[str, Tensor]:
        """Return the sum over the batch's images of each training metric, (); logged as means over images."""
        correct = (logits.argmax(1) == Labels.of(batch).dominant).sum()
        return {"loss": loss * len(logits), "acc": correct}

    def evaluation_metrics(self, num_classes: int) -> dict[str, Metric]:
        """Return fresh metrics by name; each is updated with logits (N, num_classes) and labels (N,), -1 for padding.

        Accuracies are micro-averaged: every image counts the same. Top-5 exists from 6 classes on.
        """
        options: dict[str, Any] = {"num_classes": num_classes, "average": "micro", "ignore_index": PADDING}
        metrics: dict[str, Metric] = {"loss": EvaluationLoss(), "acc": MulticlassAccuracy(top_k=1, **options)}
        return metrics if num_classes < 6 else {**metrics, "acc5": MulticlassAccuracy(top_k=5, **options)}

    def metric_names(self, num_classes: int) -> list[str]:
        """Return the names under which a run logs the metrics."""
        evaluation = list(self.evaluation_metrics(num_classes))
        by_split = {"train": self.training_metrics, "val": evaluation, "test": evaluation}
        return [f"{split}/{name}" for split, names in by_split.items() for name in names]

    def prepare(self, net: nn.Module) -> dict[str, Any]:
        """Load what training needs beside `net`, before it starts; return what the manifest should record of it."""
        return {}


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


class CrossEntropy(Objective):
    """Softmax cross-entropy.

    Args:
        label_smoothing: Share of each label spread evenly over all classes, in [0, 1) (Szegedy et al. 2016).
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        _check_share("label_smoothing", label_smoothing)
        self.label_smoothing = label_smoothing

    def loss(self, net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        logits = net(batch[0])
        return self.cross_entropy(logits, Labels.of(batch)), logits

    def cross_entropy(self, logits: Tensor, labels: Labels) -> Tensor:
        """Return the mean over images, ()."""
        return labels.average(lambda target: F.cross_entropy(logits, target, label_smoothing=self.label_smoothing))


class BinaryCrossEntropy(Objective):
    """One yes-or-no cross-entropy per class, averaged over images and classes (Wightman et al. 2021, section 2.2).

    Args:
        target_threshold: Targets above it become 1 and all others 0, so that a mixed image counts both its classes in
            full. In [0, 1); null keeps the mixing weights as targets.
        label_smoothing: Share of each label spread evenly over all classes, in [0, 1).
    """

    def __init__(self, target_threshold: float | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        _check_share("label_smoothing", label_smoothing)
        if target_threshold is not None:
            _check_share("target_threshold", target_threshold)
        self.target_threshold, self.label_smoothing = target_threshold, label_smoothing

    def loss(self, net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        logits = net(batch[0])
        classes = logits.shape[1]
        targets = Labels.of(batch).distribution(classes) * (1 - self.label_smoothing) + self.label_smoothing / classes
        if self.target_threshold is not None:
            targets = (targets > self.target_threshold).float()
        return F.binary_cross_entropy_with_logits(logits, targets), logits


class Distillation(CrossEntropy):
    """Learn from the labels and from a teacher's softened predictions (Hinton et al. 2015, arXiv:1503.02531).

    loss = alpha · T² · KL(teacher ‖ student), both at temperature T, + (1 - alpha) · cross-entropy with the labels.
    The teacher sees the same augmented (and mixed) images in eval mode, is never trained, and is not part of
    checkpoints, EMA, weights.safetensors or weights_sha256; manifest.json records its own hash.

    Args:
        teacher: A run directory, the name of a model (`reslab list models`) with `weights`, or a network.
        temperature: T, above 0.
        alpha: Weight of the teacher's part, from 0 (labels only) to 1 (teacher only).
        weights: The teacher's weights, where `teacher` is not a run: as for `model.weights`.
        label_smoothing: Of the labels' part.
    """

    def __init__(
        self,
        teacher: str | Network,
        temperature: float = 4.0,
        alpha: float = 0.9,
        weights: str | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(label_smoothing)
        if temperature <= 0:
            raise ValueError(f"temperature must be more than 0, got {temperature}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
        self.temperature, self.alpha, self.weights = temperature, alpha, weights
        self._source = (teacher,)  # in tuples: a registered submodule would be saved, averaged and moved
        self._teacher: tuple[nn.Module, ...] = ()
        self._record: dict[str, Any] = {}

    def prepare(self, net: nn.Module) -> dict[str, Any]:
        if not self._teacher:
            teacher = self._load(net)
            theirs, ours = (getattr(n, "num_classes", None) for n in (teacher, net))
            if theirs != ours and None not in (theirs, ours):
                raise UserError(f"model.objective: the teacher has {theirs} classes, the network has {ours}")
            self._teacher = (teacher.requires_grad_(False).eval(),)
            source = self._source[0] if isinstance(self._source[0], str) else type(teacher).__name__
            self._record |= {"teacher": source, "teacher_sha256": weights_sha256(teacher.state_dict())}
        return self._record

    def _load(self, net: nn.Module) -> nn.Module:
        (source,) = self._source
        if not isinstance(source, str):
            return source
        if Path(source, "manifest.json").exists():
            return network_of_run(source)
        if self.weights is None:
            wrong = f"{source} is not a run directory (it has no manifest.json)"
            raise UserError(f"model.objective.teacher: {wrong}; a model's name requires model.objective.weights")
        shape = {name: getattr(net, name) for name in ("num_classes", "in_channels") if hasattr(net, name)}
        self.weights = find_weights(self.weights).name  # of the Hub: with the commit
        self._record = {"teacher_weights": self.weights}
        return create_model(source, weights=self.weights, **shape)

    def loss(self, net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        images, (teacher,) = batch[0], self._teacher
        first = next(teacher.parameters())
        if (first.device, first.dtype) != (images.device, images.dtype):
            teacher.to(images.device, images.dtype)
        logits = net(images)
        with torch.no_grad():
            target = (teacher(images) / self.temperature).log_softmax(1)
        student = (logits / self.temperature).log_softmax(1)
        # Gradients scale with 1/T², so T² keeps both parts in proportion at any temperature (section 2.1).
        soft = F.kl_div(student, target, reduction="batchmean", log_target=True) * self.temperature**2
        return self.alpha * soft + (1 - self.alpha) * self.cross_entropy(logits, Labels.of(batch)), logits
