"""Measure the overhead of `reslab ablate run` over a shell loop of `reslab fit`.

    python benchmarks/ablation_overhead.py [--repeats 5] [--seeds 2] [--epochs 30]

Two arms × seeds on the digits. Each repeat runs them in a loop, with `--jobs 1` and with `--jobs 2`, in turn. The
overhead is split into a fixed cost (checking every arm, the report) and a cost per cell.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
STUDY = """\
name: overhead
question: How much overhead does ablate add?
base: [{base}, {{trainer.max_epochs: {epochs}, trainer.accelerator: cpu}}]
baseline: A
margin: 0.01
arms: {{A: {{}}, none: {{model.net.init_args.shortcut: none}}}}
seeds: {seeds}
"""


def reslab(*words: str | Path) -> float:
    """Run a command and return its wall time in seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "reslab", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}")
    return time.perf_counter() - began


def loop(study: Path, out: Path, seeds: int) -> float:
    """Run the cells one after the other, with the configs that `ablate` wrote to another directory."""
    seconds = 0.0
    for seed in range(seeds):
        for arm in ("A", "none"):
            words = ["--config", out.parent / "checked" / arm / "arm.yaml", "--seed_everything", str(seed)]
            seconds += reslab("fit", *words, "--run.dir", out / arm / str(seed))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    cells = 2 * options.seeds
    times: dict[str, list[float]] = {"loop": [], "jobs 1": [], "jobs 2": [], "once": []}
    with tempfile.TemporaryDirectory() as scratch:
        study = Path(scratch, "study.yaml")
        base, seeds = REPO / "configs/experiment/digits.yaml", list(range(options.seeds))
        study.write_text(STUDY.format(base=base, epochs=options.epochs, seeds=seeds))
        reslab("ablate", "run", study, "--out", Path(scratch, "checked"))
        for repeat in range(options.repeats):
            # All cells are complete there: this only checks the arms and writes the report.
            times["once"].append(reslab("ablate", "run", study, "--out", Path(scratch, "checked")))
            times["loop"].append(loop(study, Path(scratch, f"loop{repeat}"), options.seeds))
            for jobs in (1, 2):
                out = Path(scratch, f"jobs{jobs}-{repeat}")
                times[f"jobs {jobs}"].append(reslab("ablate", "run", study, "--out", out, "--jobs", str(jobs)))
            print(f"repeat {repeat}:", *(f"{name} {t[-1]:.1f} s" for name, t in times.items()), sep="  ", flush=True)
    median = {name: statistics.median(values) for name, values in times.items()}
    each = statistics.median(
        (one - once - loop) / cells
        for one, once, loop in zip(times["jobs 1"], times["once"], times["loop"], strict=True)
    )
    print(
        f"{cells} cells of {median['loop'] / cells:.1f} s, medians of {options.repeats}: ablate costs "
        f"{median['once']:.1f} s once and {each:+.2f} s per cell, "
        f"{1 + each / (median['loop'] / cells):.3f} times a shell loop; "
        f"--jobs 2 takes {median['jobs 2'] / median['jobs 1']:.2f} times as long as --jobs 1"
    )


if __name__ == "__main__":
    main()
