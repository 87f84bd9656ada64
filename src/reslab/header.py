"""The lines that `reslab fit` prints before training: the command, then the run as built. No torch at import."""

import inspect
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reslab.host import CONFIGS
from reslab.runs.masking import mask_command
from reslab.training.launchers import RANKS

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from reslab.data import ImageData
    from reslab.training import Classifier
    from reslab.training.rehearsal import Steps

Config = Mapping[str, Any]
DEVICE_KEYS = {"accelerator": "auto", "devices": 1, "num_nodes": 1}  # of `trainer`, with their defaults
OWN_LINES = ("run.dir", "data.root")  # keys that are not among the changes


def print_header(config: Config, argv: Sequence[str]) -> None:
    """Print which run starts: its directory, configs, data and device. Only rank 0 prints.

    Args:
        config: The config as far as it is known without torch: files and options of the command line, stacked.
        argv: Arguments of `reslab fit`.
    """
    if not is_rank_zero(os.environ):
        return
    names, changes = stated(argv)
    directory = _at(config, "run.dir")
    print_rows(
        {
            "run": directory and str(directory),
            "config": "; ".join(filter(None, [" + ".join(names), ", ".join(changes)])),
            "data": _data(config),
            "device": f"{_device(config)} (requested)",
        }
    )


def print_rows(rows: Mapping[str, str | None], width: int = 0) -> int:
    """Print labelled lines, values from column `width` (default: as the labels need) on; return `width`.

    Values that are None or empty are left out.
    """
    shown = {label: value for label, value in rows.items() if value}
    width = width or max(8, *map(len, shown)) + 2
    for name, value in shown.items():
        # Flushed: an error message on stderr must come after it.
        print(f"{name:<{width}}{value}", flush=True)
    return width


def is_rank_zero(environ: Mapping[str, str]) -> bool:
    """Return whether this process is rank 0, before Lightning is imported."""
    return all(environ.get(name, "0") in ("", "0") for name in (*RANKS, "NODE_RANK", "GROUP_RANK"))


def stated(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of the configs on a command line, and its changes as `key value`, with secrets masked."""
    names, changes = [], []
    for key, value in _options(shlex.split(mask_command(argv))):
        if key == "config":
            names.append(_name(value))
        elif key not in OWN_LINES:
            changes.append(f"{key} {value}")
    return names, changes


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield keys and values; a word without -- is a config."""
    words = iter(argv)
    for word in words:
        key, equals, value = word.partition("=")
        if not key.startswith("--"):
            yield "config", word
        else:
            yield key[2:], value if equals else next(words, "")


def _name(config: str) -> str:
    """Return the name of a shipped config file; any other file, such as RUN/config.yaml, keeps its path."""
    path = Path(config)
    return path.stem if path.resolve().is_relative_to(CONFIGS) else config


def _at(config: Config, key: str) -> Any:
    """Return the value of a dotted key; None if the config does not have it."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _data(config: Config) -> str | None:
    dataset = _at(config, "data.dataset.class_path") or _at(config, "data.dataset")
    root = _at(config, "data.root") or os.environ.get("RESLAB_DATA") or "data"
    return f"{str(dataset).rpartition('.')[2]}, root {root}" if isinstance(dataset, str) else None


def _device(config: Config) -> str:
    options = {name: _at(config, f"trainer.{name}") or default for name, default in DEVICE_KEYS.items()}
    return ", ".join(f"{name} {value}" for name, value in options.items() if name != "num_nodes" or value != 1)


def print_run(
    model: "Classifier", net: Config, data: "ImageData", trainer: "Trainer", steps: "Steps", run: Path | None
) -> None:
    """Print what is known just before the first step: network, images, steps, device and a new run directory.

    `net` is the network's config.
    """
    parameters = sum(p.numel() for p in model.net.parameters())
    trained = sum(p.numel() for p in model.net.parameters() if p.requires_grad)
    share = "" if trained == parameters else f", {trained:,} of them trained"
    train, val = data.split
    place = "; on the device" if data.trains_on_device else ""
    print_rows(
        {
            "network": f"{_network(model.net, net)}, {parameters:,} parameters{share}",
            "images": f"{len(train):,} train, {len(val):,} validation, {len(data.test_data):,} test{place}",
            "steps": f"{steps.total:,} in total, {steps.per_epoch:,} per epoch, {data.batch_size:,} images each",
            "device": f"{trainer.world_size} × {_device_name(trainer)}, precision {trainer.precision}",
            "run": str(run) if run else None,
        }
    )


def _network(net: Any, config: Config) -> str:
    """Return the name of a network: of its config file or library, or of its class."""
    name = getattr(net, "name", None)
    return f"{type(net).__name__} {name}" if isinstance(name, str) else _variant(type(net), config)


def _variant(network: type, config: Config) -> str:
    """Return the name of the file in configs/net with the same arguments as `config`; else the name of the class."""
    from reslab.runs.listing import flat, shipped

    parameters = inspect.signature(network).parameters.values()
    defaults = {f"model.net.{p.name}": [*p.default] if isinstance(p.default, tuple) else p.default for p in parameters}
    _, *items = flat(config, "model.net")
    for name, (class_name, stated) in shipped("net", "model.net").items():
        values = {**defaults, **dict(stated)}
        if class_name == network.__name__ and all(key in values and values[key] == value for key, value in items):
            return name
    return network.__name__


def _device_name(trainer: "Trainer") -> str:
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return device.type.upper()
    import torch

    return torch.cuda.get_device_name(device)
