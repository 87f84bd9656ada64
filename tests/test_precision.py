"""`trainer.precision: auto`: what it becomes on which machine, and that a run keeps it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from reslab import config as config_module
from reslab.ablation.launch import runs_of_automatic_precision, typed_configs
from reslab.ablation.study import read_study
from reslab.config import Experiment
from reslab.doctor import examine
from reslab.host import bf16_is_fast, cpu_bf16_is_fast
from reslab.runs.folder import RunFolder
from reslab.search.run import SearchProgress
from reslab.search.search_file import read_search
from reslab.search.trials import TrialLog
from runner import DIGITS, TRAINING, Fault, fit, reslab

AUTO = "--trainer.precision=auto"
AVX512 = "avx512f avx512_bf16 avx512_fp16"
CPUS = {
    "Intel Sapphire Rapids": ("GenuineIntel", f"avx2 {AVX512} amx_bf16 amx_tile amx_int8", True),
    "the same, without AMX in a virtual machine": ("GenuineIntel", f"avx2 {AVX512}", False),
    "Intel Cooper Lake": ("GenuineIntel", "avx2 avx512f avx512_bf16", False),
    "Intel laptop": ("GenuineIntel", "avx2 avx_vnni", False),
    "AMD Zen 5": ("AuthenticAMD", f"avx2 {AVX512}", True),
    "AMD Zen 4": ("AuthenticAMD", "avx2 avx512f avx512_bf16", True),
    "AMD Zen 3": ("AuthenticAMD", "avx2 fma", False),
    "a flag with a longer name": ("AuthenticAMD", "avx512_bf16x noamx_bf16", False),
}


def cpuinfo(vendor: str, flags: str, cores: int = 2) -> str:
    core = f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: a CPU\nflags\t\t: fpu {flags} sse\nbugs\t\t:\n"
    return "\n".join([core] * cores)


@pytest.mark.parametrize("name", CPUS)
def test_bf16_is_fast_on(name: str) -> None:
    vendor, flags, fast = CPUS[name]
    assert bf16_is_fast(cpuinfo(vendor, flags)) is fast


@pytest.mark.parametrize("text", ["", "Features\t: fp asimd bf16 i8mm\n", "flags\t\t:\n", "amx_bf16"])
def test_bf16_is_slow_where_the_file_does_not_say_otherwise(text: str) -> None:
    assert not bf16_is_fast(text)


def machine(monkeypatch: pytest.MonkeyPatch, fast_cpu: bool, *gpus: tuple[int, int]) -> None:
    """Pretend a machine with a CPU that is or is not fast at bf16, and GPUs of these compute capabilities."""
    monkeypatch.setattr(config_module, "cpu_bf16_is_fast", lambda: fast_cpu)
    monkeypatch.setattr(config_module.CUDAAccelerator, "is_available", staticmethod(lambda: bool(gpus)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: gpus[gpu])


@pytest.mark.parametrize(
    ("fast_cpu", "gpus", "accelerator", "precision"),
    [
        (True, [], "auto", "bf16-mixed"),
        (False, [], "auto", "32-true"),
        (False, [(9, 0)], "auto", "bf16-mixed"),
        (False, [(8, 0), (8, 6)], "cuda", "bf16-mixed"),
        (False, [(8, 9)], "gpu", "bf16-mixed"),
        (True, [(7, 5)], "auto", "32-true"),
        (True, [(8, 0), (7, 0)], "auto", "32-true"),
        (True, [(7, 5)], "cpu", "bf16-mixed"),
        (False, [(9, 0)], "cpu", "32-true"),
        (True, [], "cuda", "32-true"),  # the Trainer refuses the accelerator
    ],
)
def test_automatic_precision_follows_the_device(
    fast_cpu: bool, gpus: Any, accelerator: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, fast_cpu, *gpus)
    experiment = Experiment([*DIGITS, AUTO, f"--trainer.accelerator={accelerator}"])
    assert yaml.safe_load(experiment.dump())["trainer"]["precision"] == precision
    assert not experiment.notes()


def test_it_may_be_set_in_a_file_and_is_overridden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, True)
    (tmp_path / "mine.yaml").write_text("trainer: {precision: auto}")
    argv = [*DIGITS, "--config", str(tmp_path / "mine.yaml")]
    assert Experiment(argv).config.trainer.precision == "bf16-mixed"
    assert Experiment([*argv, "--precision", "64-true"]).config.trainer.precision == "64-true"


@pytest.mark.parametrize(
    ("precision", "fast_cpu", "gpus", "noted"),
    [
        ("bf16-mixed", False, [], True),
        ("bf16", False, [], True),
        ("16-mixed", False, [], True),  # computed in bf16
        ("bf16-mixed", True, [], False),
        ("bf16-mixed", False, [(7, 5)], False),
        ("32-true", False, [], False),
    ],
)
def test_slow_bf16_is_noted(
    precision: str, fast_cpu: bool, gpus: Any, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, fast_cpu, *gpus)
    notes = Experiment([*DIGITS, f"--trainer.precision={precision}", "--trainer.accelerator=auto"]).notes()
    assert len(notes) == noted and all("set --precision auto" in note for note in notes)


def test_doctor_notes_slow_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, False)
    monkeypatch.chdir(tmp_path)
    assert examine([*DIGITS, "--trainer.precision=bf16-mixed"]) == 0
    assert "bf16 is slower than fp32 on this CPU: set --precision auto" in capsys.readouterr().out


def test_run_directory_of_a_job_is_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    directories = set()
    for fast_cpu in (True, False):
        machine(monkeypatch, fast_cpu)
        directories.add(Experiment([*DIGITS, AUTO]).run_dir())
    assert len(directories) == 1


@pytest.mark.parametrize("began", ["bf16-mixed", "32-true"])
def test_run_resumes_in_the_precision_that_it_began_with(began: str, tmp_path: Path) -> None:
    """One of the two is not what auto gives on this machine."""
    options = ["--trainer.max_epochs=1", "--run.checkpoint_every_steps=3"]
    first = fit(tmp_path, *options, f"--trainer.precision={began}", fault=Fault(TRAINING, call=6))
    assert first.status < 0
    assert ("note: bf16 is slower" in first.output) == (began == "bf16-mixed" and not cpu_bf16_is_fast())
    ended = fit(tmp_path, *options, AUTO)
    assert ended.status == 0 and "bf16 is slower" not in ended.output
    assert "resuming at step 3" in ended.output and f"precision {began}" in ended.output, ended.output
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["precision"] == began
    assert "nothing to do" in fit(tmp_path, *options, AUTO).output


def test_run_of_another_precision_is_not_resumed(tmp_path: Path) -> None:
    options = ["--trainer.max_epochs=1", "--run.checkpoint_every_steps=3"]
    assert fit(tmp_path, *options, "--trainer.precision=64-true", fault=Fault(TRAINING, call=6)).status < 0
    ended = fit(tmp_path, *options, AUTO)
    assert ended.status == 2 and "trainer.precision: 64-true" in ended.output, ended.output


@pytest.mark.slow
def test_automatic_precision_is_recorded_and_reproduced(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = fit(folder, AUTO, "--trainer.max_epochs=1")
    assert ended.status == 0, ended.output
    recorded = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["precision"]
    assert recorded in ("bf16-mixed", "32-true") and f"precision {recorded}" in ended.output
    assert reslab("verify", folder).status == 0
    reproduced = reslab("reproduce", folder, "--out", tmp_path / "again")
    assert reproduced.status == 0, reproduced.output


@pytest.mark.parametrize("made", ["checkpoints/last.ckpt", "weights.safetensors"])  # the latter: a finished run
def test_all_arms_keep_the_precision_of_the_first_run(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study resumed on another kind of machine compares arms of one precision."""
    base = [DIGITS[1], {"trainer": {"precision": "auto", "accelerator": "cpu"}}]
    arms = {"a": {}, "b": {"model.optimizer.init_args.lr": 0.01}, "c": {"trainer.precision": "64-true"}}
    text = {"name": "s", "base": base, "baseline": "a", "arms": arms, "metric": "test/acc", "seeds": 2}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(text))
    study = read_study(tmp_path / "s.yaml")
    machine(monkeypatch, True)
    run = RunFolder(tmp_path / "out/a/seed-1")
    run.checkpoints.mkdir(parents=True)
    (run.path / made).touch()
    run.config.write_text(typed_configs(study)["a"])
    machine(monkeypatch, False)
    configs = typed_configs(study, earlier=runs_of_automatic_precision(study, tmp_path / "out"))
    precisions = {arm: yaml.safe_load(config)["trainer"]["precision"] for arm, config in configs.items()}
    assert precisions == {"a": "bf16-mixed", "b": "bf16-mixed", "c": "64-true"}
    assert yaml.safe_load(typed_configs(study)["a"])["trainer"]["precision"] == "32-true"


def test_new_trials_of_a_search_keep_the_precision_of_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"base": [DIGITS[1]], "space": {"model.optimizer.lr": [0.1, 0.2, 0.3]}, "trials": 3}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(text))
    plan = read_search(tmp_path / "search.yaml", [AUTO, "--trainer.accelerator=cpu"])
    out = tmp_path / "out"
    out.mkdir()
    for fast_cpu in (True, False):
        machine(monkeypatch, fast_cpu)
        progress = SearchProgress(plan, out, TrialLog(plan, out), {}, retries=1, jobs=1)
        (cell,) = progress.next_cells()
        assert yaml.safe_load(cell.config.read_text())["trainer"]["precision"] == "bf16-mixed"
        cell.folder.mkdir()
        shutil.copy(cell.config, cell.folder / "config.yaml")
        (cell.folder / "weights.safetensors").touch()
