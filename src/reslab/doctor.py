"""`reslab doctor`: check the machine, and optionally an experiment's data."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from reslab.config import Experiment
from reslab.errors import Exit, UserError
from reslab.runs.folder import RunFolder
from reslab.runs.manifest import environment


def examine(overrides: list[str]) -> int:
    """Print the environment, check that runs can be written, and with --config the data; return the exit status."""
    machine = environment()
    packages = "  ".join(f"{name} {version}" for name, version in machine["packages"].items())
    print(f"python    {machine['python']} on {machine['platform']}")
    print(f"packages  {packages}")
    print(f"cpu       {machine['cpu']}, {machine['cpus']} cores, {machine['threads']} torch threads")
    print(f"gpu       {', '.join(machine['gpus']) or 'none'}")
    netrc = Path.home() / ".netrc"
    login = "WANDB_API_KEY" in os.environ or (netrc.exists() and "wandb" in netrc.read_text(encoding="utf-8"))
    print(f"wandb     {'logged in: runs go online' if login else 'not logged in: runs are kept offline'}")
    print(f"flags     {json.dumps(machine['determinism'])}")
    checks: list[Callable[[], str]] = [_check_writing]
    if overrides:
        checks.append(partial(_check_data, Experiment(overrides)))
    status = Exit.OK
    for check in checks:
        try:
            print(check())
        except UserError as error:
            status = Exit.FAILED
            print(f"FAILED    {error}")
    return status


def _check_writing() -> str:
    folder = RunFolder(Path("runs", f".doctor-{os.getpid()}"))
    try:
        folder.probe()
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: there are runs
            folder.path.parent.rmdir()
    return f"runs      {Path('runs').absolute()} is writable, {shutil.disk_usage('.').free / 2**30:.0f} GiB free"


def _check_data(experiment: Experiment) -> str:
    data, _, _ = experiment.build()
    start = time.perf_counter()
    data.prepare_data()
    data.setup()
    train, val = data.split
    sizes = f"{len(train):,} training, {len(val):,} validation, {len(data.test_data):,} test images"
    first = f"data      {sizes}, {data.num_classes} classes, {data.image_shape} ({time.perf_counter() - start:.1f} s)"
    return "\n          ".join([first, *experiment.notes(), *data.notes()])
