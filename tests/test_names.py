"""Names of configs, short keys, and mistakes on the command line, which are reported without importing torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from reslab.ablation.study import read_study
from reslab.arguments import expand
from reslab.check import check, resolved
from reslab.cli import main
from reslab.config import Experiment
from reslab.errors import UserError
from reslab.resolve import check_key, full_key, with_paths
from test_configs import CONFIGS, DIGITS

NET = "class_path: ResNet\ninit_args: {layers: [1], width: 8, stem: cifar}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the user's own configs/."""
    files = {
        "experiment/mine": "run: {name: mine}\ndata: {dataset: digits}\nmodel: {net: tiny, objective: CrossEntropy}\n",
        "net/tiny": NET, "recipe/both": "model: {ema_decay: 0.9}\n", "trainer/both": "trainer: {max_epochs: 3}\n",
        "ablation/study": "base: [mine]\nbaseline: a\nseeds: 3\narms: {a: {}, b: {model.net: resnet20}}\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / "configs" / f"{name}.yaml").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "configs" / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SAME = [
    (["digits"], ["--config", str(DIGITS)]),
    (["digits", "--config", "ema"], ["--config", str(DIGITS), "--config", str(CONFIGS / "recipe/ema.yaml")]),
    (["--config", "experiment/digits"], ["--config", str(DIGITS)]),
    (["digits", "--model.net", "resnet18"], [str(DIGITS), f"--model.net={CONFIGS / 'net/resnet18.yaml'}"]),
    (["digits", "--data.dataset=cifar100"], [str(DIGITS), "--data.dataset", str(CONFIGS / "data/cifar100.yaml")]),
    (["--lr", "0.3", "digits"], [str(DIGITS), "--model.optimizer.init_args.lr", "0.3"]),
    (["digits", "--epochs=3", "--batch_size", "32"], [str(DIGITS), "--trainer.max_epochs=3", "--data.batch_size=32"]),
    (["digits", "--seed", "7", "--devices", "2"], [str(DIGITS), "--seed_everything=7", "--trainer.devices=2"]),
    (["digits", "--precision", "bf16-mixed"], [str(DIGITS), "--trainer.precision", "bf16-mixed"]),
]


