"""Measure what keeping freed memory brings on a CPU: python benchmarks/cpu_memory.py [--repeats 5] [--steps 20].

Processes with and without `reslab.host.keep_freed_memory` alternate. Each trains ResNet-20 at 32 pixels (batch 128),
then ResNet-18 at 128 pixels (batch 32), on random images, in fp32 and channels_last. The script prints the medians of
images/s and of the peak memory, and of the ratio of neighbours.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from reslab import create_model
from reslab.host import keep_freed_memory

SHAPES = {"resnet20": (128, 3, 32, 32), "resnet18": (32, 3, 128, 128)}


def images_per_second(net_name: str, steps: int) -> float:
    """Return the median speed of training steps, after three for warming up."""
    net = create_model(net_name, num_classes=10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(SHAPES[net_name]).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (len(images),))
    seconds = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return len(images) / statistics.median(seconds[3:])


def measure(keep: bool, steps: int) -> dict[str, float]:
    """Train in a new process; return images/s of each network, and the peak memory in MB."""
    command = [sys.executable, __file__, "--child", str(int(keep)), "--steps", str(steps)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind (default: 5)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each network (default: 20)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        if args.child:
            keep_freed_memory()
        speeds = {name: images_per_second(name, args.steps) for name in SHAPES}
        print(json.dumps({**speeds, "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    pairs = [(measure(False, args.steps), measure(True, args.steps)) for _ in range(args.repeats)]
    for name in (*SHAPES, "MB"):
        without, kept = (statistics.median(pair[i][name] for pair in pairs) for i in (0, 1))
        ratios = sorted(pair[1][name] / pair[0][name] for pair in pairs)
        unit = "peak memory" if name == "MB" else "images/s"
        print(
            f"{name:<9}{unit}: {kept:.0f} against {without:.0f}, {statistics.median(ratios):.2f} times "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}; {torch.get_num_threads()} threads, n = {args.repeats})"
        )


if __name__ == "__main__":
    main()
