"""What `reslab fit` prints beside its progress: the header before torch is imported, and the result at the end."""

import contextlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from reslab import header
from reslab.cli import main
from reslab.config import Experiment
from reslab.metric_text import interval, main_metric, wilson
from reslab.models import ResNet
from reslab.training.launchers import RANKS
from runner import DIGITS, fit, reslab

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\nfrom reslab.cli import main\nsys.exit(main(sys.argv[1:]))"


def labelled(text: str) -> dict[str, str]:
    """Return the values of the lines `label  value`, the last one of each label."""
    lines = [line for line in text.splitlines() if re.match(r"\w\S*( \S+)? {2,}\S", line)]
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in lines)


def test_header_needs_no_torch(repo: Path, tmp_path: Path) -> None:
    options = ["--config", str(repo / "configs/trainer/cpu.yaml"), "--trainer.max_epochs=2", "--data.root", "/nowhere"]
    command = [sys.executable, "-c", WITHOUT_TORCH, "fit", *DIGITS[:2], *options, "--run.dir", str(tmp_path / "r")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "torch" in done.stderr  # the import that failed, after the header was printed
    assert labelled(done.stdout) == {
        "run": str(tmp_path / "r"),
        "config": "digits + cpu; trainer.max_epochs 2",
        "data": "Digits, root /nowhere",
        "device": "accelerator cpu, devices 1 (requested)",
    }


@pytest.mark.parametrize(
    "options",
    [["--help"], ["--print_config"], ["--print_config=skip_null"], ["--model.nett", "x"], ["--trainer.max_epochs"]],
)
def test_no_header_without_a_run(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main(["fit", *DIGITS, *options])
    assert "(requested)" not in capsys.readouterr().out


@pytest.mark.parametrize("variable", [*RANKS, "NODE_RANK", "GROUP_RANK"])
def test_only_rank_0_prints_the_header(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, lines in (("0", True), ("1", False)):
        monkeypatch.setenv(variable, rank)
        header.print_header({}, DIGITS)
        assert bool(capsys.readouterr().out) == lines


@pytest.mark.parametrize("config", [{}, {"data": None, "trainer": 3}, {"data": {"dataset": ["x"]}, "run": "x"}])
def test_header_of_a_config_of_any_shape(config: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    header.print_header(config, ["mine.yaml", "--lr", "0.1", "--trainer.logger.api_key", "abcdefgh"])
    shown = labelled(capsys.readouterr().out)
    assert shown["config"] == "mine.yaml; lr 0.1, trainer.logger.api_key ***" and shown["device"]


VARIANT_CASES = [
    ("resnet50", {}, "resnet50"),
    ("resnet20", {}, "resnet20"),
    ("resnet20", {"width": 32}, "ResNet"),  # its stated width is 16
    ("resnet20", {"zero_init": True}, "ResNet"),  # differs in an argument that resnet20.yaml does not state
    ("resnet20", {"layers": [5, 5, 5]}, "resnet32"),
]


@pytest.mark.parametrize(("base", "changes", "name"), VARIANT_CASES)
def test_network_is_called_by_its_config_if_all_arguments_agree(base: str, changes: dict, name: str) -> None:  # type: ignore[type-arg]
    options = [word for key, value in changes.items() for word in (f"--model.net.{key}", str(value))]
    config = Experiment(["digits", "--model.net", base, *options]).config.model.net.as_dict()
    assert header._variant(ResNet, config) == name
    assert header._variant(type("Other", (ResNet,), {}), config) == "Other"


def test_run_prints_what_it_trains_and_its_result(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    ended = fit(folder, "--trainer.max_epochs=2")
    assert ended.status == 0, ended.output
    before, _, after = ended.output.partition("epoch 1/2")
    shown = labelled(before)
    assert re.fullmatch(r"resnet8, 75,002 parameters", shown["network"])
    assert shown["images"] == "1,294 train, 144 validation, 359 test"
    assert shown["steps"] == "40 in total, 20 per epoch, 64 images each"
    assert shown["device"] == "1 × CPU, precision 32-true"
    record = json.loads((folder / "manifest.json").read_text())
    result, correct = labelled(after), round(record["results"]["test/acc"] * 359)
    low, high = wilson(correct, 359)
    percent = f"{100 * correct / 359:.2f} %  (95 % interval {100 * low:.2f}–{100 * high:.2f} %, n = 359)"
    assert result["test/acc"] == percent
    assert result["test/loss"] == f"{record['results']['test/loss']:.4f}"
    assert re.fullmatch(r"\d+\.\d\d %  at step (20|40)", result["best val/acc"])
    assert re.fullmatch(r"[\d.]+ s, training at [\d,]+ images/s", result["time"])
    assert result["run"] == str(folder) and result["report"] == str(folder / "report.html")
    assert shlex.split(result["next"]) == ["reslab", "test", str(folder)]
    assert shlex.split(after.splitlines()[-3])[:3] == ["reslab", "predict", str(folder)]


def test_five_classes_have_no_accuracy_of_the_best_five(tmp_path: Path) -> None:
    """Of five digits, neither metrics.csv, the terminal, the report nor the manifest has a top-5 accuracy."""
    ended = fit(tmp_path / "run", "--data.dataset=reslab.user_code.FiveDigits", "--trainer.max_epochs=1")
    assert ended.status == 0, ended.output
    tested = reslab("test", tmp_path / "run")
    assert "acc" in tested.output
    texts = [ended.output, tested.output]
    texts += [(tmp_path / "run" / name).read_text() for name in ("metrics.csv", "manifest.json", "report.html")]
    assert not [text for text in texts if re.search("acc5|top-?5", re.sub('base64,[^"]*', "", text), re.IGNORECASE)]


@pytest.mark.parametrize(
    ("name", "value", "n", "shown"),
    [
        ("test/acc", 0.5, 100, "(95 % interval 40.38–59.62 %, n = 100)"),
        ("test/acc5", 1.0, 50, "(95 % interval 92.87–100.00 %, n = 50)"),
        ("test/acc", 0.0, 1, "(95 % interval 0.00–79.35 %, n = 1)"),
        ("test/acc", 0.8765400052, 50_000, "(95 % interval 87.36–87.94 %, n = 50,000)"),  # float32
        ("test/acc", 0.8765454, 50_000, ""),
        ("test/loss", 0.5, 100, ""),
        ("test/accuracy_per_class", 0.12345, 100, ""),  # no share of 100 images
        ("test/acc", 0.5, 0, ""),
        ("test/acc", float("nan"), 100, ""),
        ("test/acc_cost", 1.5, 100, ""),
    ],
)
def test_interval_is_that_of_a_share_of_the_images(name: str, value: float, n: int, shown: str) -> None:
    assert interval(name, value, n) == shown


@pytest.mark.parametrize(
    ("names", "main"),
    [
        (["val/loss", "val/acc", "val/acc5"], "val/acc"),
        (["val/loss", "val/f1"], "val/f1"),
        (["val/loss"], "val/loss"),
        (["train/acc"], None),
    ],
)
def test_main_metric_is_the_accuracy_or_the_first_that_is_no_loss(names: list[str], main: str | None) -> None:
    assert main_metric(names, "val") == main