@pytest.mark.parametrize(("short", "long"), SAME, ids=lambda args: " ".join(args))
def test_names_and_short_keys_give_the_config_and_run_directory_of_paths_and_long_keys(
    short: list[str], long: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # else the run directory depends on the time
    one, other = Experiment(short), Experiment(long)
    assert one.dump() == other.dump() and one.run_dir() == other.run_dir()


def test_names_cover_the_users_own_files_also_inside_files(project: Path) -> None:
    check(["mine"])
    config = Experiment(["mine"]).config
    assert config.model.net.init_args.width == 8 and config.data.dataset.class_path == "reslab.data.Digits"
    assert read_study("study").arms["b"].config["model"]["net"]["init_args"]["layers"] == [3, 3, 3]
    assert read_study("study", ["--lr", "0.2"]).arms["a"].config["model"]["optimizer"]["init_args"]["lr"] == 0.2


def test_users_file_takes_precedence_over_a_shipped_one(project: Path) -> None:
    (project / "configs/net/resnet20.yaml").write_text(NET)
    assert Experiment(["digits", "--model.net", "resnet20"]).config.model.net.init_args.width == 8


def test_an_argument_of_a_class_is_no_name(project: Path) -> None:
    net = {"class_path": "reslab.models.ResNet", "init_args": {"net": "resnet18"}}
    assert with_paths({"model": {"net": net}}) == {"model": {"net": net}}


MISTAKES = [
    (["fit", "digit"], ["digits"]),
    (["fit"], ["reslab fit digits"]),
    (["fit", "ddp"], ["--config ddp"]),
    (["fit", "digits", "ema"], ["'ema' is not an option"]),
    (["fit", "digits", "--config", "emma"], ["ema"]),
    (["fit", "digits", "--config", "both"], ["recipe/both", "trainer/both"]),
    (["fit", "digits", "--config", "cifar10"], ["--data.dataset cifar10"]),
    (["fit", "digits", "--config", "no/file.yaml"], ["no/file.yaml"]),
    (["fit", "digits", "--model.net", "resnet19"], ["model.net", "resnet18", "command line"]),
    (["fit", "digits", "--data.dataset", "cifar11"], ["data.dataset", "cifar10"]),
    (["fit", "digits", "--model.optimizer", "SDG"], ["model.optimizer", "SGD"]),
    (["fit", "digits", "--trainer.max_epoch", "3"], ["trainer.max_epochs", "command line"]),
    (["fit", "digits", "--epoch", "3"], ["epochs"]),
    (["fit", "digits", "--lr"], ["has no value"]),
    (["fit", "digits", "--lr", "many"], ["model.optimizer.init_args.lr", "float", "many"]),
    (["fit", "digits", "--lr", "0.1", "--model.optimizer.lr", "0.2"], ["--lr 0.1", "--model.optimizer.lr 0.2"]),
    (["fit", "digits", "--epochs", "1.5"], ["trainer.max_epochs", "int"]),
    (["fit", "digits", "--data.batch_size", "0"], ["data.batch_size must be at least 1, got 0"]),
    (["fit", "digits", "--seed", "-1"], ["seed_everything must be"]),
    (["fit", "digits", "--model.net.stem", "cifr"], ["imagenet | cifar", "nearest: cifar"]),
    (["fit", "digits", "--model.ema_decay", "2", "--nonsense", "1"], ["nonsense"]),
    (["fit", "digits", "--devices", "0", "--model.ema_decay", "2"], ["2 mistakes", "trainer.devices", "ema_decay"]),
    (["doctor", "digit"], ["digits"]),
    (["preview", "lr", "digits", "--lr", "many"], ["float"]),
    (["test", "no/such/run"], ["not a run directory"]),
    (["predict", "no/such/run", "--images", "."], ["not a run directory"]),
    (["reproduce", "no/such/run"], ["not a run directory"]),
    (["ablate", "run", "digits_shortcut"], ["digits_shortcuts"]),
    (["ablate", "plan", "digits_shortcuts", "--epoch", "3"], ["epochs"]),
    (["summary", "resnet51"], ["resnet50"]),
]  # fmt: skip


def test_every_mistake_is_reported_without_torch_and_claims_no_run_directory(project: Path) -> None:
    code = (
        "import sys\nfrom reslab.cli import main\n"
        f"for command in {[command for command, _ in MISTAKES]!r}:\n"
        "    print('##', int(main(command)), sorted({'torch', 'lightning'} & set(sys.modules)), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    messages = re.findall(r"((?:.+\n)*?)## (\d+) (\[.*\])\n", result.stderr)
    assert len(messages) == len(MISTAKES), result.stderr
    for (command, expected), (message, status, heavy) in zip(MISTAKES, messages, strict=True):
        assert (status, heavy) == ("2", "[]"), (command, message)
        assert all(part in message for part in expected), (command, message)
    assert not (project / "runs").exists()


def test_a_key_given_twice_with_one_value_is_accepted() -> None:
    assert expand(["--lr", "0.1", "--model.optimizer.lr", "1e-1"])
    with pytest.raises(UserError, match="--seed_everything 2"):
        expand(["--seed", "1", "--seed_everything", "2"])


def test_help_of_fit_is_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    keys = re.findall(r"^  --([\w.]+)", "\n".join(lines), re.MULTILINE)
    assert len(keys) >= 20 and "(128)" in "".join(lines)
    config = resolved(["digits"])
    for key in {*keys} - {"config", "model.schedule.warmup_epochs"}:  # not of OneCycle, which digits has
        check_key(full_key(key, config), config)


@pytest.mark.parametrize("command", [["fit", "--help", "crop_padding"], ["keys", "crop_padding"]])
def test_help_on_a_key_shows_type_default_and_documentation(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("data.augment.crop_padding\n") and "int; default: 0" in out and "Pixels of padding" in out


def test_version_and_square_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and re.fullmatch(r"reslab \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert main(["summary", "resnet18", "--input", "224"]) == 0
    assert "11,689,512 parameters" in capsys.readouterr().out
    assert main(["summary", "resnet8", "--input", "1,8,8", "--classes", "10"]) == 0
    assert "for an image of 1×8×8" in capsys.readouterr().out
