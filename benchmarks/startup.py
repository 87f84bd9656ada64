"""Measure the time of `reslab --help`: python benchmarks/startup.py."""

import statistics
import subprocess
import sys
import time

RUNS = 5


def seconds() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "reslab", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    times = [seconds() for _ in range(RUNS)]
    median = statistics.median(times)
    print(f"reslab --help: {median:.2f} s (median of {RUNS}, {min(times):.2f} to {max(times):.2f} s)")
