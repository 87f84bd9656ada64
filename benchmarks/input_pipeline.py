"""Compare the input pipelines of reslab and torchvision on one thread: python benchmarks/input_pipeline.py [--jpeg]

All yield augmented, normalised float32 batches in random order.

CIFAR-10: batches of 128 with pad-4 crop and flip. torchvision: CIFAR10 with RandomCrop, RandomHorizontalFlip, ToTensor
and Normalize on PIL images in a DataLoader; the faster of 0 and 2 workers counts.

--jpeg: the images in ROOT/imagenet-samples/<class>/, batches of 50 at 224 pixels, one worker each. torchvision: its
reference preset on PIL images, ImageFolder with RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize in a
DataLoader. reslab flips and normalises in the main process, on the device; that time is included. The scaled mode sets
data.resize.scaled_decode to --share.

Each repeat runs all pipelines in turn and compares runs next to each other in time, so that other load on the machine
affects all alike.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, transforms

from reslab.data import CIFAR10, Augment, ImageData, ImageFolder, ResizeConfig
from reslab.data.datasets import IMAGENET_MEAN, IMAGENET_STD
from reslab.data.decode import simplejpeg

BATCH, JPEG_BATCH = 128, 50
PASSES = 4  # over the images in each measurement


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


def images_per_second(batches: Iterable[Any], size: int = BATCH) -> float:
    start, count = time.perf_counter(), sum(1 for _ in batches)
    return count * size / (time.perf_counter() - start)


def started(loader: DataLoader[Any], count: int) -> Iterator[Any]:
    """Return the next `count` batches of a loader after its first batch, so that its workers have started."""
    iterator = iter(loader)
    next(iterator)
    return islice(iterator, count)


def cifar(root: str, repeats: int) -> None:
    data = ImageData(CIFAR10(), root, BATCH, val_split=0, augment=Augment(crop_padding=4, flip="random"))
    loaders = [torchvision_loader(root, workers) for workers in (0, 2)]
    data.setup()
    ours, theirs, ratios = [], [], []
    for _ in range(repeats):
        ours.append(images_per_second(reslab_batches(data)))  # a whole epoch, including its start
        theirs.append(max(images_per_second(started(loader, 80)) for loader in loaders))
        ratios.append(ours[-1] / theirs[-1])
    print(
        f"input pipeline, CIFAR-10, one thread: reslab {median(ours):,.0f} images/s, torchvision "
        f"{median(theirs):,.0f} images/s (faster of 0 and 2 workers): {median(ratios):.1f} times "
        f"(median of {repeats} interleaved repeats, {min(ratios):.1f} to {max(ratios):.1f}; "
        f"batch {BATCH}, torch {torch.__version__})"
    )


def reference_preset(root: str) -> Callable[[], Iterator[Any]]:
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    images = datasets.ImageFolder(f"{root}/imagenet-samples", transform)
    count = PASSES * len(images)
    sampler = RandomSampler(images, replacement=True, num_samples=count + JPEG_BATCH)
    loader = DataLoader(images, JPEG_BATCH, sampler=sampler, num_workers=1, persistent_workers=True)
    return lambda: started(loader, count // JPEG_BATCH)


def jpeg_pipeline(root: str, scaled_decode: float | None) -> Callable[[], Iterator[Any]]:
    source = ImageFolder(root, train="imagenet-samples", test="imagenet-samples", apply_exif_orientation=False)
    resize, augment = ResizeConfig(scaled_decode=scaled_decode), Augment(flip="random")
    data = ImageData(source, root, JPEG_BATCH, val_split=0, num_workers=1, augment=augment, resize=resize)
    indices = np.arange(len(data.train_data))
    data.split = np.concatenate([np.tile(indices, PASSES), indices[:JPEG_BATCH]]), indices[:0]
    loader = data.train_dataloader()
    return lambda: map(data.on_after_batch_transfer, started(loader, PASSES * len(indices) // JPEG_BATCH))


def jpeg(root: str, repeats: int, share: float) -> None:
    exact, scaled, theirs = jpeg_pipeline(root, None), jpeg_pipeline(root, share), reference_preset(root)
    rates = np.array(
        [[images_per_second(run(), JPEG_BATCH) for run in (theirs, exact, scaled)] for _ in range(repeats)]
    )
    reference, *ours = np.median(rates, axis=0)
    results = []
    for name, speed, column in zip(("exact", f"scaled (share {share})"), ours, (1, 2), strict=True):
        ratios = rates[:, column] / rates[:, 0]
        results.append(
            f"{name} {speed:,.0f} images/s, {median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(
        f"JPEG input, one worker: torchvision {reference:,.0f} images/s, reslab {'; '.join(results)} "
        f"(medians of {repeats} interleaved repeats; 224 pixels, torch {torch.__version__}, "
        f"{'simplejpeg ' + simplejpeg.__version__ if simplejpeg else 'no simplejpeg'})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=os.environ.get("RESLAB_DATA", "data"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--jpeg", action="store_true", help="image files instead of CIFAR-10")
    parser.add_argument("--share", type=float, default=0.5, help="data.resize.scaled_decode of the scaled mode")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.jpeg:
        jpeg(arguments.root, arguments.repeats, arguments.share)
    else:
        cifar(arguments.root, arguments.repeats)


if __name__ == "__main__":
    main()
