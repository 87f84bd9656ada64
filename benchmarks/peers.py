"""Compare reslab with what users would pick instead: same network, data, batch, precision and threads.

    python benchmarks/peers.py --data.root DIR [--out peers.json] [--plot docs/images/peers.svg]
    python benchmarks/peers.py --parts study                    # fork server against --fresh-processes
    python benchmarks/peers.py --read peers.json --plot FILE    # draw results again

    cifar   ResNet-20 on CIFAR-10: reslab, a plain PyTorch loop, plain Lightning (benchmarks/baselines)
    jpeg    ResNet-18 on JPEG files (DIR/imagenette-subset): reslab, torchvision's reference settings
    study   the 15 cells of configs/ablation/digits_shortcuts with --jobs 2, with and without --fresh-processes

Every measurement is a separate process; the programs take turns in every round. Each trains three epochs of --steps
batches, with --val-batches of validation after each. The clock is the same for all: stopwatch/sitecustomize.py writes
the time of every optimizer step. Images/s are those of all epochs but the first, without each epoch's first steps.
Memory is the proportional set size of the process and its workers: pages that they share count once.

Before the first round, a baseline is tried with 0 and 2 loader workers, with and without channels_last. The fastest
options are used, also by Lightning, which has the network and the loader of the plain loop.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EPOCHS = 3  # in the first, kernels are chosen and the workers start
SKIPPED = 5  # steps at the start of an epoch that images/s leave out: the loader has prefetched their batches
MEMORY_INTERVAL = 0.5  # seconds
RESULTS = {  # in the order of the table; the first PLOTTED ones are drawn
    "images_per_second": "images/s in training",
    "first_step": "first step after, s",
    "epoch": "epoch with validation, s",
    "memory": "peak memory, MB",
    "folder": "run directory, MB",
    "total": "start to exit, s",
}
PLOTTED = 4
CANDIDATES = [["--workers", str(workers), *format] for workers, format in product((2, 0), (["--channels-last"], []))]


@dataclass(frozen=True)
class Job:
    """One training task that several programs share."""

    title: str
    batch_size: int
    steps: int
    val_batches: int
    programs: Mapping[str, Callable[["Job", argparse.Namespace, Path], list[str]]]

    @property
    def limits(self) -> list[str]:
        """Options of reslab that limit a run to this job."""
        options = {"limit_train_batches": self.steps, "limit_val_batches": self.val_batches, "max_steps": -1}
        words = [f"--trainer.{name}={value}" for name, value in options.items()]
        return [*words, f"--trainer.limit_test_batches={self.val_batches}", f"--data.batch_size={self.batch_size}"]


def reslab_cifar(job: Job, opt: argparse.Namespace, run: Path) -> list[str]:
    return [*fit("cifar10_resnet20", opt, run), *job.limits]


def reslab_jpeg(job: Job, opt: argparse.Namespace, run: Path) -> list[str]:
    data = [
        "--data.dataset.init_args.folder=imagenette-subset",
        f"--data.dataset.init_args.image_size={opt.image_size}",
    ]
    scale = "--data.augment.scale=[0.08, 1.0]"  # as torchvision's
    return [*fit("imagenette_resnet18", opt, run), *job.limits, *data, scale]


def fit(experiment: str, opt: argparse.Namespace, run: Path) -> list[str]:
    options = [f"--run.dir={run}", f"--data.root={opt.root}", f"--precision={opt.precision}", f"--epochs={EPOCHS}"]
    return ["-m", "reslab", "fit", experiment, *options]


def baseline(script: str, folder: str = "") -> Callable[[Job, argparse.Namespace, Path], list[str]]:
    def command(job: Job, opt: argparse.Namespace, run: Path) -> list[str]:
        sizes = {"steps": job.steps, "val-batches": job.val_batches, "batch-size": job.batch_size}
        options = {"root": Path(opt.root, folder), "out": run, "epochs": EPOCHS, "precision": opt.precision, **sizes}
        words = [f"--{name}={value}" for name, value in options.items()]
        return [str(HERE / "baselines" / script), *words, f"--image-size={opt.image_size}"]

    return command


def jobs(opt: argparse.Namespace) -> dict[str, Job]:
    cifar = {
        "reslab": reslab_cifar,
        "plain PyTorch": baseline("pytorch_loop.py"),
        "plain Lightning": baseline("plain_lightning.py"),
    }
    jpeg = {"reslab": reslab_jpeg, "torchvision reference": baseline("torchvision_reference.py", "imagenette-subset")}
    title = f"ResNet-18 at {opt.image_size} pixels on JPEG files"
    return {
        "cifar": Job("ResNet-20 on CIFAR-10", opt.batch_size, opt.steps, opt.val_batches, cifar),
        "jpeg": Job(title, opt.jpeg_batch_size, opt.jpeg_steps, opt.jpeg_val_batches, jpeg),
    }


def measure(command: Sequence[str], job: Job, threads: int, scratch: Path) -> dict[str, float]:
    """Run a program that trains `job` in the directory `scratch`/run, and return its results."""
    stopwatch = scratch / "steps.txt"
    path = os.pathsep.join([str(HERE / "stopwatch"), os.environ.get("PYTHONPATH", "")])
    begin = time.monotonic()
    environment = {"STOPWATCH": str(stopwatch), "PYTHONPATH": path.strip(os.pathsep), "OMP_NUM_THREADS": str(threads)}
    process = start(command, scratch / "log.txt", **environment)
    with watching_memory(process.pid) as peak:
        status = process.wait()
    end = time.monotonic()
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{(scratch / 'log.txt').read_text()}")
    steps = [float(line) for line in stopwatch.read_text().split()]
    folder = sum(file.stat().st_size for file in (scratch / "run").rglob("*") if file.is_file())
    rest = {"memory": max(peak) / 2**20, "folder": folder / 2**20, "total": end - begin}
    return {**from_steps(steps, begin, job), **rest}


def from_steps(steps: Sequence[float], begin: float, job: Job) -> dict[str, float]:
    """Return what the times of all optimizer steps tell about a program that was started at `begin`."""
    if len(steps) < EPOCHS * job.steps:
        sys.exit(f"expected {EPOCHS * job.steps} optimizer steps, got {len(steps)}")
    steps = steps[-EPOCHS * job.steps :]  # reslab has tried the optimizer before, on a copy
    skipped = min(SKIPPED, job.steps - 2)
    epochs = [steps[i * job.steps + skipped : (i + 1) * job.steps] for i in range(1, EPOCHS)]
    images = job.batch_size * sum(len(epoch) - 1 for epoch in epochs)
    return {
        "images_per_second": images / sum(epoch[-1] - epoch[0] for epoch in epochs),
        "first_step": steps[0] - begin,
        "epoch": steps[-1] - steps[-1 - job.steps],  # a validation, and the training of the last epoch
    }


def start(command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )  # fmt: skip


@contextlib.contextmanager
def watching_memory(pid: int) -> Any:
    """Yield a list of the memory of a process and its descendants, in bytes, filled until the end of the block."""
    samples, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(MEMORY_INTERVAL):
            samples.append(sum(map(proportional_set_size, family(pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        done.set()
        watcher.join()


def family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return [pid, *(member for child in children for member in family(child))]


def proportional_set_size(pid: int) -> int:
    """Return the memory of a process in bytes, where a page of n processes counts 1/n; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def fastest(name: str, job: Job, opt: argparse.Namespace) -> list[str]:
    """Try a baseline with every candidate's options, and return those with the most images/s."""
    speeds = []
    for candidate in CANDIDATES:
        speeds.append(once(name, job, opt, candidate)["images_per_second"])
        print(f"{name} {' '.join(candidate)}: {speeds[-1]:,.0f} images/s", flush=True)
    return CANDIDATES[speeds.index(max(speeds))]


