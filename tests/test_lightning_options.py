"""Lightning's options and classes: each works and keeps reslab's promises, or is refused in one line."""

import importlib
import inspect
import itertools
import json
import re
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer, callbacks, loggers, plugins, profilers, strategies
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.plugins import environments, io, precision
from lightning.pytorch.trainer.connectors.accelerator_connector import _PRECISION_INPUT
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import optim
from torchvision.transforms import v2

import reslab
from reslab.config import Experiment
from reslab.errors import UserError
from reslab.training import compatibility
from reslab.training.compatibility import CLASSES, FLAGS, NAMES, refusal
from runner import DIGITS, TRAINING, Fault, fit, manifest, metrics

SHORT = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=4", "--trainer.limit_test_batches=1"]
MODULES = {
    "callbacks": [callbacks],
    "logger": [loggers],
    "plugins": [plugins, environments, io, precision],
    "profiler": [profilers],
    "strategy": [strategies],
}


def message(*options: str) -> str:
    """Return the error message of the digits experiment with some options."""
    with pytest.raises(UserError) as caught:
        Experiment([*DIGITS, *options]).build()
    return str(caught.value)


def problem(**flags: Any) -> str:
    """Return the message about a parsed `trainer` config with some values changed."""
    trainer = parsed().config.trainer.clone()
    for name, value in flags.items():
        trainer[name] = value
    return "trainer." + "".join(next(compatibility.problems(trainer)))


@cache
def parsed() -> Experiment:
    return Experiment(DIGITS)


def public_classes(key: str) -> dict[str, type]:
    names = ((module, name) for module in MODULES[key] for name in dir(module) if not name.startswith("_"))
    return {name: getattr(module, name) for module, name in names if inspect.isclass(getattr(module, name))}


# The tables are complete


@pytest.mark.parametrize("key", CLASSES)
def test_every_public_class_of_lightning_is_in_its_table(key: str) -> None:
    for name, cls in public_classes(key).items():
        if "_graveyard" in cls.__module__:  # removed or renamed by Lightning
            assert refusal(cls, CLASSES[key]), name
        else:
            assert name in CLASSES[key], f"decide whether {key} {name} works"
    ours = {name for name in CLASSES[key] if name not in public_classes(key)}
    assert ours <= {"Checkpoints", "LogRows", "MLflow", "MetricsCSV", "Preemption", "ProgressReport", "RunLogger",
                    "SkipRedundantSync", "TensorBoard", "VerifiedCheckpointIO", "WandB"}  # fmt: skip


def test_every_parameter_of_trainer_is_in_the_table() -> None:
    assert {*inspect.signature(Trainer).parameters} == {*FLAGS}


def test_every_name_that_trainer_accepts_is_in_its_table() -> None:
    values = [v for part in typing.get_args(_PRECISION_INPUT) for v in typing.get_args(part)]
    assert {*NAMES["precision"]} == {"auto", *map(str, values)}
    assert {*NAMES["strategy"]} == {"auto", *strategies.StrategyRegistry.available_strategies()}
    assert {*NAMES["accelerator"]} == {"auto", "gpu", *AcceleratorRegistry.available_accelerators()}
    with pytest.raises(MisconfigurationException) as caught:
        Trainer(profiler="nonsense", logger=False)
    assert {*NAMES["profiler"]} == {*re.findall(r"'(\w+)'", str(caught.value))}


def test_page_for_users_is_up_to_date(repo: Path) -> None:
    page = (repo / "docs/lightning_options.md").read_text(encoding="utf-8")
    assert page == compatibility.markdown(), "python -m reslab.training.compatibility > docs/lightning_options.md"


# Refused

LISTS = ("callbacks", "plugins")
OWN = {
    "Checkpoints": "reslab.training.checkpoint",
    "LogRows": "reslab.training.log_rows",
    "MetricsCSV": "reslab.runs.csv_logger",
    "Preemption": "reslab.training.preemption",
    "ProgressReport": "reslab.training.progress",
    "SkipRedundantSync": "reslab.training.processes",
    "VerifiedCheckpointIO": "reslab.training.checkpoint",
    "WandB": "reslab.runs.tracking",
}


