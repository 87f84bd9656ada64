"""Measure the overhead of `reslab fit` over a bare PyTorch loop: same network, data and precision.

    python benchmarks/loop_overhead.py --data.root DIR [--blocks 7] [--steps 50]

Both train ResNet-20 on CIFAR-10 (batch 128, bf16 autocast on CPU and GPU) in one process, alternating: one block of
steps of `reslab fit`, with checkpoints and logging, then one block of the bare loop. The script prints the median
ratio of adjacent blocks, as quoted in the docs.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer

from reslab import create_model
from reslab.config import Experiment
from reslab.data import ImageData
from reslab.experiment import Run
from reslab.host import CONFIGS
from reslab.runs.folder import RunFolder


class Done(BaseException):
    """Raised when enough blocks have been measured; not an error that a run would record."""


class BareLoop:
    """A plain PyTorch training loop over the same loader."""

    def __init__(self, data: ImageData, device: torch.device) -> None:
        self.data, self.device = data, device
        self.net = create_model("resnet20", num_classes=10).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)

    def run(self, steps: int) -> float:
        loader = self.data.train_dataloader()
        start = time.perf_counter()
        for batch, _ in zip(loader, range(steps), strict=False):
            batch = self.data.on_after_batch_transfer(type(batch)(*(part.to(self.device) for part in batch)))
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = F.cross_entropy(self.net(batch.images), batch.labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
        synchronize(self.device)
        return time.perf_counter() - start


class TakeTurns(Callback):
    """Time a block of the trainer's steps including all callbacks, then a block of the bare loop; repeat."""

    def __init__(self, blocks: int, steps: int) -> None:
        self.blocks, self.steps = blocks, steps
        self.ratios: list[float] = []
        self.bare: BareLoop | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.steps:
            return
        device = trainer.strategy.root_device
        synchronize(device)
        if self.bare is None:
            self.bare = BareLoop(trainer.datamodule, device)  # type: ignore[attr-defined]
        elif batch_idx:  # else an epoch has ended: its last block is incomplete and not counted
            fit = time.perf_counter() - self.start
            bare = self.bare.run(self.steps)
            self.ratios.append(fit / bare)
            print(
                f"block {len(self.ratios) - 1}: fit {fit:.2f} s, bare loop {bare:.2f} s, ratio {fit / bare:.3f}",
                flush=True,
            )
        if len(self.ratios) > self.blocks:
            raise Done
        self.start = time.perf_counter()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=7, help="measured blocks, after one warmup block (default: 7)")
    parser.add_argument("--steps", type=int, default=50, help="steps per block (default: 50)")
    args, rest = parser.parse_known_args()
    turns = TakeTurns(args.blocks, args.steps)
    argv = [f"--config={CONFIGS / 'experiment/cifar10_resnet20.yaml'}", "--trainer.precision=bf16-mixed"]
    argv += ["--run.checkpoint_every_steps=100", "--trainer.max_epochs=30", "--trainer.max_steps=-1", *rest]
    with tempfile.TemporaryDirectory() as temporary:
        experiment = Experiment(argv)
        data, model, settings = experiment.build()
        settings["callbacks"].append(turns)
        folder = RunFolder(Path(temporary) / "run")
        with contextlib.suppress(Done), folder.claimed():
            Run(experiment, folder, argv, data, model, settings).execute()
    ratios = turns.ratios[1:]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"reslab fit takes {statistics.median(ratios):.3f} times a bare loop's time "
        f"(ResNet-20, batch 128, bf16, {device}; median of {len(ratios)} pairs of {args.steps} steps, "
        f"from {min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
