"""`reslab doctor`: check the machine, and optionally an experiment's data."""

import contextlib
import json
import os
import shutil
import time
import timeit
from pathlib import Path

import torch

from reslab.config import Experiment
from reslab.data import ImageData
from reslab.errors import Exit, UserError
from reslab.runs.folder import RunFolder
from reslab.runs.manifest import environment


def examine(args: list[str]) -> int:
    """Print the environment and check that runs can be written; with --config, check the experiment's data too.

    Returns:
        Exit status: 1 if a check fails.
    """
    machine = environment()
    packages = "  ".join(f"{name} {version}" for name, version in machine["packages"].items())
    print(f"python    {machine['python']} on {machine['platform']}")
    print(f"packages  {packages}")
    print(f"cpu       {machine['cpu']}, {machine['cpus']} cores, {machine['threads']} torch threads")
    print(f"gpu       {', '.join(machine['gpus']) or 'none'}")
    print(f"speed     {_tflops():.2f} TFLOP/s (float32 matrix product)")
    print(f"flags     {json.dumps(machine['determinism'])}")
    print(f"wandb     {_wandb()}")
    checks = [_check_writing]
    if args:
        data, _, _ = Experiment(args).build()
        checks.append(lambda: _check_data(data))
    status = Exit.OK
    for check in checks:
        try:
            print(check())
        except UserError as error:
            status = Exit.FAILED
            print(f"FAILED    {error}")
    return status


def _tflops(size: int = 2048) -> float:
    a = torch.randn(size, size, device="cuda" if torch.cuda.is_available() else "cpu")
    seconds = min(timeit.repeat(lambda: float((a @ a)[0, 0]), number=1, repeat=3))  # reading a value waits for the GPU
    return 2 * size**3 / seconds / 1e12


def _wandb() -> str:
    netrc = Path.home() / ".netrc"
    if os.environ.get("WANDB_API_KEY") or (netrc.exists() and "wandb" in netrc.read_text()):
        return "login found: runs with configs/logger/wandb.yaml are synced online"
    return "no login: runs with configs/logger/wandb.yaml stay offline"


def _check_writing() -> str:
    folder = RunFolder(Path("runs", f".doctor-{os.getpid()}"))
    try:
        folder.probe()
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: there are runs
            folder.path.parent.rmdir()
    free = shutil.disk_usage(".").free / 2**30
    return f"runs      {Path('runs').absolute()} is writable, {free:.0f} GiB free"


def _check_data(data: ImageData) -> str:
    start = time.perf_counter()
    data.prepare_data()
    data.setup()
    train, val = data.split
    sizes = f"{len(train):,} training, {len(val):,} validation, {len(data.test_data):,} test images"
    return f"data      {sizes}, {data.num_classes} classes, {data.image_shape} ({time.perf_counter() - start:.1f} s)"
