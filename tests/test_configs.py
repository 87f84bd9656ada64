"""Every shipped config file loads; a mistake is reported with its key, its file and the nearest valid name."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from reslab import cli, names
from reslab.ablation.study import read_study
from reslab.arguments import expand
from reslab.check import check
from reslab.config import Experiment
from reslab.errors import UserError
from reslab.search.search_file import read_search
from reslab.training import MultiStep

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DIGITS = CONFIGS / "experiment" / "digits.yaml"
EXPERIMENTS = sorted((CONFIGS / "experiment").glob("*.yaml"))
OVERLAYS = sorted(f for folder in ("recipe", "trainer", "logger") for f in (CONFIGS / folder).glob("*.yaml"))
ALL = sorted(CONFIGS.rglob("*.yaml"))
LEAVES = sorted(f for folder in ("net", "data", "objective") for f in (CONFIGS / folder).glob("*.yaml"))


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in paths]


def parse(*configs: Path, options: list[str] | None = None) -> Experiment:
    return Experiment([*(arg for path in configs for arg in ("--config", str(path))), *(options or [])])


# What ships


def test_no_config_file_is_forgotten() -> None:
    tested = {"experiment", "recipe", "trainer", "logger", "net", "objective", "data", "ablation", "sweep"}
    assert {path.name for path in CONFIGS.iterdir()} <= tested | {"base.yaml"}
    assert len(EXPERIMENTS) >= 13 and len(OVERLAYS) >= 12


@pytest.mark.parametrize("path", named(EXPERIMENTS))
def test_experiment_parses_and_is_named_after_its_file(path: Path) -> None:
    config = parse(path).config
    assert config.run.name == path.stem
    assert config.trainer.max_epochs or config.trainer.max_steps, "no end of training"


@pytest.mark.parametrize("path", [p for p in named(EXPERIMENTS) if "imagenet_" not in str(p.id)])
def test_experiment_builds_data_model_and_trainer_settings(path: Path) -> None:
    with torch.device("meta"):  # shapes without arithmetic
        data, model, settings = parse(path).build()
        logits = model.net.eval()(torch.zeros(2, *data.image_shape))
    assert model.net.num_classes == data.num_classes
    assert model.net.in_channels == data.channels
    assert settings["callbacks"] == []
    assert logits.shape == (2, data.num_classes)


def test_imagenet_classes_follow_the_folders(tmp_path: Path) -> None:
    for wnid in ("n01440764", "n02102040", "n03000684"):
        (tmp_path / "imagenet" / "train" / wnid).mkdir(parents=True)
    path = CONFIGS / "experiment" / "imagenet_resnet18.yaml"
    data, model, _ = parse(path, options=["--data.root", str(tmp_path)]).build()
    assert data.num_classes == model.net.num_classes == 3


@pytest.mark.parametrize("path", named(EXPERIMENTS))
def test_header_states_command_hardware_time_and_result(path: Path) -> None:
    header = path.read_text(encoding="utf-8").partition("\nrun:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert path in [used for command in commands(path) for used in check_command(command)]
    assert "Hardware:" in header and "Time:" in header
    measured = r"0\.\d+ (± 0?\.\d+ \(\d+ seeds|\(1 seed\b)"
    published = r"not measured(, needs a GPU)?\. Published: "
    assert re.search(rf"Expected test/acc: ({measured}|{published})", header) and "not yet measured" not in header


def header(path: Path) -> str:
    """Return the comment at the top of a config file, without its #."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return "\n".join(line[1:] for line in lines)


def commands(path: Path) -> list[list[str]]:
    """Return the indented commands in the header of a config file."""
    text = re.sub(r"\\\n *", "", header(path))
    lines = re.findall(rf"^   ((?:{'|'.join(PROGRAMS)}) .*)$", text, re.MULTILINE)
    return [shlex.split(line.replace("EXPERIMENT", "digits"), comments=True) for line in lines]


def check_command(command: list[str]) -> list[Path]:
    """Check a command as the command line does, without running it; return the config files that it names."""
    if before := PROGRAMS[command[0]]:
        command = ["reslab", "fit", *command[command.index(before) + 1 + (before == "-m") * 2 :]]
    if command[1] == "fit":
        check(command[2:])
        return [Path(word) for word in expand(command[2:]) if word.endswith(".yaml")]
    args, overrides = cli._parser().parse_known_args(command[1:])
    reader = {"ablate": read_study, "search": read_search}[command[1]]
    return [reader(args.name, overrides).path]


PROGRAMS = {"reslab": "", "torchrun": "-m", "sbatch": "scripts/slurm.sbatch"}  # and what precedes the arguments of fit
COMMANDS = [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in ALL if commands(path)]


