"""Facts about the installation and the machine that several rooms need: config folder, signals, cores."""

import os
import signal
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Signals that ask a run to stop: it writes a checkpoint and exits with Exit.PREEMPTED.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def available_cores() -> int:
    """Return the number of CPU cores this process may use: fewer than the machine has under Slurm or taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
