"""Measure the cost of a table of 1.28 million image files: python benchmarks/file_index.py [--files N] [--folder DIR]

Creates that many file names in 1,000 class directories, in a temporary directory (choose one in memory to spare the
disk); the names of a class are hard links to one file. They are listed through ImageData as in a run, and again in a
new process, which uses the cached table. The time covers ImageData's construction, the validation split, the check that
the directory has not changed, and the fingerprint. The memory is what a worker, started after that, adds to its private
memory (Linux) while it looks up 200 batches of 256 files in random order.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from reslab.data import ImageData, ImageFolder
from reslab.data.files import Files

CLASSES = 1000


def make(top: Path, files: int) -> None:
    for part, count in (("train", files // CLASSES), ("val", 1)):
        for label in range(CLASSES):
            folder = top / part / f"n{label:08}"
            folder.mkdir(parents=True)
            first = folder / f"n{label:08}_0.JPEG"
            first.write_bytes(b"\xff")
            for i in range(1, count):
                os.link(first, f"{folder}/n{label:08}_{i}.JPEG")
    time.sleep(1.1)  # a directory modified within the last second is not cached


def unique_bytes() -> int:
    rows = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    sizes = {row[0]: int(row[1]) * 1024 for row in rows}
    return sizes["Private_Clean:"] + sizes["Private_Dirty:"]


def look_up(files: Files, queue: Any) -> None:
    rng, before = np.random.default_rng(0), unique_bytes()
    for _ in range(200):
        for index in rng.integers(0, len(files), 256):
            files.path(index)
        files.labels[rng.integers(0, len(files), 256)]
    queue.put(unique_bytes() - before)


def start(top: str) -> None:
    """Start like a run; print the seconds (wall clock, CPU) and how many bytes a forked and a spawned worker add."""
    start_time, start_cpu = time.perf_counter(), time.process_time()
    data = ImageData(ImageFolder(top), top, 256, num_workers=0, val_split=10_000)
    data.setup("fit")
    data.identity()
    seconds = time.perf_counter() - start_time, time.process_time() - start_cpu
    growth = {}
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        worker = context.Process(target=look_up, args=(data.train_data, queue))
        worker.start()
        growth[method] = queue.get()
        worker.join()
    print(json.dumps([len(data.train_data), seconds, growth]))


def run_start(top: str) -> tuple[int, tuple[float, float], dict[str, int]]:
    command = [sys.executable, __file__, "--start", top]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_281_000)
    parser.add_argument("--folder", help="where to create the files; they are removed at the end")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        return start(arguments.start)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as top:
        make(Path(top), arguments.files)
        (count, listed, _), (_, cached, growth) = run_start(top), run_start(top)
    print(
        f"table of {count:,} files: listed in {listed[0]:.1f} s, loaded from the cache in {cached[0]:.2f} s "
        f"({cached[1]:.2f} s of CPU time); "
        f"a worker adds {growth['fork'] / 1e6:.0f} MB (forked), {growth['spawn'] / 1e6:.0f} MB (spawned)"
    )


if __name__ == "__main__":
    main()