@pytest.mark.parametrize("path", COMMANDS)
def test_commands_in_the_header_are_valid_short_and_use_the_file(
    path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo)
    assert path in [used for command in commands(path) for used in check_command(command)]
    assert not re.search(r"(?<!wandb)[\w-]+ (?:-\S+ )*configs/", "\n".join(map(" ".join, commands(path))))


def test_every_experiment_study_and_search_states_its_command() -> None:
    described = {path for path in ALL if path.parent.name in ("experiment", "ablation", "sweep")}
    assert described - {path for path in ALL if commands(path)} == {CONFIGS / "sweep/wandb.yaml"}


@pytest.mark.parametrize("path", named(ALL))
def test_names_in_the_header_exist(path: Path) -> None:
    for option, name in re.findall(r"--(config|on|model\.net|data\.dataset)[ =]([\w./-]*\w)", header(path)):
        kind = {"on": "data", "model.net": "net", "data.dataset": "data"}.get(option)
        assert (names.find(kind, name) if kind else names.find_stacked(name)).is_file()


@pytest.mark.parametrize("path", named(OVERLAYS))
def test_overlay_stacks_on_an_experiment(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), "the first line of an overlay says what it is for"
    if "timm." in text:
        pytest.importorskip("timm", reason="timm is not installed: its optimizers are not tested")
    assert parse(DIGITS, path).config.run.name == "digits"


@pytest.mark.parametrize("path", named([*EXPERIMENTS, *OVERLAYS, CONFIGS / "base.yaml"]))
def test_no_config_inside_a_config(path: Path) -> None:
    # jsonargparse would let it replace whole groups silently.
    assert "config" not in yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", named(LEAVES))
