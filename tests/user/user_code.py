"""What a user writes: a network, an objective with a metric, a callback that logs."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torchmetrics.classification import MulticlassF1Score

from reslab.data.datasets import Arrays, Digits, Split
from reslab.models import Network
from reslab.training import CrossEntropy


class TinyNet(Network):
    def __init__(self, width: int = 16, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.in_channels, self.num_classes, self.num_features = in_channels, num_classes, 2 * width
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.stage1 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2), nn.Dropout(0.1), nn.ReLU())
        self.head = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stage1(self.stem(x)).mean((2, 3))


class FiveDigits(Digits):
    def classes(self, root: Path) -> list[str]:
        return super().classes(root)[:5]

    def load(self, root: Path, split: Split) -> Arrays:
        data = super().load(root, split)
        return Arrays(data.images[data.labels < 5], data.labels[data.labels < 5])


class WithF1(CrossEntropy):
    def evaluation_metrics(self, num_classes: int) -> dict[str, Any]:
        f1 = MulticlassF1Score(num_classes, average="macro", ignore_index=-1)
        return {**super().evaluation_metrics(num_classes), "f1": f1}


class GradientNorm(Callback):
    metric_names = ("grad_norm",)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        norms = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        pl_module.log("grad_norm", torch.stack(norms).norm())


class TwoOutputs(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :2]


class TooDeep(TinyNet):
    def forward_features(self, x: Tensor) -> Tensor:
        return self.stage1(self.stage1(self.stem(x))).mean((2, 3))
