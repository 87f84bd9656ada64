"""Measure `reslab runs` and the page of `reslab runs --html` for 1,000 runs: python benchmarks/runs_table.py [DIR].

The run directories are written to DIR (default: a temporary directory). They have the files that a listing reads, with
the content of real runs: 400 runs of four studies, 400 of a sweep over lr, weight decay and width, 200 single runs.
"""

import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

RUNS, TIMES = 1000, 7
DATA = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "digits": "Digits"}
LAYERS = {"resnet20": [3, 3, 3], "resnet32": [5, 5, 5], "resnet56": [9, 9, 9]}
STATUSES = ["complete"] * 94 + ["failed"] * 2 + ["diverged"] + ["preempted"] * 2 + ["running"]
TRAINER = """
accelerator: auto
strategy: auto
devices: 1
num_nodes: 1
precision: bf16-mixed
logger: null
callbacks: null
fast_dev_run: false
max_epochs: 60
min_epochs: null
max_steps: -1
min_steps: null
max_time: null
limit_train_batches: null
limit_val_batches: null
limit_test_batches: null
limit_predict_batches: null
overfit_batches: 0.0
val_check_interval: null
check_val_every_n_epoch: 1
num_sanity_val_steps: 0
log_every_n_steps: 100
enable_checkpointing: false
enable_progress_bar: false
enable_model_summary: false
accumulate_grad_batches: 1
gradient_clip_val: null
gradient_clip_algorithm: null
deterministic: true
benchmark: null
inference_mode: true
use_distributed_sampler: false
profiler: null
detect_anomaly: false
barebones: false
plugins: null
sync_batchnorm: false
reload_dataloaders_every_n_epochs: 0
default_root_dir: null
enable_autolog_hparams: true
model_registry: null
"""


