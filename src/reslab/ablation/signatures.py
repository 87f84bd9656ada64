"""What a class takes, read from its source: a plan is checked in a second, without importing torch."""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

from reslab.config_errors import NAMESPACES

ROOTS = {  # the groups of a config, and what each is built from
    "trainer": "lightning.pytorch.trainer.trainer.Trainer",
    "model": "reslab.training.classifier.Classifier",
    "data": "reslab.data.datamodule.ImageData",
    "data.augment": "reslab.data.augment.Augment",
    "run": "reslab.config.RunOptions",
}
FROM_OUTSIDE = {"self", "seed", "params", "num_classes", "in_channels"}  # set by links, or not by a config at all


class Unknown(str):
    """A default that is no literal: its source text."""


@functools.cache
def parameters(class_path: str) -> dict[str, Any] | None:
    """Names and defaults of what a config may give the class; None where its source does not tell.

    Args:
        class_path: A dotted path, or the short name of a class of the namespaces that configs use.
    """
    paths = [class_path] if "." in class_path else [f"{space}.{class_path}" for space in NAMESPACES]
    for path in paths:
        module, _, name = path.rpartition(".")
        if (found := _find(module, name)) is not None:
            taken = _taken(*found)
            return None if taken is None else {k: v for k, v in taken.items() if k not in FROM_OUTSIDE}
    return None


def _source(module: str) -> Path | None:
    """The file of a module, found without importing it or the packages that it is in."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations)), *rest)
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.exists()), None)


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _find(module: str, name: str, depth: int = 8) -> tuple[str, ast.ClassDef] | None:
    """The module that defines a class, and its definition; imports are followed, lazy packages searched."""
    file = _source(module)
    if file is None or depth == 0:
        return None
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                    origin = f"{base}.{node.module}" if node.level else str(node.module)
                    return _find(origin, alias.name, depth - 1)
    return None


def _taken(module: str, node: ast.ClassDef) -> dict[str, Any] | None:
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is not None:
        own = _arguments(init.args)
        return {**(_inherited(module, node) or {}), **own} if init.args.kwarg else own
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        return {**(_inherited(module, node) or {}), **{n.target.id: _default(n.value) for n in fields}}  # type: ignore[union-attr]
    return _inherited(module, node)


def _inherited(module: str, node: ast.ClassDef) -> dict[str, Any] | None:
    for base in node.bases:
        if isinstance(base, ast.Name) and (found := _find(module, base.id)) is not None:
            return _taken(*found)
    return None if node.bases else {}


def _arguments(args: ast.arguments) -> dict[str, Any]:
    positional = [a.arg for a in (*args.posonlyargs, *args.args)]
    without = len(positional) - len(args.defaults)
    taken = {name: _default(args.defaults[i - without] if i >= without else None) for i, name in enumerate(positional)}
    return taken | {a.arg: _default(value) for a, value in zip(args.kwonlyargs, args.kw_defaults, strict=True)}


def _default(node: ast.expr | None) -> Any:
    """The literal's value; its source text where it is none; None where there is no default."""
    if node is None:
        return None
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return Unknown(ast.unparse(node))
    return list(value) if isinstance(value, tuple) else value
