"""`reslab list`: the names of config files, shipped and in configs/ of the working directory. Imports no torch."""

import re
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

from reslab import names
from reslab.errors import UserError


class Kind(NamedTuple):
    """A kind of config files: their folder in configs/, and how their names are used."""

    folder: str
    use: str


KINDS = {
    "experiments": Kind("experiment", "reslab fit NAME"),
    "models": Kind("net", "--model.net NAME"),
    "data": Kind("data", "--data.dataset NAME"),
    "objectives": Kind("objective", "--model.objective NAME"),
    "recipes": Kind("recipe", "--config NAME"),
    "trainers": Kind("trainer", "--config NAME"),
    "loggers": Kind("logger", "--config NAME"),
    "ablations": Kind("ablation", "reslab ablate run NAME"),
    "searches": Kind("sweep", "reslab search NAME"),
}


def show_names(what: str | None, pattern: str | None) -> None:
    """Print the names of one kind with the first lines of the files, or the names of all kinds."""
    if pattern:
        lines = _models(what, pattern)
    elif what:
        files = _files(what)
        lines = [f"{name:<{max(map(len, files))}}  {_title(path)}" for name, path in files.items()]
    else:
        lines = [line for kind in KINDS for line in _paragraph(kind)]
        lines += ["`reslab list KIND` describes them; `reslab list models timm` lists all models of timm"]
    print(*lines, sep="\n")


def _models(what: str | None, pattern: str) -> list[str]:
    from reslab.models.zoo import list_models

    if what != "models":
        raise UserError(f"reslab list {what} accepts no pattern: only `reslab list models PATTERN` does")
    if not (models := list_models(pattern)):
        raise UserError(f"no model matches {pattern!r}")
    return models


def _files(kind: str) -> dict[str, Path]:
    """Return the config files of a kind, by name in natural order: resnet20 before resnet110."""
    files = names.files(KINDS[kind].folder)
    return {name: files[name] for name in sorted(files, key=_natural)}


def _natural(name: str) -> list[str]:
    return [part.zfill(9) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _title(config: Path) -> str:
    """Return the first line of a config file's header."""
    first = config.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _paragraph(kind: str) -> list[str]:
    width = min(shutil.get_terminal_size().columns, 120)
    rows = textwrap.wrap(", ".join(_files(kind)), width - 2, break_long_words=False, break_on_hyphens=False)
    return [f"{kind} ({KINDS[kind].use}):", *(f"  {row}" for row in rows)]
