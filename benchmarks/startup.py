"""Measure how fast `reslab fit` reports a mistake, against the import of Lightning: python benchmarks/startup.py.

The processes alternate, so that both see the same load of the machine. The ratio must be at most 0.35.
"""

import statistics
import subprocess
import sys
import time

RUNS = 7
LIMIT = 0.35
COMMANDS = {
    "import lightning.pytorch": ["-c", "import lightning.pytorch"],
    "reslab --help": ["-m", "reslab", "--help"],
    "unknown key": ["-m", "reslab", "fit", "digits", "--trainer.max_epoch", "3"],
    "unknown experiment": ["-m", "reslab", "fit", "digit"],
    "wrong value": ["-m", "reslab", "fit", "digits", "--data.batch_size", "0"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    rows = [{name: seconds(command) for name, command in COMMANDS.items()} for _ in range(RUNS)]
    medians = {name: statistics.median(row[name] for row in rows) for name in COMMANDS}
    reference = medians["import lightning.pytorch"]
    for name, median in medians.items():
        print(f"{name:<26}{median:6.2f} s  {median / reference:5.2f} × (median of {RUNS})")
    slowest = max(median for name, median in medians.items() if name != "import lightning.pytorch")
    sys.exit(slowest > LIMIT * reference)
