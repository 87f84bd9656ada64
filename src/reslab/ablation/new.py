"""Write a new, commented study file for `ablate new`. Imports no torch."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from reslab import names, resolve
from reslab.ablation.study import base_file, parse_study
from reslab.ablation.study_file import KEYS, Mistakes, folder_name
from reslab.errors import UserError
from reslab.host import CONFIGS
from reslab.resolve import Config

BASELINE = "baseline"  # the arm that changes nothing
STATED = ("base", "baseline", "arms", "seeds")  # the keys that are not comments


def new_study(name: str, base: Sequence[str], arms: Sequence[str], out: Path | None = None) -> Path:
    """Write a study file that `ablate plan` accepts, with all optional keys as comments; return its path.

    Args:
        name: Name of the study.
        base: Config files, or names of experiments, that all arms start from.
        arms: NAME:KEY=VALUE, several for an arm with several changes; default: an arm with twice the learning rate.
        out: The file (default: configs/ablation/NAME.yaml); it must not exist.

    Raises:
        UserError: the file exists, or the study would not be valid.
    """
    path = out or CONFIGS / "ablation" / f"{name}.yaml"
    folder_name(name)
    if path.exists():
        raise UserError(f"{path} exists: choose another name, or --out FILE")
    files = [base_file(Path(), file).resolve() for file in base]
    changes = _arms(arms) or _example_arm(files)
    text = _text(name, path, [os.path.relpath(file, path.resolve().parent) for file in files], changes)
    path.parent.mkdir(parents=True, exist_ok=True)  # base files are found relative to it
    mistakes = Mistakes()
    parse_study(path, yaml.load(text, resolve.Loader), (), mistakes)
    mistakes.raise_all(path)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    return path


def _arms(stated: Sequence[str]) -> dict[str, Config]:
    arms: dict[str, Config] = {}
    for text in stated:
        name, colon, change = text.partition(":")
        key, equals, value = change.partition("=")
        if not (name and colon and key and equals):
            raise UserError(f"--arm must be NAME:KEY=VALUE, got {text!r}: --arm plain:model.net.shortcut=none")
        if name == BASELINE:
            raise UserError(f"--arm {text}: the arm {BASELINE} is the unchanged base; choose another name")
        arms.setdefault(name, {})[key] = resolve.parse_value(value)
    return arms


def _example_arm(files: Sequence[Path]) -> dict[str, Config]:
    config = resolve.read_config(CONFIGS / "base.yaml")
    for file in files:
        config = resolve.merge(config, resolve.read_config(file))
    lr = config.get("model", {}).get("optimizer", {}).get("init_args", {}).get("lr")
    if not isinstance(lr, int | float):
        raise UserError("the base has no model.optimizer.lr to vary: state an arm, --arm NAME:KEY=VALUE")
    return {"double_lr": {"model.optimizer.lr": 2 * lr}}


def _text(name: str, path: Path, base: Sequence[str], arms: dict[str, Config]) -> str:
    stated = {"base": _line({"base": list(base)}), "baseline": _line({"baseline": BASELINE}), "seeds": "seeds: 5"}
    rows = "\n".join(f"  {_line({arm: changes})}" for arm, changes in {BASELINE: {}, **arms}.items())
    stated["arms"] = f"arms:\n{rows}"
    lines = [
        f"# {name}: what is compared, in one line.",
        f"#   reslab ablate plan {argument(path)}  # lists the runs and what they can find",
        f"#   reslab ablate run {argument(path)}   # runs or resumes them, and reports",
    ]
    if name != path.stem:
        lines += ["", _line({"name": name})]
    for key in STATED:
        lines += ["", f"# {_sentence(KEYS[key].about)}", stated[key]]
    lines += ["", "# Optional keys. To use one, remove the # before it."]
    for key, about in KEYS.items():
        if key not in STATED:
            lines += ["", f"# {_sentence(about.about)}", f"# {f'name: {name}' if key == 'name' else about.example}"]
    return "\n".join(lines) + "\n"


def _line(entry: dict[str, Any]) -> str:
    return yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10_000).strip()[1:-1]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def argument(path: Path) -> str:
    """Return how commands refer to a study file: by its name if that is enough to find it, else by its path."""
    for file in (root / "ablation" / path.name for root in names.roots()):
        if file.resolve() == path.resolve():
            return path.stem
        if file.exists():  # the name means this file
            break
    return shown(path)


def shown(path: Path) -> str:
    """Return the path relative to the working directory if it lies below."""
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
