"""What a table of 1.28 million image files costs: python benchmarks/file_index.py [--files N] [--folder DIR]

Makes a folder of 1,000 classes with that many names (by default in a temporary folder; give one in memory to spare the
disk), those of a class being links to one file. It is listed through ImageData as a run does, and again in a fresh
process, which finds the table kept. The time is from ImageData's construction to its fingerprint: training and
validation split, and the check that the folder has not changed. A worker's growth is what a loader process, started
after that, adds to its private memory (Linux) while it looks up 200 batches of 256 files in random order.
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
    time.sleep(1.1)  # a folder that changed within the last second is not trusted to stay


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
    """As a run starts: prints seconds (clock, CPU), and a worker's growth in bytes, forked and spawned."""
    began, worked = time.perf_counter(), time.process_time()
    data = ImageData(ImageFolder(top), top, 256, num_workers=0, val_split=10_000)
    data.setup("fit")
    data.fingerprint()
    took = time.perf_counter() - began, time.process_time() - worked
    growth = {}
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        worker = context.Process(target=look_up, args=(data.train_data, queue))
        worker.start()
        growth[method] = queue.get()
        worker.join()
    print(json.dumps([len(data.train_data), took, growth]))


def started(top: str) -> tuple[int, tuple[float, float], dict[str, int]]:
    command = [sys.executable, __file__, "--start", top]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_281_000)
    parser.add_argument("--folder", help="for the generated files; removed at the end")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        return start(arguments.start)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as top:
        make(Path(top), arguments.files)
        (count, listed, _), (_, kept, growth) = started(top), started(top)
    print(
        f"table of {count:,} files: listed in {listed[0]:.1f} s, from the table kept {kept[0]:.2f} s "
        f"({kept[1]:.2f} s of CPU time); "
        f"a loader process grows by {growth['fork'] / 1e6:.0f} MB (forked), {growth['spawn'] / 1e6:.0f} MB (spawned)"
    )


if __name__ == "__main__":
    main()