def test_leaf_takes_its_place_in_an_experiment(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    key = {"net": "model.net", "data": "data.dataset", "objective": "model.objective"}[path.parent.name]
    config = parse(DIGITS, options=[f"--{key}={path}"]).config
    assert config[key].class_path == yaml.safe_load(path.read_text(encoding="utf-8"))["class_path"]


@pytest.mark.parametrize(
    ("key", "name"), [("model.net", "ResNet"), ("model.net", "TorchvisionNetwork"), ("model.objective", "CrossEntropy")]
)
def test_shipped_classes_may_be_named_without_their_module(key: str, name: str) -> None:
    arguments = ["--model.net.init_args.name=resnet18"] if name == "TorchvisionNetwork" else []
    assert parse(DIGITS, options=[f"--{key}={name}", *arguments]).config[key].class_path.endswith(f".{name}")


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_he_recipe_is_the_papers(depth: int) -> None:
    config = parse(CONFIGS / "experiment" / f"cifar10_resnet{depth}.yaml").config
    sgd, schedule = config.model.optimizer.init_args, config.model.schedule.init_args
    assert (config.trainer.max_steps, config.data.batch_size, config.data.val_split) == (64_000, 128, 5000)
    assert (sgd.lr, sgd.momentum, sgd.nesterov, sgd.weight_decay) == (0.1, 0.9, False, 1e-4)
    assert (schedule.milestones, schedule.gamma) == ([0.5, 0.75], 0.1)
    assert config.model.param_groups.decay_norm_and_bias and config.model.net.init_args.shortcut == "A"
    assert (config.data.augment.crop_padding, config.data.augment.flip) == (4, "random")


PUBLISHED_EPOCHS = {
    "cifar100_resnet18": [60, 120, 160],
    "cifar100_resnet50": [60, 120, 160],
    "imagenet_resnet18": [30, 60],
    "imagenet_resnet50": [30, 60],
}


@pytest.mark.parametrize("name", PUBLISHED_EPOCHS)
def test_rate_falls_at_the_published_epochs(name: str) -> None:
    config = parse(CONFIGS / "experiment" / f"{name}.yaml").config
    schedule, an_epoch = MultiStep(**config.model.schedule.init_args.as_dict()), 5004
    total = config.trainer.max_epochs * an_epoch
    for drops, epoch in enumerate(PUBLISHED_EPOCHS[name]):
        step = epoch * an_epoch
        assert schedule.factor(step - 1, total, an_epoch) == schedule.gamma**drops
        assert schedule.factor(step, total, an_epoch) == schedule.gamma ** (drops + 1)


# Mistakes


def refusal(folder: Path, text: str, *options: str) -> str:
    """Return the error message for the digits experiment with the config `text` stacked on it."""
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parse(DIGITS, folder / "mine.yaml", options=list(options)).build()
    message = str(caught.value)
    assert len(message.splitlines()) <= 5 and len(message) <= 600
    assert "mine.yaml" in message
    return message


def words(message: str) -> set[str]:
    """Return the dotted names in a message and their last parts."""
    names = re.findall(r"[\w.]*\w", message)
    return {*names, *(name.rpartition(".")[2] for name in names)}


UNKNOWN_KEYS = [
    ("trainr: {max_epochs: 3}", "trainr", "trainer.max_epochs"),
    ("trainer: {max_epoch: 3}", "trainer.max_epoch", "trainer.max_epochs"),
    ("data: {batchsize: 64}", "data.batchsize", "data.batch_size"),
    ("data: {augment: {crop_pading: 1}}", "crop_pading", "crop_padding"),
    ("run: {nam: x}", "run.nam", "run.name"),
    ("model: {objective: {init_args: {label_smothing: 0.1}}}", "label_smothing", "label_smoothing"),
    ("model: {param_groups: {freez: [stem]}}", "freez", "freeze"),
    ("model: {net: {init_args: {shortcat: A}}}", "shortcat", "shortcut"),
    ("model: {schedule: {init_args: {peak_att: 0.2}}}", "peak_att", "peak_at"),
    ("model: {optimizer: {init_args: {momentun: 0.9}}}", "momentun", "momentum"),
    (
        "model: {net: {class_path: TimmNetwork, init_args: {name: resnet10t, drop_path_rate: 0.1}}}",
        "drop_path_rate",
        "model.net.dict_kwargs.drop_path_rate",
    ),
]
WRONG_NAMES = [
    ("model: {optimizer: {class_path: torch.optim.SDG}}", "model.optimizer", "SGD"),
    ("model: {schedule: {class_path: Cosin}}", "model.schedule", "Cosine"),
    ("model: {objective: {class_path: CrossEntrop}}", "model.objective", "CrossEntropy"),
    ("model: {schedule: {class_path: reslab.training.OneCicle}}", "model.schedule", "OneCycle"),
    ("data: {dataset: {class_path: CIFAR11}}", "data.dataset", "CIFAR10"),
    ("data: {augment: {flip: randm}}", "flip", "random"),
    ("model: {net: {init_args: {stem: cifr}}}", "stem", "cifar"),
    ("run: {test_weights: lst}", "run.test_weights", "last"),
]
WRONG_TYPES = [
    ("model: {objective: {class_path: Distillation}}", "model.objective", "init_args.teacher is required"),
    ("data: {batch_size: many}", "data.batch_size", "int"),
    ("model: {objective: {init_args: {label_smoothing: [1]}}}", "label_smoothing", "float"),
    ("model: {net: {init_args: {layers: two}}}", "layers", "two"),
    ("trainer: {max_epochs: 1.5}", "trainer.max_epochs", "int"),
    ("trainer: 3", "trainer", ""),
]


@pytest.mark.parametrize(("text", "key", "nearest"), UNKNOWN_KEYS)
def test_unknown_key_is_reported_with_the_nearest(tmp_path: Path, text: str, key: str, nearest: str) -> None:
    message = refusal(tmp_path, text)
    assert key in message and nearest in words(message)


@pytest.mark.parametrize(("text", "key", "nearest"), WRONG_NAMES)
def test_unknown_name_is_reported_with_the_nearest(tmp_path: Path, text: str, key: str, nearest: str) -> None:
    message = refusal(tmp_path, text)
    assert key in message and nearest in message


@pytest.mark.parametrize(("text", "key", "expected"), WRONG_TYPES)
def test_wrong_type_is_reported_with_the_expected_one(tmp_path: Path, text: str, key: str, expected: str) -> None:
    message = refusal(tmp_path, text)
    assert key in message and expected in message


OUT_OF_RANGE = [
    ("data: {batch_size: 0}", "batch_size", "at least 1"),
    ("data: {augment: {crop_padding: -1}}", "crop_padding", "0 or more"),
    ("model: {objective: {init_args: {label_smoothing: 1.5}}}", "label_smoothing", "[0, 1)"),
    ("model: {ema_decay: 2.0}", "ema_decay", "between 0 and 1"),
    ("model: {param_groups: {freeze: [stem, stage9]}}", "freeze", "stem, stage1, stage2, stage3"),
    ("model: {schedule: {class_path: MultiStep, init_args: {milestones: [0.5, 3]}}}", "milestones", "between 0 and 1"),
    ("model: {net: {init_args: {layers: [1, 0]}}}", "layers", "1"),
    ("run: {checkpoint_every_minutes: 0}", "checkpoint_every_minutes", "more than 0"),
    ("run: {name: a/b}", "run.name", "letters"),
]


@pytest.mark.parametrize(("text", "key", "remedy"), OUT_OF_RANGE)
def test_value_out_of_range_is_reported_with_the_allowed_range(
    tmp_path: Path, text: str, key: str, remedy: str
) -> None:
    message = refusal(tmp_path, text)
    assert key in message and remedy in message


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("data: {batch_size: 0}", "data.batch_size must be"),
        ("run: {checkpoint_every_minutes: 0}", "run.checkpoint_every_minutes must be"),
        ("data: {augment: {crop_padding: -1}}", "data.augment.crop_padding: augment: crop_padding and cutout must be"),
    ],
)
def test_message_begins_with_its_key_once(tmp_path: Path, text: str, start: str) -> None:
    assert refusal(tmp_path, text).startswith(start)


