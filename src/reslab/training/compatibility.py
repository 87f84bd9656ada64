"""Which Lightning options and classes keep reslab's promises; all others are refused before anything is trained.

The promises: a run resumes with the same bits; `data.batch_size` is the global batch of every step; a checkpoint is one
verified file; loggers get one row per step; training does not wait for the device; the weights that are tested are
named beforehand; a run that ends as complete has been trained and tested.

Every name that a config may contain is in a table here. tests/test_lightning_options.py compares the tables with the
installed Lightning and tries every entry, and docs/lightning_options.md shows them.
"""

import pydoc
import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from jsonargparse import Namespace

from reslab.value_types import in_yaml


class Entry(NamedTuple):
    """What happens to a class or a named value: it works, with a note, or it is refused for a reason."""

    works: bool
    note: str = ""


def works(note: str = "") -> Entry:
    return Entry(True, note)


def refused(reason: str) -> Entry:
    return Entry(False, reason)


_EMA = refused("keeps a second set of weights outside of reslab's checkpoints and test: set model.ema_decay")
_CHECKPOINTS = refused(
    "writes checkpoints that are neither verified nor resumed exactly: "
    "set run.checkpoint_every_steps or run.checkpoint_every_minutes, and run.monitor for best.ckpt"
)
_PROGRESS = refused("waits for the device in every step: reslab shows its own progress")
_PRECISION = refused("conflicts with trainer.precision: set that")
_XLA = refused("requires XLA devices: reslab trains on CPUs and CUDA GPUs")
_FREEZE = refused("changes the optimizer's parameter groups during training: set model.param_groups")
_IO = refused("writes checkpoints that reslab cannot verify: leave it out")
_LAUNCHER = refused("is not needed: start the run with torchrun or srun, which Lightning detects")
_FORKS = refused("starts processes without reslab's command line: use ddp")
_FSDP = refused("writes one checkpoint per process: use ModelParallelStrategy, see configs/trainer/fsdp.yaml")
_DEEPSPEED = refused("writes checkpoints in its own format: use ModelParallelStrategy, see configs/trainer/fsdp.yaml")
_OURS = refused("is added by reslab itself: leave it out")
_ABSTRACT = refused("is a base class: use ddp or ModelParallelStrategy")