def once(name: str, job: Job, opt: argparse.Namespace, extra: Sequence[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        command = job.programs[name](job, opt, Path(scratch, "run"))
        return measure([*command, *extra], job, opt.threads, Path(scratch))


def compare(job: Job, opt: argparse.Namespace) -> dict[str, Any]:
    """Measure all programs of a job in interleaved rounds; the first program is reslab."""
    ours, *baselines = job.programs
    chosen = opt.baseline_options.split() if opt.baseline_options else fastest(baselines[0], job, opt)
    extra = {ours: [], **dict.fromkeys(baselines, chosen)}
    rounds = []
    for repeat in range(opt.repeats):
        rounds.append({name: once(name, job, opt, extra[name]) for name in job.programs})
        speeds = (f"{name} {row['images_per_second']:,.0f} images/s" for name, row in rounds[-1].items())
        print(f"{job.title}, round {repeat + 1}:", *speeds, sep="  ", flush=True)
    return {
        "title": f"{job.title}, batch {job.batch_size}, {opt.precision}, OMP_NUM_THREADS={opt.threads}",
        "epoch": f"{job.steps} training and {job.val_batches} validation batches",
        "options": {name: " ".join(words) for name, words in extra.items()},
        "rounds": rounds,
    }


def study(opt: argparse.Namespace) -> dict[str, Any]:
    """Time a study of short runs, from start to exit, in both ways."""
    modes: dict[str, list[str]] = {"fork server": [], "--fresh-processes": ["--fresh-processes"]}
    rounds = []
    for repeat in range(opt.study_repeats):
        rounds.append({mode: {"total": study_seconds(words)} for mode, words in modes.items()})
        seconds = (f"{mode} {row['total']:.1f} s" for mode, row in rounds[-1].items())
        print(f"study, round {repeat + 1}:", *seconds, sep="  ", flush=True)
    title = "configs/ablation/digits_shortcuts, 15 cells, --jobs 2"
    return {"title": title, "epoch": "", "options": dict.fromkeys(modes, ""), "rounds": rounds}


def study_seconds(words: Sequence[str]) -> float:
    configs = HERE.parent / "configs"
    text = (configs / "ablation/digits_shortcuts.yaml").read_text()
    # All seeds without a look, which could end the study after three of them.
    text = text.replace("looks: [3, 5]", "seeds: [0, 1, 2, 3, 4]").replace("../experiment", f"{configs}/experiment")
    with tempfile.TemporaryDirectory() as scratch:
        file, out, log = (Path(scratch, name) for name in ("study.yaml", "study", "log.txt"))
        file.write_text(text)
        command = ["-m", "reslab", "ablate", "run", str(file), "--jobs", "2", "--out", str(out), *words]
        begin = time.monotonic()
        status = start(command, log).wait()
        seconds = time.monotonic() - begin
        if status or len(list(out.glob("*/seed-*/report.html"))) != 15:
            sys.exit(f"{' '.join(command)} failed:\n{log.read_text()}")
        return seconds


def median(rounds: Iterable[Mapping[str, Any]], program: str, result: str) -> float:
    return statistics.median(row[program][result] for row in rounds)


def ratio(rounds: Iterable[Mapping[str, Any]], program: str, result: str) -> float:
    """Return the median over rounds of a program's result divided by that of the first program."""
    return statistics.median(row[program][result] / next(iter(row.values()))[result] for row in rounds)


def table(part: Mapping[str, Any]) -> str:
    rounds, programs = part["rounds"], list(part["options"])
    lines = [part["title"], *([f"one epoch: {part['epoch']}"] if part["epoch"] else [])]
    lines += [f"{name}: {words}" for name, words in part["options"].items() if words]
    lines.append(f"{'median of ' + str(len(rounds)):<30}" + "".join(f"{name:>24}" for name in programs))
    for result in (name for name in RESULTS if name in rounds[0][programs[0]]):
        cells = [f"{median(rounds, name, result):,.1f}" for name in programs]
        for i, name in enumerate(programs[1:], 1):
            cells[i] += f" ({ratio(rounds, name, result):.2f}×)"
        lines.append(f"{RESULTS[result]:<30}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join([*lines, f"(×): median over the rounds of the ratio to {programs[0]}"])


def plot(results: Mapping[str, Any], file: Path) -> None:
    """Draw the medians of the training jobs, with the range over rounds, one panel per result."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = list(RESULTS)[:PLOTTED]
    parts = [part for name, part in results["parts"].items() if name != "study"]
    figure, axes = plt.subplots(len(parts), len(shown), figsize=(11, 1.9 * len(parts)), squeeze=False)
    for part, row in zip(parts, axes, strict=True):
        for result, axis in zip(shown, row, strict=True):
            draw(part, result, axis)
        row[0].set_yticks(range(len(part["options"])), list(part["options"]), fontsize=8)
        row[0].set_title(f"{part['title']}\n{RESULTS[shown[0]]}", fontsize=8, loc="left")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def draw(part: Mapping[str, Any], result: str, axis: Any) -> None:
    programs, rounds = list(part["options"]), part["rounds"]
    for place, name in enumerate(programs):
        values = sorted(row[name][result] for row in rounds)
        middle = statistics.median(values)
        axis.barh(place, middle, color="#f28e6b" if place == 0 else "#c5cdd6", height=0.6)
        axis.plot([values[0], values[-1]], [place, place], color="black", linewidth=1)
        axis.text(
            0.02 * axis.get_xlim()[1],
            place,
            f"{middle:,.0f}" if middle >= 10 else f"{middle:.1f}",
            va="center",
            fontsize=8,
        )
    axis.invert_yaxis()
    axis.set_yticks([])
    axis.set_title(RESULTS[result], fontsize=8, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=7)


def machine(threads: int) -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "torchvision", "lightning")}
    return {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "threads": threads, **packages}


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=["cifar", "jpeg", "study"], default=["cifar", "jpeg"])
    add("--data.root", dest="root", default=os.environ.get("RESLAB_DATA", "data"))
    add("--repeats", type=int, default=5, help="rounds (default: 5)")
    add("--study-repeats", type=int, default=3, help="rounds of the study (default: 3)")
    add("--threads", type=int, default=cores, help="OMP_NUM_THREADS of every program (default: CPU cores)")
    add("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    add("--baseline-options", help="options of the baselines, instead of trying: '--workers 2 --channels-last'")
    add("--batch-size", type=int, default=128)
    add("--steps", type=int, default=25, help="training batches per epoch (default: 25)")
    add("--val-batches", type=int, default=4, help="validation batches per epoch (default: 4)")
    add("--image-size", type=int, default=128, help="jpeg: pixels (default: 128)")
    add("--jpeg-batch-size", type=int, default=32)  # torchvision's default
    add("--jpeg-steps", type=int, default=15)
    add("--jpeg-val-batches", type=int, default=4)
    add("--out", type=Path, metavar="FILE", help="write the results as JSON")
    add("--read", type=Path, metavar="FILE", help="read the results from a file of --out; measure nothing")
    add("--plot", type=Path, metavar="FILE", help="draw the results as SVG or PNG")
    return parser.parse_args(argv)


def measure_all(opt: argparse.Namespace) -> dict[str, Any]:
    known = jobs(opt)
    parts = {name: compare(known[name], opt) if name in known else study(opt) for name in opt.parts}
    return {"machine": machine(opt.threads), "parts": parts}


def main(argv: Sequence[str] | None = None) -> None:
    opt = parse(argv)
    results = json.loads(opt.read.read_text()) if opt.read else measure_all(opt)
    print("", ", ".join(f"{name} {value}" for name, value in results["machine"].items()), sep="\n")
    for part in results["parts"].values():
        print("", table(part), sep="\n")
    if opt.out:
        opt.out.write_text(json.dumps(results, indent=1) + "\n")
    if opt.plot:
        plot(results, opt.plot)


if __name__ == "__main__":
    main()