def option(key: str, name: str) -> str:
    """Return the option that names a class of one of the tables."""
    module = OWN.get(name) or next(m.__name__ for m in MODULES[key] if hasattr(m, name))
    value = {"class_path": f"{module}.{name}"}
    return f"--trainer.{key}={json.dumps([value] if key in LISTS else value)}"


REFUSED_CLASSES = [(key, name) for key, table in CLASSES.items() for name, entry in table.items() if not entry.works]
REFUSED_NAMES = [(key, name) for key, table in NAMES.items() for name, entry in table.items() if not entry.works]


@pytest.mark.parametrize(("key", "name"), REFUSED_CLASSES)
def test_refused_class_is_reported_in_one_line(key: str, name: str) -> None:
    line = message(option(key, name))
    assert line.startswith(f"trainer.{key}: {name} {CLASSES[key][name].note}") and "\n" not in line


@pytest.mark.parametrize(("key", "name"), REFUSED_NAMES)
def test_refused_name_is_reported_in_one_line(key: str, name: str) -> None:
    line = problem(**{key: name})
    assert line.startswith(f"trainer.{key}: {name} {NAMES[key][name].note}") and "\n" not in line


WRONG_VALUES = {
    "accumulate_grad_batches": [0, -1],
    "barebones": [True],
    "check_val_every_n_epoch": [0, -1],
    "default_root_dir": ["elsewhere"],
    "devices": [0, -2, "0", "x", [], [0, 0]],
    "enable_checkpointing": [True, None],
    "enable_progress_bar": [True, None],
    "fast_dev_run": [True, 1, 3],
    "gradient_clip_algorithm": ["nrm"],
    "gradient_clip_val": [-0.1],
    "limit_predict_batches": [0, 2],
    "limit_test_batches": [0, 0.0, -1],
    "limit_train_batches": [0, 0.0, -1],
    "limit_val_batches": [-1],
    "log_every_n_steps": [0, -5],
    "max_epochs": [0, -2],
    "max_steps": [0, -2],
    "max_time": ["10 minutes", "1:00"],
    "min_epochs": [-1],
    "min_steps": [-1],
    "model_registry": ["mine"],
    "num_nodes": [0],
    "num_sanity_val_steps": [-2],
    "overfit_batches": [1, 0.1],
    "reload_dataloaders_every_n_epochs": [1],
    "use_distributed_sampler": [True],
    "val_check_interval": [0, -1, 0.0, "00:00:15:00", {"minutes": 15}],
}


@pytest.mark.parametrize(
    ("flag", "value"), [(flag, value) for flag, values in WRONG_VALUES.items() for value in values]
)
def test_wrong_value_of_a_flag_is_reported_in_one_line(flag: str, value: Any) -> None:
    line = problem(**{flag: value})
    assert line.startswith(f"trainer.{flag} must be {FLAGS[flag].values}, got ") and "\n" not in line


def test_every_flag_with_wrong_values_is_tried() -> None:
    nonsense = type("Nonsense", (), {"__ge__": lambda self, other: False, "__gt__": lambda self, other: False})()
    assert {name for name, flag in FLAGS.items() if name != "max_time" and not flag.accepts(nonsense)} <= {
        *WRONG_VALUES
    }