CALLBACKS = {
    "BackboneFinetuning": _FREEZE,
    "BaseFinetuning": _FREEZE,
    "BasePredictionWriter": refused("would never be called: use `reslab predict RUN --out FILE.csv`"),
    "BatchSizeFinder": refused("would change the batch size during the run: set data.batch_size"),
    "Callback": works("your own subclass; what it needs to resume belongs in its state_dict"),
    "Checkpoint": _CHECKPOINTS,
    "DeviceStatsMonitor": works("adds many columns to metrics.csv"),
    "EMAWeightAveraging": _EMA,
    "EarlyStopping": works("stops after a validation; an early stop is final, also for a run that is resumed"),
    "GradientAccumulationScheduler": refused(
        "would change data.batch_size during the run: set trainer.accumulate_grad_batches"
    ),
    "LambdaCallback": works("its functions must be in a module that a config may name"),
    "LearningRateFinder": refused("trains before the run starts: set the rate in model.optimizer, or sweep it"),
    "LearningRateMonitor": works("reslab logs the rate of the first parameter group itself, as `lr`"),
    "ModelCheckpoint": _CHECKPOINTS,
    "ModelPruning": refused("renames the weights during training, so that checkpoints do not load: prune afterwards"),
    "ModelSummary": works("see also `reslab summary`"),
    "OnExceptionCheckpoint": _CHECKPOINTS,
    "ProgressBar": _PROGRESS,
    "RichModelSummary": works("see also `reslab summary`"),
    "RichProgressBar": _PROGRESS,
    "SpikeDetection": refused(
        "waits for the device in every step and loses its state on resume: "
        "reslab ends a run whose loss is not finite as diverged"
    ),
    "StochasticWeightAveraging": refused("adds an epoch and replaces the schedule: set model.ema_decay"),
    "TQDMProgressBar": _PROGRESS,
    "ThroughputMonitor": refused("waits for the device in every step: reslab logs images_per_second"),
    "Timer": refused("ends training early without a note in the manifest: set trainer.max_time"),
    "WeightAveraging": _EMA,
    **dict.fromkeys(["Checkpoints", "LogRows", "Preemption", "ProgressReport", "SkipRedundantSync"], _OURS),
}
PLUGINS = {
    "AsyncCheckpointIO": _IO,
    "BitsandbytesPrecision": refused("replaces the network's layers: reslab's weights would not load elsewhere"),
    "CheckpointIO": _IO,
    "ClusterEnvironment": _LAUNCHER,
    "DeepSpeedPrecision": _DEEPSPEED,
    "DoublePrecision": _PRECISION,
    "FSDPPrecision": _FSDP,
    "HalfPrecision": _PRECISION,
    "KubeflowEnvironment": _LAUNCHER,
    "LSFEnvironment": _LAUNCHER,
    "LayerSync": refused("is set by a flag: set trainer.sync_batchnorm true"),
    "LightningEnvironment": _LAUNCHER,
    "MPIEnvironment": _LAUNCHER,
    "MixedPrecision": _PRECISION,
    "Precision": _PRECISION,
    "SLURMEnvironment": _LAUNCHER,
    "TorchCheckpointIO": _IO,
    "TorchElasticEnvironment": _LAUNCHER,
    "TorchSyncBatchNorm": refused("is set by a flag: set trainer.sync_batchnorm true"),
    "TransformerEnginePrecision": refused("replaces the network's layers: set trainer.precision bf16-mixed"),
    "XLACheckpointIO": _XLA,
    "XLAEnvironment": _XLA,
    "XLAPrecision": _XLA,
    "VerifiedCheckpointIO": _OURS,
}
STRATEGIES = {
    "DDPStrategy": works("see configs/trainer/ddp.yaml"),
    "DeepSpeedStrategy": _DEEPSPEED,
    "FSDPStrategy": _FSDP,
    "ModelParallelStrategy": works("FSDP2 and HSDP, see configs/trainer/fsdp.yaml and hsdp.yaml"),
    "ParallelStrategy": _ABSTRACT,
    "SingleDeviceStrategy": refused("is chosen by devices: 1: leave it out"),
    "SingleDeviceXLAStrategy": _XLA,
    "Strategy": _ABSTRACT,
    "XLAStrategy": _XLA,
}
STRATEGY_NAMES = {
    "auto": works("ddp with several devices"),
    "ddp": works(),
    "ddp_find_unused_parameters_false": works("as ddp"),
    "ddp_find_unused_parameters_true": works("for networks with branches that some steps skip"),
    **dict.fromkeys(
        [f"ddp_{start}{unused}" for start in ("spawn", "fork", "notebook")
         for unused in ("", "_find_unused_parameters_false", "_find_unused_parameters_true")], _FORKS,
    ),
    **dict.fromkeys(
        ["deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload", "deepspeed_stage_3",
         "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme"], _DEEPSPEED,
    ),
    "fsdp": _FSDP,
    "fsdp_cpu_offload": _FSDP,
    "single_device": refused("is chosen by devices: 1: leave it out"),
    **dict.fromkeys(["single_tpu", "single_xla", "xla", "xla_debug"], _XLA),
}  # fmt: skip
PROFILERS = {
    "AdvancedProfiler": works(),
    "PassThroughProfiler": works("measures nothing"),
    "Profiler": works("your own subclass"),
    "PyTorchProfiler": works(),
    "SimpleProfiler": works(),
    "XLAProfiler": _XLA,
}
PROFILER_NAMES = {
    "advanced": works("cProfile of every hook"),
    "pytorch": works("torch.profiler"),
    "simple": works("seconds per hook"),
    "xla": _XLA,
}
LOGGERS = {
    "CSVLogger": works("metrics.csv in the run directory is always written"),
    "CometLogger": works("requires comet_ml and an account"),
    "LitLogger": refused("does not extend lightning.pytorch's Logger: use another logger"),
    "Logger": works("your own subclass"),
    "MLFlowLogger": works("starts another MLflow run when it resumes: see configs/logger/mlflow.yaml"),
    "TensorBoardLogger": works("shows steps twice after it resumes: see configs/logger/tensorboard.yaml"),
    "MLflow": works("of reslab, see configs/logger/mlflow.yaml"),
    "MetricsCSV": _OURS,
    "RunLogger": works("of reslab: extend it for a logger that resumes with the run"),
    "TensorBoard": works("of reslab, see configs/logger/tensorboard.yaml"),
    "WandB": works("of reslab: online or offline, see configs/logger/wandb.yaml"),
    "WandbLogger": refused("can end the run, and loses rows when it is resumed: see configs/logger/wandb.yaml"),
}
ACCELERATORS = {
    "auto": works("a CUDA GPU if there is one, else the CPU"),
    "cpu": works(),
    "cuda": works(),
    "gpu": works("CUDA"),
    "mps": refused("has no float64, which reslab's metrics require: set cpu"),
    "tpu": _XLA,
}
PRECISIONS = {
    "16": works("as 16-mixed"),
    "16-mixed": works("loss scaling waits for the GPU in every step; on a CPU, Lightning computes in bf16-mixed"),
    "16-true": refused("has no loss scaling, so small gradients become 0: set 16-mixed or bf16-mixed"),
    "32": works("as 32-true"),
    "32-true": works(),
    "64": works("as 64-true"),
    "64-true": works(),
    "auto": works("bf16-mixed where the hardware is fast at it, else 32-true; config.yaml records which"),
    "bf16": works("as bf16-mixed"),
    "bf16-mixed": works(),
    "bf16-true": refused("rounds weights, batch-norm statistics and the EMA to 8 bits: set bf16-mixed"),
    "transformer-engine": refused("replaces the network's layers: set bf16-mixed"),
    "transformer-engine-float16": refused("replaces the network's layers: set 16-mixed"),
}


