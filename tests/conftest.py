"""Fixtures shared by all tests: real data, small image folders, and a finished short run."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

# One thread per process, also in processes started by tests: pytest-xdist's workers share the cores, and OpenMP
# threads that wait for each other on a shared core are many times slower than a single one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline: a slow machine is not a failure. On CI the examples are the same in every run.
settings.register_profile("reslab", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("reslab")

# Started in the background, as by `nohup make test &`, this process ignores SIGINT, and so would the runs it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with cifar-10-batches-py, imagenette-subset and imagenet-samples: real data, not committed."""
    directory = os.environ.get("RESLAB_DATA")
    if directory and (Path(directory) / "cifar-10-batches-py").is_dir():
        return Path(directory)
    unpack = REPO.parent / "shared" / "data" / "unpack.py"
    if not unpack.exists():
        pytest.skip("real image data found neither in $RESLAB_DATA nor beside the repository")
    target = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "reslab-test-data"
    target.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock

    with FileLock(target / "unpack.lock"):  # of pytest-xdist's workers, one unpacks and the others wait
        subprocess.run([sys.executable, str(unpack), str(target)], check=True, capture_output=True)
    return target


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{train,val}/{cat,dog} with six noise images each, of several sizes."""
    import numpy as np
    from PIL import Image

    top, rng = tmp_path_factory.mktemp("pets"), np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (top / part / name).mkdir(parents=True)
            for i in range(6):
                noise = rng.integers(0, 256, (50 + i, 40, 3), dtype=np.uint8)
                Image.fromarray(noise).save(top / part / name / f"{i}.jpg")
    return top


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains the short run with some options, uninterrupted, once per session."""
    from runner import fit

    @cache
    def run(*options: str) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        ended = fit(folder, *options)
        assert ended.status == 0, ended.output
        return folder

    return run