@pytest.mark.parametrize(
    ("option", "key", "nearest"),
    [
        ("--trainer.max_epoch=12", "trainer.max_epoch", "trainer.max_epochs"),  # abbreviations are not accepted
        ("--data.num_worker=2", "data.num_worker", "data.num_workers"),
        ("--model.net.init_args.shortcut=D", "shortcut", "identity"),
    ],
)
def test_mistake_on_the_command_line_is_located(option: str, key: str, nearest: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(DIGITS, options=[option])
    message = str(caught.value)
    assert key in message and nearest in words(message) and "command line" in message


def test_missing_config_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        parse(Path("nowhere.yaml"))


def test_missing_leaf_is_named_with_the_file_that_references_it(tmp_path: Path) -> None:
    message = refusal(tmp_path, "model: {net: ../net/resnet9.yaml}")
    assert "resnet9.yaml" in message


def test_broken_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, "data:\n  batch_size: [64\nmodel: {}")
    assert "mine.yaml" in message and "line" in message


FORBIDDEN = ["os.system", "subprocess.Popen", "builtins.eval", "torch.load", "reslab_evil.Callback"]
PLACES = [
    "trainer: {callbacks: [{class_path: NAME}]}",
    "model: {net: {class_path: NAME}}",
    "model: {optimizer: {class_path: NAME}}",
]


@pytest.mark.parametrize("name", FORBIDDEN)
@pytest.mark.parametrize("place", PLACES)
def test_config_cannot_name_modules_outside_the_allowlist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, name: str
) -> None:
    # A module whose name begins like an allowed one, and which leaves a file when it is imported.
    trace = tmp_path / "imported"
    (tmp_path / "reslab_evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Callback: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert name in refusal(tmp_path, place.replace("NAME", name))
    assert not trace.exists()


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nowhere:
        def find_spec(self, name: str, *args: object) -> None:
            if name.partition(".")[0] == "timm":
                raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(sys, "meta_path", [Nowhere(), *sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    optimizer = "model: {optimizer: {class_path: timm.optim.Lamb}}"
    assert "model.optimizer: timm is not installed: pip install timm" in refusal(tmp_path, optimizer)
    policy = "data: {augment: {transforms: [{class_path: reslab.data.TimmRandAugment}]}}"
    assert "TimmRandAugment requires timm: pip install timm" in refusal(tmp_path, policy)


def test_command_line_prints_one_message_and_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trainer: {max_epoch: 3}")
    command = [sys.executable, "-m", "reslab", "fit", "--config", str(DIGITS), "--config", str(tmp_path / "mine.yaml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "trainer.max_epochs" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"], "a refused run leaves no files"


MONITORS = [
    ("run: {monitor: val/accuracy}", "run.monitor", "val/acc"),
    ("trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val_loss}}]}",
     "EarlyStopping", "val/loss"),
    ("trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val_loss}},"
     " {class_path: EarlyStopping, init_args: {monitor: val/acc}}]}", "EarlyStopping", "val/loss"),
    ("run: {monitor: val/f1}", "run.monitor", "val/loss"),
    ("{data: {val_split: 0}, trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/acc}}]}}",
     "EarlyStopping", "test/acc"),
    ("{data: {val_split: 0}, run: {test_weights: best}}", "run.test_weights", "data.val_split"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "key", "nearest"), MONITORS)
def test_metric_that_no_run_logs_is_reported_before_anything_starts(
    tmp_path: Path, text: str, key: str, nearest: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parse(DIGITS, tmp_path / "mine.yaml").build()
    assert key in str(caught.value) and nearest in str(caught.value)


def test_monitor_of_a_metric_that_a_callback_publishes_is_accepted() -> None:
    from lightning.pytorch.callbacks import EarlyStopping

    experiment = parse(DIGITS)
    data, model, _ = experiment.build()
    publisher = type("Publisher", (), {"metric_names": ["grad_norm"]})()
    experiment._check_metrics(data, model, [EarlyStopping("grad_norm"), publisher])
    with pytest.raises(UserError, match="grad_norm"):
        experiment._check_metrics(data, model, [EarlyStopping("grad_norm")])