class Flag(NamedTuple):
    """A Trainer flag: a test of its value, the values that work in words, a note for the docs, and the reslab way."""

    accepts: Callable[[Any], bool]
    values: str
    note: str = ""
    remedy: str = ""


def _only(value: Any, remedy: str) -> Flag:
    return Flag(lambda got: got == value, in_yaml(value), remedy=remedy)


def _at_least(low: float, note: str = "", *others: Any) -> Flag:
    values = " or ".join([*map(in_yaml, others), f"at least {low}"])
    return Flag(lambda got: got in others or got >= low, values, note)


def _more_than_0(note: str = "") -> Flag:
    return Flag(lambda got: got is None or (not isinstance(got, bool) and got > 0), "null or more than 0", note)


def _any(values: str, note: str = "") -> Flag:
    return Flag(lambda got: True, values, note)


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and value > 0)


def _is_duration(value: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() <= {"weeks", "days", "hours", "minutes", "seconds"}
    return not isinstance(value, str) or re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value.strip()) is not None


def _are_devices(value: Any) -> bool:
    if isinstance(value, str):
        return value == "auto" or (value.lstrip("-").isdigit() and _are_devices(int(value))) or "," in value
    if isinstance(value, list):
        return len(value) == len({*value}) > 0 and all(isinstance(i, int) and i >= 0 for i in value)
    return value == -1 or value >= 1


