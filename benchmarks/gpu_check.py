"""Measure reslab on a GPU: `make gpu-check`, or python benchmarks/gpu_check.py [--parts loop jpeg ...] [--tiny].

    loop           ResNet-50 at 224 pixels on images in memory, with and without torch.compile: reslab against a plain
                   loop with the same settings
    jpeg           the same from JPEG files: images/s, and the share of time that training waits for data
    sync           50 training steps under torch.cuda.set_sync_debug_mode("error")
    speed          cifar10_speed94, 95 and 96 with gpu_fast: accuracy and time (requires the data: --root DIR)
    paper          cifar10_resnet20, 18 and 56 with gpu_fast, 3 seeds at the same time: accuracy (requires the data)
    side_by_side   8 runs of cifar10_resnet18 at the same time on one GPU: images/s in total (requires the data)
    deterministic  cost per step of configs/trainer/deterministic.yaml with ResNet-50
    on_device      ResNet-18 on images of CIFAR-10's size: data.on_device true against false
    fast           the same: configs/trainer/gpu_fast.yaml, also without compile or CUDA graphs, against gpu.yaml

Each part runs in its own process and prints one line for docs/performance.md, with the name of the GPU. --tiny runs
small versions of all parts, also on a CPU, to test this script.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from PIL import Image

from reslab import Classifier, ImageData, create_model
from reslab.config import Experiment
from reslab.data import Augment, ImageFolder
from reslab.data.datasets import Arrays, ImageSource, Split
from reslab.host import CONFIGS
from reslab.runs.metrics import read_metrics
from reslab.training import Execution

PARTS = ("loop", "jpeg", "sync", "speed", "paper", "side_by_side", "deterministic", "on_device", "fast")
GPU = torch.cuda.is_available()
NAME = torch.cuda.get_device_name() if GPU else "CPU"


class Noise(ImageSource):
    """`count` noise images in memory."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, count: int, size: int) -> None:
        self.count, self.image_size, self.resize = count, size, size

    def classes(self, root: Path) -> list[str]:
        return [f"class{i}" for i in range(10)]

    def load(self, root: Path, split: Split) -> Arrays:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (self.count, self.image_size, self.image_size, 3), dtype=np.uint8)
        return Arrays(images, np.arange(self.count) % 10)


class Sizes:
    """Sizes of the measurement, or tiny ones to test this script."""

    def __init__(self, tiny: bool) -> None:
        self.net, self.size, self.batch = ("resnet18", 32, 8) if tiny else ("resnet50", 224, 256)
        self.steps, self.blocks = (3, 2) if tiny else (25, 5)
        self.images = self.batch * (self.steps + 2) if tiny else 5120

    def classifier(self, compile: bool = False) -> Classifier:
        torch.manual_seed(0)
        execution = Execution(compile=compile, fused_optimizer=compile)
        return Classifier(create_model(self.net, num_classes=10), execution=execution)

    def in_memory(self) -> ImageData:
        return ImageData(
            Noise(self.images, self.size), batch_size=self.batch, val_split=0, augment=Augment(flip="random")
        )


def trainer(callback: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 10_000, "precision": "bf16-mixed", "benchmark": True, "callbacks": [callback], "logger": False,
        "log_every_n_steps": 10_000, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "use_distributed_sampler": False, "devices": 1,
    }  # fmt: skip
    return Trainer(**{**settings, **options})


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


class Blocks(Callback):
    """Time blocks of steps, each followed by a call of `other`, and stop after the last block."""

    def __init__(self, sizes: Sizes, other: Any = None) -> None:
        self.sizes, self.other = sizes, other
        self.seconds: list[float] = []
        self.other_seconds: list[float] = []
        self.step = 0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self.step % self.sizes.steps == 0:
            synchronize()
            if self.step:
                self.seconds.append(time.perf_counter() - self.started)
                if self.other:
                    self.other_seconds.append(self.other())
            trainer.should_stop = len(self.seconds) > self.sizes.blocks
            self.started = time.perf_counter()
        self.step += 1

    def speed(self, seconds: list[float]) -> float:
        """Return the images/s of the median block, without the first (warmup)."""
        return self.sizes.batch * self.sizes.steps / statistics.median(seconds[1:])


