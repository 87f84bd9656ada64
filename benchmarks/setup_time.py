"""Time from a fresh clone to the demo's report, and the longest time without output.

    python benchmarks/setup_time.py            # empty caches: everything is downloaded
    python benchmarks/setup_time.py --warm     # a second time, with the caches of the first

`make demo` is compared with pip: `pip install '.[dev,notebooks]'`, then the same demo. Both write to a pipe. Requires
about 20 GB of free space in --dir and prints one line per measurement.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = {
    "make": ["make demo"],
    "pip": [
        "python3 -m venv .venv",
        ".venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,notebooks]'",
        ".venv/bin/reslab fit --config configs/experiment/digits.yaml",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--warm", action="store_true", help="also measure a second time, with filled caches")
    parser.add_argument("--dir", type=Path, help="directory of clones and caches (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for caches in ["empty", "filled"] if args.warm else ["empty"]:
            seconds = {way: measure(way, Path(folder), caches) for way in args.ways}
            if len(seconds) == 2:
                print(f"{caches} caches: make / pip = {seconds['make'] / seconds['pip']:.2f}", flush=True)


def measure(way: str, folder: Path, caches: str) -> float:
    """Clone the repository, run a way to the report, print and return the seconds it took."""
    clone = folder / "clone"
    repository = Path(__file__).resolve().parent.parent
    subprocess.run(["git", "clone", "--quiet", str(repository), str(clone)], check=True)
    env = {**os.environ, "UV_CACHE_DIR": str(folder / "uv"), "PIP_CACHE_DIR": str(folder / "pip")}
    env.pop("PYTHONPATH", None)
    begin = time.monotonic()
    silences = [silence for command in WAYS[way] for silence in output_gaps(command, clone, env)]
    seconds = time.monotonic() - begin
    reports = list(clone.glob("runs/*/*/report.html"))
    if not reports:
        sys.exit(f"{way}: no report was written")
    print(f"{caches} caches, {way}: {seconds:.0f} s to the report, longest silence {max(silences):.0f} s", flush=True)
    shutil.rmtree(clone)
    return seconds


def output_gaps(command: str, clone: Path, env: dict[str, str]) -> list[float]:
    """Run a command and return the times between its outputs, including its start and end."""
    times = [time.monotonic()]
    with subprocess.Popen(
        ["bash", "-c", command], cwd=clone, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout
        while chunk := os.read(process.stdout.fileno(), 65536):
            times.append(time.monotonic())
            sys.stderr.buffer.write(chunk)
    if process.returncode:
        sys.exit(f"{command}: exit status {process.returncode}")
    times.append(time.monotonic())
    return [late - early for early, late in itertools.pairwise(times)]


if __name__ == "__main__":
    main()
