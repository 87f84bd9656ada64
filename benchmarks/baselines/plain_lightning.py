"""ResNet-20 on CIFAR-10 in plain Lightning: self.log, torchmetrics, ModelCheckpoint, and the loader of pytorch_loop.py.

The network is reslab's, so that only the loop and the input differ.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from cifar import cifar10
from common import loaders, memory_format, options
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from reslab import create_model


class PlainClassifier(LightningModule):
    def __init__(self, format: torch.memory_format) -> None:
        super().__init__()
        self.net = create_model("resnet20", num_classes=10).to(memory_format=format)
        self.format = format
        self.train_acc = MulticlassAccuracy(10, average="micro")
        self.val_acc = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.net(images.to(memory_format=self.format))
        loss = F.cross_entropy(logits, labels)
        self.train_acc(logits, labels)
        self.log("train/loss", loss)
        self.log("train/acc", self.train_acc)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images.to(memory_format=self.format))
        self.val_acc(logits, labels)
        self.log("val/loss", F.cross_entropy(logits, labels))
        self.log("val/acc", self.val_acc)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [91, 137])]


def main(argv: Sequence[str] | None = None) -> None:
    opt = options(argv)
    train_loader, val_loader = loaders(*cifar10(opt.root), opt)
    trainer = Trainer(
        max_epochs=opt.epochs, precision=opt.precision, devices=1, logger=CSVLogger(opt.out),
        callbacks=[ModelCheckpoint(monitor="val/acc", mode="max", save_last=True)],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(PlainClassifier(memory_format(opt)), train_loader, val_loader)


if __name__ == "__main__":
    main()
