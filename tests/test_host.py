"""What the machine is asked for: memory that a training step on a CPU reuses."""

import ctypes
import functools
import subprocess
import sys
import types

import pytest

from reslab import config as config_module
from reslab import host
from reslab.config import Experiment
from runner import DIGITS

linux = pytest.mark.skipif(sys.platform != "linux", reason="the setting exists in glibc only")
PAGE_FAULTS = """
def faults_of_new_tensors():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults_of_new_tensors()
print(faults_of_new_tensors())
"""
GROWTH_OF_FORK = """
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
torch.ones(2**27)  # 512 MiB, freed at once
if os.fork() == 0:
    print(resident() - before, flush=True)
    os._exit(0)
os.wait()
"""


@functools.cache
def result(code: str, setting: str = "keep_freed_memory()") -> int:
    code = f"import os, resource, torch\nfrom reslab.host import keep_freed_memory\n{setting}\n{code}"
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@linux
def test_freed_memory_is_reused_without_page_faults() -> None:
    assert result(PAGE_FAULTS) < result(PAGE_FAULTS, "") / 10


@linux
def test_loader_workers_do_not_hold_on_to_freed_memory() -> None:
    assert result(GROWTH_OF_FORK) < 2**26


@linux
def test_limited_address_space_is_no_error() -> None:
    limit = "resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)); keep_freed_memory(2**40)"
    assert result(PAGE_FAULTS, limit) < result(PAGE_FAULTS, "") / 10


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_nothing_happens_without_glibc(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(), raising=platform == "linux")
    host.keep_freed_memory.__wrapped__()


@pytest.mark.parametrize(("accelerator", "times"), [("cpu", 1), ("auto", 1), ("cuda", 0)])
def test_training_on_a_cpu_keeps_freed_memory(accelerator: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(config_module, "keep_freed_memory", lambda: calls.append(None))
    monkeypatch.setattr(config_module.CUDAAccelerator, "is_available", staticmethod(lambda: accelerator == "cuda"))
    Experiment([*DIGITS, f"--trainer.accelerator={accelerator}"]).build()
    assert len(calls) == times