CONFLICTS = [
    (["--trainer.deterministic=true", "--trainer.benchmark=true"], "trainer.benchmark must be false"),
    (["--trainer.max_epochs=null"], "trainer.max_epochs or trainer.max_steps is required"),
    (["--trainer.max_epochs=-1", "--trainer.max_time=00:01:00:00"], "trainer.max_epochs or trainer.max_steps"),
    (["--trainer.strategy={class_path: DDPStrategy, init_args: {start_method: spawn}}"], "start_method must be popen"),
    (["--trainer.strategy={class_path: ModelParallelStrategy}"], "save_distributed_checkpoint must be false"),
    (
        [
            "--trainer.strategy={class_path: ModelParallelStrategy, init_args: {save_distributed_checkpoint: false}}",
            "--trainer.sync_batchnorm=true",
        ],
        "trainer.sync_batchnorm must be false",
    ),
    (
        ["--trainer.strategy={class_path: DDPStrategy, init_args: {checkpoint_io: {class_path: AsyncCheckpointIO}}}"],
        "checkpoint_io must be null",
    ),
    (["--trainer.strategy=DDPStrategy"], "trainer.strategy: DDPStrategy is a class"),
    (["--trainer.strategy=dpp"], "trainer.strategy: dpp is none of ddp"),
    (["--trainer.profiler=simpel"], "trainer.profiler: simpel is none of simple"),
    (["--trainer.accelerator=CPUAccelerator"], "trainer.accelerator: CPUAccelerator is none of auto"),
    (["--trainer.limit_val_batches=0", "--run.test_weights=best"], "set trainer.limit_val_batches above 0"),
    (["--trainer.check_val_every_n_epoch=31", "--run.test_weights=best"], "set trainer.check_val_every_n_epoch to at"),
    (
        [
            "--trainer.limit_val_batches=0",
            "--trainer.callbacks={class_path: EarlyStopping, init_args: {monitor: val/acc}}",
        ],
        "EarlyStopping.monitor: val/acc requires validation",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "start"), CONFLICTS)
def test_conflict_is_reported_in_one_line(options: list[str], start: str) -> None:
    line = message(*options)
    assert start in line and "\n" not in line


REFUSED_CALLBACKS = [name for name in dir(callbacks) if name in CLASSES["callbacks"] and name[0].isupper()]


@pytest.mark.parametrize("name", [n for n in REFUSED_CALLBACKS if not CLASSES["callbacks"][n].works])
def test_subclass_of_a_refused_class_is_refused(name: str) -> None:
    cls = getattr(callbacks, name)
    reason = CLASSES["callbacks"][name].note
    assert refusal(type("Mine", (cls,), {}), CLASSES["callbacks"]) == reason
    assert refusal(type("Mine", (callbacks.LearningRateMonitor, cls), {}), CLASSES["callbacks"]) == reason


def test_own_classes_work() -> None:
    for key, base in (("callbacks", callbacks.Callback), ("logger", loggers.Logger), ("profiler", profilers.Profiler)):
        assert refusal(type("Mine", (base,), {}), CLASSES[key]) is None
    assert refusal(type("Mine", (strategies.DDPStrategy,), {}), CLASSES["strategy"]) is None
    assert refusal(type("Mine", (plugins.CheckpointIO,), {}), CLASSES["plugins"])


SEEDS = [
    *(("seed_everything", value) for value in ("-1", "4294967296", "true", "false")),
    *(("data.split_seed", value) for value in ("-1", "4294967296")),
]


@pytest.mark.parametrize(("key", "seed"), SEEDS)
def test_seed_out_of_range_is_reported_in_one_line(key: str, seed: str) -> None:
    wrong = f"{key} must be a whole number from 0 to 4294967295, got {seed}"
    assert message(f"--{key}={seed}") == f"{wrong} (set in: the command line)"


ON_THE_COMMAND_LINE = [
    [option("callbacks", "GradientAccumulationScheduler")],
    ["--trainer.fast_dev_run=true"],
    ["--seed_everything=-1"],
    ["--trainer.limit_train_batches=1.5"],  # the rest is refused by Lightning's Trainer
    ["--trainer.devices=[0]"],
    ["--trainer.precision=16-mixed", "--trainer.plugins=[]", "--trainer.max_time={fortnights: 1}"],
    ["--trainer.devices=2", "--trainer.sync_batchnorm=true"],
    ["--trainer.accelerator=gpu"],
]


@pytest.mark.parametrize("options", ON_THE_COMMAND_LINE)
def test_refused_run_exits_with_2_and_leaves_no_directory(tmp_path: Path, options: list[str]) -> None:
    import torch

    if "--trainer.accelerator=gpu" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ended = fit(tmp_path / "run", *options)
    assert ended.status == 2 and "Traceback" not in ended.output
    assert re.search("^reslab: (trainer|seed_everything)", ended.output, re.MULTILINE), ended.output  # after the header
    assert not (tmp_path / "run").exists()


