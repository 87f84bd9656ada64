"""Imported by the fork server before it starts cells: protection from signals, and all that a training imports.

Ctrl-C and SIGTERM reach the process group or the Slurm step. The cells get them from `ablate run`, and write a
checkpoint; the server must outlive them.
"""

import os
import signal

from reslab.host import STOP_SIGNALS, quick_imports


def preload() -> None:
    os.setsid()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with quick_imports():
        import reslab.experiment
        import reslab.runs.figures
        import reslab.runs.report  # noqa: F401


preload()
