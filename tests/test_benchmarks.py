"""The benchmark scripts run, and compute what they print."""

import importlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from test_docs import imitate_cifar

REPO = Path(__file__).resolve().parents[1]
FOLDER = REPO / "benchmarks"


@pytest.fixture(autouse=True)
def import_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("", "baselines"):
        monkeypatch.syspath_prepend(FOLDER / folder)


@pytest.fixture
def peers() -> ModuleType:
    return importlib.import_module("peers")


@pytest.fixture(scope="module")
def imitation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("data")
    (top / "cifar-10-batches-py").mkdir()
    imitate_cifar(top / "cifar-10-batches-py")
    names = [f"class {i}" for i in range(10)]
    (top / "cifar-10-batches-py/batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return top


@pytest.fixture
def cifar(imitation: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    return imitation


@pytest.fixture
def steps() -> Iterator[list[Any]]:
    """One entry per optimizer step."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    taken: list[Any] = []
    hook = register_optimizer_step_post_hook(lambda *args: taken.append(args))
    yield taken
    hook.remove()


@pytest.mark.parametrize(
    ("script", "checkpoint"),
    [("pytorch_loop", "ckpt.pth"), ("plain_lightning", "last.ckpt"), ("torchvision_reference", "model_1.pth")],
)  # fmt: skip
def test_baseline_takes_the_given_number_of_steps(
    script: str, checkpoint: str, cifar: Path, pets: Path, tmp_path: Path, steps: list[Any]
) -> None:
    root = pets if script == "torchvision_reference" else cifar
    options = {"root": root, "out": tmp_path / "run", "epochs": 2, "steps": 3, "val-batches": 1, "batch-size": 4}
    words = [f"--{name}={value}" for name, value in options.items()]
    importlib.import_module(script).main([*words, "--workers=0", "--image-size=32", "--channels-last"])
    assert len(steps) == 6
    assert len(list((tmp_path / "run").rglob(checkpoint))) == 1


def test_stopwatch_writes_the_time_of_every_step_of_any_program(tmp_path: Path) -> None:
    (tmp_path / "torch/optim").mkdir(parents=True)  # an imitation: torch takes seconds to import
    for package in ("torch", "torch/optim"):
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "torch/optim/optimizer.py").write_text(
        "hooks = []\nregister_optimizer_step_post_hook = hooks.append\n"
        "def step():\n    for hook in hooks: hook('optimizer', (), {})\n"
    )
    code = "import sys, torch.optim.optimizer as o; o.step(); o.step(); o.step()"
    path = os.pathsep.join([str(FOLDER / "stopwatch"), str(tmp_path)])
    environment = {"PYTHONPATH": path, "STOPWATCH": str(tmp_path / "steps.txt")}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True)
    times = [float(line) for line in (tmp_path / "steps.txt").read_text().split()]
    assert len(times) == 3 and times == sorted(times)


def job(peers: ModuleType, **values: Any) -> Any:
    return peers.Job(**{"title": "a job", "batch_size": 10, "steps": 8, "val_batches": 1, "programs": {}, **values})


def test_results_follow_from_the_times_of_the_steps(peers: ModuleType) -> None:
    def epoch(begin: float, seconds: float) -> list[float]:
        return [begin + i * seconds for i in range(8)]

    times = [3, *epoch(5, 9), *epoch(100, 0.5), *epoch(200, 1)]  # the first step was a trial
    results = peers.from_steps(times, begin=2.0, job=job(peers))
    assert results["first_step"] == 3
    assert results["images_per_second"] == 10 * 4 / (2 * 0.5 + 2 * 1)  # the last two intervals of the last two epochs
    assert results["epoch"] == 207 - 103.5


@pytest.mark.parametrize("steps", [0, 23])
def test_program_with_too_few_steps_is_an_error(peers: ModuleType, steps: int) -> None:
    with pytest.raises(SystemExit, match=f"expected 24 optimizer steps, got {steps}"):
        peers.from_steps([1.0] * steps, 0, job(peers))


PROGRAM = """
import os, pathlib, sys, time
run = pathlib.Path(sys.argv[1])
block = os.urandom(50 * 2**20)  # shared with the child
if os.fork() == 0:
    more = os.urandom(30 * 2**20)
    time.sleep(2)
    os._exit(0)
(run / "checkpoints").mkdir(parents=True)
(run / "checkpoints/last.ckpt").write_bytes(bytes(2**20))
pathlib.Path(os.environ["STOPWATCH"]).write_text("".join(f"{i}\\n" for i in range(int(os.environ["OMP_NUM_THREADS"]))))
os.wait()
"""


def test_memory_and_run_directory_of_a_program_are_measured(peers: ModuleType, tmp_path: Path) -> None:
    results = peers.measure(["-c", PROGRAM, str(tmp_path / "run")], job(peers), 24, tmp_path)
    assert 80 < results["memory"] < 125  # a sum of resident sizes would count the shared block twice
    assert results["folder"] == 1
    assert results["total"] > 2


def test_failure_of_a_program_shows_its_output(peers: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such data"):
        peers.measure(["-c", "raise SystemExit('no such data')"], job(peers), 1, tmp_path)


def test_fastest_options_of_a_baseline_are_used(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"--workers 0": 300.0}
    calls: list[tuple[str, str]] = []

    def once(name: str, job: Any, opt: Any, extra: list[str]) -> dict[str, float]:
        calls.append((name, " ".join(extra)))
        return {"images_per_second": speeds.get(" ".join(extra), 200.0)}

    monkeypatch.setattr(peers, "once", once)
    part = peers.compare(job(peers, programs={"reslab": None, "loop": None}), peers.parse(["--repeats", "3"]))
    assert part["options"] == {"reslab": "", "loop": "--workers 0"}
    assert calls[-4:] == [("reslab", ""), ("loop", "--workers 0")] * 2  # interleaved
    assert len(part["rounds"]) == 3


def test_table_and_plot_show_medians_and_ratios(peers: ModuleType, tmp_path: Path) -> None:
    def row(value: float) -> dict[str, float]:
        return dict.fromkeys(peers.RESULTS, value)

    rounds = [{"reslab": row(ours), "loop": row(theirs)} for ours, theirs in ((10, 20), (20, 60), (40, 100))]
    part = {"title": "a job", "epoch": "8 batches", "options": {"reslab": "", "loop": "--workers 2"}, "rounds": rounds}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"machine": {"cores": 2}, "parts": {"cifar": part}}))
    assert re.search(r"peak memory, MB +20\.0 +60\.0 \(2\.50×\)", peers.table(part))
    peers.main(["--read", str(file), "--plot", str(tmp_path / "images/peers.svg")])
    assert (tmp_path / "images/peers.svg").stat().st_size < 150_000


def test_loop_overhead_runs(cifar: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data.root", str(cifar), "--data.batch_size=4", "--data.val_split=0.1", "--trainer.accelerator=cpu"]
    monkeypatch.setattr(sys, "argv", ["loop_overhead.py", "--blocks=1", "--steps=2", *options])
    importlib.import_module("loop_overhead").main()
    assert "reslab fit takes" in capsys.readouterr().out


def test_cpu_memory_compares_neighbours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cpu_memory = importlib.import_module("cpu_memory")
    monkeypatch.setattr(cpu_memory, "SHAPES", {"resnet20": (2, 3, 32, 32)})
    monkeypatch.setattr(sys, "argv", ["cpu_memory.py", "--child=0", "--steps=1"])
    cpu_memory.main()
    measured = json.loads(capsys.readouterr().out)
    assert measured["resnet20"] > 0 and measured["MB"] > 0
    speeds = iter([100.0, 200.0, 100.0, 110.0, 100.0, 130.0])
    monkeypatch.setattr(cpu_memory, "measure", lambda keep, steps: {"resnet20": next(speeds), "MB": 1000.0 + keep})
    monkeypatch.setattr(sys, "argv", ["cpu_memory.py", "--repeats=3"])
    cpu_memory.main()
    assert "images/s: 130 against 100, 1.30 times (1.10 to 2.00" in capsys.readouterr().out


SLOW_PARTS = ["loop", "jpeg", "speed", "paper", "side_by_side", "deterministic"]


@pytest.mark.parametrize("part", ["sync", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_PARTS)])
def test_gpu_check_runs_in_its_tiny_version(part: str, tmp_path: Path) -> None:
    gpu_check = importlib.import_module("gpu_check")
    assert getattr(gpu_check, part)(gpu_check.Sizes(tiny=True), str(tmp_path))


@pytest.mark.slow
def test_peers_runs_on_real_data(peers: ModuleType, shared_data: Path, tmp_path: Path) -> None:
    sizes = ["--batch-size=16", "--jpeg-batch-size=4", "--image-size=32", "--val-batches=1", "--jpeg-val-batches=1"]
    steps = ["--repeats=1", "--steps=3", "--jpeg-steps=3", "--threads=1", "--baseline-options=--workers 2"]
    peers.main(["--data.root", str(shared_data), *sizes, *steps, "--out", str(tmp_path / "results.json")])
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert {name: len(part["rounds"][0]) for name, part in parts.items()} == {"cifar": 3, "jpeg": 2}


@pytest.mark.slow
def test_study_of_fifteen_cells_runs_in_both_ways(peers: ModuleType) -> None:
    [row] = peers.study(peers.parse(["--study-repeats", "1"]))["rounds"]
    assert all(row[mode]["total"] > 0 for mode in ("fork server", "--fresh-processes"))