class PlainLoop:
    """A plain PyTorch training loop on one batch that is already on the device."""

    def __init__(self, sizes: Sizes, compile: bool) -> None:
        self.steps, self.device = sizes.steps, torch.device("cuda" if GPU else "cpu")
        self.net = create_model(sizes.net, num_classes=10).to(self.device, memory_format=torch.channels_last)
        if compile:
            self.net.compile(dynamic=False)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=compile
        )
        images = torch.randn(sizes.batch, 3, sizes.size, sizes.size, device=self.device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.arange(sizes.batch, device=self.device) % 10

    def __call__(self) -> float:
        start = time.perf_counter()
        for _ in range(self.steps):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = F.cross_entropy(self.net(self.images), self.labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        synchronize()
        return time.perf_counter() - start


def loop(sizes: Sizes, root: str) -> str:
    results = []
    for compile in (False, True):
        blocks = Blocks(sizes, PlainLoop(sizes, compile))
        trainer(blocks).fit(sizes.classifier(compile), datamodule=sizes.in_memory())
        pairs = list(zip(blocks.seconds, blocks.other_seconds, strict=False))[1:]
        ratio = statistics.median(fit / plain for fit, plain in pairs)
        results.append(
            f"{'compiled' if compile else 'eager'} {blocks.speed(blocks.seconds):,.0f} images/s, {ratio:.3f} times the "
            f"time of a plain loop without input (median of {len(pairs)} pairs of {sizes.steps} steps)"
        )
    return f"{sizes.net} at {sizes.size}, batch {sizes.batch}, images in memory: {'; '.join(results)}"


@contextlib.contextmanager
def photographs(count: int) -> Iterator[Path]:
    """Yield a directory of JPEGs of ImageNet's usual size, smooth enough for about 100 KB each."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        for split, n in (("train", count), ("val", 10)):
            for i in range(n):
                coarse = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
                path = Path(scratch, "photographs", split, f"class{i % 10}", f"{i}.jpg")
                path.parent.mkdir(parents=True, exist_ok=True)
                coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        yield Path(scratch)


def jpeg(sizes: Sizes, root: str) -> str:
    profiler = SimpleProfiler()
    blocks = Blocks(sizes)
    workers = len(os.sched_getaffinity(0))
    with photographs(sizes.images) as directory:
        data = ImageData(
            ImageFolder("photographs", image_size=sizes.size),
            str(directory), batch_size=sizes.batch, val_split=0, num_workers=workers, augment=Augment(flip="random"),
        )  # fmt: skip
        trainer(blocks, profiler=profiler).fit(sizes.classifier(), datamodule=data)
    waited = sum(profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"][sizes.steps :])
    share = waited / sum(blocks.seconds[1:])
    return (
        f"{sizes.net} at {sizes.size}, batch {sizes.batch}, from JPEGs of 500 × 375, {workers} workers: "
        f"{blocks.speed(blocks.seconds):,.0f} images/s, {100 * share:.0f} % of the time waiting for data "
        f"(median of {len(blocks.seconds) - 1} blocks of {sizes.steps} steps)"
    )


class NoSync(Callback):
    """Raise an error on any device synchronization during 50 steps."""

    first, last = 5, 55

    def on_train_batch_start(self, trainer: Trainer, model: Any, batch: Any, batch_idx: int) -> None:
        if GPU and batch_idx == self.first:
            torch.cuda.set_sync_debug_mode("error")
        if batch_idx == self.last:
            if GPU:
                torch.cuda.set_sync_debug_mode("default")
            trainer.should_stop = True


def sync(sizes: Sizes, root: str) -> str:
    sizes.images = sizes.batch * 60 if sizes.size < 224 else 64 * 60
    sizes.batch = min(sizes.batch, 64)
    augment = Augment(flip="random", crop_padding=4, cutout=8, mixup=0.2, cutmix=1.0)
    data = ImageData(Noise(sizes.images, sizes.size), batch_size=sizes.batch, val_split=0, augment=augment)
    trainer(NoSync()).fit(sizes.classifier(), datamodule=data)
    return f"{sizes.net}: {NoSync.last - NoSync.first} steps without a device synchronization" + (
        "" if GPU else " (not checked on a CPU)"
    )


class Result(NamedTuple):
    """What a finished run measured."""

    accuracy: float  # on the test set, in percent
    rate: float  # training images/s
    training: float  # seconds
    total: float  # seconds, with checks, test and report


def runs(name: str, seeds: Iterable[int], root: str, *options: str) -> list[Result]:
    """Run `reslab fit NAME` with all seeds at the same time."""
    fit = [sys.executable, "-m", "reslab", "fit", name, f"--data.root={root}", *options]
    fit += [] if GPU else ["--trainer.accelerator=cpu"]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {seed: Path(scratch, str(seed)) for seed in seeds}
        commands = [[*fit, f"--seed={seed}", f"--run.dir={folder}"] for seed, folder in folders.items()]
        processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
        statuses = [process.wait() for process in processes]
        if any(statuses):
            raise RuntimeError(f"a run of {name} failed")
        return [result(folder) for folder in folders.values()]


def result(folder: Path) -> Result:
    manifest = json.loads((folder / "manifest.json").read_text())
    batch_size = yaml.safe_load((folder / "config.yaml").read_text())["data"]["batch_size"]
    steps = read_metrics(folder / "metrics.csv")["train/loss"][0][-1]
    rate = manifest["samples_per_second"]
    accuracy = 100 * manifest["results"].get("test/acc", math.nan)
    return Result(accuracy, rate, steps * batch_size / rate, manifest["wall_seconds"])


def summary(name: str, results: list[Result]) -> str:
    accuracies, rates, trainings, totals = zip(*results, strict=True)
    accuracy = f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} % (n = {len(results)})"
    rate, training, total = map(statistics.median, (rates, trainings, totals))
    return f"{name}: test/acc {accuracy}, trained in {training:.1f} s at {rate:,.0f} images/s, {total:.0f} s in all"


def speed(sizes: Sizes, root: str) -> str:
    tiny = sizes.size < 224
    recipes = {"digits": 2} if tiny else {"cifar10_speed94": 5, "cifar10_speed95": 5, "cifar10_speed96": 3}
    options = ["--epochs=1"] if tiny else ["--config=gpu_fast"]
    return "; ".join(
        summary(name, [runs(name, [seed], root, *options)[0] for seed in range(n)]) for name, n in recipes.items()
    )


def paper(sizes: Sizes, root: str) -> str:
    tiny = sizes.size < 224
    names = ["digits"] if tiny else ["cifar10_resnet20", "cifar10_resnet18", "cifar10_resnet56"]
    options = ["--epochs=1"] if tiny else ["--config=gpu_fast"]
    return "; ".join(f"at the same time, {summary(name, runs(name, range(3), root, *options))}" for name in names)


def side_by_side(sizes: Sizes, root: str) -> str:
    tiny = sizes.size < 224
    name, jobs = ("digits", 2) if tiny else ("cifar10_resnet18", 8)
    options = ["--run.skip_test=true", "--trainer.max_epochs=-1", f"--trainer.max_steps={20 if tiny else 6000}"]
    options += [] if tiny else ["--config=gpu"]
    alone, together = (sum(run.rate for run in runs(name, range(n), root, *options)) for n in (1, jobs))
    return (
        f"{name}: {jobs} runs at the same time train {together:,.0f} images/s in total, one alone {alone:,.0f} (n = 1)"
    )


def step_seconds(sizes: Sizes, deterministic: bool) -> float:
    blocks = Blocks(sizes)
    options = {"deterministic": True, "benchmark": False} if deterministic else {}
    trainer(blocks, **options).fit(sizes.classifier(), datamodule=sizes.in_memory())
    return statistics.median(blocks.seconds[1:]) / sizes.steps


def deterministic(sizes: Sizes, root: str) -> str:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    ratios = []
    for _ in range(2 if sizes.size < 224 else 5):
        fast = step_seconds(sizes, False)
        ratios.append(step_seconds(sizes, True) / fast)
        torch.use_deterministic_algorithms(False)
    return f"{sizes.net}: a deterministic step takes {statistics.median(ratios):.3f} times as long (n = {len(ratios)})"


def cifar_speed(sizes: Sizes, config: str, *options: str, on_device: bool | str = "auto") -> float:
    """Return the training images/s of cifar10_resnet18 (--tiny: ResNet-8) with a trainer config, on noise images."""
    tiny = sizes.size < 224
    files = [CONFIGS / "experiment/cifar10_resnet18.yaml", CONFIGS / f"trainer/{config}.yaml"]
    small = [f"--model.net={CONFIGS / 'net/resnet8_fast.yaml'}", "--trainer.accelerator=cpu"] if tiny else []
    argv = [arg for file in files for arg in ("--config", str(file))]
    data, model, settings = Experiment([*argv, *small, *options]).build()
    noise = ImageData(
        Noise(256 if tiny else 50_000, 32),
        batch_size=sizes.batch if tiny else data.batch_size, val_split=0, augment=data.augment, on_device=on_device,
    )  # fmt: skip
    sizes.batch = noise.batch_size
    blocks = Blocks(sizes)
    trainer(blocks, **{key: settings[key] for key in ("accelerator", "precision", "benchmark")}).fit(model, noise)
    return blocks.speed(blocks.seconds)


def compared(sizes: Sizes, arms: dict[str, Any]) -> str:
    """Measure the arms in turn, and return their median images/s as text, with the ratio to the first arm."""
    sizes.steps = min(sizes.steps * 4, 200) if GPU else sizes.steps
    rates = [[arm() for arm in arms.values()] for _ in range(1 if sizes.size < 224 else 3)]
    ratios = [statistics.median(row[i] / row[0] for row in rates) for i in range(len(arms))]
    medians = [statistics.median(row[i] for row in rates) for i in range(len(arms))]
    results = zip(arms, medians, ratios, strict=True)
    text = ", ".join(f"{name} {rate:,.0f} images/s ({ratio:.2f} times)" for name, rate, ratio in results)
    return f"cifar10_resnet18, batch {sizes.batch}: {text} (medians of {len(rates)} interleaved repeats)"


def on_device(sizes: Sizes, root: str) -> str:
    arms = {
        f"data.on_device {str(place).lower()}": partial(cifar_speed, sizes, "gpu", on_device=place)
        for place in (False, True)
    }
    return compared(sizes, arms)


def fast(sizes: Sizes, root: str) -> str:
    modes = {
        "gpu_fast": [],
        "gpu_fast without compile": ["--model.execution.compile=false"],
        "gpu_fast without CUDA graphs": ["--model.execution.cuda_graph=false"],
    }
    arms = {name: partial(cifar_speed, sizes, "gpu_fast", *options) for name, options in modes.items()}
    return compared(sizes, {"gpu": partial(cifar_speed, sizes, "gpu"), **arms})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--root", default=os.environ.get("RESLAB_DATA", "data"), help="directory with CIFAR-10")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not GPU and not args.tiny:
        sys.exit("no GPU found; use --tiny to test this script on a CPU")
    if len(args.parts) == 1:
        print(f"{NAME}: {globals()[args.parts[0]](Sizes(args.tiny), args.root)}", flush=True)
        return
    tiny = ["--tiny"] if args.tiny else []
    failed = [
        part
        for part in args.parts
        if subprocess.run(
            [sys.executable, __file__, "--parts", part, "--root", args.root, *tiny], check=False
        ).returncode
    ]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
