"""Replacement of `reslab fit` for tests of scheduling: writes a run directory in milliseconds, without torch.

$FAKE is a JSON object with a list of outcomes per cell name, one per try; the last one is repeated.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def main() -> int:
    words = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    folder = Path(words["--run.dir"])
    tries = folder / "tries"
    tries.write_text(f"{tries.read_text() if tries.exists() else ''}{os.environ.get('OMP_NUM_THREADS')}\n")
    acts = json.loads(os.environ.get("FAKE", "{}")).get("/".join(folder.parts[-2:]), ["complete"])
    act = acts[min(len(tries.read_text().split()), len(acts)) - 1]
    config = yaml.safe_load(Path(words["--config"]).read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write(folder, "running", words)
    print(f"this cell is told to: {act}", flush=True)
    if act == "wait":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(write(folder, "preempted", words) or 75))
        time.sleep(60)
    if act == "usage":
        (folder / "manifest.json").unlink()
        print("reslab: data: no such folder", file=sys.stderr)
        return 2
    if act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, act, words)
    return 0 if act == "complete" else 1


def write(folder: Path, status: str, words: dict[str, str]) -> None:
    seed = int(words["--seed_everything"])
    results = {"test/acc": 0.9 + seed / 100 + (len(folder.parent.name) % 7) / 50}
    manifest = {
        "status": status,
        "seed": seed,
        "attempts": [{"how": status if status == "complete" else f"{status}: as told"}],
        "results": results if status == "complete" else {},
        "wall_seconds": 0.1,
        "environment": {"gpus": [], "threads": int(os.environ["OMP_NUM_THREADS"])},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


if __name__ == "__main__":
    sys.exit(main())
