"""The typed configuration of a run: LightningCLI with an allowlist and one-message errors."""

import difflib
import enum
import hashlib
import os
import re
from argparse import ArgumentError
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from reslab.arguments import expand
from reslab.check import BASE, wrong_seed
from reslab.config_errors import ALLOWED, explain, explain_failure, located, one_line, places
from reslab.data import ImageData
from reslab.errors import UserError, last_line
from reslab.host import cpu_bf16_is_fast, keep_freed_memory
from reslab.models import ResNet, SpeedNet, TimmNetwork, TorchvisionNetwork  # noqa: F401 - short names: of imported classes only
from reslab.names import fixed_directory
from reslab.resolve import with_paths
from reslab.runs.folder import RunFolder
from reslab.training import Classifier, compatibility
from reslab.training.lightning_internals import rank

FROM_DATA = {"num_classes": "num_classes", "in_channels": "channels", "image_size": "image_size"}  # of networks
COMPUTED_IN_BF16 = ("16", "16-mixed", "bf16", "bf16-mixed")  # on a CPU
AUTOMATIC = {True: "bf16-mixed", False: "32-true"}  # precisions, by whether the device is fast at bf16
# A class may have an enum as the default of an argument that is a string.
yaml.SafeDumper.add_multi_representer(enum.Enum, lambda dumper, member: dumper.represent_data(member.value))
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=ALLOWED)
_load_yaml = get_loader("yaml")
set_loader("yaml", lambda text: with_paths(_load_yaml(text)), (yaml.YAMLError,))  # net: resnet18, also in files


@dataclass(frozen=True)
class Seeds:
    """Seeds of the sources of randomness, where they differ from seed_everything (null: they do not).

    Args:
        init: Initial weights.
        order: Order of the training images.
        augment: Augmentation of each image, and the mixing of images.
        network: Randomness inside the network during training: dropout, stochastic depth.
    """

    init: int | None = None
    order: int | None = None
    augment: int | None = None
    network: int | None = None


@dataclass
class RunOptions:
    """Name and directory of a run, its checkpoints, and which weights are tested.

    Args:
        name: Name of the experiment; runs go to runs/<name>/<id>.
        dir: The run directory. An unfinished run in it is resumed.
        test_weights: Weights to test: those at the end of training (last), or those with the best `monitor` (best).
        skip_test: Do not evaluate the test set: for searches, and other runs that are chosen by validation.
        monitor: Validation metric that decides about best.ckpt.
        mode: Whether a higher (max) or a lower (min) `monitor` is better.
        checkpoint_every_steps: Write last.ckpt every this many optimizer steps.
        checkpoint_every_minutes: Write last.ckpt every this many minutes.
        allow_world_size_change: Allow an unfinished run to resume with another number of processes; bits may differ.
        allow_data_change: Allow an unfinished run to resume on other data; the manifest records what has changed.
        seeds: Seeds of single sources of randomness: vary one and fix the others to see how much noise it makes.
        group: W&B group of the run, such as a study.
        job_type: W&B job type of the run, such as an arm.
        tags: W&B tags of the run.
    """

    name: str = "unnamed"
    dir: str | None = None
    test_weights: Literal["last", "best"] = "last"
    skip_test: bool = False
    monitor: str = "val/acc"
    mode: Literal["max", "min"] = "max"
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float = 5.0
    allow_world_size_change: bool = False
    allow_data_change: bool = False
    seeds: Seeds = field(default_factory=Seeds)
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.checkpoint_every_minutes <= 0:
            raise ValueError(f"checkpoint_every_minutes must be more than 0, got {self.checkpoint_every_minutes}")
        if not re.fullmatch(r"[\w.=+-]+", self.name):
            raise ValueError(f"name must consist of letters, digits and _ . = + -, got {self.name!r}")


