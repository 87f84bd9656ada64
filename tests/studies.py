"""Synthetic studies: a study file, and run directories as finished or broken runs leave them.

As a script, writes one to look at: `python tests/studies.py DIR [ARMS [SEEDS]]`.
"""

import copy
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from reslab.ablation.cells import ARM, Cell, cells
from reslab.ablation.plan_log import append_plan
from reslab.ablation.study import Study, read_study
from reslab.files import write_text

REPO = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"python": "3.12.1", "packages": {"torch": "2.15.0"}, "cpu": "AMD EPYC", "gpus": [], "cuda": None}
ENVIRONMENT |= {"cudnn": None, "threads": 1, "world_size": 1, "determinism": {}}
DATA = {"files": "aa", "split": "bb", "classes": "cc"}
GIT = {"sha": "f00d" * 10, "dirty": False, "diff_sha256": None}
EPOCHS, IMAGES = 5, 500


def make_study(folder: Path, arms: Iterable[str] = ("identity", "plain"), seeds: int = 5, **keys: Any) -> Study:
    """Write and read a study file; the first arm is the baseline, each other arm has a higher learning rate."""
    baseline, *_ = arms
    changes = {name: {"model.optimizer.init_args.lr": 0.2 + i / 100} if i else {} for i, name in enumerate(arms)}
    text = {"name": "demo", "question": "Does it matter?", "base": [str(REPO / "configs/experiment/digits.yaml")]}
    text |= {"baseline": baseline, "seeds": list(range(seeds)), "margin": 0.002}
    text |= {} if "factors" in keys else {"arms": changes}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(text | keys, sort_keys=False))
    return read_study(path)


def run_study(study: Study, out: Path, accuracy: Mapping[str, float], spread: float = 0.002) -> None:
    """Write the plan and all cells, finished, with about the accuracy of their arm."""
    out.mkdir(parents=True, exist_ok=True)
    append_plan(study, out)
    for i, cell in enumerate(cells(study, out)):
        of_seed = np.random.default_rng(cell.seed).normal(0, spread)
        of_cell = np.random.default_rng(1000 + i).normal(0, spread / 2)
        run_cell(study, cell, float(np.clip(accuracy[cell.arm] + of_seed + of_cell, 0, 1)))


def run_cell(study: Study, cell: Cell, accuracy: float, **entries: Any) -> None:
    """Write the run directory of one cell; `entries` override those of its manifest."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    config = study.arms[cell.arm].config
    write_text(cell.folder.parent / ARM, yaml.safe_dump(config))
    write_text(cell.folder / "config.yaml", yaml.safe_dump({**config, "seed_everything": cell.seed}))
    right = round(accuracy * IMAGES)
    results = {"test/acc": right / IMAGES, "test/loss": 1 - accuracy, "val/acc": accuracy, "val/loss": 1.1 - accuracy}
    manifest = {
        **{"status": "complete", "id": f"{cell.arm}{cell.seed}", "seed": cell.seed, "rule": study.test_weights},
        "attempts": [{"how": "complete"}],
        **{"git": GIT, "environment": ENVIRONMENT, "data": DATA, "results": results},
        **{"wall_seconds": 60.0 + len(cell.arm), "samples_per_second": 900.0},
        "tested_weights": "trained weights, the last epoch",
    }
    write_text(cell.folder / "manifest.json", json.dumps(copy.deepcopy(manifest) | entries))
    _log(cell, accuracy)
    predict(cell, right)


def _log(cell: Cell, accuracy: float, rows: int = 10) -> None:
    step = np.arange(1, EPOCHS * rows + 1)
    so_far = 1 - np.exp(-6 * step / step[-1])
    noise = np.random.default_rng([cell.seed, *cell.arm.encode()]).normal(0, 0.01, len(step)) * (step < step[-1])
    frame = pd.DataFrame({"step": 10 * step, "epoch": (step - 1) // rows, "train/loss": 2.3 * (1 - 0.9 * so_far)})
    frame["val/acc"] = np.where(step % rows == 0, accuracy * so_far + noise, np.nan)
    frame.to_csv(cell.folder / "metrics.csv", index=False)


def predict(cell: Cell, right: int, images: int = IMAGES) -> None:
    """Write predictions of which `right` are correct; the seed chooses which ones are wrong."""
    label = np.arange(images) % 10
    wrong = np.random.default_rng(cell.seed).permutation(images)[right:]
    prediction = label.copy()
    prediction[wrong] = (label[wrong] + 1) % 10
    arrays = {"index": np.arange(images), "label": label, "prediction": prediction}
    np.savez(cell.folder / "predictions.npz", **arrays, confidence=np.full(images, 0.9, np.float32))


if __name__ == "__main__":
    folder, *sizes = sys.argv[1:]
    n, seeds = [*map(int, sizes), *(3, 5)[len(sizes) :]]
    study = make_study(Path(folder), [f"arm{i}" for i in range(n)], seeds)
    run_study(study, Path(folder, "out"), {name: 0.95 - 0.002 * i for i, name in enumerate(study.arms)})