# Works

EARLY_STOPPING = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/acc", "mode": "max", "patience": 50}}
WATCHERS = ("DeviceStatsMonitor", "LambdaCallback", "LearningRateMonitor", "ModelSummary", "RichModelSummary")
SIDE_BY_SIDE = [
    f"--trainer.callbacks={json.dumps([EARLY_STOPPING, *({'class_path': name} for name in WATCHERS)])}",
    '--trainer.logger={class_path: CSVLogger, init_args: {save_dir: FOLDER}}',
    "--trainer.profiler=simple",
    "--trainer.num_sanity_val_steps=2",
    "--trainer.inference_mode=false",
    "--trainer.detect_anomaly=true",
    "--trainer.val_check_interval=3",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.deterministic=warn",
    "--trainer.min_steps=3",
    "--trainer.enable_model_summary=true",
    "--trainer.max_time=00:01:00:00",
]  # fmt: skip
SAME_BITS = {  # as a run without the option
    "accelerator auto": ["--trainer.accelerator=auto"],
    "AdvancedProfiler": [option("profiler", "AdvancedProfiler")],
    "CSVLogger": ["--trainer.logger={class_path: CSVLogger, init_args: {save_dir: FOLDER}}"],
    "Callback": [option("callbacks", "Callback")],
    "DDPStrategy": [option("strategy", "DDPStrategy")],
    "DeviceStatsMonitor": [option("callbacks", "DeviceStatsMonitor"), "--trainer.log_every_n_steps=1"],
    "EarlyStopping": [f"--trainer.callbacks={json.dumps(EARLY_STOPPING)}"],
    "LambdaCallback": [option("callbacks", "LambdaCallback")],
    "LearningRateMonitor": [option("callbacks", "LearningRateMonitor")],
    "MLFlowLogger": ["--trainer.logger={class_path: MLFlowLogger, init_args: {tracking_uri: 'file://FOLDER'}}"],
    "MLflow": ["--trainer.logger=reslab.runs.tracking.MLflow"],
    "ModelSummary": [option("callbacks", "ModelSummary")],
    "PassThroughProfiler": [option("profiler", "PassThroughProfiler")],
    "PyTorchProfiler": [option("profiler", "PyTorchProfiler")],
    "RichModelSummary": [option("callbacks", "RichModelSummary")],
    "SimpleProfiler": [option("profiler", "SimpleProfiler")],
    "TensorBoard": ["--trainer.logger=reslab.runs.tracking.TensorBoard"],
    "TensorBoardLogger": ["--trainer.logger={class_path: TensorBoardLogger, init_args: {save_dir: FOLDER}}"],
    "WandB": ["--trainer.logger={class_path: reslab.runs.tracking.WandB, init_args: {mode: disabled}}"],
    "accumulate_grad_batches": ["--trainer.accumulate_grad_batches=1"],
    "advanced": ["--trainer.profiler=advanced"],
    "auto": ["--trainer.strategy=auto"],
    "benchmark": ["--trainer.benchmark=true"],
    "check_val_every_n_epoch": ["--trainer.check_val_every_n_epoch=2"],
    "check_val_every_n_epoch null": ["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=3"],
    "ddp": ["--trainer.strategy=ddp"],
    "ddp_find_unused_parameters_false": ["--trainer.strategy=ddp_find_unused_parameters_false"],
    "ddp_find_unused_parameters_true": ["--trainer.strategy=ddp_find_unused_parameters_true"],
    "detect_anomaly": ["--trainer.detect_anomaly=true"],
    "deterministic": ["--trainer.deterministic=true"],
    "deterministic warn": ["--trainer.deterministic=warn"],
    "devices": ["--trainer.devices=auto"],
    "enable_autolog_hparams": ["--trainer.enable_autolog_hparams=false"],
    "enable_model_summary": ["--trainer.enable_model_summary=null"],
    "gradient_clip_val 0": ["--trainer.gradient_clip_val=0"],
    "inference_mode": ["--trainer.inference_mode=false"],
    "limit_val_batches": ["--trainer.limit_val_batches=0"],
    "limit_val_batches 1": ["--trainer.limit_val_batches=1"],
    "log_every_n_steps": ["--trainer.log_every_n_steps=null"],
    "logger": ["--trainer.logger=true"],
    "max_time": ["--trainer.max_time={minutes: 50}"],
    "min_epochs": ["--trainer.min_epochs=50"],
    "min_steps": ["--trainer.min_steps=500"],
    "num_sanity_val_steps": ["--trainer.num_sanity_val_steps=-1"],
    "pytorch": ["--trainer.profiler=pytorch"],
    "simple": ["--trainer.profiler=simple"],
    "sync_batchnorm": ["--trainer.sync_batchnorm=true"],
    "val_check_interval": ["--trainer.val_check_interval=0.5"],
    "32": ["--trainer.precision=32"],
    "32-true": ["--trainer.precision=32-true"],
}
OTHER_BITS = {
    "EarlyStopping that stops": [
        "--trainer.max_epochs=4",
        "--trainer.callbacks={class_path: EarlyStopping, init_args: {monitor: val/acc, mode: min, patience: 1}}",
    ],
    "accumulate_grad_batches 2": ["--trainer.accumulate_grad_batches=2"],
    "gradient_clip_val": ["--trainer.gradient_clip_val=0.1"],
    "gradient_clip_algorithm": ["--trainer.gradient_clip_val=0.01", "--trainer.gradient_clip_algorithm=value"],
    "limit_train_batches": ["--trainer.limit_train_batches=0.3"],
    "limit_test_batches": ["--trainer.limit_test_batches=0.5", "--seed_everything=1"],
    "max_epochs": ["--trainer.max_epochs=3"],
    "max_steps": ["--trainer.max_epochs=-1", "--trainer.max_steps=6"],
    "16": ["--trainer.precision=16"],
    "16-mixed": ["--trainer.precision=16-mixed"],
    "64": ["--trainer.precision=64"],
    "64-true": ["--trainer.precision=64-true", "--model.ema_decay=0.9"],
    "bf16": ["--trainer.precision=bf16"],
    "bf16-mixed": ["--trainer.precision=bf16-mixed"],
}
ELSEWHERE = {  # works, and is not tried here
    "CometLogger": "needs comet_ml and an account",
    "RunLogger": "an abstract class",
    "Logger": "an abstract class: test_log_rows.py has a subclass",
    "Profiler": "an abstract class",
    "ModelParallelStrategy": "needs several GPUs: benchmarks/gpu_check.py, and test_processes.py on CPUs",
    "num_nodes": "needs a launcher: test_processes.py",
    "cpu": "all tests",
    "cuda": "needs a GPU",
    "gpu": "needs a GPU",
    **dict.fromkeys(["accelerator", "callbacks", "plugins", "precision", "profiler", "strategy"], "has its own table"),
}


