"""Kill runs with SIGKILL at random points, resume them, and compare every bit with uninterrupted runs.

    python benchmarks/kill_anywhere.py [--kills 4] [--seed 0]

Each configuration of the digits demonstration (80 steps) runs once uninterrupted and once killed `--kills` times.
docs/exactness.md quotes the last line. Takes about ten minutes on two CPU cores.
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

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from runner import DIGITS, EPOCH_END, RENAME, SHORT, SUMS, TRAINING, VALIDATION, Ended, Fault, reslab, spawn, traces

DEPTH = ["--model.net.init_args.drop_path=0.2", "--model.net.init_args.shortcut=identity"]
MIX = ["--data.augment.mixup=0.4", "--data.augment.cutmix=1"]
HALF = ["--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=2"]
EMA = ["--model.ema_decay=0.9"]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
CONFIGURATIONS = {
    "no workers": [],
    "2 workers": ["--data.num_workers=2"],
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=4, help="number of kills per configuration")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random points")
    args = parser.parse_args()
    random.seed(args.seed)
    began, hit, same = time.monotonic(), Counter[str](), 0
    for name, options in CONFIGURATIONS.items():
        with tempfile.TemporaryDirectory() as top:
            whole, killed = Path(top, "whole"), Path(top, "killed")
            ends = [run(whole, options)]
            kinds = []
            for kind, fault in (draw(options) for _ in range(args.kills)):
                if run(killed, options, fault).status:
                    kinds.append(kind)
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
        f"to the uninterrupted run's in {same} of {len(CONFIGURATIONS)} configurations "
        f"({platform.machine()}, {os.cpu_count()} cores, {time.monotonic() - began:.0f} s)"
    )
    return 0 if same == len(CONFIGURATIONS) else 1


if __name__ == "__main__":
    sys.exit(main())