class Experiment(LightningCLI):
    """Parse the configuration of a run; `build` creates data, model and trainer settings."""

    def __init__(self, args: list[str]) -> None:
        self._args = args = expand(args)
        super().__init__(
            Classifier,
            ImageData,
            save_config_callback=None,
            seed_everything_default=0,
            run=False,
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": "reslab fit",
                "description": "Train and test one run.",
                "exit_on_error": False,
                "allow_abbrev": False,  # otherwise --trainer.max_epoch trains
                "default_config_files": [str(BASE)],
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunOptions, "run")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        precision = next(action for action in parser._actions if action.dest == "trainer.precision")
        precision._typehint |= Literal["auto"]  # type: ignore[attr-defined]
        for argument, source in FROM_DATA.items():  # ignored by networks without such an argument
            parser.link_arguments(f"data.{source}", f"model.net.init_args.{argument}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            with fixed_directory():
                self.config = parser.parse_args(args)
        except ArgumentError as error:
            keys = [key for key, _ in parser.get_defaults(skip_validation=True).items()]
            raise UserError(explain(str(error), keys, args, BASE)) from error
        except Exception as error:  # from importing the module of a class
            raise UserError(explain_failure(None, error, Namespace(), args, BASE)) from error
        for group in ("trainer", "model", "data", "run"):
            if not isinstance(value := self.config[group], Namespace):
                raise UserError(located(f"{group} must hold keys and values, got {value!r}", [group], args, BASE))
        self.automatic_precision = self.config.trainer.precision == "auto"
        if self.automatic_precision:
            self.config.trainer.precision = AUTOMATIC[self._bf16_is_fast()]

    def _accelerator(self) -> Any:
        """Return trainer.accelerator; for auto a CUDA GPU if there is one, else the CPU."""
        if self.config.trainer.accelerator != "auto":
            return self.config.trainer.accelerator
        # Lightning's choice includes devices on which reslab does not train.
        return "cuda" if CUDAAccelerator.is_available() else "cpu"

    def _bf16_is_fast(self) -> bool:
        """Return whether training on the chosen device is faster in bf16 than in fp32."""
        if self._accelerator() == "cpu":
            return cpu_bf16_is_fast()
        gpus = range(torch.cuda.device_count())
        return len(gpus) > 0 and all(torch.cuda.get_device_capability(gpu) >= (8, 0) for gpu in gpus)  # Ampere

    def keep_precision(self, folder: RunFolder) -> None:
        """Replace an automatic precision by that of a run begun earlier, which may have been on another machine."""
        begun = folder.holds_checkpoint() or folder.weights.exists()
        if self.automatic_precision and begun and folder.config.exists():
            recorded = yaml.safe_load(folder.config.read_text(encoding="utf-8"))["trainer"]["precision"]
            if recorded in AUTOMATIC.values():
                self.config.trainer.precision = recorded

    def notes(self) -> list[str]:
        """Describe options that slow training down on this machine, one line each."""
        in_bf16 = str(self.config.trainer.precision) in COMPUTED_IN_BF16
        if self.automatic_precision or not in_bf16 or self._accelerator() != "cpu" or self._bf16_is_fast():
            return []
        return ["bf16 is slower than fp32 on this CPU: set --precision auto, or 32-true"]

    def _set_seed(self) -> None:
        """Do nothing: `build` sets the seed."""

    def instantiate_classes(self) -> None:
        """Do nothing: `build` creates the objects."""

    def dump(self) -> str:
        """Return the resolved configuration as YAML, without the run directory: a config file for the same run."""
        return self._dump(self.config.clone())

    def _dump(self, config: Namespace) -> str:
        config.run.dir = None
        return self.parser.dump(config, skip_unset=False, skip_validation=True)

    def run_dir(self) -> Path:
        """Return the run directory: as given, else runs/<name>/<id>.

        Under Slurm or torchrun the id contains the job's id, so that all ranks use the same run directory, and a
        requeued job finds it again.
        """
        if self.config.run.dir:
            return Path(self.config.run.dir)
        if rank() and "RESLAB_RUN_DIR" in os.environ:  # chosen by rank 0, which started this process
            return Path(os.environ["RESLAB_RUN_DIR"])
        job = "_".join(os.environ[k] for k in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID") if k in os.environ)
        started = f"slurm{job}" if job else datetime.now().strftime("%Y%m%d-%H%M%S")
        started = os.environ.get("TORCHELASTIC_RUN_ID", started)
        if started == "none":  # torchrun's default
            raise UserError("all ranks need the same run directory: give torchrun an --rdzv_id, or reslab a --run.dir")
        config = self.config.clone()
        if self.automatic_precision:  # a requeued job may be on another kind of machine
            config.trainer.precision = "auto"
        digest = hashlib.sha256(self._dump(config).encode()).hexdigest()[:6]
        folder = Path("runs", self.config.run.name, f"{started}-seed{int(self.config.seed_everything)}-{digest}")
        os.environ["RESLAB_RUN_DIR"] = str(folder)
        return folder

    def build(self) -> tuple[ImageData, Classifier, dict[str, Any]]:
        """Create data, model and trainer settings, with callbacks, loggers and plugins as lists.

        Raises:
            UserError: A constructor refuses its arguments, or the config names a metric that the run does not log.
        """
        self._check_seeds()
        self._check_trainer_options()
        seeds = {name: self.config.seed_everything if seed is None else seed for name, seed in self._seeds().items()}
        seed_everything(seeds["init"], workers=True, verbose=False)
        if self.config.trainer.deterministic:  # TF32 would round float32 inputs to 10 bits
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        built = self._instantiate()
        self._check_links(built.data)
        built.data.seed, built.data.augment_seed, built.model.seed = seeds["order"], seeds["augment"], seeds["network"]
        settings = dict(built.trainer)
        for name in ("callbacks", "logger", "plugins"):
            if not isinstance(value := settings[name], list):
                settings[name] = [] if isinstance(value, bool | None) else [value]
        settings["accelerator"] = self._accelerator() if settings["accelerator"] == "auto" else settings["accelerator"]
        if settings["accelerator"] == "cpu":
            keep_freed_memory()
        self._check_metrics(built.data, built.model, settings["callbacks"])
        return built.data, built.model, settings

    def _instantiate(self) -> Namespace:
        """Call the constructors of all classes; report a failure of any kind in one message."""
        failed: list[tuple[type, Exception]] = []

        def construct(cls: type, *args: Any, **kwargs: Any) -> Any:
            try:
                return cls(*args, **kwargs)
            except Exception as error:  # jsonargparse would wrap some kinds of errors
                failed.append((cls, error))
                raise

        try:
            return self.parser.instantiate(self.config, instantiators=[(construct, object, True)])
        except Exception as error:
            cls, cause = failed[-1] if failed else (None, error)
            raise UserError(explain_failure(cls, cause, self.config, self._args, BASE)) from error

    def _seeds(self) -> dict[str, int | None]:
        """Return the seeds of single sources of randomness; None where it is that of the run."""
        return {seed.name: self.config.run.seeds[seed.name] for seed in fields(Seeds)}

    def _check_seeds(self) -> None:
        seeds = {key: self.config[key] for key in ("seed_everything", "data.split_seed")}
        seeds |= {f"run.seeds.{name}": seed for name, seed in self._seeds().items() if seed is not None}
        for key, seed in seeds.items():
            if wrong := wrong_seed(seed):
                raise UserError(one_line(key, wrong, self._args, BASE))

    def _check_trainer_options(self) -> None:
        """Refuse what Lightning offers but would break one of reslab's promises, see `compatibility`."""
        for name, problem in compatibility.problems(self.config.trainer):
            raise UserError(one_line(f"trainer.{name}", problem, self._args, BASE))

    def _check_links(self, data: ImageData) -> None:
        """Refuse a class count, channel count or image size in the config that is not the one of the data."""
        init_args = self.config.model.net.get("init_args", Namespace())
        for name, source in FROM_DATA.items():
            key, value = f"model.net.init_args.{name}", getattr(data, source)
            if init_args.get(name) != value and any(places(key, self._args, BASE)):  # else it is the default
                wrong = f"{name} is {init_args[name]} here, {value} in the data: leave it out, it follows the data"
                raise UserError(located(wrong, [key], self._args, BASE))

    def no_validation(self, data: ImageData) -> str | None:
        """Return the option that keeps the run from validating, with the remedy; None if it validates."""
        trainer = self.config.trainer
        if not (data.val_split or data.folds):
            return "set data.val_split above 0"
        if trainer.limit_val_batches == 0:
            return "set trainer.limit_val_batches above 0"
        every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
        if every and epochs and 0 < epochs < every:
            return f"set trainer.check_val_every_n_epoch to at most trainer.max_epochs ({epochs})"
        return None

    def build_trainer(self, settings: dict[str, Any]) -> Trainer:
        """Create the Trainer of a run; report what it refuses, such as devices that do not exist, in one message."""
        try:
            trainer = Trainer(**settings)
        except Exception as error:
            keys = [f"trainer.{name}" for name in compatibility.FLAGS]
            message = located(last_line(error), keys, self._args, BASE)
            raise UserError(message if message.startswith("trainer.") else f"trainer: {message}") from error
        if self.config.trainer.sync_batchnorm and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
            wrong = " must be false on CPUs: SyncBatchNorm requires GPUs"
            raise UserError(one_line("trainer.sync_batchnorm", wrong, self._args, BASE))
        return trainer

    def _check_metrics(self, data: ImageData, model: Classifier, callbacks: list[Any]) -> None:
        """Refuse a monitor that names a metric which neither the objective nor a callback logs."""
        added = [name for callback in callbacks for name in getattr(callback, "metric_names", [])]
        obstacle = self.no_validation(data)
        names = [name for name in (*model.metric_names, *added) if not (obstacle and name.startswith("val/"))]
        monitors = [(f"trainer.callbacks.{type(c).__name__}.monitor", getattr(c, "monitor", None)) for c in callbacks]
        if not obstacle:
            monitors.append(("run.monitor", self.config.run.monitor))
        elif self.config.run.test_weights == "best":
            raise UserError(f"run.test_weights: best requires validation: {obstacle}")
        for key, monitor in monitors:
            if monitor is not None and monitor not in names:
                near = difflib.get_close_matches(monitor, names, 3, 0.4) or names
                if obstacle and monitor in model.metric_names:
                    raise UserError(f"{key}: {monitor} requires validation: {obstacle}, or monitor {', '.join(near)}")
                hint = "(A callback that logs metrics lists their names in its attribute metric_names.)"
                raise UserError(f"{key}: no metric is called {monitor}; nearest: {', '.join(near)}. {hint}")