FLAGS = {
    "accelerator": _any("see Accelerators"),
    "accumulate_grad_batches": _at_least(1, "micro-batches per step; data.batch_size stays the batch of a step"),
    "barebones": _only(False, "it turns off logging and checkpoints"),
    "benchmark": _any("null, true or false", "true conflicts with deterministic: cuDNN chooses its kernels by timing"),
    "callbacks": _any("see Callbacks"),
    "check_val_every_n_epoch": _at_least(1, "null counts val_check_interval over epochs", None),
    "default_root_dir": _only(None, "set run.dir"),
    "detect_anomaly": _any("true or false", "slow: for debugging"),
    "deterministic": _any(
        "null, true, false or warn", "bit-identical runs on GPUs require true; see docs/exactness.md"
    ),
    "devices": Flag(_are_devices, "auto, -1, at least 1, or a list of different GPU indices"),
    "enable_autolog_hparams": _any("true or false", "no effect: config.yaml holds the whole config"),
    "enable_checkpointing": _only(False, "reslab writes its own checkpoints, see run.checkpoint_every_steps"),
    "enable_model_summary": _any("null, true or false", "see also `reslab summary`"),
    "enable_progress_bar": _only(False, "reslab shows its own progress without waiting for the device"),
    "fast_dev_run": _only(False, "it trains without a log or a checkpoint: use --config debug"),
    "gradient_clip_algorithm": Flag(lambda got: got in (None, "norm", "value"), "null, norm or value"),
    "gradient_clip_val": _at_least(0, "null or 0: no clipping", None),
    "inference_mode": _any("true or false"),
    "limit_predict_batches": _only(None, "`reslab predict` classifies all images"),
    "limit_test_batches": _more_than_0("for debugging: the result is that of these batches only"),
    "limit_train_batches": _more_than_0("shortens every epoch"),
    "limit_val_batches": _at_least(0, "0: no validation, refused where one is needed", None),
    "log_every_n_steps": _at_least(1, "null: every 50 steps", None),
    "logger": _any("see Loggers", "null, true and false: metrics.csv only"),
    "max_epochs": _at_least(1, "null or -1: until max_steps", None, -1),
    "max_steps": _at_least(1, "-1: until max_epochs", -1),
    "max_time": Flag(_is_duration, "null, DD:HH:MM:SS, or a mapping of days, hours, minutes and seconds"),
    "min_epochs": _at_least(0, "EarlyStopping waits for it", None),
    "min_steps": _at_least(0, "EarlyStopping waits for it", None),
    "model_registry": _only(None, "it uploads Lightning's checkpoints, which reslab does not write"),
    "num_nodes": _at_least(1, "see configs/trainer/ddp_2nodes.yaml"),
    "num_sanity_val_steps": _at_least(-1, "validation batches before training (null: 2); they change no bits", None),
    "overfit_batches": _only(0, "it replaces the order of the data: set trainer.limit_train_batches"),
    "plugins": _any("see Plugins"),
    "precision": _any("see Precision"),
    "profiler": _any("see Profilers"),
    "reload_dataloaders_every_n_epochs": _only(0, "reslab's loaders know the epoch"),
    "strategy": _any("see Strategies"),
    "sync_batchnorm": _any("true or false", "batch-norm statistics over all GPUs, with DDP only"),
    "use_distributed_sampler": _only(False, "reslab's samplers divide every batch over the processes"),
    "val_check_interval": Flag(
        _is_interval, "null or a number above 0", remedy="by the clock, results would depend on the machine"
    ),
}
CLASSES = {"callbacks": CALLBACKS, "plugins": PLUGINS, "strategy": STRATEGIES, "profiler": PROFILERS, "logger": LOGGERS}
NAMES = {"accelerator": ACCELERATORS, "precision": PRECISIONS, "profiler": PROFILER_NAMES, "strategy": STRATEGY_NAMES}

FROM_FLAGS = ("accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin")


def problems(trainer: Namespace) -> Iterator[tuple[str, str]]:
    """Yield the key and a message for each option of a parsed `trainer` config that breaks a promise."""
    for name, flag in FLAGS.items():
        if not flag.accepts(value := trainer[name]):
            yield name, f" must be {flag.values}, got {in_yaml(value)}" + (flag.remedy and f": {flag.remedy}")
    for name, table in NAMES.items():
        value = trainer[name]
        if isinstance(value, str | int) and not isinstance(value, bool):
            yield from ((name, f": {reason}") for reason in _wrong_name(str(value), table))
    for name, classes in CLASSES.items():
        for path in _class_paths(trainer[name]):
            if reason := refusal(pydoc.locate(path), classes):
                yield name, f": {path.rpartition('.')[2]} {reason}"
    yield from _conflicts(trainer)


