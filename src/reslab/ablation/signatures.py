"""Arguments of classes, read from their source: a plan is checked in a second, without importing torch."""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from reslab.host import NAMESPACES

CONFIG = ""  # stands for the whole config where a class path is expected
ROOTS = {  # groups of a config, and the class whose arguments they hold
    "trainer": "lightning.pytorch.trainer.trainer.Trainer",
    "model": "reslab.training.classifier.Classifier",
    "data": "reslab.data.datamodule.ImageData",
    "run": "reslab.config.RunOptions",
}
NOT_IN_CONFIGS = {"self", "seed", "params", "num_classes", "in_channels"}  # linked, or passed by code


class Unknown(str):
    """A default that is not a literal: its source text."""


class Parameter(NamedTuple):
    """A class's parameter: its default, and the dataclass that its keys belong to, if its annotation is one."""

    default: Any
    group: str | None = None


Parameters = dict[str, Parameter]


@functools.cache
def parameters(class_path: str | None) -> Parameters:
    """Return the parameters that a config may set; empty if the class is unknown or its source does not list them.

    Args:
        class_path: A dotted path, the short name of a class in the namespaces of configs, or CONFIG.
    """
    if class_path == CONFIG:
        return {"seed_everything": Parameter(None)} | {name: Parameter({}, path) for name, path in ROOTS.items()}
    if class_path is None:
        return {}
    for path in [class_path] if "." in class_path else [f"{space}.{class_path}" for space in NAMESPACES]:
        module, _, name = path.rpartition(".")
        if (source := _find(module, name)) is not None:
            return {name: p for name, p in _accepted(*source).items() if name not in NOT_IN_CONFIGS}
    return {}


@functools.cache
def _file(module: str) -> Path | None:
    """Return the file of a module without importing it or its packages."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    folders = spec.submodule_search_locations if spec else None
    paths = [Path(folder, *rest) for folder in folders or ()]
    candidates = [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py")]
    return next((file for file in candidates if file.exists()), None)


@functools.cache
def _definitions(file: Path) -> dict[str, ast.ClassDef | tuple[ast.ImportFrom, str]]:
    """Return a file's classes, and its imports with the imported name, by the name they have in the file."""
    definitions: dict[str, ast.ClassDef | tuple[ast.ImportFrom, str]] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            definitions.setdefault(node.name, node)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                definitions.setdefault(alias.asname or alias.name, (node, alias.name))
    return definitions


def _find(module: str, name: str, depth: int = 8) -> tuple[str, ast.ClassDef] | None:
    """Return the module that defines a class, and its definition; follows imports, also those of lazy packages."""
    file = _file(module) if module else None
    definition = _definitions(file).get(name) if file and depth else None
    if file is None or definition is None:
        return None
    if isinstance(definition, ast.ClassDef):
        return module, definition
    node, name = definition
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
    return _find(f"{base}.{node.module}" if node.level else str(node.module), name, depth - 1)


def _accepted(module: str, node: ast.ClassDef) -> Parameters:
    own: Parameters = {}
    inherits = True
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is not None:
        positional = [*init.args.posonlyargs, *init.args.args]
        defaults = [None] * (len(positional) - len(init.args.defaults)) + init.args.defaults + init.args.kw_defaults
        named = zip([*positional, *init.args.kwonlyargs], defaults, strict=True)
        own = {a.arg: _parameter(module, a.annotation, default) for a, default in named}
        inherits = init.args.kwarg is not None
    elif _is_dataclass(node):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        own = {n.target.id: _parameter(module, n.annotation, n.value) for n in fields}  # type: ignore[union-attr]
    bases = (_find(module, base.id) for base in node.bases if isinstance(base, ast.Name)) if inherits else ()
    base = next((source for source in bases if source is not None), None)
    return {**(_accepted(*base) if base else {}), **own}


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _parameter(module: str, annotation: ast.expr | None, default: ast.expr | None) -> Parameter:
    group, value = _group(module, annotation), _default(default)
    return Parameter({} if group and isinstance(value, dict | Unknown) else value, group)


def _group(module: str, annotation: ast.expr | None) -> str | None:
    """Return the dataclass that an annotation names, as `Augment` or `Augment | None`."""
    names = (annotation.left, annotation.right) if isinstance(annotation, ast.BinOp) else (annotation,)
    for name in names:
        source = _find(module, name.id) if isinstance(name, ast.Name) else None
        if source is not None and _is_dataclass(source[1]):
            return f"{source[0]}.{source[1].name}"
    return None


def _default(node: ast.expr | None) -> Any:
    """Return a literal's value, a class config for `Class()`, else the source text; None if there is no default."""
    if node is None:
        return None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not (node.args or node.keywords):
        return {"class_path": node.func.id}
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return Unknown(ast.unparse(node))
    return list(value) if isinstance(value, tuple) else value
