"""Write the time of every optimizer step to the file $STOPWATCH, in any program that trains with torch.

Python imports this file at start if its directory is in PYTHONPATH. It waits until torch.optim is imported, so that
the program's own imports stay as they are. Times are those of time.monotonic(), which all processes share on Linux.
"""

import importlib.util
import os
import sys
import time
from importlib.machinery import ModuleSpec
from typing import Any

MODULE = "torch.optim.optimizer"


class AfterImport:
    """A finder that hooks into the optimizers once their module has been imported."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(AfterImport)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec and spec.loader
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.register_optimizer_step_post_hook(write_time)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def write_time(*args: Any) -> None:
    os.write(file, f"{time.monotonic():.6f}\n".encode())


if "STOPWATCH" in os.environ:
    file = os.open(os.environ["STOPWATCH"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.meta_path.insert(0, AfterImport)  # type: ignore[arg-type]