def refusal(cls: Any, table: Mapping[str, Entry]) -> str | None:
    """Return why a class is refused, or None if it works; a subclass shares the outcome of the classes it extends."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith(("lightning.", "reslab."))]
    bases = [base for base in ours if base.__name__ in table]
    nearest = [base for base in bases if not any(issubclass(other, base) for other in bases if other is not base)]
    entries = [table[base.__name__] for base in nearest] or [refused("is not known to work with reslab: leave it out")]
    return next((entry.note for entry in entries if not entry.works), None)


def known_refusal(name: str) -> str | None:
    """Return why the class called `name` is refused, for classes that cannot even be imported from a config."""
    entries = [table[name] for table in CLASSES.values() if name in table]
    return next((f"{name} {entry.note}" for entry in entries if not entry.works), None)


def _wrong_name(name: str, table: Mapping[str, Entry]) -> Iterator[str]:
    # A strategy that cannot be built arrives here as a string, because the flag accepts both.
    match = re.fullmatch(r"(?:.*class_path\W+)?(?:lightning[\w.]*\.)?(\w+).*", name, re.DOTALL)
    class_name = match[1] if match else name
    if name in table and not table[name].works:
        yield f"{name} {table[name].note}"
    elif name not in table and class_name in STRATEGIES:
        remedy = "name the class in a config file, or as --trainer.strategy.class_path, with its arguments"
        yield known_refusal(class_name) or f"{class_name} is a class: {remedy}"
    elif name not in table:
        working = [known for known, entry in table.items() if entry.works]
        yield f"{name} is none of {', '.join(get_close_matches(name, working, 3, 0.5) or working)}"


def _class_paths(value: Any) -> Iterator[str]:
    """Yield the classes that a value of the config names."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, Namespace) and "class_path" in item:
            yield item.class_path


def _conflicts(trainer: Namespace) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with options that work alone, but not together."""
    if trainer.benchmark and trainer.deterministic:
        yield "benchmark", " must be false with trainer.deterministic: cuDNN chooses its kernels by timing"
    if trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
        yield "max_epochs", " or trainer.max_steps is required: the schedule needs an end of training"
    if not isinstance(trainer.strategy, Namespace):
        return
    name, args = trainer.strategy.class_path.rpartition(".")[2], trainer.strategy.get("init_args", Namespace())
    key = "strategy.init_args"
    for flag in FROM_FLAGS:
        if args.get(flag) is not None:
            yield f"{key}.{flag}", f" must be null: {name} gets it from reslab and the flags of trainer"
    if args.get("start_method", "popen") != "popen":
        yield f"{key}.start_method", f" must be popen, got {args.start_method}: the others start no command line"
    if args.get("save_distributed_checkpoint"):
        yield f"{key}.save_distributed_checkpoint", " must be false: a checkpoint is one file"
    if trainer.sync_batchnorm and "ModelParallel" in name:
        yield "sync_batchnorm", f" must be false: it has no effect with {name}"


INTRODUCTION = """# Lightning's options and classes

<!-- Generated: python -m reslab.training.compatibility > docs/lightning_options.md -->

```bash
reslab fit digits --trainer.gradient_clip_val 1.0    # works
reslab fit digits --trainer.overfit_batches 10       # refused, with the option to use instead
```

This page lists every option under `trainer`, and whether it works. reslab refuses options that would break one of its
promises: exact resume, one global batch size, one verified checkpoint, one row per step in every log, no waiting for
the device, and a test with weights named beforehand. The message comes before training starts, with exit status 2. A
subclass is treated like the class it extends. `tests/test_lightning_options.py` tries every row.
"""
TITLES = {
    "Callbacks": CALLBACKS,
    "Loggers": LOGGERS,
    "Profilers": {**PROFILER_NAMES, **PROFILERS},
    "Strategies": {**STRATEGY_NAMES, **STRATEGIES},
    "Plugins": PLUGINS,
    "Accelerators": ACCELERATORS,
    "Precision": PRECISIONS,
}


def markdown() -> str:
    """Return docs/lightning_options.md."""
    rows = [f"| `{name}` | {flag.values} | {flag.note or flag.remedy} |" for name, flag in FLAGS.items()]
    parts = [INTRODUCTION, "## Flags\n", "| trainer. | Values that work | Note |", "|---|---|---|", *rows]
    for title, table in TITLES.items():
        parts += [f"\n## {title}\n", "| Name | Outcome | Note |", "|---|---|---|"]
        parts += [f"| `{name}` | {'works' if works else 'refused'} | {note} |" for name, (works, note) in table.items()]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
