"""The typed configuration of a run: LightningCLI's, with an allowlist and messages that name the mistake."""

import hashlib
import os
import re
from argparse import ArgumentError
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from reslab.config_errors import explain, located, places
from reslab.data import ImageData
from reslab.errors import UserError
from reslab.host import CONFIGS
from reslab.training import Classifier

BASE = CONFIGS / "base.yaml"

# What a config file may name. Everything else is refused before it is imported: importing runs code.
ALLOWED = [
    "reslab",
    "torch.optim",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.strategies",
    "lightning.pytorch.profilers",
    "lightning.pytorch.plugins",
    "torchvision.transforms.v2",
    "timm.optim",
]
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=ALLOWED)


def rank() -> int:
    """The number of this process among those of its run."""
    return int(getattr(rank_zero_only, "rank", 0))  # Lightning sets it when it is imported


@dataclass
class RunOptions:
    """How a run is kept.

    Args:
        name: The experiment's name: runs go to runs/<name>/<id>.
        dir: The run's folder. An unfinished run in it is continued.
        test_weights: Which weights are tested: those at the end of training, or those with the best `monitor`.
        monitor: The validation metric that best.ckpt goes by.
        mode: Whether more or less of `monitor` is better.
        checkpoint_every_steps: Write last.ckpt every so many optimizer steps.
        checkpoint_every_minutes: Write last.ckpt whenever so many minutes have passed.
        allow_world_size_change: Allow an unfinished run to go on with another number of processes; its bits may differ.
        group: The group of the run in W&B, such as a study.
        job_type: The job type of the run in W&B, such as an arm.
        tags: The tags of the run in W&B.
    """

    name: str = "unnamed"
    dir: str | None = None
    test_weights: Literal["last", "best"] = "last"
    monitor: str = "val/acc"
    mode: Literal["max", "min"] = "max"
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float = 5.0
    allow_world_size_change: bool = False
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.checkpoint_every_minutes <= 0:
            raise ValueError(f"checkpoint_every_minutes must be more than 0, not {self.checkpoint_every_minutes}")
        if not re.fullmatch(r"[\w.=+-]+", self.name):
            raise ValueError(f"name is a folder's name, of letters, digits and _ . = + -, not {self.name!r}")


class Experiment(LightningCLI):
    """Parses a run's configuration; builds data, model and trainer only when asked (`build`)."""

    def __init__(self, args: list[str]) -> None:
        self._args = args
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
                "description": "Trains and tests one run.",
                "exit_on_error": False,
                "allow_abbrev": False,  # otherwise --trainer.max_epoch trains
                "default_config_files": [str(BASE)],
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunOptions, "run")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("data.num_classes", "model.net.init_args.num_classes", apply_on="instantiate")
        parser.link_arguments("data.channels", "model.net.init_args.in_channels", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise UserError(explain(str(error), self._keys(), args, BASE)) from error
        for group in ("trainer", "model", "data", "run"):
            if not isinstance(self.config[group], Namespace):
                raise UserError(located(f"{group}: keys and values, not {self.config[group]!r}", [group], args, BASE))

    def _keys(self) -> list[str]:
        config = getattr(self, "config", None) or self.parser.get_defaults(skip_validation=True)
        return [key for key, _ in config.items()]

    def _set_seed(self) -> None:
        """The seed is set by `build`."""

    def instantiate_classes(self) -> None:
        """Building is `build`'s, after the run's folder is claimed."""

    def dump(self) -> str:
        """The whole resolved configuration as YAML: a config file of the same run in a folder of its own."""
        config = self.config.clone()
        config.run.dir = None
        return self.parser.dump(config, skip_unset=False, skip_validation=True)

    def run_dir(self) -> Path:
        """The run's folder: as given, else runs/<name>/<id>.

        A job of Slurm's or torchrun's has its own id in it, so that all its processes mean the same folder, and find
        it again when the job is repeated.
        """
        if self.config.run.dir:
            return Path(self.config.run.dir)
        if rank() and "RESLAB_RUN_DIR" in os.environ:  # started by rank 0, which chose
            return Path(os.environ["RESLAB_RUN_DIR"])
        job = "_".join(os.environ[k] for k in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID") if k in os.environ)
        started = f"slurm{job}" if job else datetime.now().strftime("%Y%m%d-%H%M%S")
        if "TORCHELASTIC_RUN_ID" in os.environ:
            started = os.environ["TORCHELASTIC_RUN_ID"]
            if started == "none":  # torchrun's default
                raise UserError("give torchrun an --rdzv_id, or reslab a --run.dir: all processes mean one folder")
        digest = hashlib.sha256(self.dump().encode()).hexdigest()[:6]
        folder = Path("runs", self.config.run.name, f"{started}-seed{int(self.config.seed_everything)}-{digest}")
        os.environ["RESLAB_RUN_DIR"] = str(folder)
        return folder

    def build(self) -> tuple[ImageData, Classifier, dict[str, Any]]:
        """The data, the model, and the trainer's settings: callbacks, loggers and plugins as lists, to add to."""
        seed_everything(int(self.config.seed_everything), workers=True, verbose=False)
        if self.config.trainer.deterministic:  # float32 means float32: TF32 rounds its inputs to 10 bits
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        try:
            built = self.parser.instantiate(self.config)
        except (ValueError, UserError) as error:  # a check at construction, with the fix in its message
            raise UserError(located(str(error), self._keys(), self._args, BASE)) from error
        self._check_links(built.data)
        settings = dict(built.trainer)
        for name in ("callbacks", "logger", "plugins"):
            settings[name] = _as_list(settings[name])
        return built.data, built.model, settings

    def _check_links(self, data: ImageData) -> None:
        """Refuses a class or channel count typed into the config that is not the data's."""
        typed = self.config.model.net.get("init_args", Namespace())
        for name, value in (("num_classes", data.num_classes), ("in_channels", data.channels)):
            key = f"model.net.init_args.{name}"
            if typed.get(name) != value and any(places(key, self._args, BASE)):  # else it is the class's default
                wrong = f"{name} is {typed[name]} here, {value} in the data: leave it out, it follows the data"
                raise UserError(located(wrong, [key], self._args, BASE))


def _as_list(value: Any) -> list[Any]:
    if value in (None, False, True):
        return []
    return list(value) if isinstance(value, list) else [value]
