"""Arguments of classes, read from their source: a plan is checked in a second, without importing torch."""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from reslab.host import NAMESPACES
from reslab.value_types import ANYTHING, Type

CONFIG = ""  # stands for the whole config where a class path is expected
ROOTS = {  # groups of a config, and the class whose arguments they hold
    "trainer": "lightning.pytorch.trainer.trainer.Trainer",
    "model": "reslab.training.classifier.Classifier",
    "data": "reslab.data.datamodule.ImageData",
    "run": "reslab.config.RunOptions",
}
ADDED = {(ROOTS["trainer"], "precision"): Type(choices=("auto",))}  # values that reslab adds to a parameter's
STRATEGIES = ("lightning.pytorch.strategies", "lightning.pytorch.plugins", "lightning.pytorch.profilers")
NOT_IN_CONFIGS = {"self", "seed", "params", "num_classes", "in_channels"}  # linked, or passed by code


class Unknown(str):
    """A default that is not a literal: its source text."""


class Parameter(NamedTuple):
    """A parameter of a class.

    `group` is the dataclass that its keys belong to, if its annotation is one. `base` is the class of which it accepts
    an instance, if any. `required` parameters have no default. `doc` is its entry under "Args:" in a docstring.
    """

    default: Any = None
    group: str | None = None
    type: Type = ANYTHING
    base: str | None = None
    required: bool = False
    doc: str = ""

    @property
    def only_class(self) -> bool:
        """Whether a text can only be the name of a class."""
        return self.base is not None and not self.type.names and not self.type.items


SEED = Parameter(0, type=Type(names=("int",)), doc="Seed of everything random: weights, order, augmentation, dropout.")
Parameters = dict[str, Parameter]
Definition = ast.ClassDef | ast.expr | tuple[ast.ImportFrom, str]


@functools.cache
def parameters(class_path: str | None) -> Parameters:
    """Return the parameters that a config may set; empty if the class is unknown or its source does not list them.

    Args:
        class_path: A dotted path, the short name of a class in the namespaces of configs, or CONFIG.
    """
    if class_path == CONFIG:
        return {"seed_everything": SEED} | {name: Parameter({}, path) for name, path in ROOTS.items()}
    source = find_class(class_path) if class_path else None
    accepted = _accepted(*source) if source else {}
    for (owner, name), more in ADDED.items():
        if owner == class_path:
            accepted[name] = accepted[name]._replace(type=accepted[name].type | more)
    return {name: parameter for name, parameter in accepted.items() if name not in NOT_IN_CONFIGS}


def find_class(class_path: str) -> tuple[str, ast.ClassDef] | None:
    """Return the module and the definition of a class (a dotted path, or a short name of the namespaces of configs)."""
    paths = [class_path] if "." in class_path else [f"{space}.{class_path}" for space in (*NAMESPACES, *STRATEGIES)]
    return next(filter(None, (_find(*path.rpartition(".")[::2]) for path in paths)), None)


@functools.cache
def accepts_more(class_path: str) -> bool:
    """Return whether a constructor may accept arguments that its source does not list: its **kwargs go elsewhere."""
    source = find_class(class_path)
    for _, node in [source, *_bases(*source)] if source else ():
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is None:
            continue
        if init.args.kwarg is None:
            return False
        if f"super().__init__(**{init.args.kwarg.arg}" not in re.sub(r"(__init__\()[^*()]*", r"\1", ast.unparse(init)):
            return True
    return False


def lists_its_names(module: str) -> bool:
    """Return whether the source of a module shows all of its names."""
    file = _file(module)
    return file is not None and "*" not in _definitions(file)


@functools.cache
def subclasses(base: str) -> list[str]:
    """Return the dotted paths of the concrete public classes in the namespaces of configs that inherit from `base`."""
    home = find_class(base)
    paths: dict[str, None] = {}
    for space in (*NAMESPACES, "reslab.runs.tracking"):
        file = _file(space)
        names = [name for name in _definitions(file) if name[:1].isupper()] if file else []
        for source in filter(None, (_find(space, name) for name in names)):
            if home in [*_bases(*source)] and not _is_abstract(source[1]):
                paths[f"{space}.{source[1].name}"] = None
    return list(paths)


