"""Facts about the installation and the machine that several rooms need, and lazy imports."""

import atexit
import contextlib
import functools
import gc
import importlib
import mmap
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Modules whose classes a config may name without their module.
NAMESPACES = (
    "reslab.models", "reslab.data", "reslab.training", "torch.optim", "torchvision.transforms.v2",
    "lightning.pytorch.callbacks", "lightning.pytorch.loggers",
)  # fmt: skip
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of mallopt in glibc's malloc.h
# Signals that ask a run to stop: it writes a checkpoint and exits with Exit.PREEMPTED.
STOP_SIGNALS = tuple(getattr(signal, f"SIG{n}") for n in ("TERM", "INT", "USR1", "USR2") if hasattr(signal, f"SIG{n}"))


def available_cores() -> int:
    """Return the number of CPU cores this process may use: fewer than the machine has under Slurm or taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bf16_is_fast(cpuinfo: str) -> bool:
    """Return whether a CPU trains faster in bf16 than in fp32, given the text of Linux's /proc/cpuinfo.

    It does with AMX, and on AMD's Zen 4 and 5 (1.6 times as fast: ResNet-20, channels_last). Intel's avx512_bf16
    without AMX is slower than fp32 (0.75 times), and so is a CPU without bf16 instructions (0.35 times).
    """
    flags = set(re.findall(r"\w+", "".join(re.findall(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)[:1])))
    return "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in cpuinfo)


def cpu_bf16_is_fast() -> bool:
    """Return `bf16_is_fast` of this machine; False where there is no /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    return info.exists() and bf16_is_fast(info.read_text(encoding="utf-8", errors="replace"))


@functools.cache
def keep_freed_memory(reserve: int = 2**31) -> None:
    """Let glibc keep the memory of freed tensors for later ones, and use huge pages for it.

    By default glibc returns large blocks to the kernel, so each training step on a CPU gets most of its activations as
    new pages: one fault and 4 KiB of zeros at a time. Elsewhere than on Linux with glibc, nothing happens.

    Args:
        reserve: Bytes of address space that huge pages may fill. They take memory only once they are used.
    """
    import ctypes  # here: `reslab --help` does without

    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl
        return
    libc.mallopt(_M_MMAP_MAX, 0)  # all blocks come from the heap,
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # which does not shrink by itself
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.free.argtypes = [ctypes.c_void_p]

    def use_huge_pages() -> None:
        if block := libc.malloc(reserve):  # None if the address space is limited
            start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
            libc.madvise(start, block + reserve - start, mmap.MADV_HUGEPAGE)  # a kernel without them refuses: no harm
            libc.free(block)

    use_huge_pages()
    # Forked loader workers would hold on to copies of the freed pages.
    os.register_at_fork(before=lambda: libc.malloc_trim(0), after_in_parent=use_huge_pages)


@contextlib.contextmanager
def handling_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle STOP_SIGNALS with `handler`, and restore the handlers before. In a thread, Python does not allow it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import without garbage collection, which would visit the million objects of torch and Lightning again and again.

    Later collections do not visit them either.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # else nanobind reports its own objects as leaks
        if was_enabled:
            gc.enable()


def lazy_exports(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return a package's `__getattr__` (PEP 562): it imports a name from its module when the name is first used."""
    homes = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return get