def test_everything_that_works_is_tried() -> None:
    working = {name for table in (*CLASSES.values(), *NAMES.values()) for name, entry in table.items() if entry.works}
    flags = {name for name in FLAGS if not FLAGS[name].remedy or name == "val_check_interval"}
    assert working | flags == {name.partition(" ")[0] for name in (*SAME_BITS, *OTHER_BITS)} - {"accelerator"} | {
        *ELSEWHERE
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The manifest of the short run without options."""
    return manifest(trained(tmp_path_factory.mktemp("plain")))


def trained(folder: Path, *options: str, fault: Fault | None = None) -> Path:
    """Train the short run in `folder`; with a fault, until it ends there and then, resumed, to the end."""
    words = [*SHORT, *(word.replace("FOLDER", str(folder / "log")) for word in options)]
    files = {"MLFLOW_ALLOW_FILE_STORE": "true"}  # Lightning's MLFlowLogger leaves it to the user
    if fault:
        assert fit(folder, *words, fault=fault, **files).status < 0
    ended = fit(folder, *words, **files)
    assert ended.status == 0, ended.output
    assert manifest(folder)["status"] == "complete"
    return folder


def test_options_that_work_change_no_bits_together(tmp_path: Path, plain: dict[str, Any]) -> None:
    folder = trained(tmp_path, *SIDE_BY_SIDE, fault=Fault(TRAINING, call=6))
    assert manifest(folder)["weights_sha256"] == plain["weights_sha256"]
    steps = [row["step"] for row in metrics(folder)]
    assert len(steps) == len({*steps})


@pytest.mark.slow
def test_double_precision_resumes_with_the_same_bits(tmp_path: Path) -> None:
    options = ["--trainer.precision=64-true", "--model.ema_decay=0.9", "--trainer.max_epochs=1"]
    whole = trained(tmp_path / "whole", *options)
    resumed = trained(tmp_path / "resumed", *options, fault=Fault(TRAINING, call=4))
    assert manifest(resumed)["weights_sha256"] == manifest(whole)["weights_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME_BITS)
def test_option_alone_changes_no_bits_of_a_resumed_run(tmp_path: Path, plain: dict[str, Any], name: str) -> None:
    resumed = trained(tmp_path, *SAME_BITS[name], fault=Fault(TRAINING, call=6))
    assert manifest(resumed)["weights_sha256"] == plain["weights_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_BITS)
def test_option_that_changes_training_resumes_exactly(tmp_path: Path, plain: dict[str, Any], name: str) -> None:
    whole = trained(tmp_path / "whole", *OTHER_BITS[name])
    resumed = trained(tmp_path / "resumed", *OTHER_BITS[name], fault=Fault(TRAINING, call=6))
    assert manifest(resumed)["weights_sha256"] == manifest(whole)["weights_sha256"] != plain["weights_sha256"]
    assert metrics(resumed) == metrics(whole)


# Failing constructors and imports

EXCEPTIONS = [
    "TypeError('an odd type')",
    "KeyError('a lost key')",
    "AttributeError('no such part')",
    "ImportError('no such library')",
    "OSError(28, 'no space')",
    "RuntimeError('two lines', 'of text')",
    "AssertionError()",
    "ValueError('first line\\nlast line')",
    "IndexError('out of range')",
    "ZeroDivisionError('division by zero')",
    "NotImplementedError()",
    "__import__('lightning').pytorch.utilities.exceptions.MisconfigurationException('a wrong setting')",
    "type('ValidationError', (Exception,), {})('1 validation error')",
]


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A file outside of the package that a config may import, as reslab.mineN: its classes outlive the test."""
    monkeypatch.setattr(reslab, "__path__", [*reslab.__path__, str(tmp_path)])
    return tmp_path / f"mine{next(NUMBERS)}.py"


NUMBERS = itertools.count()
PARENTS = {
    "callbacks": ("lightning.pytorch.Callback", "--trainer.callbacks"),
    "logger": ("lightning.pytorch.loggers.CSVLogger", "--trainer.logger"),
    "net": ("reslab.models.ResNet", "--model.net"),
    "dataset": ("reslab.data.Digits", "--data.dataset"),
    "schedule": ("reslab.training.Cosine", "--model.schedule"),
}


PLACES_AND_EXCEPTIONS = [
    *(("callbacks", exception) for exception in EXCEPTIONS),
    *((place, "KeyError('a lost key')") for place in PARENTS if place != "callbacks"),
    *((place, "ValueError('not enough values to unpack')") for place in PARENTS if place != "callbacks"),
]


@pytest.mark.parametrize(("place", "exception"), PLACES_AND_EXCEPTIONS)
def test_any_exception_of_a_constructor_is_one_located_message(user_module: Path, place: str, exception: str) -> None:
    parent, option = PARENTS[place]
    code = f"""import {parent.rpartition(".")[0]}
class Mine({parent}):
    def __init__(self):
        self.fail()
    def fail(self):
        raise {exception}"""
    user_module.write_text(code)
    text = message(f"{option}=reslab.{user_module.stem}.Mine")
    error = eval(exception)
    expected = str(error).splitlines()[-1] if str(error) else type(error).__name__
    assert text.startswith(f"{option.lstrip('-')}: Mine: ") and expected in text
    assert f"raised in: {user_module}, line 6" in text
    assert "Traceback" not in text and len(text.splitlines()) <= 3


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import nowhere_to_be_found", "nowhere_to_be_found is not installed"),
        ("undefined", "NameError: name 'undefined' is not defined"),
        ("def broken(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("raise ImportError('cannot import name x')", "cannot import name x"),
        ("x = 1", "no class 'Mine'"),
    ],
)
def test_module_that_fails_to_import_is_one_message(user_module: Path, code: str, expected: str) -> None:
    user_module.write_text(code)
    text = message(f"--trainer.callbacks=reslab.{user_module.stem}.Mine")
    assert expected in text and "Traceback" not in text and len(text.splitlines()) <= 3


