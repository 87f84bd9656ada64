"""Kill runs with SIGKILL at random points, resume them, and compare every bit with uninterrupted runs.

    python benchmarks/kill_anywhere.py [--kills 4] [--seed 0]

Each configuration of the digits demonstration (80 steps) runs once uninterrupted and once killed `--kills` times.
In one of them the digits are image files, and some of them are removed or moved between two kills: the run must refuse
to resume, and resume once they are restored. docs/exactness.md quotes the last line.
Takes about ten minutes on two CPU cores.
"""

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from runner import DIGITS, EPOCH_END, RENAME, SHORT, SUMS, TRAINING, VALIDATION, Ended, Fault, reslab, spawn, traces

DEPTH = ["--model.net.init_args.drop_path=0.2", "--model.net.init_args.shortcut=identity"]
MIX = ["--data.augment.mixup=0.4", "--data.augment.cutmix=1"]
HALF = ["--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=2"]
EMA = ["--model.ema_decay=0.9"]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
FILES = [
    "--data.dataset.class_path=ImageFolder", "--data.dataset.init_args.folder=.", "--data.dataset.mean=[0.3]",
    "--data.dataset.std=[0.4]", "--data.dataset.image_size=8", "--data.num_workers=2",
]  # fmt: skip
CONFIGURATIONS = {
    "no workers": [],
    "image files, 2 workers, other data between kills": FILES,
    "EMA, stochastic depth": [*EMA, *DEPTH],
    "mixup and CutMix": MIX,
    "bf16, accumulation": HALF,
    "all of these": [*EMA, *DEPTH, *MIX, *HALF, "--data.num_workers=2"],
    "2 processes (gloo)": [*TWO, *EMA],
}


def draw(options: list[str]) -> tuple[str, Fault]:
    """Choose a random point within about one epoch: its kind, and the fault to inject there."""
    rank = random.randrange(2 if TWO[0] in options else 1)
    points = {
        "in a step": Fault(TRAINING, call=random.randint(1, 20), rank=rank),
        "at any moment": Fault(TRAINING, "die_soon", random.randint(1, 20), rank),
        "in validation": Fault(VALIDATION, call=random.randint(1, 3), rank=rank),
        "at the end of an epoch": Fault(EPOCH_END, rank=rank),
        "while writing a checkpoint": Fault(SUMS, "halve_and_die", random.randrange(1, 10, 2)),
        "between renames": Fault(RENAME, call=random.randint(4, 30)),
    }
    return random.choice(list(points.items()))


def run(folder: Path, options: list[str], fault: Fault | None = None) -> Ended:
    start = spawn if TWO[0] in options else reslab
    return start("fit", *DIGITS, *SHORT, "--trainer.max_epochs=4", "--run.dir", folder, *options, fault=fault)


def draw_digits(top: Path) -> None:
    """Write the digits as image files in class directories."""
    pixels, labels = load_digits(return_X_y=True)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        file = top / ("val" if i % 5 == 0 else "train") / str(label) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8").reshape(8, 8)).save(file)


def change_data(root: Path) -> list[tuple[Path, Path]]:
    """Remove two training images and move one to another class; return the moves, to be undone."""
    first, second, third = random.sample(sorted((root / "train/3").iterdir()), 3)
    moves = [(first, root / "removed-1"), (second, root / "removed-2"), (third, root / "train/4" / third.name)]
    for source, target in moves:
        source.rename(target)
    return moves


def refuses_other_data(folder: Path, options: list[str], root: Path) -> bool:
    """Try to resume on other data, and restore them; return whether that was refused with nothing changed."""
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
    moves = change_data(root)
    ended = run(folder, options)
    for source, target in moves:
        target.rename(source)
    after = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
    return ended.status == 2 and "1 training image in another class" in ended.output and before == after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=4, help="number of kills per configuration")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random points")
    args = parser.parse_args()
    random.seed(args.seed)
    began, hit, same, refused = time.monotonic(), Counter[str](), 0, []
    for name, options in CONFIGURATIONS.items():
        with tempfile.TemporaryDirectory() as top:
            whole, killed, root = Path(top, "whole"), Path(top, "killed"), Path(top, "digits")
            if options is FILES:
                draw_digits(root)
                options = [*FILES, f"--data.root={root}"]
            ends = [run(whole, options)]
            kinds = []
            for kind, fault in (draw(options) for _ in range(args.kills)):
                if run(killed, options, fault).status:
                    kinds.append(kind)
                if root.exists() and any(killed.glob("checkpoints/last.ckpt")):
                    refused.append(refuses_other_data(killed, options, root))
            ends.append(run(killed, options))
            failures = [end.output for end in ends if end.status]
            left, right = ({}, {"all": "not finished"}) if failures else (traces(whole), traces(killed))
            different = [name for name in right if left.get(name) != right[name]]
        hit.update(kinds)
        same += not different
        print(f"{name}: killed {', '.join(kinds)}; different: {different or 'nothing'}", *failures, flush=True)
    kinds_hit = ", ".join(f"{count} {kind}" for kind, count in sorted(hit.items()))
    print(
        f"kill_anywhere: {hit.total()} random SIGKILLs ({kinds_hit}); weights, metrics and best checkpoint identical "
        f"to the uninterrupted run's in {same} of {len(CONFIGURATIONS)} configurations; "
        f"{sum(refused)} of {len(refused)} attempts on other data refused with nothing changed "
        f"({platform.machine()}, {os.cpu_count()} cores, {time.monotonic() - began:.0f} s)"
    )
    return 0 if same == len(CONFIGURATIONS) and refused and all(refused) else 1


if __name__ == "__main__":
    sys.exit(main())
