"""ResNet-18 on image files by the settings of torchvision's reference (references/classification/train.py).

ImageFolder, PIL, the presets' transforms, a DataLoader with workers, and top-1 and top-5 accuracy by .item() per step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import loaders, memory_format, options
from torch import Tensor, nn
from torchvision import datasets, models, transforms

NORMALIZE = [
    transforms.PILToTensor(),
    transforms.ConvertImageDtype(torch.float),
    transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
]


def image_folders(root: str, size: int) -> tuple[datasets.ImageFolder, datasets.ImageFolder]:
    train = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *NORMALIZE]
    val = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), *NORMALIZE]
    return tuple(
        datasets.ImageFolder(str(Path(root, split)), transforms.Compose(steps))
        for split, steps in (("train", train), ("val", val))
    )  # type: ignore[return-value]


@torch.inference_mode()
def accuracy(logits: Tensor, labels: Tensor) -> list[float]:
    """Return the top-1 and top-5 accuracy of a batch."""
    hits = logits.topk(5).indices == labels[:, None]
    return [hits[:, :k].any(1).float().mean().item() for k in (1, 5)]


def main(argv: Sequence[str] | None = None) -> None:
    opt = options(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_loader, val_loader = loaders(*image_folders(opt.root, opt.image_size), opt)
    net = models.resnet18(num_classes=10).to(device, memory_format=memory_format(opt))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)

    def run(loader: Any, training: bool) -> list[float]:
        """Run one epoch, and return the means of loss, top-1 and top-5 accuracy."""
        net.train(training)
        rows = []
        for images, labels in loader:
            images = images.to(device, memory_format=memory_format(opt), non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=opt.precision == "bf16-mixed"):
                logits = net(images)
                loss = criterion(logits, labels)
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            rows.append([loss.item(), *accuracy(logits, labels)])
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    out = Path(opt.out)
    out.mkdir(parents=True)
    for epoch in range(opt.epochs):
        print(f"epoch {epoch}: train", *(f"{value:.4f}" for value in run(train_loader, training=True)))
        scheduler.step()
        with torch.inference_mode():
            print(f"epoch {epoch}: val", *(f"{value:.4f}" for value in run(val_loader, training=False)))
        state = {part: thing.state_dict() for part, thing in (("model", net), ("optimizer", optimizer))}
        for name in (f"model_{epoch}.pth", "checkpoint.pth"):
            torch.save({**state, "lr_scheduler": scheduler.state_dict(), "epoch": epoch}, out / name)


if __name__ == "__main__":
    main()
