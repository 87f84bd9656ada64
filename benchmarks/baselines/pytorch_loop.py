"""ResNet-20 on CIFAR-10 in a plain PyTorch loop, in the style of kuangliu/pytorch-cifar and akamaster's ResNets.

The network is reslab's, so that only the loop and the input differ.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar import cifar10
from common import loaders, memory_format, options

from reslab import create_model


def main(argv: Sequence[str] | None = None) -> None:
    opt = options(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_loader, val_loader = loaders(*cifar10(opt.root), opt)
    net = create_model("resnet20", num_classes=10).to(device, memory_format=memory_format(opt))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [91, 137])

    def run(loader: Any, training: bool) -> float:
        """Run one epoch, and return its accuracy."""
        net.train(training)
        total_loss, correct, count = 0.0, 0, 0
        for i, (images, labels) in enumerate(loader):
            images = images.to(device, memory_format=memory_format(opt), non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=opt.precision == "bf16-mixed"):
                logits = net(images)
                loss = F.cross_entropy(logits, labels)
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            total_loss += loss.item()
            correct += (logits.argmax(1) == labels).sum().item()
            count += len(labels)
            if i % 50 == 0:
                print(f"{i}/{len(loader)}  loss {total_loss / (i + 1):.4f}  accuracy {correct / count:.4f}")
        return correct / count

    out, best = Path(opt.out), 0.0
    out.mkdir(parents=True)
    for epoch in range(opt.epochs):
        run(train_loader, training=True)
        with torch.no_grad():
            accuracy = run(val_loader, training=False)
        scheduler.step()
        if accuracy >= best:
            best = accuracy
            torch.save({"net": net.state_dict(), "acc": accuracy, "epoch": epoch}, out / "ckpt.pth")


if __name__ == "__main__":
    main()