# Wrong arguments of any class that a config may name


def places_of_classes() -> Iterator[tuple[str, type]]:
    """Yield every class of the admitted modules with the option that accepts it, NAME standing for its value."""
    from reslab.data import ImageSource
    from reslab.models import Network
    from reslab.training import Objective, Schedule

    bases = [
        (optim.Optimizer, "--model.optimizer=NAME", [optim]),
        (v2.Transform, "--data.augment.transforms=[NAME]", [v2]),
        (Network, "--model.net=NAME", [importlib.import_module("reslab.models")]),
        (ImageSource, "--data.dataset=NAME", [importlib.import_module("reslab.data")]),
        (Objective, "--model.objective=NAME", [importlib.import_module("reslab.training")]),
        (Schedule, "--model.schedule=NAME", [importlib.import_module("reslab.training")]),
        *((object, f"--trainer.{key}={'[NAME]' if key in LISTS else 'NAME'}", MODULES[key]) for key in CLASSES),
    ]
    for base, place, modules in bases:
        for module in modules:
            for name, cls in vars(module).items():
                if inspect.isclass(cls) and issubclass(cls, base) and not name.startswith("_"):
                    yield place.replace("NAME", f"{module.__name__}.{name}"), cls


def wrong_arguments() -> Iterator[tuple[str, str, str]]:
    """Yield options with a wrong argument name, a wrong type, and a missing argument, and what the message names."""
    for place, cls in places_of_classes():
        option, _, value = place.partition("=")
        path = value.strip("[]")
        form = value.replace(path, f'{{"class_path": "{path}", "init_args": ARGS}}')
        parameters = [p for p in inspect.signature(cls).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        names = [p.name for p in parameters if p.name != "params"]
        yield f"{option}={form.replace('ARGS', json.dumps({'wrong_name': 1}))}", cls.__name__, "wrong_name"
        for name in names[:1]:
            yield f"{option}={form.replace('ARGS', json.dumps({name: {'odd': [1]}}))}", cls.__name__, name
        if required := [p.name for p in parameters if p.default is p.empty and p.name in names]:
            yield f"{option}={form.replace('ARGS', '{}')}", cls.__name__, required[0]


def causes(error: BaseException | None) -> Iterator[str]:
    """Yield the last line of every exception that led to an error."""
    while error is not None:
        yield from [line.strip() for line in str(error).splitlines() if line.strip()][-1:]
        error = error.__cause__ or error.__context__


WRONG = [*dict.fromkeys(wrong_arguments())]


def check_wrong_argument(option: str, cls: str, argument: str) -> None:
    try:
        Experiment([*DIGITS, option]).build()
    except UserError as error:
        text = str(error)
        assert text.splitlines()[0].strip()[-1] not in ":", text
        assert len(text) <= 1000 and len(text.splitlines()) <= 6, text
        named = {cls, argument} & {*re.findall(r"\w+", text)} or any(cause in text for cause in causes(error.__cause__))
        assert named, text


@pytest.mark.parametrize(("option", "cls", "argument"), WRONG[:: len(WRONG) // 15])
def test_wrong_argument_is_explained(option: str, cls: str, argument: str) -> None:
    check_wrong_argument(option, cls, argument)


@pytest.mark.slow
@pytest.mark.parametrize(("option", "cls", "argument"), WRONG)
def test_any_wrong_argument_is_explained(option: str, cls: str, argument: str) -> None:
    check_wrong_argument(option, cls, argument)
