"""Commands other than `fit`, and how the command line reports mistakes."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reslab import lists
from reslab.cli import main

DIGITS = "configs/experiment/digits.yaml"


@pytest.fixture(autouse=True)
def in_repository(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


@pytest.mark.parametrize(
    "command", [["--help"], ["list"], ["list", "models"], ["predict", "--help"], ["export", "--help"]]
)
def test_help_and_lists_import_no_torch(command: list[str]) -> None:
    code = (
        "import sys\nfrom reslab.cli import main\n"
        f"try: main({command!r})\nexcept SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'lightning', 'numpy', 'pandas', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def kinds() -> dict[str, str]:
    return {kind: folder for kind, (folder, _) in lists.KINDS.items()}


def test_every_folder_of_configs_can_be_listed(repo: Path) -> None:
    assert sorted(kinds().values()) == sorted(path.name for path in (repo / "configs").iterdir() if path.is_dir())


@pytest.mark.parametrize("kind", kinds())
def test_list_describes_every_config_file(kind: str, capsys: pytest.CaptureFixture[str], repo: Path) -> None:
    assert main(["list", kind]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed.keys() == {path.stem for path in (repo / "configs" / kinds()[kind]).glob("*.yaml")}
    assert not [title for title in listed.values() if title.startswith("#")]


def test_list_without_a_kind_is_short_and_names_all_files(capsys: pytest.CaptureFixture[str], repo: Path) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert {path.stem for path in (repo / "configs").glob("*/*.yaml")} <= {*re.split(r"[,\s]+", out)}
    assert len(out.splitlines()) <= 50 and out.index("cifar10_resnet56") < out.index("cifar10_resnet110")


def test_list_includes_the_users_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, folder in kinds().items():
        (tmp_path / "configs" / folder / "mine").mkdir(parents=True)
        (tmp_path / "configs" / folder / "mine" / "a.yaml").write_text("# My own\n")
        monkeypatch.chdir(tmp_path)
        assert main(["list", kind]) == 0
        assert re.search(r"^mine/a +My own$", capsys.readouterr().out, re.MULTILINE)


def test_summary_counts_parameters_and_flops(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "resnet50", "--input", "3,224,224"]) == 0
    out = capsys.readouterr().out
    assert "25,557,032 parameters" in out and "4.09 GMACs" in out and "2 FLOPs" in out


@pytest.mark.parametrize("what", ["lr", "augment"])
def test_preview_writes_png(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    assert main(["preview", what, "--config", DIGITS, "--out", str(tmp_path / "a" / "p.png")]) == 0
    assert Image.open(tmp_path / "a" / "p.png").size[0] > 300
    assert "p.png" in capsys.readouterr().out


def test_doctor_reports_machine_and_checks_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--config", str(repo / DIGITS)]) == 0
    out = capsys.readouterr().out
    assert "1,294 training, 144 validation, 359 test images, 10 classes" in out and "torch" in out
    cifar = ["--config", str(repo / "configs/experiment/cifar10_fast.yaml"), "--data.root", str(tmp_path)]
    assert main(["doctor", *cifar, "--data.download", "false"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())  # doctor leaves no files behind


MISTAKES = [
    (["summary", "resnet51"], "resnet50"),
    (["summary", "resnet50", "--inputs", "3,32,32"], "--inputs"),
    (["test", "no/such/run"], "not a run directory"),
    (["predict", "no/such/run", "--images", ".", "--out", "x.csv"], "not a run directory"),
    (["export", "no/such/run", "--format", "pt2", "--out", "x.pt2"], "not a run directory"),
    (["fit", "--config", "no/such/file.yaml"], "no/such/file.yaml"),
    (["fit", "--config", DIGITS, "--trainer.max_epoch", "3"], "trainer.max_epochs"),
    (["fit", "--config", DIGITS, "--trainer.max_epochs", "many"], "trainer.max_epochs"),
    (["fit", "--config", DIGITS, "--data.batch_size", "5000"], "batch_size"),
    (["fit", "--config", DIGITS, "--run.test_weights", "best", "--data.val_split", "0"], "data.val_split"),
    (["preview", "lr", "--config", DIGITS, "--model.net.init_args.stem", "cifr"], "cifar"),
]


@pytest.mark.parametrize(("command", "expected"), MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else x)
def test_mistake_is_one_message_and_exit_status_2(
    command: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command[0] == "fit":
        command = [*command, "--run.dir", str(tmp_path / "run")]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert expected in message and "Traceback" not in message and len(message.splitlines()) <= 6


def test_unsupported_platform_is_one_message(tmp_path: Path) -> None:
    commands = [
        ["fit", "--config", DIGITS],
        ["test", "run"],
        ["export", "run", "--format", "pt2", "--out", "x.pt2"],
        ["verify", "run"],
        ["ablate", "plan", "digits_shortcuts"],
    ]
    code = (
        "import signal, sys\n"
        "sys.modules['fcntl'] = None\n"  # as on Windows, which also lacks some signals
        "del signal.SIGUSR1, signal.SIGUSR2\n"
        "from reslab.cli import main\n"
        f"print([int(main(command)) for command in {commands!r}], main(['list', 'data']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("[2, 2, 2, 2, 2] 0\n"), result.stderr
    message = "Linux and macOS are supported; on Windows, use WSL 2 (this Python has no module fcntl)"
    assert result.stderr == f"reslab: {message}\n" * len(commands)


@pytest.mark.parametrize("command", [["bogus"], [], ["summary"], ["summary", "resnet50", "--input", "a,b"]])
def test_wrong_usage_is_exit_status_2(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "moment"),
    [
        (["list"], "cli._parser"),
        (["list", "models", "resnet*"], "models.zoo.list_models"),
        (["fit", "--config", DIGITS], "config.Experiment.build"),
        (["fit", "--config", DIGITS], "runs.record.RunRecord.open"),
        (
            ["preview", "lr", "--config", DIGITS],
            "training.Classifier.configure_optimizers",
        ),  # inside Lightning's Trainer
    ],
)
def test_ctrl_c_ends_a_command_with_one_line(
    command: list[str], moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--run.dir", str(tmp_path / "run")] if command[0] == "fit" else []
    monkeypatch.setattr(f"reslab.{moment}", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert main([*command, *options]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it during its teardown
    assert capfd.readouterr().err == "reslab: interrupted\n"
