"""`reslab doctor`: is this machine, and are these data, fit for a run?"""

import json
import os
import shutil
import time
from pathlib import Path

import torch

from reslab.config import Experiment
from reslab.data import ImageData
from reslab.errors import UserError
from reslab.runs.folder import RunFolder
from reslab.runs.manifest import environment


def examine(args: list[str]) -> int:
    """Prints what is here, checks writing and (given an experiment's --config) its data; 1 if something is wrong."""
    here = environment()
    packages = "  ".join(f"{name} {version}" for name, version in here["packages"].items())
    print(f"python    {here['python']} on {here['platform']}")
    print(f"packages  {packages}")
    print(f"cpu       {here['cpu']}, {here['cpus']} cores, {here['threads']} threads in torch")
    print(f"gpu       {', '.join(here['gpus']) or 'none'}")
    print(f"speed     {_tflops():.2f} TFLOP/s in a float32 matrix product")
    print(f"flags     {json.dumps(here['determinism'])}")
    print(f"wandb     {_wandb()}")
    checks = [_writing]
    if args:
        experiment = Experiment(args)
        data, _, _ = experiment.build()
        checks.append(lambda: _data(data))
    wrong = 0
    for check in checks:
        try:
            print(check())
        except UserError as error:
            wrong += 1
            print(f"WRONG     {error}")
    return 1 if wrong else 0


def _tflops(size: int = 2048) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(size, size, device=device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e12


def _wandb() -> str:
    netrc = Path.home() / ".netrc"
    known = bool(os.environ.get("WANDB_API_KEY")) or (netrc.exists() and "wandb" in netrc.read_text())
    return (
        "a login is there: runs with configs/logger/wandb.yaml go online"
        if known
        else "no login: such runs are kept offline"
    )


def _writing() -> str:
    folder = RunFolder(Path("runs", f".doctor-{os.getpid()}"))
    existed = Path("runs").exists()
    try:
        folder.probe()
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)
        if not existed:
            shutil.rmtree("runs", ignore_errors=True)
    return f"folder    {Path('runs').absolute()} can be written, {shutil.disk_usage('.').free / 2**30:.0f} GiB free"


def _data(data: ImageData) -> str:
    start = time.perf_counter()
    data.prepare_data()
    data.setup()
    train, val = data.split
    sizes = f"{len(train):,} training, {len(val):,} validation, {len(data.test_data):,} test images"
    return f"data      {sizes}, {data.num_classes} classes, {data.image_shape} ({time.perf_counter() - start:.1f} s)"
