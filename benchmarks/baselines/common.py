"""What the baselines of benchmarks/peers.py share: options, and loaders of epochs with a fixed number of batches."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", required=True, help="directory of the data")
    parser.add_argument("--out", required=True, help="run directory")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, required=True, help="training steps per epoch")
    parser.add_argument("--val-batches", type=int, required=True, help="validation batches per epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=128, help="of the network's input, for image files")
    parser.add_argument("--workers", type=int, default=2, help="of each DataLoader")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--channels-last", action="store_true")
    return parser.parse_args(argv)


def loaders(train: Dataset[Any], val: Dataset[Any], opt: argparse.Namespace) -> tuple[DataLoader, DataLoader]:
    """Return loaders of `opt.steps` random training batches and of the first `opt.val_batches` validation batches."""
    settings: dict[str, Any] = {
        "batch_size": opt.batch_size, "num_workers": opt.workers, "persistent_workers": opt.workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }  # fmt: skip
    images = min(opt.val_batches * opt.batch_size, len(val))  # type: ignore[arg-type]
    sampler = RandomSampler(train, num_samples=opt.steps * opt.batch_size)  # type: ignore[arg-type]
    return DataLoader(train, sampler=sampler, **settings), DataLoader(Subset(val, range(images)), **settings)


def memory_format(opt: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if opt.channels_last else torch.contiguous_format