def config(name: str, seed: int, net: str, data: str, lr: float, decay: float, width: int, **run: Any) -> str:
    """Return the text of a config.yaml, as a run writes it."""
    layers = {"block": "basic", "layers": LAYERS[net], "width": width, "stem": "cifar", "shortcut": "A", "groups": 1}
    sgd = {"lr": lr, "momentum": 0.9, "dampening": 0.0, "weight_decay": decay, "nesterov": True, "foreach": None}
    augment = {"crop_padding": 4, "flip": "horizontal", "cutout": 0, "mixup": 0.0, "cutmix": 0.0, "transforms": []}
    cosine = {"class_path": "reslab.training.Cosine", "init_args": {"warmup": 0.05}}
    net_args = {**layers, "norm": "batch", "width_per_group": 64, "zero_init": False, "drop_path": 0.0, "blur": False}
    values = {
        "seed_everything": seed,
        "trainer": yaml.safe_load(TRAINER),
        "model": {
            "net": {"class_path": "reslab.models.ResNet", "init_args": net_args},
            "weights": None,
            "objective": {"class_path": "reslab.training.CrossEntropy", "init_args": {"label_smoothing": 0.0}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": sgd},
            "schedule": cosine,
            "param_groups": {"freeze": [], "backbone_lr_scale": 1.0, "layer_decay": 1.0, "decay_norm_and_bias": True},
            "ema_decay": None,
            "flip_tta": False,
            "execution": {"compile": False, "channels_last": True},
        },
        "data": {
            "dataset": {"class_path": f"reslab.data.{DATA[data]}"},
            "root": None, "batch_size": 128, "eval_batch_size": None, "val_split": 0.1, "split_seed": 0,
            "num_workers": None, "augment": augment,
            "resize": {"train_size": None, "test_size": None, "test_resize": None, "progressive": None},
            "download": True, "classes": None,
        },
        "run": {
            "name": name, "dir": None, "test_weights": "last", "monitor": "val/acc", "mode": "max",
            "checkpoint_every_steps": None, "checkpoint_every_minutes": 5.0, "allow_world_size_change": False,
            "allow_data_change": False, "seeds": dict.fromkeys(["init", "order", "augment", "network"]), **run,
        },
    }  # fmt: skip
    return "# lightning.pytorch==2.6.6\n" + yaml.dump(values, sort_keys=False, Dumper=yaml.CSafeDumper)


def manifest(name: str, seed: int, status: str, start: str, final: float) -> dict[str, Any]:
    attempt = {"started": start, "host": "node7", "pid": 4242, "ended": start, "how": status}
    if status == "failed":
        attempt["how"] = "failed: out of memory (CUDA out of memory): --trainer.accumulate_grad_batches N splits each"
    results = {"train/loss": 0.31, "train/acc": 0.93, "lr": 1e-4, "val/loss": 1.3 - final, "val/acc": final}
    results |= {"val/acc5": 0.99, "test/loss": 1.32 - final, "test/acc": final - 0.004, "test/acc5": 0.99}
    package = dict.fromkeys(["reslab", "torch", "torchvision", "lightning", "numpy", "wandb"], "1.2.3")
    classes = [f"class {i}" for i in range(100)]
    return {
        "status": status, "id": f"{seed:08x}", "name": name, "seed": seed, "command": f"reslab fit {name}",
        "config_sha256": "a" * 64, "rule": "last", "attempts": [attempt],
        "git": {"sha": "b" * 40, "dirty": False, "untracked": [], "left_out": [], "binaries": [], "diff": None},
        "results": results if status == "complete" else {}, "weights_sha256": "c" * 64,
        "wall_seconds": 1800 + 60 * final, "samples_per_second": 12345.6,
        "environment": {"python": "3.11.7", "packages": package, "gpus": ["NVIDIA A100"], "world_size": 1},
        "data": {"files": "d" * 64, "split": "e" * 64, "class_names": classes, "image_shape": [3, 32, 32]},
    }  # fmt: skip


def metrics(final: float, epochs: int, every: int = 100, steps: int = 351) -> str:
    """Return the text of a metrics.csv."""
    lines = ["step,epoch,train/loss,train/acc,lr,images_per_second,val/loss,val/acc,val/acc5,test/loss,test/acc"]
    for step in sorted({*range(every, epochs * steps, every), *range(steps, epochs * steps + 1, steps)}):
        share = step / (epochs * steps)
        acc = final * (1 - math.exp(-5 * share)) + random.gauss(0, 0.004)
        validation = f"{1.4 - acc:.16f},{acc:.16f},{min(1, acc + 0.2):.16f}" if step % steps == 0 else ",,"
        lines.append(
            f"{step},{step // steps},{2 - 1.7 * acc:.16f},{acc:.16f},{0.1 * (1 - share):.12f},12345.678,{validation},,"
        )
    return "\n".join(lines) + "\n"


def recipes() -> list[tuple[str, dict[str, Any]]]:
    """Return directory and config arguments of each run."""
    runs: list[tuple[str, dict[str, Any]]] = []
    base = {"net": "resnet20", "data": "cifar10", "lr": 0.1, "decay": 5e-4, "width": 16}
    for study, arm, seed in itertools.product(range(4), range(10), range(10)):
        run = {"group": f"study{study}", "job_type": f"arm{arm}", "tags": [f"seed {seed}"]}
        options = {**base, "lr": 0.1 / 2**arm, "net": list(LAYERS)[study % 3], "name": f"study{study}.arm{arm}"}
        runs.append((f"ablations/study{study}/arm{arm}/seed-{seed}", {**options, "seed": seed, **run}))
    sweep = itertools.product(range(10), range(10), (16, 24, 32, 48))
    for i, (lr, decay, width) in enumerate(sweep):
        options = {**base, "lr": 0.4 / 1.5**lr, "decay": 2e-3 / 1.7**decay, "width": width, "seed": 0}
        runs.append((f"sweep/20261101-{i:06}-seed0-{i:06x}", {**options, "name": "sweep"}))
    for i in range(RUNS - len(runs)):
        data, net = list(DATA)[i % 3], list(LAYERS)[i % 2]
        options = {**base, "data": data, "net": net, "seed": i, "name": f"{data}_{net}"}
        runs.append((f"{data}_{net}/20261105-{i:06}-seed{i}-{i:06x}", options))
    return runs


def generate(top: Path, epochs: int = 60) -> None:
    """Write the run directories."""
    random.seed(0)
    for i, (path, options) in enumerate(recipes()):
        folder, final = top / path, random.gauss(0.9, 0.02)
        for part in ("checkpoints", "figures"):
            (folder / part).mkdir(parents=True)
        start = f"2026-11-{1 + i % 25:02}T{i % 24:02}:{i % 60:02}:00+00:00"
        record = manifest(options["name"], options["seed"], random.choice(STATUSES), start, final)
        (folder / "config.yaml").write_text(config(**options))
        (folder / "manifest.json").write_text(json.dumps(record, indent=2))
        (folder / "metrics.csv").write_text(metrics(final, epochs))
        for name in (".lock", "report.html", "weights.safetensors", "predictions.npz", "checkpoints/last.ckpt"):
            (folder / name).write_text("{}")


def measure(title: str, *command: str) -> None:
    """Print the median time of a command, from process start to end."""
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "reslab", "runs", *command], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    print(f"{title:<30} {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f} s, n = {TIMES})")


def main(top: Path) -> None:
    runs, page = top / "runs", top / "runs.html"
    if not runs.exists():
        generate(runs)
    measure("reslab runs", str(runs))
    measure("reslab runs --where --sort", str(runs), "--where", "data.dataset=cifar10", "--sort", "-test/acc")
    measure("reslab runs --json", str(runs), "--json")
    measure("reslab runs --html", str(runs), "--html", str(page))
    print(f"{page.name}: {page.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as directory:
            main(Path(directory))