def _bases(module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield the base classes of a class whose source is known."""
    for base in node.bases:
        if isinstance(base, ast.Name) and (source := _find(module, base.id)):
            yield source
            yield from _bases(*source)


def _is_abstract(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "ABC" for base in node.bases)


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
def _definitions(file: Path) -> dict[str, Definition]:
    """Return a file's classes, its assignments, and its imports with the imported name, by their name in the file."""
    definitions: dict[str, Definition] = {}
    for node in _statements(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            definitions.setdefault(node.name, node)
        elif isinstance(node, ast.Assign):
            definitions.update(_assigned(node.targets[0], node.value) | definitions)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                definitions.setdefault(alias.asname or alias.name, (node, alias.name))
    return definitions


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements of a module, and those inside its `if`, `try` and `with`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):
            yield child
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _statements(child)


def _assigned(target: ast.expr, value: ast.expr) -> dict[str, Definition]:
    """Return the definitions of `a = x` or `a, b = x, y`."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return {ast.unparse(name): part for name, part in zip(target.elts, value.elts, strict=False)}
    return {ast.unparse(target): value}


def _find(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """Return the module that defines a class, and its definition."""
    module, node = _look_up(module, name)
    return (module, node) if isinstance(node, ast.ClassDef) else None


def _look_up(module: str, name: str, depth: int = 8) -> tuple[str, ast.ClassDef | ast.expr | None]:
    """Return the module that defines a name, and its definition; follows imports, also those of lazy packages."""
    file = _file(module) if module else None
    definition = _definitions(file).get(name) if file and depth else None
    if file is None or definition is None:
        return module, None
    if not isinstance(definition, tuple):
        return module, definition
    node, name = definition
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
    return _look_up(f"{base}.{node.module}" if node.level else str(node.module), name, depth - 1)


def _accepted(module: str, node: ast.ClassDef) -> Parameters:
    arguments: Parameters = {}
    inherits = True
    docs = _docs(module, node)
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is not None:
        positional = [*init.args.posonlyargs, *init.args.args]
        required: list[ast.expr | None] = [_REQUIRED] * (len(positional) - len(init.args.defaults))
        defaults = required + init.args.defaults + [default or _REQUIRED for default in init.args.kw_defaults]
        fields = [(a.arg, a.annotation) for a in (*positional, *init.args.kwonlyargs)]
        values = zip(fields, defaults, strict=True)
        arguments = {name: _parameter(module, type_, value, docs.get(name, "")) for (name, type_), value in values}
        inherits = init.args.kwarg is not None
    elif _is_dataclass(node):
        for n in node.body:
            if isinstance(n, ast.AnnAssign):
                name = ast.unparse(n.target)
                arguments[name] = _parameter(module, n.annotation, n.value or _REQUIRED, docs.get(name, ""))
    bases = (_find(module, base.id) for base in node.bases if isinstance(base, ast.Name)) if inherits else ()
    base = next((source for source in bases if source is not None), None)
    return {**(_not_passed(init, _accepted(*base)) if base else {}), **arguments}


def _not_passed(init: ast.FunctionDef | None, inherited: Parameters) -> Parameters:
    """Return the parameters of a base class that a constructor does not itself pass to `super().__init__`."""
    nodes = ast.walk(init) if init else ()
    calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "super().__init__"]
    if not calls or any(isinstance(arg, ast.Starred) for arg in calls[0].args):
        return inherited
    names = [name for name in inherited if name != "self"]
    passed = {*names[: len(calls[0].args)], *(keyword.arg for keyword in calls[0].keywords)}
    return {name: parameter for name, parameter in inherited.items() if name not in passed}


_REQUIRED = ast.Constant(...)  # stands for the default of a parameter that has none


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


@functools.cache
def constructor_checks(class_path: str) -> list[ast.stmt]:
    """Return the statements of a constructor that only check its arguments: `if ...: raise`, also in a `for`.

    Those that read a variable which the constructor assigns are left out.
    """
    source = find_class(class_path)
    for _, node in [source, *_bases(*source)] if source else ():
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "__post_init__"):
                return list(_checks(method))
    return []


def _checks(method: ast.FunctionDef) -> Iterator[ast.stmt]:
    changed = {ast.unparse(n) for n in ast.walk(method) if isinstance(getattr(n, "ctx", None), ast.Store)}
    if "__setattr__" in ast.unparse(method):
        return
    for statement in method.body:
        if isinstance(statement, ast.Return):
            return
        body = statement.body if isinstance(statement, ast.For) else [statement]
        assigned = {ast.unparse(n) for n in ast.walk(statement) if isinstance(getattr(n, "ctx", None), ast.Store)}
        reads = {ast.unparse(n) for n in ast.walk(statement) if isinstance(n, ast.Name | ast.Attribute)}
        is_check = all(isinstance(s, ast.If) and not s.orelse and isinstance(s.body[-1], ast.Raise) for s in body)
        if is_check and not reads & (changed - assigned) and (method.name == "__post_init__" or "self" not in reads):
            yield statement


def _docs(module: str, node: ast.ClassDef) -> dict[str, str]:
    """Return the entries under "Args:" in the docstrings of a class, its constructor and its base classes."""
    docs: dict[str, str] = {}
    for home, cls in [(module, node), *_bases(module, node)]:
        file = _file(home)
        assigned = _definitions(file).get(f"{cls.name}.__doc__") if file else None  # torch.optim's way
        init = (n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
        documented: list[ast.ClassDef | ast.FunctionDef] = [cls, *init]
        texts = [ast.get_docstring(part) or "" for part in documented]
        texts += [_text(home, assigned)] if isinstance(assigned, ast.expr) else []
        docs = {name: doc for text in texts for name, doc in _entries(text)} | docs
    return docs


def _text(module: str, node: ast.AST | None) -> str:
    """Return the text of an expression that consists of literals, + and names of such expressions."""
    if isinstance(node, ast.BinOp):
        return _text(module, node.left) + _text(module, node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(module, part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(module, node.value)
    if isinstance(node, ast.Name):
        home, definition = _look_up(module, node.id)
        return "" if isinstance(definition, ast.Name) else _text(home, definition)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _entries(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each entry under "Args:", without reST markup."""
    section = re.search(r"^( *)(?:Args|Arguments):\n((?:\1 +.*\n|\s*\n)+)", docstring + "\n", re.MULTILINE)
    lines = section[2].splitlines() if section else []
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    entries = re.split(rf"^ {{{indent}}}(?=\w)", "\n".join(lines), flags=re.MULTILINE)
    for entry in entries:
        if match := re.match(r"(\w+)(?: \([^)\n]*\))?: *(.*)", entry, re.DOTALL):
            text = re.sub(r":\w+:`~?(?:[\w.]+\.)?([\w.]+)`", r"\1", " ".join(match[2].split())).replace("``", "`")
            yield match[1], re.sub(r" (\(default: [-\w.]+\)|Default: \S+)$", "", text)


def _parameter(module: str, annotation: ast.expr | None, default: ast.expr | None, doc: str = "") -> Parameter:
    group, required = _group(module, annotation), default is _REQUIRED
    value = None if required else _default(module, default)
    value = {} if group and isinstance(value, dict | Unknown) else value
    type_, base = read_type(module, annotation), _base(module, annotation)
    return Parameter(value, group, type_, base, required, doc)


def _group(module: str, annotation: ast.expr | None) -> str | None:
    """Return the dataclass that an annotation names, as `Augment` or `Augment | None`."""
    return next((f"{m}.{node.name}" for m, node in _classes(module, annotation) if _is_dataclass(node)), None)


def _base(module: str, annotation: ast.expr | None) -> str | None:
    """Return the class of which an annotation accepts instances: `Network`, `list[Callback] | None`, a factory."""
    return next((f"{m}.{node.name}" for m, node in _classes(module, annotation) if not _is_dataclass(node)), None)


def _classes(module: str, node: ast.expr | None, depth: int = 4) -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield the classes of which an annotation accepts instances."""
    if isinstance(node, ast.BinOp):
        yield from _classes(module, node.left, depth)
        yield from _classes(module, node.right, depth)
    elif isinstance(node, ast.Subscript):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for part in parts[-1:] if ast.unparse(node.value) == "Callable" else parts:  # what the factory returns
            yield from _classes(module, part, depth)
    elif isinstance(node, ast.Name) and depth:
        home, definition = _look_up(module, node.id)
        if isinstance(definition, ast.ClassDef):
            yield home, definition
        elif definition is not None:  # an alias of a type
            yield from _classes(home, definition, depth - 1)


def read_type(module: str, node: ast.expr | None, depth: int = 4) -> Type:
    """Return the values that an annotation accepts; aliases are followed."""
    if isinstance(node, ast.BinOp):
        return read_type(module, node.left, depth) | read_type(module, node.right, depth)
    if isinstance(node, ast.Subscript):
        outer = ast.unparse(node.value).rpartition(".")[2]
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if outer == "Literal":
            return Type(choices=tuple(ast.literal_eval(part) for part in parts))
        if outer == "Optional":
            return read_type(module, parts[0], depth) | Type(choices=(None,))
        if outer == "Union":
            return functools.reduce(Type.__or__, (read_type(module, part, depth) for part in parts))
        if outer in ("list", "List"):
            return Type(items=read_type(module, parts[0], depth))
    if isinstance(node, ast.Constant) and node.value is None:
        return Type(choices=(None,))
    if isinstance(node, ast.Name) and node.id in ("int", "float", "bool", "str"):
        return Type(names=(node.id,))
    if isinstance(node, ast.Name) and depth:
        home, definition = _look_up(module, node.id)
        if definition is not None and not isinstance(definition, ast.ClassDef):
            return read_type(home, definition, depth - 1)
    return Type(others=(re.sub(r"\b\w+\.(?=\w)|'", "", ast.unparse(node)),)) if node else ANYTHING


def _default(module: str, node: ast.expr | None) -> Any:
    """Return a literal's value, a class config for `Class()`, else the source text; None if there is no default."""
    if node is None:
        return None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not (node.args or node.keywords):
        return {"class_path": node.func.id}
    if match := re.fullmatch(r"field\(default_factory=(\w+)\)", ast.unparse(node)):
        return {"list": [], "dict": {}}.get(match[1], Unknown(match[1]))
    if isinstance(node, ast.Name):  # a constant of the module
        home, definition = _look_up(module, node.id)
        is_literal = isinstance(definition, ast.expr) and not isinstance(definition, ast.Name)
        return _default(home, definition) if is_literal else Unknown(node.id)  # type: ignore[arg-type]
    if not all(isinstance(part, _LITERALS) for part in ast.walk(node)):
        return Unknown(ast.unparse(node))
    value = eval(compile(ast.Expression(node), module, "eval"), {"__builtins__": {}})
    return list(value) if isinstance(value, tuple) else value


_LITERALS = (
    ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop, ast.expr_context
)  # fmt: skip
