"""Names of config files: those that ship with reslab, and those in configs/ of the working directory. No torch."""

import contextlib
import difflib
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

from reslab.errors import UserError
from reslab.host import CONFIGS

LEAVES = {"net": "net", "dataset": "data", "objective": "objective"}  # last part of a key: folder of its config files
KINDS = {  # words for messages
    "experiment": "experiment", "ablation": "study", "sweep": "search file", "net": "network", "data": "data set",
}  # fmt: skip
NOT_STACKED = (*LEAVES.values(), "ablation", "sweep")  # folders whose files are no --config files


_directory: ContextVar[Path] = ContextVar("directory", default=Path())


@contextlib.contextmanager
def fixed_directory() -> Iterator[None]:
    """Look up names in the present working directory, while jsonargparse changes it to the folder of each file."""
    token = _directory.set(Path.cwd())
    try:
        yield
    finally:
        _directory.reset(token)


def roots() -> list[Path]:
    """Return the folders with config files: the user's own first, which takes precedence."""
    local = _directory.get() / "configs"
    return [local, CONFIGS] if local.is_dir() and local.resolve() != CONFIGS else [CONFIGS]


def files(kind: str) -> dict[str, Path]:
    """Return the config files of a folder by name: the path below the folder, without .yaml."""
    paths: dict[str, Path] = {}
    for root in reversed(roots()):
        paths |= {str(p.relative_to(root / kind).with_suffix("")): p for p in sorted((root / kind).rglob("*.yaml"))}
    return paths


def is_name(text: str) -> bool:
    """Return whether a text may be the name of a config file, rather than a path or a value."""
    looks_right = re.fullmatch(r"\w[\w.=+-]*(/[\w.=+-]+)*", text) and not text.endswith((".yaml", ".yml"))
    return bool(looks_right) and not Path(text).is_file()


def find(kind: str, name: str) -> Path:
    """Return the config file of a kind (experiment, ablation, ...) with a name; raise UserError with the nearest."""
    if (path := files(kind).get(name.removeprefix(f"{kind}/"))) is not None:
        return path
    word, names = KINDS.get(kind, kind), files(kind)
    near = _nearest(name, names) or list(names)
    others = "".join(f"; {use}" for use in _other_uses(name, kind))
    raise UserError(f"no {word} {name!r}{others}; nearest: {', '.join(near)}")


def find_file(kind: str, text: str) -> Path:
    """Return the file that a path or a name of a kind means; a path comes first."""
    path = Path(text)
    return path if path.is_file() else find(kind, text)


def find_stacked(name: str) -> Path:
    """Return the file that `--config NAME` means: NAME, or KIND/NAME if several kinds have that name."""
    kinds = sorted({folder.name for root in roots() for folder in root.iterdir() if folder.is_dir()} - {*NOT_STACKED})
    paths = {f"{kind}/{file}": path for kind in kinds for file, path in files(kind).items()}
    paths |= {path.stem: path for root in reversed(roots()) for path in root.glob("*.yaml")}
    matches = [key for key in paths if name in (key, key.partition("/")[2])]
    if len(matches) == 1:
        return paths[matches[0]]
    if matches:
        raise UserError(f"several config files are called {name}: {' or '.join(f'--config {m}' for m in matches)}")
    near = _nearest(name, [key.partition("/")[2] or key for key in paths])
    hints = [*_other_uses(name, ""), *([f"nearest: {', '.join(near)}"] if near else [])]
    raise UserError("; ".join([f"no config file {name!r}", *(hints or ["`reslab list` shows the names"])]))


def _other_uses(name: str, kind: str) -> list[str]:
    """Return how a name may be used where it was not found."""
    uses = {
        "net": f"--model.net {name}", "data": f"--data.dataset {name}", "objective": f"--model.objective {name}",
        "recipe": f"--config {name}", "trainer": f"--config {name}", "logger": f"--config {name}",
        "experiment": f"reslab fit {name}", "ablation": f"reslab ablate run {name}",
    }  # fmt: skip
    return [f"did you mean {use}?" for other, use in uses.items() if other != kind and name in files(other)][:1]


def _nearest(name: str, names: Sequence[str] | dict[str, Path]) -> list[str]:
    return difflib.get_close_matches(name, list(dict.fromkeys(names)), 3, 0.5)


def leaf(key: str, value: str) -> Path | None:
    """Return the config file that a value of a key like model.net names; None if it is a class, a path or unknown."""
    kind = LEAVES.get(key.rpartition(".")[2])
    return files(kind).get(value) if kind and is_name(value) else None
