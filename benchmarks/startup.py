"""Measure how fast reslab starts, against the import of Lightning: python benchmarks/startup.py [--runs 7].

Times of processes from start to exit: help, mistakes that `reslab fit` reports, and a run of one epoch. The processes
alternate, so that all see the same load of the machine. Exit with 1 if a ratio is above its limit.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

REFERENCE = "import lightning.pytorch"
COMMANDS = {  # with the limit of the ratio
    REFERENCE: (["-c", REFERENCE], 1),
    "reslab --help": (["-m", "reslab", "--help"], 0.35),
    "unknown key": (["-m", "reslab", "fit", "digits", "--trainer.max_epoch", "3"], 0.35),
    "unknown experiment": (["-m", "reslab", "fit", "digit"], 0.35),
    "wrong value": (["-m", "reslab", "fit", "digits", "--data.batch_size", "0"], 0.35),
    "fit digits --epochs 1": (["-m", "reslab", "fit", "digits", "--epochs", "1"], 1.2),
}


def seconds(command: list[str]) -> float:
    with tempfile.TemporaryDirectory() as scratch:  # for the run directory
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=scratch, capture_output=True, check=False)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="runs of each command (default: 7)")
    runs = parser.parse_args().runs
    rows = [{name: seconds(command) for name, (command, _) in COMMANDS.items()} for _ in range(runs)]
    medians = {name: statistics.median(row[name] for row in rows) for name in COMMANDS}
    ratios = {name: statistics.median(row[name] / row[REFERENCE] for row in rows) for name in COMMANDS}
    for name, (_, limit) in COMMANDS.items():
        print(f"{name:<26}{medians[name]:6.2f} s  {ratios[name]:5.2f} × (limit {limit}; median of {runs})")
    sys.exit(any(ratios[name] > limit for name, (_, limit) in COMMANDS.items()))


if __name__ == "__main__":
    main()
