"""Measure the cost of exactness outside of the step: python benchmarks/exactness_cost.py"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reslab import create_model
from reslab.data import Augment, order
from reslab.training.checkpoint import VerifiedCheckpointIO


def median_seconds(work: Callable[[], Any], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    augment, indices = Augment(crop_padding=4, flip="random"), np.arange(50_000)
    draws = median_seconds(lambda: (augment.draw(0, 3, indices, 32), order.permutation(0, 3, 50_000)))
    print(f"order and augmentation of 50,000 images: {1e3 * draws:.0f} ms per epoch (one thread, median of 7)")

    net = create_model("resnet18")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    checkpoint = {"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.ckpt"
        seconds = median_seconds(lambda: VerifiedCheckpointIO().save_checkpoint(checkpoint, path))
        size = path.stat().st_size / 1e6
    print(f"checkpoint of ResNet-18 with momentum: {seconds:.2f} s for {size:.0f} MB (median of 7)")


if __name__ == "__main__":
    main()
