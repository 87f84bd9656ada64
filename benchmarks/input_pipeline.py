"""CIFAR-10 input pipelines on one thread, reslab's against torchvision's: python benchmarks/input_pipeline.py

Both give augmented, normalised float32 batches of 128 in random order (pad-4 crop and flip). torchvision's is
CIFAR10 + RandomCrop, RandomHorizontalFlip, ToTensor, Normalize on PIL images in a DataLoader, with 0 and with
2 workers, of which the better counts. Each repeat times all three in turn and takes the ratio of neighbours
in time, so that other work on the machine meets all alike.
"""

import argparse
import os
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from reslab.data import CIFAR10, Augment, ImageData

BATCH = 128


def torchvision_loader(root: str, workers: int) -> DataLoader[Any]:
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, 4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(CIFAR10.mean, CIFAR10.std),
        ]
    )
    train = datasets.CIFAR10(root, transform=transform)
    return DataLoader(train, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0, drop_last=True)


def reslab_batches(data: ImageData) -> Iterator[Any]:
    for batch in data.train_dataloader():
        yield data.on_after_batch_transfer(batch)


def images_per_second(batches: Iterable[Any]) -> float:
    start, count = time.perf_counter(), sum(1 for _ in batches)
    return count * BATCH / (time.perf_counter() - start)


def started(loader: DataLoader[Any], count: int) -> Iterator[Any]:
    """The first batches of a loader whose workers are up and have filled their queues."""
    iterator = iter(loader)
    next(iterator)
    return islice(iterator, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default=os.environ.get("RESLAB_DATA", "data"))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = ImageData(CIFAR10(), arguments.root, BATCH, val_split=0, augment=Augment(crop_padding=4, flip="random"))
    loaders = [torchvision_loader(arguments.root, workers) for workers in (0, 2)]
    data.setup()
    ours, theirs, ratios = [], [], []
    for _ in range(arguments.repeats):
        ours.append(images_per_second(reslab_batches(data)))  # a whole epoch, its start included
        theirs.append(max(images_per_second(started(loader, 80)) for loader in loaders))
        ratios.append(ours[-1] / theirs[-1])
    print(
        f"input pipeline, CIFAR-10, one thread: reslab {median(ours):,.0f} images/s, torchvision "
        f"{median(theirs):,.0f} images/s (better of 0 and 2 workers): {median(ratios):.1f} times "
        f"(median of {arguments.repeats} interleaved repeats, {min(ratios):.1f} to {max(ratios):.1f}; "
        f"batch {BATCH}, torch {torch.__version__})"
    )


if __name__ == "__main__":
    main()
